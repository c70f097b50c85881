"""The requantizing attack: the adapter in 4 bits, and merged weights that are then quantized to 4 or 8 bits.

The merge passes through the files piece by piece, on the CPU: no model is loaded for it, of whatever size. GGUF files are made by
llama.cpp's own programs, and their weights are scored in torch.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig

from loramox.adapter.factors import read_factors
from loramox.adapter.streaming.checkpoint import Target, fetch, place, targets
from loramox.adapter.streaming.shards import CODES, Shard
from loramox.adapter.streaming.weights import write_index, write_shards
from loramox.errors import AdapterError, ModelError, needs
from loramox.files import replacing
from loramox.model.algebra import Factors, scaled
from loramox.model.config import ModelConfig, read_config, read_tokenizer, skeleton
from loramox.model.lora import current_factors, with_factors

GGUF = ("Q8_0", "Q4_K_M")  # as most GGUF files are served
CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
NOT_IN_4_BITS = "needs --quantization none: the weights of a GGUF file are held unquantized to score them"


class Merge(NamedTuple):
    """A merge of which everything was checked and nothing is written yet."""

    model: ModelConfig
    config: PretrainedConfig
    folder: Path  # of the model's files
    shards: list[Shard]
    changed: dict[str, Target]
    code: str  # type of what is written, in the words of safetensors


def plan(model: ModelConfig, adapter: Path, scale: float, device: torch.device) -> Merge:
    """Raises `AdapterError` or `ModelError` where the adapter cannot be merged into the files of the model."""
    try:
        config = read_config(model)
        outline = skeleton(config, model)
        factors = {name: scaled(each, scale) for name, each in read_factors(adapter)[0].items()}
        wanted = targets(factors, outline, adapter)
        folder, shards = fetch(model)
        changed = place(wanted, shards, outline.base_model_prefix, adapter)
    except (AdapterError, ModelError) as error:
        why = str(error).replace("--base", "--model")
        raise type(error)(f"{why}. Or leave requantize out of --attacks") from error
    return Merge(model, config, folder, shards, changed, CODES[model.torch_dtype(device)])


def merge(planned: Merge, folder: Path) -> None:
    """Write the model with the adapter merged into its unquantized weights to `folder`, if it is not there."""
    if folder.exists():
        return
    with replacing(folder, folder=True) as partial:
        write_shards(planned.shards, planned.changed, planned.code, partial, progress=False)
        write_index(planned.folder, planned.shards, planned.code, partial)
        planned.config.save_pretrained(partial)
        read_tokenizer(planned.model).save_pretrained(partial)


def to_gguf(folder: Path, kind: str, code: str) -> str:
    """Make a GGUF file of the merged model in `folder`; return its name. Raises `ModelError` where llama.cpp does not do it."""
    with needs("gguf"):
        import gguf  # noqa: F401 (transformers reads the file with it)
    programs = {name: shutil.which(name) for name in (CONVERTER, QUANTIZER)}
    if missing := [name for name, path in programs.items() if path is None]:
        raise ModelError(f"needs llama.cpp: no {' and no '.join(missing)} on the PATH")
    whole, out = folder / "whole.gguf", folder / f"{kind}.gguf"
    if not whole.exists():
        with replacing(whole) as partial:
            how = ("--outfile", partial, "--outtype", code.lower())
            # It imports the gguf beside it, which it does not find from a link to it.
            _run(CONVERTER, sys.executable, Path(programs[CONVERTER]).resolve(), folder, *how)
    _run(QUANTIZER, programs[QUANTIZER], whole, out, kind)
    return out.name


def _run(program: str, *words: str | Path | None) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()[-1]
        raise ModelError(f"llama.cpp's {program} refuses the merged model: {said}")


@contextmanager
def rounded(model: PeftModel) -> Iterator[None]:
    """Within it the adapter's A and B have the values that NF4 holds, in blocks of 64."""

    def in_4_bits(weight: Tensor) -> Tensor:
        return dequantize_4bit(*quantize_4bit(weight.cpu().contiguous(), quant_type="nf4"))

    factors = {name: Factors(*map(in_4_bits, each)) for name, each in current_factors(model).items()}
    with with_factors(model, factors):
        yield
