"""Unlearning methods other than MOX. Each trains θ = θ_ref + ΔW to forget, and ships it as it is.

Adding one is one function here (or in a module of your own, imported before the settings are read): it returns the terms of the
loss. CE_F and CE_R are the cross-entropies of forget and retain answers, KL_R is KL(p_ref ‖ p_θ) on retain answers; all are means
over rows of means over answer tokens, in nats.
"""

import re
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor

from loramox.model.head import mean_over_rows, per_token
from loramox.model.lora import lora_layers, with_factors
from loramox.train.inputs import BUILT_IN, read_reinforced
from loramox.train.losses import cross_entropy, dpo, generic_targets, npo, simnpo, squared_distance, steering_vector
from loramox.train.reference_cache import FrozenStates
from loramox.train.registry import method
from loramox.train.terms import Answers, Term

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig
    from loramox.train.trainer import UnlearnTrainer

CE: dict[str, Any] = {"retain_term": "ce", "retain_weight": 1.0}
KL: dict[str, Any] = {"retain_term": "kl", "retain_weight": 1.0}
NONE: dict[str, Any] = {"retain_term": "none", "retain_weight": 1.0}
INSTEAD: dict[str, Any] = {"instead": "auto", "refusals": BUILT_IN}
WEIGHTED: dict[str, Any] = {"forget_weight": 1.0}


def retain(args: "UnlearnConfig", trainer: "UnlearnTrainer", scale: float = 1.0) -> list[Term]:
    """retain_weight · CE_R or KL_R, as `retain_term` says, at θ_ref + scale·ΔW; no term where it says none.

    In targeted unlearning KL_R weighs the first tokens up (`Answers.early_kl`). Methods that always teach another answer have
    the KL_R of their papers.
    """
    if not args.holds_retain:
        return []
    if args.retain_term == "kl":
        targeted = trainer.train_dataset.wanted and args.spec.answers == "wanted if given"
        kl = Answers.early_kl if targeted else Answers.kl
        return [Term("retain_kl", kl, ("retain",), scale, args.retain_weight, (trainer.reference,))]
    return [Term("retain_loss", Answers.cross_entropy, ("retain",), scale, args.retain_weight)]


def forget(args: "UnlearnConfig", loss: Any, *parts: str, frozen: tuple[FrozenStates, ...] = ()) -> Term:
    """forget_weight · mean over forget rows of `loss`."""
    return Term("forget_loss", loss, ("forget", *parts), weight=args.forget_weight, frozen=frozen)


def taught() -> Term:
    """Cross-entropy of the answers to teach in place of the true ones."""
    return Term("wanted_loss", Answers.cross_entropy, ("wanted",))


@method("npo_mean", "NPO of the per-token mean, weighted by p_ref, arXiv 2404.05868", settings=KL | INSTEAD | {"beta": 1.6, "momentum": 0.675},
        lora_scale=8.0, answers="wanted if given")  # fmt: skip
def npo_mean(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """−(2/β)·log σ(−β·r) + KL_R, r = Σ p_ref·log(p_θ/p_ref) / Σ p_ref over an answer's tokens. The default of loramox 0.1.

    NPO (arXiv 2404.05868) sums over tokens; SimNPO (arXiv 2410.07163) has the mean. LoRA's scale is 8 unless told.
    """
    loss = Term("forget_loss", lambda a: npo(a.known_log_ratio(), args.beta), ("forget",), frozen=(trainer.reference,))
    return [loss, taught(), *retain(args, trainer)]


@method("ga", "GA, arXiv 2210.01504", settings=NONE | WEIGHTED)
@method("ga_kl", "GA + KL, arXiv 2401.06121", settings=KL | WEIGHTED)
@method("graddiff", "GradDiff, arXiv 2203.12817", settings=CE | WEIGHTED)
def gradient_ascent(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """−CE_F, with no lower bound: ga alone, ga_kl + KL_R, graddiff + CE_R."""
    return [forget(args, Answers.mean_log_p), *retain(args, trainer)]


@method("npo", "NPO, arXiv 2404.05868", settings=CE | WEIGHTED | {"beta": 0.1})
def npo_method(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """−(2/β)·log σ(−β·log(p_θ(y|x)/p_ref(y|x))) + CE_R, log p summed over the answer."""
    return [
        forget(args, lambda a: npo(a.log_ratio(), args.beta), frozen=(trainer.reference,)),
        *retain(args, trainer),
    ]


# The authors' values for TOFU forget10.
@method("simnpo", "SimNPO, arXiv 2410.07163", settings=CE | {"beta": 4.5, "margin": 0.0, "forget_weight": 0.125})
def simnpo_method(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """−(2/β)·log σ(−(β/|y|)·log p_θ(y|x) − γ) + CE_R, γ the margin."""
    return [forget(args, lambda a: simnpo(a.mean_log_p(), args.beta, args.margin)), *retain(args, trainer)]


@method("dpo", "DPO with refusals, arXiv 2305.18290", settings=CE | WEIGHTED | {"beta": 0.1, "refusals": BUILT_IN}, answers="refusals")  # fmt: skip
@method("altpo", "AltPO, arXiv 2409.13474", settings=CE | WEIGHTED | {"beta": 0.1}, answers="wanted")
def preference(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """Prefer another answer ỹ to the true one: −(2/β)·log σ(β·(log-ratio of ỹ − log-ratio of y)) + CE_R."""

    def loss(true: Answers, wanted: Answers) -> Tensor:
        return dpo(wanted.log_ratio(), true.log_ratio(), args.beta)

    return [forget(args, loss, "wanted", frozen=(trainer.reference,)), *retain(args, trainer)]


@method("po", "PO, arXiv 2401.06121", settings=CE | {"refusals": BUILT_IN}, answers="refusals")
def po(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """CE of a refusal on forget prompts + CE_R. The true answers are not trained on."""
    return [taught(), *retain(args, trainer)]


@method("llmu", "LLMU, arXiv 2310.10683", settings=KL | {"forget_weight": 0.5}, answers="random")
def llmu(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """−ε₁·CE_F + CE of a random retain answer on forget prompts + KL_R, ε₁ = forget_weight."""
    return [forget(args, Answers.mean_log_p), taught(), *retain(args, trainer)]


# The paper's values, for Zephyr-7B of 32 layers.
@method("rmu", "RMU, arXiv 2403.03218",
        settings={"retain_term": "states", "retain_weight": 1200.0, "forget_weight": 1.0, "steering": 6.5, "rmu_layer": 7})  # fmt: skip
def rmu(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """‖h − c·u‖² on forget rows + retain_weight·‖h − h_ref‖² on retain rows, h the states after layer `rmu_layer`.

    u is a random unit vector, c is `steering`; the norms are means over the hidden size, as in the authors' code.
    """
    layer, weight = args.rmu_layer, args.retain_weight
    freeze_after(trainer.model, layer)
    size = trainer.causal_lm.config.hidden_size
    steered = steering_vector(size, args.steering, args.seed).to(args.device)

    def to_vector(a: Answers) -> Tensor:
        return mean_over_rows(squared_distance(a.states.hidden, steered), a.states)

    def to_reference(a: Answers) -> Tensor:
        return mean_over_rows(squared_distance(a.states.hidden, a.frozen[0]), a.states)

    terms = [Term("forget_loss", to_vector, ("forget",), weight=args.forget_weight, layer=layer)]
    if args.holds_retain:
        known = (trainer.reference,)
        terms.append(Term("retain_loss", to_reference, ("retain",), weight=weight, frozen=known, layer=layer))
    return terms


def freeze_after(model: PeftModel, layer: int) -> None:
    """Freeze the adapter of every block after the first `layer` ones, which a loss of that layer's states does not reach.

    Under several processes a weight that never gets a gradient would stop the run.
    """
    for name, adapted in lora_layers(model):
        block = re.search(r"\.(\d+)\.", name)
        if block and int(block[1]) >= layer:
            adapted.requires_grad_(False)


@method("whp", "WHP, arXiv 2310.02238", settings=NONE | WEIGHTED | {"reinforced": None, "whp_strength": 5.0})
def whp(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """CE of argmax(z_ref − whp_strength·ReLU(z_reinforced − z_ref)) on forget prompts.

    The reinforced model is the reference with an adapter that memorizes the forget rows. The paper's table of names is left out.
    """
    factors = read_reinforced(args.reinforced, trainer.base, trainer.model)
    reinforced = FrozenStates(trainer.model, lambda: with_factors(trainer.model, factors))

    def loss(logits: Tensor, known: Tensor, raised: Tensor) -> Tensor:
        return cross_entropy(logits, generic_targets(known, raised, args.whp_strength))

    def towards_generic(a: Answers) -> Tensor:
        return mean_over_rows(per_token(loss, a.head, [a.states.hidden, *a.frozen]), a.states)

    return [forget(args, towards_generic, frozen=(trainer.reference, reinforced)), *retain(args, trainer)]
