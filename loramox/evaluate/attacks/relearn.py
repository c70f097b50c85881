"""The relearning attack: a few steps of training, on some of the forget rows or on harmless ones."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from loramox.data.encode import Example
from loramox.data.pairs import Collator
from loramox.data.rows import Row, read_rows, rows_of
from loramox.errors import RowsError
from loramox.model.head import Head, answer_states, mean_over_rows, per_token
from loramox.model.lora import ADAPTER

ATTACKER = "relearning"
TEXT = "unrelated text"
NO_TEXT = "needs a file of text that has nothing to do with the forget rows (--relearn_text)"


def read_text(source: str) -> Sequence[Row]:
    """The unrelated text that the attacker trains on: a line a row of a .txt file, or the rows of any other file.

    Raises `RowsError` for a file that is missing, empty or not text.
    """
    if Path(source).suffix != ".txt":
        return read_rows(source)
    try:
        lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"--relearn_text {source} cannot be read: {error}. Expected lines of text in UTF-8") from error
    return rows_of([{"text": line} for line in lines if line.strip()], source)


def saved(states: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Steps saved against the control, for each attack that was made on the retrained model too.

    Returns:
        attack → `probability` that the control gives the other forget rows at its last step, `control_step`; and `step`, the
        first at which the forget model gives them as much: 0 before any training, None for never.
    """
    curves: dict[tuple[str, str], dict[int, float]] = {}
    start = math.nan
    for each in states:
        p = each["metrics"].get("forget_probability", math.nan)
        step, _, model = each["state"].removeprefix("step ").partition(", ")
        if (each["attack"], step) == ("none", "forget model"):
            start = p
        elif each["attack"].startswith("relearn "):
            curves.setdefault((each["attack"], model), {})[int(step)] = p
    found = {}
    for attack in dict.fromkeys(attack for attack, model in curves if model):
        control, ours = curves[attack, "retrained model"], {0: start} | curves.get((attack, ""), {})
        goal = control[max(control)]
        reached = min((step for step, p in ours.items() if p >= goal), default=None)
        found[attack] = {"probability": goal, "control_step": max(control), "step": reached}
    return found


def sentence(attack: str, found: dict[str, Any]) -> str:
    """What `saved` found of an attack, in words."""
    step, last = found["step"], found["control_step"]
    ours = "never gets there" if step is None else f"gets there after {step} ({last - step} saved)"
    goal = f"a probability of {found['probability']:.3g}"
    return f"{attack.capitalize()}: after {last} steps the retrained model gives the other rows {goal}; the forget model {ours}."


@contextmanager
def attacker(model: PeftModel, rank: int, seed: int) -> Iterator[PeftModel]:
    """Within it `model` has a second, fresh LoRA adapter beside the forget adapter, which is the only thing that trains.

    The weights below may be in 4 bits, and nothing is merged. Afterwards the model is as it was.
    """
    torch.manual_seed(seed)
    kind = model.peft_config[ADAPTER]
    model.add_adapter(ATTACKER, LoraConfig(r=rank, lora_alpha=rank, target_modules=kind.target_modules, task_type="CAUSAL_LM",
                                           fan_in_fan_out=kind.fan_in_fan_out))  # fmt: skip
    try:
        model.base_model.set_adapter([ADAPTER, ATTACKER])
        for name, weight in model.named_parameters():
            weight.requires_grad_(f".{ATTACKER}." in name)
        yield model
    finally:
        model.delete_adapter(ATTACKER)
        model.set_adapter(ADAPTER)
        model.requires_grad_(False)


@contextmanager
def all_weights(model: PeftModel) -> Iterator[PeftModel]:
    """Within it the weights below the forget adapter train, as if that were merged. Afterwards they are as before.

    W + scale·ΔW has the same gradient by W as by itself. The output layer gets none, as `per_token` takes it for frozen; one that
    is tied to the embedding trains as that. A copy of the weights is kept in main memory meanwhile.
    """
    weights = {name: weight for name, weight in model.named_parameters() if ".lora_" not in name}
    before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield model
    finally:
        model.requires_grad_(False)
        for name, weight in weights.items():
            weight.data.copy_(before[name])


def train(
    model: PeftModel,
    examples: Sequence[Example],
    until: Sequence[int],
    learning_rate: float,
    batch_size: int,
    pad_token_id: int,
    seed: int,
) -> Iterator[int]:
    """Train what trains in `model` on `examples` by cross-entropy of their answers, AdamW; stop at each of the steps `until`.

    A generator: it yields each step's number with the model as it is after it. Rows are dealt from seeded shuffles.
    """
    causal_lm = model.get_base_model()
    head, collate = Head(causal_lm), Collator(pad_token_id)
    device = next(causal_lm.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(1, max(until) + 1):
        if len(order) < min(batch_size, len(examples)):
            order += torch.randperm(len(examples), generator=generator).tolist()
        rows, order = order[:batch_size], order[batch_size:]
        batch = collate([examples[i] for i in rows])
        model.train()
        states = answer_states(
            model, causal_lm, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        )
        loss = mean_over_rows(per_token(_cross_entropy, head, [states.hidden], states.targets), states).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        if step in until:
            yield step


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
