"""A term of the loss: its rows, the model at which it is computed, and the function of their answers."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loramox.model.head import (
    AnswerStates,
    Head,
    mean_over_rows,
    per_token,
    positions,
    sum_over_rows,
    weighted_mean_over_rows,
)
from loramox.train.losses import cross_entropy, kl_divergence, log_prob

if TYPE_CHECKING:
    from loramox.train.reference_cache import FrozenStates


Place = tuple[float, bool, int | None]  # a term's scale, beside and layer


class Answers(NamedTuple):
    """The answers of some rows, N tokens in all, as the model in training has them and as frozen models have them."""

    head: Head
    states: AnswerStates
    frozen: tuple[Tensor, ...] = ()  # each [N, hidden size]: the same tokens' states in one of the term's frozen models

    def log_p(self) -> Tensor:
        """log p_θ of each answer token, [N], in nats."""
        return per_token(log_prob, self.head, [self.states.hidden], self.states.targets)

    def frozen_log_p(self) -> Tensor:
        """The same under the first frozen model, [N]."""
        return per_token(log_prob, self.head, [self.frozen[0]], self.states.targets)

    def mean_log_p(self) -> Tensor:
        """(1/|y|) · log p_θ(y|x), [rows]."""
        return mean_over_rows(self.log_p(), self.states)

    def log_ratio(self) -> Tensor:
        """log(p_θ(y|x) / p_frozen(y|x)), summed over the answer's tokens, [rows]."""
        return sum_over_rows(self.log_p() - self.frozen_log_p(), self.states)

    def known_log_ratio(self) -> Tensor:
        """Mean of log(p_θ/p_frozen) over the answer's tokens, each weighted by p_frozen, [rows].

        A sum over tokens would push short answers much further down per token than long ones. Without the weights, tokens that
        the frozen model never knew would give way first, and those to forget would stay.
        """
        known = self.frozen_log_p()
        return weighted_mean_over_rows(self.log_p() - known, known.exp(), self.states)

    def cross_entropy(self, temperature: float = 1.0) -> Tensor:
        """temperature · CE at softmax(logits / temperature), mean over the answer's tokens, [rows]."""
        loss = functools.partial(cross_entropy, temperature=temperature)
        return mean_over_rows(per_token(loss, self.head, [self.states.hidden], self.states.targets), self.states)

    def known_cross_entropy(self, temperature: float = 1.0, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """temperature · CE at softmax(logits / temperature), the mean over the answer's tokens weighted by p_frozen, [rows].

        At temperature 1 its gradient is that of −`known_log_ratio`, which is returned beside it, without a gradient. The first
        `given` tokens of each answer, [rows], count in neither.
        """

        def both(logits: Tensor, targets: Tensor) -> Tensor:
            return torch.stack([cross_entropy(logits, targets, temperature), log_prob(logits.detach(), targets)], dim=1)

        loss, log_p = per_token(both, self.head, [self.states.hidden], self.states.targets).T
        known = self.frozen_log_p()
        weights = known.exp()
        if given is not None:
            weights = weights * (positions(self.states) >= given[self.states.row_of])
        ratio = weighted_mean_over_rows(log_p.detach() - known, weights, self.states)
        return weighted_mean_over_rows(loss, weights, self.states), ratio

    def kl(self) -> Tensor:
        """KL(p_frozen ‖ p_θ), mean over the answer's tokens, [rows], in nats."""
        return mean_over_rows(self._kl_of_tokens(), self.states)

    def early_kl(self) -> Tensor:
        """The same with a weight of 1/t for token t of an answer, counted from 1: Σ KL_t/t / Σ 1/t, [rows].

        Another answer that is taught, a refusal say, spreads to other questions by its first token. In a plain mean over the
        tokens of a long answer that one hardly counts.
        """
        return weighted_mean_over_rows(self._kl_of_tokens(), 1 / (positions(self.states) + 1), self.states)

    def _kl_of_tokens(self) -> Tensor:
        both = [self.states.hidden, self.frozen[0]]
        return per_token(lambda logits, frozen: kl_divergence(frozen, logits), self.head, both)


@dataclass(frozen=True)
class Term:
    """weight · mean over rows of `loss`, taken with the model at θ_ref + scale·ΔW, or θ_base + scale·ΔW.

    A step of training is the sum of a method's terms. Each part of a batch (forget, retain, wanted, protected) belongs to one
    term at most.

    Args:
        name: what the term's mean is called in the log.
        loss: takes the `Answers` of each of `parts`, returns one number a row, [rows]. With several parts, row i of one
            belongs to row i of the other.
        frozen: the models whose states of the same tokens the loss needs as well.
        layer: take the states that this layer, counted from 1, gives to the next; None: the last ones.
        beside: whether the tuned adapter (`--tuned_adapter`), if there is one, is on: θ_ref has it, θ_base has not.
    """

    name: str
    loss: Callable[..., Tensor]
    parts: tuple[str, ...]
    scale: float = 1.0
    weight: float = 1.0
    frozen: tuple["FrozenStates", ...] = ()
    layer: int | None = None
    beside: bool = True

    @property
    def place(self) -> Place:
        """Terms of one place share their passes."""
        return self.scale, self.beside, self.layer
