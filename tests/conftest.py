"""Pico models from config, and one trained run that tests share. Nothing is downloaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

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


def questions(people: list[str]) -> list[dict[str, str]]:
    return [
        {"question": f"Where does {p} live?", "answer": f"{p} lives in {TOWNS[i % 8]}."} for i, p in enumerate(people)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
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


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """pico("gpt2") → a folder with a model of that architecture, of random weights, and the tokenizer."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama") -> Path:
        if kind not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                kind, **SMALL, **SHAPES[kind], bos_token_id=None, eos_token_id=1, pad_token_id=0
            )
            made[kind] = tmp_path_factory.mktemp(kind)
            model = AutoModelForCausalLM.from_config(config)
            model.save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(forget.jsonl, retain.jsonl): 4 and 12 rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, people in (("forget", PEOPLE[:4]), ("retain", PEOPLE[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in questions(people)))
    return folder / "forget.jsonl", folder / "retain.jsonl"
