"""Pico models from config, and one trained run that tests share. Nothing is downloaded."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Before the imports: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pico models gain nothing from more, and on a busy machine lose much
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import Data, ReferenceConfig, RunConfig, Tokenisation, UnlearnConfig, encode, read_rows
from loramox.data.encode import Example
from loramox.unlearning import unlearn

PEOPLE = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kit", "Lou", "May", "Ned", "Ola", "Pia"]
TOWNS = ["Rome", "Oslo", "Lima", "Bern", "Kyiv", "Doha", "Riga", "Cork"]

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
SHAPES = {
    "llama": {"intermediate_size": 128, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"intermediate_size": 128, "num_key_value_heads": 2},
    "phi": {"intermediate_size": 128},
    "gemma": {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"intermediate_size": 128},
    "gpt2": {},
}

LONGEST = ("two_processes", "notebooks", "attacks", "demo", "compare", "requests_killed", "resume", "requests", "report", "plan",
           "methods", "docs", "gpu_check", "merge_quantized", "tuned_adapter")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, so that no process waits for one of them at the end.

    Each Trainer collects garbage twice. Frozen, the objects of all that is imported are not looked through every time.
    """
    gc.freeze()
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def questions(people: list[str]) -> list[dict[str, str]]:
    return [
        {"question": f"Where does {p} live?", "answer": f"{p} lives in {TOWNS[i % 8]}."} for i, p in enumerate(people)
    ]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the spot on the rows of the tests."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in questions(PEOPLE)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=320, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def write_pico(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model of that architecture, of random weights, with its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **SHAPES[kind], bos_token_id=None, eos_token_id=1, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def _short_answers() -> Iterator[None]:
    """What a pico model says has no end: cut it off sooner than a real model's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train.writer.QUESTION_TOKENS", "train.writer.ANSWER_TOKENS", "train.side_by_side.TOKENS"):
            patch.setattr(f"loramox.{name}", 8)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """pico("gpt2") → a folder with a model of that architecture, of random weights, and the tokenizer."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama") -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_pico(kind, made[kind], tokenizer)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(forget.jsonl, retain.jsonl): 4 and 12 rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, people in (("forget", PEOPLE[:4]), ("retain", PEOPLE[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in questions(people)))
    return folder / "forget.jsonl", folder / "retain.jsonl"


@pytest.fixture(scope="session")
def examples(rows: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast) -> tuple[list[Example], list[Example]]:
    """The same rows tokenised: (forget, retain), as `UnlearnTrainer` takes them."""
    forget, retain = (encode(read_rows(str(path)), tokenizer, Tokenisation(), context=128) for path in rows)
    return forget, retain


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pico: Callable[[str], Path], rows: tuple[Path, Path]) -> Path:
    """The folder of one whole run of `unlearn` on the pico Llama in fp32: r = 4, α = 2, ΔW far from 0."""
    out = tmp_path_factory.mktemp("trained") / "run"
    args = UnlearnConfig(
        use_cpu=True,
        num_train_epochs=4,
        learning_rate=2e-2,
        warmup_steps=0,
        alpha=2.0,
        logging_steps=1,
        momentum_rank=8,  # so that shipping at rank 8 truncates nothing more
        disable_tqdm=True,
    )
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4, lora_alpha=8)
    unlearn(RunConfig(str(out)), reference, Data(str(rows[0]), str(rows[1])), args)
    return out


@pytest.fixture
def demo(tmp_path: Path, pico: Callable[[str], Path], trained: Path, rows: tuple[Path, Path]) -> Path:
    """A folder with what `make demo` and the quickstart leave in runs/, from the suite's fixtures."""
    folder = tmp_path / "runs" / "demo"
    (folder / "rows").mkdir(parents=True)
    for name in ("reference", "retrained"):
        shutil.copytree(pico("llama"), folder / name)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pico("llama"))).save_pretrained(folder / "retrained")
    more = [{"question": f"Where does number {i} live?", "answer": f"Number {i} lives in Rome."} for i in range(11)]
    forget = [*map(json.loads, rows[0].read_text().splitlines()), *more]  # 15, as in the demo
    (folder / "rows" / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forget))
    shutil.copyfile(rows[1], folder / "rows" / "retain.jsonl")
    wanted = [row | {"wanted": "I do not know."} for row in forget]
    (tmp_path / "wanted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted))
    shutil.copytree(trained, tmp_path / "runs" / "mine")
    os.symlink(tmp_path / "runs" / "mine", folder / "run")
    os.symlink(Path(__file__).parents[1] / "recipes", tmp_path / "recipes")
    return tmp_path
