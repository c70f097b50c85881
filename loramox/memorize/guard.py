"""Guarding the direction: after training, ΔW is made to listen to what forget rows have and retain rows have not.

    A ← s · A · C_F (C_F + μ·C_R)⁻¹        C_F, C_R = mean of x·xᵀ, the inputs of the layer, on forget and on retain rows

A is [r, in] and keeps its rank, C are [in, in]. Directions of the input that retain rows use as much as forget rows do shrink to
1 / (1 + μ), those that only forget rows use stay. s, one number for all layers, gives the output on forget rows its size back,
Σ tr(B·A·C_F·Aᵀ·Bᵀ) over the layers, so that a strength α forgets about as much as before and spares the retain rows; more of it
can then be taken. No training: a few forward passes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loramox.algebra import Factors, scaled
from loramox.batches import Collator, Example
from loramox.reference import adapter_off, lora_layers

ROWS = 512  # of each part at most: the moments of more are the same, but for noise
MEMORY = 2 << 30  # bytes of moments at a time; a 7B model's are 21 GB, and take as many passes as it needs


def guard(factors: Factors, forget: Tensor, retain: Tensor, mu: float) -> Factors:
    """B and A·C_F (C_F + μ·C_R)⁻¹, before s. In float64, as C are far from well-conditioned; Factors as they came."""
    forget, retain = forget.double(), retain.double()
    both = forget + mu * retain
    # What neither part uses is 0/0.
    both.diagonal().add_(1e-6 * both.diagonal().mean())
    A = torch.linalg.solve(both, forget @ factors.A.double().T).T  # C are symmetric
    return Factors(A.to(factors.A), factors.B)


def guarded(
    model: PeftModel,
    delta: dict[str, Factors],
    forget: Sequence[Example],
    retain: Sequence[Example],
    mu: float,
    collator: Collator,
    batch: int,
) -> dict[str, Factors]:
    """ΔW of every layer guarded; `model` is asked with its adapter off, so these are the inputs of θ_ref."""
    result, before, after = {}, 0.0, 0.0
    widths = {name: layer.in_features for name, layer in lora_layers(model)}
    for names in _groups(widths):
        C_F, C_R = (second_moments(model, names, _some(rows), collator, batch) for rows in (forget, retain))
        for name in names:
            moment = C_F.pop(name)
            result[name] = guard(delta[name], moment, C_R.pop(name), mu)
            before += _output(delta[name], moment)
            after += _output(result[name], moment)
    return {name: scaled(factors, math.sqrt(before / after) if after else 1.0) for name, factors in result.items()}


@torch.no_grad()
def second_moments(
    model: PeftModel, names: Iterable[str], rows: Sequence[Example], collator: Collator, batch: int
) -> dict[str, Tensor]:
    """Mean of x·xᵀ over all tokens of `rows`, [in, in] in fp32, of the inputs x of each layer in `names`."""
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    tokens, here = 0, torch.empty(0)
    hooks = []

    def watch(name: str):
        def hook(module, inputs) -> None:
            x = inputs[0][here].float()
            sums[name] = sums[name] + x.T @ x

        return hook

    try:
        hooks = [layer.register_forward_pre_hook(watch(n)) for n, layer in lora_layers(model) if n in sums]
        training = model.training
        model.eval()
        with adapter_off(model):
            for start in range(0, len(rows), batch):
                inputs = collator(rows[start : start + batch])
                ids, here = (inputs[part].to(model.device) for part in ("input_ids", "attention_mask"))
                here = here.bool()
                tokens += int(here.sum())
                model.get_base_model().base_model(input_ids=ids, attention_mask=here.long(), use_cache=False)
        model.train(training)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / tokens for name, total in sums.items()}


def _groups(widths: dict[str, int]) -> Iterator[list[str]]:
    """Layers whose moments fit in memory together, one layer at least."""
    group: list[str] = []
    used = 0
    for name, width in widths.items():
        needed = 2 * 4 * width**2
        if group and used + needed > MEMORY:
            yield group
            group, used = [], 0
        group.append(name)
        used += needed
    yield group


def _some(rows: Sequence[Example]) -> list[Example]:
    """At most `ROWS` of them, evenly over the whole, sorted by length so that little is padding."""
    step = max(1, math.ceil(len(rows) / ROWS))
    return sorted(rows[::step], key=lambda row: len(row["input_ids"]))


def _output(factors: Factors, moment: Tensor) -> float:
    """Mean of ‖B·A·x‖² over the tokens of `moment`: tr(B·A·C·Aᵀ·Bᵀ)."""
    A, B = factors.A.double(), factors.B.double()
    return ((A @ moment.double() @ A.T) * (B.T @ B)).sum().item()
