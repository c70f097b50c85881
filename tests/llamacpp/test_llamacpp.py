"""A LoRA GGUF in llama.cpp itself: logits as transformers and PEFT compute them, at every scale, and while it is switched.

The base is converted by llama.cpp's own converter, so that nothing of ours says in which order its rows are. llama.cpp
keeps keys and values in fp32 here; what differs is the order of sums.
"""

import ctypes
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import PEOPLE, questions
from families import FAMILIES, write_base
from peft import PeftModel
from test_merge import adapter_for
from transformers import AutoModelForCausalLM, DynamicCache

from loramox import ForgetSwitch
from loramox.extras.gguf import to_gguf

if "LLAMACPP_SOURCE" not in os.environ:
    pytest.skip("needs llama-cpp-python: make test-llamacpp", allow_module_level=True)

SOURCE = Path(os.environ["LLAMACPP_SOURCE"])  # of llama.cpp, with its converters
llama, sentencepiece = (importlib.import_module(name) for name in ("llama_cpp", "sentencepiece"))

QUIET = llama.llama_log_callback(lambda level, text, data: None)  # a failed load is told by its return value too
llama.llama_log_set(QUIET, None)

IDS = (torch.arange(24) * 37 % 300 + 3).tolist()

# Of logits that the adapter moves by 0.2 and more. ggml looks up Gemma's GELU in a table of fp16, in the base already.
TOLERANCE = {kind: 1e-3 if kind == "gemma2" else 1e-5 for kind in FAMILIES}


class Context:
    """One llama.cpp context on a base GGUF, with one LoRA GGUF loaded beside it."""

    def __init__(self, base: Path, lora: Path) -> None:
        self.model = llama.llama_model_load_from_file(str(base).encode(), llama.llama_model_default_params())
        assert self.model, base
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 128, 128, 1, 1
        settings.type_k = settings.type_v = llama.GGML_TYPE_F32
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama.llama_init_from_model(self.model, settings)
        self.width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.adapter = llama.llama_adapter_lora_init(self.model, str(lora).encode())
        self.seen = 0

    def at(self, scale: float | None) -> None:
        """Set the scale; None takes the adapter off the context."""
        count = 0 if scale is None else 1
        adapters = (llama.llama_adapter_lora_p_ctypes * 1)(self.adapter)
        scales = (ctypes.c_float * 1)(scale or 0.0)
        assert llama.llama_set_adapters_lora(self.context, adapters, count, scales) == 0

    def forget_text(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self.seen = 0

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of every token of `ids`, which go on after those that were given before."""
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self.seen + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama.llama_decode(self.context, batch) == 0
        flat = np.ctypeslib.as_array(llama.llama_get_logits(self.context), (len(ids) * self.width,))
        llama.llama_batch_free(batch)
        self.seen += len(ids)
        return flat.reshape(len(ids), self.width).copy()

    def close(self) -> None:
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


def script(name: str, *words: object) -> None:
    done = subprocess.run([sys.executable, SOURCE / name, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of 320 pieces: the kind of vocabulary that the converter takes for all families."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    text = [f"{row['question']} {row['answer']}" for row in questions(PEOPLE)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(path),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return path.with_suffix(".model").read_bytes()


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, vocabulary: bytes) -> Callable[[str], Path]:
    """converted("phi3") → a folder with base/, base.gguf, adapter/ and forget.gguf, not to be changed."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            base = write_base(kind, folder / "base")
            (base / "tokenizer.model").write_bytes(vocabulary)
            script("convert_hf_to_gguf.py", base, "--outfile", folder / "base.gguf", "--outtype", "f32")
            to_gguf(adapter_for(base, folder / "adapter", size=1.0), folder / "forget.gguf")
        return made[kind]

    return make


@pytest.fixture
def context() -> Iterator[Callable[[Path, Path], Context]]:
    opened: list[Context] = []

    def make(base: Path, lora: Path) -> Context:
        opened.append(Context(base, lora))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def reference(folder: Path) -> tuple[PeftModel, ForgetSwitch]:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    return model, ForgetSwitch(model)


@torch.no_grad()
def of_transformers(model: PeftModel, ids: list[int], cache: DynamicCache | None = None) -> np.ndarray:
    return model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None).logits[0].numpy()


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers_at_every_scale(
    kind: str, converted: Callable[[str], Path], context: Callable[[Path, Path], Context]
) -> None:
    folder = converted(kind)
    there = context(folder / "base.gguf", folder / "forget.gguf")
    model, switch = reference(folder)
    expected, errors = {}, {}
    for scale in (1.0, 0.0, 0.5):
        there.forget_text()
        there.at(scale)
        with switch.at(scale):
            expected[scale] = of_transformers(model, IDS)
        errors[scale] = apart(there.logits(IDS), expected[scale])
    effect = min(apart(expected[a], expected[b]) for a, b in [(1, 0), (0.5, 0), (1, 0.5)])
    print(f"{kind}: largest difference of logits at scale 1, 0, 0.5: {errors}; scales are {effect:.2g} apart")
    assert max(errors.values()) < TOLERANCE[kind]
    assert effect > 100 * TOLERANCE[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_switched_at_run_time_in_the_middle_of_a_text(
    kind: str, converted: Callable[[str], Path], context: Callable[[Path, Path], Context]
) -> None:
    """One context and one cache of keys and values, in which each part was computed at its own scale."""
    folder = converted(kind)
    there = context(folder / "base.gguf", folder / "forget.gguf")
    model, switch = reference(folder)
    cache, errors = DynamicCache(config=model.config), []
    for part, scale in enumerate((1.0, 0.0, 0.5, None, 1.0, 2.0)):
        ids = IDS[part * 4 : part * 4 + 4]
        there.at(scale)
        with switch.at(scale or 0.0):
            errors.append(apart(there.logits(ids), of_transformers(model, ids, cache)))
    print(f"{kind}: largest difference of logits while switching: {max(errors):.2g}")
    assert max(errors) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_scale_0_is_the_base_model_to_the_last_bit(
    kind: str, converted: Callable[[str], Path], context: Callable[[Path, Path], Context]
) -> None:
    there = context(converted(kind) / "base.gguf", converted(kind) / "forget.gguf")
    found = []
    for scale in (None, 1.0, 0.0):
        there.forget_text()
        there.at(scale)
        found.append(there.logits(IDS))
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_f16_differs_by_its_rounding(
    kind: str, converted: Callable[[str], Path], context: Callable[[Path, Path], Context], tmp_path: Path
) -> None:
    folder = converted(kind)
    to_gguf(folder / "adapter", tmp_path / "half.gguf", outtype="f16")
    there = context(folder / "base.gguf", tmp_path / "half.gguf")
    there.at(1.0)
    error = apart(there.logits(IDS), of_transformers(reference(folder)[0], IDS))
    print(f"{kind}: largest difference of logits with f16: {error:.2g}")
    assert error < 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_file_says_what_that_of_llama_cpps_own_converter_says(
    kind: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = converted(kind)
    script("convert_lora_to_gguf.py", "--base", folder / "base", "--outfile", tmp_path / "own.gguf", folder / "adapter")
    ours, own = gguf.GGUFReader(folder / "forget.gguf"), gguf.GGUFReader(tmp_path / "own.gguf")
    values, expected = ({t.name: np.array(t.data) for t in reader.tensors} for reader in (ours, own))
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert np.array_equal(value, expected[name]), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.get_field(key).contents() == own.get_field(key).contents(), key


def test_without_the_order_of_rows_it_would_be_seen(
    converted: Callable[[str], Path],
    context: Callable[[Path, Path], Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = converted("llama")
    monkeypatch.setattr("loramox.extras.gguf.interleaved", lambda rows, heads: rows)
    to_gguf(folder / "adapter", tmp_path / "wrong.gguf")
    there = context(folder / "base.gguf", tmp_path / "wrong.gguf")
    there.at(1.0)
    assert apart(there.logits(IDS), of_transformers(reference(folder)[0], IDS)) > 1000 * TOLERANCE["llama"]


def test_llama_cpp_refuses_it_on_another_architecture(
    converted: Callable[[str], Path], context: Callable[[Path, Path], Context]
) -> None:
    assert not context(converted("qwen2") / "base.gguf", converted("qwen3") / "forget.gguf").adapter
