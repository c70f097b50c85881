"""Activation patching: read the hidden states after each layer, or replace those after one, in one forward pass."""

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from loramox.model.head import Head, answer_states, mean_over_rows, per_token
from loramox.model.sharding import layers_of


def patched_pass(
    model: nn.Module, batch: dict[str, Any], at: Tensor, patched: int | None = None, states: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Score the answers of a batch, with the states after layer `patched` (from 0) replaced by `states` [N, hidden size] where
    `at` [rows, tokens] is true.

    Returns the mean log p of each answer, [rows], in nats, and the states after each layer there, [N, hidden size] each.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    found: list[Tensor] = []

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        stream = output if isinstance(output, Tensor) else output[0]
        if len(found) == patched:
            stream = stream.clone()
            stream[at] = states.to(stream)
        found.append(stream[at])
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    hooks = [layer.register_forward_hook(after) for layer in layers_of(causal_lm)]
    try:
        answer = answer_states(model, causal_lm, batch)
    finally:
        for hook in hooks:
            hook.remove()

    def log_p(logits: Tensor, targets: Tensor) -> Tensor:
        return log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    return mean_over_rows(per_token(log_p, Head(causal_lm), [answer.hidden], answer.targets), answer), found
