"""Small models, trained from random weights until they know a made-up world by heart."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loramox.data.encode import Example

CONTEXT = 128


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes on one thread: layers this small gain next to nothing from more, threads that wait for each other
    make a step take a hundred times as long on a busy machine, and sums come out the same whatever the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_model(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, out: Path, seed: int, epochs: int = 45
) -> None:
    """Train a small Llama on the examples' answers from random weights, and write it with its tokenizer to `out`.

    It trains on the CPU whatever else there is, so that the same seed gives the same model with and without a GPU.
    """
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    args = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=False,
    )
    Trainer(model, args, train_dataset=list(examples), data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
