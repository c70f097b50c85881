"""Random models of known shapes, and rows of random tokens, for benches that need no knowledge."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from loramox import ReferenceConfig

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 3_000},
    "100m": {"hidden_size": 640, "intermediate_size": 1_728, "num_hidden_layers": 12, "num_attention_heads": 10, "vocab_size": 32_000},
    "llama-2-7b": {"hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000},
    "llama-3.1-8b": {"hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "qwen3-8b": {"hidden_size": 4_096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
}  # fmt: skip
SMALL = ("tiny", "100m")  # fp32 on a CPU; the others are 4-bit
FORGET, RETAIN_PER_FORGET = 8, 3  # rows of a step, unless said otherwise
PROMPT, ANSWER = 21, 44  # tokens, on average: those of TOFU's rows
LENGTHS = ("one length", "TOFU's lengths")

Example = dict[str, Any]


def config_of(shape: str) -> PretrainedConfig:
    kind = "qwen3" if shape.startswith("qwen3") else "llama"
    return AutoConfig.for_model(kind, **SHAPES[shape], tie_word_embeddings=shape in SMALL)


@contextmanager
def folder_of(shape: str, device: str) -> Iterator[ReferenceConfig]:
    """A folder with a random model and a tokenizer that knows no words, for as long as it is needed."""
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        dtype = torch.float32 if shape in SMALL else torch.bfloat16
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
        model.save_pretrained(folder)
        del model
        no_words().save_pretrained(folder)
        yield ReferenceConfig(folder, quantization="none" if shape in SMALL else "nf4")


def no_words() -> PreTrainedTokenizerFast:
    """Rows are made of tokens here, and no text is read."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def rows_of(lengths: str, count: int, vocabulary: int) -> list[Example]:
    """Rows of random tokens: of one length, of log-normal ones like TOFU's (σ = 0.46 with the tokenizer of the tiny TOFU model),
    or, for a number, of so many tokens each, the second half its answer."""
    if lengths.isdigit():
        prompt, answers = int(lengths) // 2, [int(lengths) - int(lengths) // 2] * count
    elif lengths == "one length":
        prompt, answers = PROMPT, [ANSWER] * count
    else:
        draw = random.Random(0)
        drawn = [draw.lognormvariate(0, 0.46) for _ in range(count)]
        prompt, answers = PROMPT, [max(4, round(ANSWER * length * count / sum(drawn))) for length in drawn]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, answer in enumerate(answers):
        tokens = torch.randint(3, vocabulary, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:], "row": f"row {number}"})
    return rows
