"""From the model's last hidden states to numbers per answer token, without the logits of a whole batch.

Logits of every token of a batch would be a [rows, tokens, vocabulary] tensor: with a vocabulary of 128,000 words
and 2,048 tokens, 1 GB in fp32, several times over in a loss. Only answer tokens need any, and only a few at once.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from loramox.data.microbatches import concatenated
from loramox.errors import ModelError

# Logits of one chunk, in elements: 36 MB in fp32. A loss holds a handful of such tensors at a time. Just above the 32 MiB
# up to which glibc may keep freed blocks on its heap: below it, a process on the CPU grew to 2 GB of remains.
CHUNK_ELEMENTS = 9_000_000
# On a GPU no fewer tokens: for fewer, reading the head takes longer than multiplying with it.
CHUNK_TOKENS = 256

# How far the head's logits may be from the model's own, as a share of the largest: 16-bit arithmetic takes one in a hundred.
AGREE = 0.05
_COMPARED: WeakSet[nn.Module] = WeakSet()  # the models of which they are compared

OTHERS = "Use an architecture without them (Llama, Qwen, Mistral, Phi, Gemma, GPT-NeoX, GPT-2)"


class AnswerStates(NamedTuple):
    """What a batch's answer tokens are predicted from. N answer tokens in `rows` rows."""

    hidden: Tensor  # [N, hidden size], the last hidden state one position before each answer token
    targets: Tensor  # [N], the answer tokens themselves
    row_of: Tensor  # [N], the batch row that each belongs to
    rows: int


class Head(nn.Module):
    """Hidden states [N, hidden size] → logits [N, vocabulary] in fp32, as the model itself computes them.

    Where the device can, they are not rounded to the model's 16 bits first.

    Raises `ModelError` on construction when the model does something to its logits that is not known here.
    """

    # What some architectures do after the output layer, by the name of their config field.
    UNKNOWN = (
        "logit_scale",
        "logits_scaling",
        "lm_head_multiplier",
        "output_multiplier",
        "logits_soft_cap",
        "output_logit_soft_cap",
        "unpadded_vocab_size",
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = model.config
        present = [name for name in self.UNKNOWN if getattr(config, name, None) not in (None, 1, 1.0)]
        if present:
            raise ModelError(
                f"{type(model).__name__} changes its logits after the output layer ({', '.join(present)} in config.json), which loramox "
                f"does not reproduce in its chunked losses. {OTHERS}"
            )
        output = model.get_output_embeddings()
        held = {id(p) for part in (backbone(model), output) for p in part.parameters()}
        between = [name for name, p in model.named_parameters() if id(p) not in held]
        if between:
            raise ModelError(
                f"{type(model).__name__} has weights between its layers and its output layer ({', '.join(between[:3])}), which loramox's chunked "
                f"losses would leave out. {OTHERS}"
            )
        # In a tuple, so that the model is not registered as a child of its own head.
        self._output = (output,)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.vocabulary = self._output[0].weight.shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        (output,) = self._output
        # Without autocast the head's own dtype decides (16-bit models); with it, autocast does.
        autocast = torch.is_autocast_enabled(hidden.device.type)
        hidden = hidden if autocast else hidden.to(output.weight.dtype)
        if not autocast and multiplies_into_fp32(hidden) and type(output) is nn.Linear and output.bias is None:
            logits = _Fp32Product.apply(hidden, output.weight)
        else:
            logits = output(hidden).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def multiplies_into_fp32(hidden: Tensor) -> bool:
    """Whether torch multiplies such 16-bit matrices into one in fp32. Rounded to bfloat16, logits are up to 0.06 off."""
    is_cuda = hidden.device.type == "cuda" and torch.version.hip is None  # AMD's GPUs are called cuda as well
    return is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)


class _Fp32Product(torch.autograd.Function):
    """hidden · weightᵀ, [N, size] and [vocabulary, size] in 16 bits → [N, vocabulary] in fp32. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model has no dropout; after it, however it ends, the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def backbone(causal_lm: PreTrainedModel) -> nn.Module:
    """The layers below the output head, as the model's own forward pass calls them: OPT goes past its `base_model`."""
    decoder = causal_lm.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else causal_lm.base_model


def answer_states(
    model: nn.Module, causal_lm: nn.Module, batch: dict[str, Any], layer: int | None = None
) -> AnswerStates:
    """One forward pass of `model`, keeping the hidden states from which answer tokens are predicted.

    `model` is called as it is, wrapped for several processes or not, so that its hooks run; `causal_lm` is the transformers model
    inside it. `batch` is as `loramox.data.pairs.Collator` makes it: input_ids, attention_mask and labels, each [rows, tokens],
    and `answers`, the positions of each row's answer tokens. The logits of the pass are not used: one position's are computed.
    With `layer` the states are those that layer, counted from 1, gives to the next, instead of the last ones.

    Raises:
        ModelError: in the first pass of a model whose own logits are not those of its `Head`.
    """
    states: list[Tensor] = []
    passed_on: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters:
        passed_on["logits_to_keep"] = 1
    if layer is not None:
        passed_on["output_hidden_states"] = True  # the first is the embedding
    hook = backbone(causal_lm).register_forward_hook(
        lambda module, args, output: states.append(output[0] if layer is None else output.hidden_states[layer])
    )
    try:
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            **passed_on,
        )
    finally:
        hook.remove()
    if layer is None and causal_lm not in _COMPARED:
        _compare(causal_lm, states[-1][:, -1], output.logits[:, -1])
        _COMPARED.add(causal_lm)
    # Known before the pass, so nothing has to wait for the GPU, as it would to find them in the labels.
    places = [(row, at) for row, answer in enumerate(batch["answers"]) for at in answer]
    row_of, at = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T.to(batch["labels"].device, non_blocking=True)
    return AnswerStates(
        hidden=states[-1][row_of, at - 1],
        targets=batch["labels"][row_of, at],
        row_of=row_of,
        rows=len(batch["answers"]),
    )


@torch.no_grad()
def _compare(causal_lm: nn.Module, hidden: Tensor, own: Tensor) -> None:
    """Raises `ModelError` unless `Head` makes the model's own logits of the last position of its hidden states.

    `Head.UNKNOWN` names what architectures of today do to their logits; this finds what it does not name.
    """
    if isinstance(own, FakeTensor):
        return
    apart, largest = (Head(causal_lm)(hidden) - own.float()).abs().max().item(), own.abs().max().item()
    if apart > AGREE * largest:
        raise ModelError(
            f"{type(causal_lm).__name__} makes other logits of its last hidden states than its output layer does ({apart:.3g} apart, its largest "
            f"is {largest:.3g}), which loramox does not reproduce in its chunked losses. {OTHERS}"
        )


def states_of_parts(
    model: nn.Module, causal_lm: nn.Module, parts: dict[str, dict[str, Any]], layer: int | None = None
) -> dict[str, AnswerStates]:
    """`answer_states` of each part, from one forward pass over the rows of all."""
    states = answer_states(model, causal_lm, concatenated(list(parts.values())), layer)
    tokens = [sum(map(len, batch["answers"])) for batch in parts.values()]
    made, row = {}, 0
    for (part, batch), hidden, targets, row_of in zip(
        parts.items(), *(each.split(tokens) for each in states[:3]), strict=True
    ):
        rows = len(batch["answers"])
        made[part] = AnswerStates(hidden, targets, row_of - row, rows)
        row += rows
    return made


def per_token(function: Callable[..., Tensor], head: Head, hidden: list[Tensor], *others: Tensor) -> Tensor:
    """function(logits₁, …, others…) for every answer token, [N], computed a chunk of tokens at a time.

    `hidden` is a list of [N, hidden size]; `function` receives the logits [chunk, vocabulary] of each, then the same
    chunk of each of `others` [N, …], and returns [chunk] (without gradients also [chunk, …]), from each token alone. It may
    return [chunk, 2], of which the second column is made of detached logits: it has no gradient. The gradient is that of the
    hidden states; the head is frozen. torch's `linear_cross_entropy` does this for cross-entropy; the KL term needs two sets of
    logits at once.
    """

    def on_chunk(*tensors: Tensor) -> Tensor:
        return function(*(head(h) for h in tensors[: len(hidden)]), *tensors[len(hidden) :])

    size = tokens_at_once(head.vocabulary, hidden[0].device.type)
    return _Chunked.apply(on_chunk, size, *hidden, *others)


def tokens_at_once(vocabulary: int, device: str) -> int:
    """Tokens of a chunk, on a device of this type."""
    return max(CHUNK_ELEMENTS // vocabulary, 1 if device == "cpu" else CHUNK_TOKENS)


class _Chunked(torch.autograd.Function):
    """A function of tokens, chunk by chunk, whose gradient is taken while a chunk's logits are there.

    Each value depends on its own token's hidden state only, so that the gradient of the values' sum holds that of each
    value; the backward pass has but to weigh it. No logits are kept for it, and none are computed again.
    """

    @staticmethod
    def forward(ctx: Any, on_chunk: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
        learned = ctx.needs_input_grad[2:]
        values, gradients = [], []
        for chunk in zip(*(t.split(size) for t in tensors), strict=True):
            leaves = [t.detach().requires_grad_(needed) for t, needed in zip(chunk, learned, strict=True)]
            with torch.set_grad_enabled(any(learned)):
                value = on_chunk(*leaves)
                if any(learned):
                    wanted = [t for t in leaves if t.requires_grad]
                    gradients.append(torch.autograd.grad(value.sum(), wanted, materialize_grads=True))
            values.append(value.detach())
        ctx.learned = learned
        ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*gradients, strict=True)))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        weight = weight[:, None] if weight.dim() == 1 else weight[:, :1]  # of the only column with a gradient
        weighed = ((weight * gradient).to(gradient) for gradient in ctx.saved_tensors)
        return None, None, *(next(weighed) if needed else None for needed in ctx.learned)


def answer_lengths(states: AnswerStates) -> Tensor:
    """How many answer tokens each row has, [rows]. `bincount` would wait for the GPU."""
    return sum_over_rows(torch.ones_like(states.row_of), states)


def positions(states: AnswerStates) -> Tensor:
    """The place of each answer token in its answer, counted from 0, [N]."""
    lengths = answer_lengths(states)
    before = lengths.cumsum(0) - lengths
    return torch.arange(len(states.row_of), device=lengths.device) - before[states.row_of]


def sum_over_rows(values: Tensor, states: AnswerStates) -> Tensor:
    """Sum over each row's answer tokens, [rows]."""
    return values.new_zeros(states.rows).index_add(0, states.row_of, values)


def weighted_mean_over_rows(values: Tensor, weights: Tensor, states: AnswerStates) -> Tensor:
    """Σ w·v / max(1, Σ w) over each row's answer tokens, [rows]: a row whose weights are small in all counts for little."""
    return sum_over_rows(weights * values, states) / sum_over_rows(weights, states).clamp_min(1)


def mean_over_rows(values: Tensor, states: AnswerStates) -> Tensor:
    """Mean over each row's answer tokens, [rows]. Padding and prompt tokens never count."""
    return sum_over_rows(values, states) / answer_lengths(states)
