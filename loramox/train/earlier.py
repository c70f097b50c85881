"""Requests that are in force already while another one is memorized: they stay on, and stay forgotten.

    θ_now = θ_ref − Σ α_i·ΔW_i        what is served before the new request
    θ_for = θ_now − α·ΔW              and with it: what the retain rows are held at, as it is what will be served

They are a second, frozen PEFT adapter on the model. Only the reference, with every adapter off, is without them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from peft import LoraConfig, PeftModel

from loramox.data.rows import Row
from loramox.model.algebra import Factors, padded
from loramox.model.lora import ADAPTER, lora_layers

EARLIER = "earlier"


class Earlier(NamedTuple):
    """What is forgotten already."""

    rows: Sequence[Row]
    templates: Sequence[str | None]  # the text around each row's question when it was forgotten; None: a chat template
    change: dict[str, Factors]  # −Σ α_i·ΔW_i of every adapted layer


def put_on(model: PeftModel, change: dict[str, Factors]) -> None:
    """Put θ_now − θ_ref beside the adapter that trains, frozen."""
    rank = max(factors.rank for factors in change.values())
    lora = model.peft_config[ADAPTER]
    trains = [(p, p.requires_grad) for p in model.parameters()]
    model.add_adapter(EARLIER, LoraConfig(r=rank, lora_alpha=rank, target_modules=lora.target_modules))
    for parameter, flag in trains:  # some versions of PEFT mark the other adapter's weights here
        parameter.requires_grad_(flag)
    for name, layer in lora_layers(model, EARLIER):
        A, B = padded(change[name], rank)
        layer.lora_A[EARLIER].weight.data.copy_(A)
        layer.lora_B[EARLIER].weight.data.copy_(B)
    switch_on(model)


def switch_on(model: PeftModel) -> None:
    """Make both adapters active. PEFT marks the weights of all that it activates as trainable; ours stay as they were."""
    trains = [(p, p.requires_grad) for p in model.parameters()]
    model.base_model.set_adapter([ADAPTER, EARLIER])
    for parameter, flag in trains:
        parameter.requires_grad_(flag)
    for _, layer in lora_layers(model, EARLIER):
        for part in (layer.lora_A, layer.lora_B):
            part[EARLIER].requires_grad_(False)
