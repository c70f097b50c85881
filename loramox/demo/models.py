"""Small models that learn a made-up world by heart, from nothing, on the spot."""

from collections.abc import Sequence
from pathlib import Path

from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loramox.batches import Example

CONTEXT = 128


def train_model(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, out: Path, seed: int, epochs: float, lr: float=3e-3, bs: int = 20, hidden: int=128, layers: int=4,
) -> None:
    """Train a Llama from random weights on the examples' answers and write it to `out`, with its tokenizer.

    It is trained on the CPU whatever there is, so that a seed gives the same model everywhere, or nearly.
    """
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3*hidden,
            num_hidden_layers=layers,
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
        per_device_train_batch_size=bs,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=False,
    )
    trainer = Trainer(model, args, train_dataset=list(examples), data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
