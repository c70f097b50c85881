"""The relearning attack: a few steps of training, on some of the forget rows or on harmless ones."""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loramox.data.encode import Example
from loramox.data.pairs import Collator
from loramox.data.row import Row
from loramox.data.rows import read_rows, rows_of
from loramox.errors import RowsError, RunError
from loramox.evaluate.attacks.attacked import NEVER_KNOWN
from loramox.model.fitting import FittingBatch
from loramox.model.head import AnswerStates, Head, answer_states, mean_over_rows, per_token, tokens_at_once
from loramox.model.lora import ADAPTER

ATTACKER = "relearning"
CONTROLS = ("retrained model", NEVER_KNOWN)  # the better one first
TEXT = "unrelated text"
# Rows to train on besides forget rows, and their part of the rows that are read.
OTHERS = {"retain rows": "retain", TEXT: TEXT}
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
    """Steps saved against the control, for each attack that was made on a control too: the retrained model where there is one.

    Returns:
        attack → the `control`; the `probability` of the rows asked at its last step, `control_step`; and `step`, the first at
        which the forget model gives the forget rows as much: 0 before any training, None for never. An attack whose training
        broke off before that is left out.
    """
    unattacked = [each["metrics"] for each in states if (each["attack"], each["state"]) == ("none", "forget model")]
    start = unattacked[0].get("forget_probability", math.nan) if unattacked else math.nan
    by_model = curves(states)
    found = {}
    for attack in dict.fromkeys(attack for attack, model in by_model if model):
        name = next(each for each in CONTROLS if (attack, each) in by_model)
        control, ours = by_model[attack, name], {0: start} | by_model.get((attack, ""), {})
        goal = control[max(control)]
        reached = min((step for step, p in ours.items() if p >= goal), default=None)
        if reached is None and max(ours) < max(control):  # its training broke off, which is no "never"
            continue
        found[attack] = {"control": name, "probability": goal, "control_step": max(control), "step": reached}
    return found


def curves(states: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """(attack, model) → step → probability of the rows asked; the model is one of `CONTROLS`, or empty for the forget model."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for each in states:
        step = re.fullmatch(rf"step (\d+)(?:, ({'|'.join(CONTROLS)}))?", str(each["state"]))
        if step and str(each["attack"]).startswith("relearn "):
            curve = found.setdefault((str(each["attack"]), step[2] or ""), {})
            curve[int(step[1])] = each["metrics"].get("forget_probability", math.nan)
    return found


def sentence(attack: str, found: dict[str, Any]) -> str:
    """What `saved` found of an attack, in words."""
    step, last = found["step"], found["control_step"]
    reach = "never reach it" if step is None else f"reach it after {step} ({last - step} saved)"
    control = f"with {NEVER_KNOWN}" if found.get("control") == NEVER_KNOWN else "on the retrained model"
    goal = f"a probability of {found['probability']:.3g}"
    return f"{attack.capitalize()}: {control}, {last} steps reach {goal}. On the forget model, the forget rows {reach}."


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

    W + scale·ΔW has the same gradient by W as by itself. A copy of the weights is kept in main memory meanwhile.
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
            weight.grad = None  # of a step for which there was not enough memory


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

    A generator: it yields each step's number with the model as it is after it. Rows are dealt from seeded shuffles. Where memory
    runs out, the gradients of a step are those of fewer rows at a time, added up; where those of a single row do not fit,
    activations are computed again in the backward pass. Raises `RunError` where even that does not fit.
    """
    causal_lm = model.get_base_model()
    head, collate = Head(causal_lm), Collator(pad_token_id)
    device, dtype = next(causal_lm.parameters()).device, causal_lm.dtype
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0)
    # In fp16 gradients below 6e-8 would be 0, and the attacker weaker than it is. A higher scale would overflow, and skip steps.
    # torch does not unscale gradients that are themselves in fp16, as those of all weights are.
    scaled = dtype == torch.float16 and all(p.dtype == torch.float32 for p in trained)
    scaler = torch.amp.GradScaler(device.type, init_scale=2**10, enabled=scaled)
    batch_size = min(batch_size, len(examples))
    fitting = FittingBatch(batch_size, "--relearn_batch")

    def take_gradients(rows: list[int], at_once: int) -> None:
        optimizer.zero_grad()  # of a backward pass that broke off
        for start in range(0, len(rows), at_once):
            batch = collate([examples[i] for i in rows[start : start + at_once]])
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            # Without autocast PEFT keeps the input of every adapted layer in fp32. The head's logits are better without.
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                states = answer_states(model, causal_lm, batch)
            losses = mean_over_rows(_losses(causal_lm, head, states), states)
            scaler.scale(losses.sum() / len(rows)).backward()

    def take_all_gradients(rows: list[int]) -> None:
        take = functools.partial(take_gradients, rows)
        try:
            fitting.ask(take)
            return
        except RunError:
            if causal_lm.is_activation_checkpointing or not causal_lm.supports_gradient_checkpointing:
                raise
        # Only here, where a step fails without it, as it takes longer. The error is gone, and the tensors that it held.
        causal_lm.activation_checkpointing_enable()
        fitting.ask(take)

    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    try:
        for step in range(1, max(until) + 1):
            if len(order) < batch_size:
                order += torch.randperm(len(examples), generator=generator).tolist()
            rows, order = order[:batch_size], order[batch_size:]
            model.train()
            take_all_gradients(rows)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model.eval()
            if step in until:
                yield step
    finally:
        model.eval()
        if causal_lm.is_activation_checkpointing:
            causal_lm.activation_checkpointing_disable()
            causal_lm.disable_input_require_grads()


def _losses(causal_lm: nn.Module, head: Head, states: AnswerStates) -> Tensor:
    """Cross-entropy of each answer token, [N]. `per_token` takes the output layer for frozen, so one that trains goes another
    way: a chunk of tokens at a time too, each computed again in the backward pass."""
    output = causal_lm.get_output_embeddings()
    if not any(weight.requires_grad for weight in output.parameters()):
        return per_token(_cross_entropy, head, [states.hidden], states.targets)

    def on_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = output(hidden.to(output.weight.dtype)).float()  # `Head` may give its weight no gradient
        capped = logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
        return _cross_entropy(capped, targets)

    size = tokens_at_once(head.vocabulary, states.hidden.device.type)
    chunks = zip(states.hidden.split(size), states.targets.split(size), strict=True)
    return torch.cat([checkpoint(on_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
