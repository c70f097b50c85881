"""The registry of methods: each is one decorated function that returns the terms of its loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loramox.train.terms import Term

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig
    from loramox.train.trainer import UnlearnTrainer

Terms = Callable[["UnlearnConfig", "UnlearnTrainer"], list[Term]]
Gradient = Callable[["UnlearnTrainer", nn.Module, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Method:
    """An unlearning method: where it is from, what its settings are by default, how it trains ΔW and what ships.

    Args:
        title: its name and source, as cards and records have it.
        terms: the terms of its loss, from the settings and the trainer (its head, reference and adapter).
        settings: the settings it has, at its paper's values; None has to be given. All others are refused.
        alpha_is_free: True where θ_for = θ_ref − alpha·ΔW ships, at any alpha > 0; False where θ_ref + ΔW ships.
        static: whether the forget rows are trained on at θ_ref + ΔW, where a reference that knows them by heart is saturated.
        answers: other answers to the forget prompts: refusals (of a file), random (of retain rows), wanted (of a column), or
            wanted if given.
        writes_retain: whether the reference writes retain rows beside the user's by default, where the forget rows are questions.
        lora_scale: LoRA's own scale, lora_alpha / r, that the method is trained with by default.
        gradient: what the method steps by besides its terms: takes the trainer, the model and the forget rows of one step, adds
            to the gradients, and returns what it adds to the loss.
    """

    name: str
    title: str
    terms: Terms
    settings: dict[str, Any]
    alpha_is_free: bool = False
    static: bool = False
    answers: str | None = None
    writes_retain: bool = False
    lora_scale: float = 1.0
    gradient: Gradient | None = None


METHODS: dict[str, Method] = {}


def method(name: str, title: str, settings: dict[str, Any], **more: Any) -> Callable[[Terms], Terms]:
    """Register the decorated function as `--method NAME`. `more` are the other fields of `Method`."""

    def register(terms: Terms) -> Terms:
        METHODS[name] = Method(name, title, terms, settings, **more)
        return terms

    return register
