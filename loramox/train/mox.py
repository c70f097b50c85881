"""MOX: memorize, then extrapolate (arXiv 2602.06441). The default method, and the paper's own.

`mox_static`, the paper's, memorizes once, at θ_ref + ΔW, where a reference that knows its rows by heart has no gradient left.
`mox` memorizes anew in every step of training, from where forgetting has got to (docs/method.md):

    θ_1 = θ_for                            start at the forget model of the moment
    M_k+1 = M_k − inner_lr · sign ∇_M L    memorize: a fresh LoRA adapter M descends on the forget rows, θ_k = θ_for + M_k
    g = −Σ_k ∇_ΔW L(θ_k)                   extrapolate: g = alpha·Σ_k ∇_θ L(θ_k) goes to ΔW's optimiser, so ΔW follows the
                                           path, and θ_for = θ_ref − alpha·ΔW goes the other way

    L(θ) = mean over rows of w(y|x; θ) · CE_T(y|x; θ),    w = 2σ(beta·r),  r = mean of log(p_θ/p_ref) over the answer

A row's weight w goes to 0 once it is forgotten. CE_T is the cross-entropy at temperature T, which falls to 1 in training: at
first all tokens are taken down, in the end those that are still likely.

Another answer that is taught begins with other tokens. The first tokens alone would then make a row improbable, and w release
it with the rest still known. So the beginning of some answers is taken as given, and L is of the rest.

With K = 1 and T = 1 the step is that of NPO's loss, as `npo_mean` has it: w·∇CE is the gradient of −(2/beta)·log σ(−beta·r). What
K > 1 adds is that forgetting has to hold on the path on which a fine-tune would bring the rows back.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loramox.data.microbatches import ONE_PASS, microbatches, rows_of
from loramox.model.head import answer_states
from loramox.model.lora import ADAPTER, at_scale, lora_layers
from loramox.train.losses import npo, preference
from loramox.train.methods import INSTEAD, retain
from loramox.train.registry import method
from loramox.train.terms import Answers, Term

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig
    from loramox.train.trainer import UnlearnTrainer

Batch = dict[str, Any]
GIVEN = 0.75  # of an answer at most is taken as given, so that a few tokens are left to memorize
SHARED: dict[str, Any] = {"retain_term": "kl", "retain_weight": 1.0, "momentum": 0.675, "targeted": "descent"} | INSTEAD


def memorize_and_extrapolate(trainer: "UnlearnTrainer", model: Any, batch: Batch) -> Tensor:
    """Memorize the forget rows of one step along a path; add the gradients against it to ΔW's; return NPO's loss along it, [].

    One backward pass of −L gives both: ΔW's optimiser descends on −L, and M ascends on it.
    """
    args, rows = trainer.args, list(range(len(batch["rows"])))
    steps = min(args.inner_steps, len(rows))
    done = trainer.state.global_step / max(1, trainer.state.max_steps)  # of a step that is called alone, 0 of 0
    temperature = falling(args.temperature, done)
    # Each mini-batch is one pass, unless that would not fit.
    minibatches = [
        list(microbatches({"forget": rows_of(batch, rows[k::steps])}, ONE_PASS, trainer.passes.most))
        for k in range(steps)
    ]
    known = [[_known(trainer, model, each) for each in minibatch] for minibatch in minibatches]
    total = torch.zeros((), device=args.device)
    with (
        at_scale(trainer.model, args.forget_scale),
        memorizer(trainer.model, args.seed + trainer.state.global_step) as M,
    ):
        for minibatch, frozen in zip(minibatches, known, strict=True):
            for each, states in zip(minibatch, frozen, strict=True):
                trainer.passes.begin(each)
                answers = Answers(trainer.head, answer_states(model, trainer.causal_lm, each["forget"]), (states,))
                loss, r = answers.known_cross_entropy(temperature, beginnings(trainer, each["forget"]))
                L = (2 * torch.sigmoid(args.beta * r) * loss).mean()
                total += trainer.passes.note("forget_loss", "forget", each["forget"], npo(r, args.beta).mean())
                trainer.accelerator.backward(-each["forget"]["share"] * L)
            for weight, gradient in zip(M, trainer.mean_over_processes([weight.grad for weight in M]), strict=True):
                # NaN: fp16 overflowed, and the optimiser will skip this step.
                weight.data += args.inner_lr * gradient.sign().nan_to_num()
                weight.grad = None
    return total


def beginnings(trainer: "UnlearnTrainer", batch: Batch) -> Tensor | None:
    """How many tokens of each answer are taken as given in this step, [rows]; None where no other answer is taught.

    Of about every second row 0 tokens, of the others a uniform share of up to `GIVEN`, the token that ends it not counted. Drawn
    for a row and a step, whatever pass it is in.
    """
    if not trainer.train_dataset.wanted:
        return None
    step = f"{trainer.args.seed} {trainer.state.global_step}"
    draws = (random.Random(f"{step} {key.hex()}").uniform(-1, 1) for key in batch["keys"])
    given = [int(GIVEN * max(0.0, u) * (len(answer) - 1)) for u, answer in zip(draws, batch["answers"], strict=True)]
    return torch.tensor(given, device=trainer.args.device)


def falling(temperature: float, done: float) -> float:
    """T after a share `done` of the training: linear from `temperature` to 1, which it reaches at three quarters."""
    return temperature + (1 - temperature) * min(1.0, done / 0.75)


def _known(trainer: "UnlearnTrainer", model: Any, parts: dict[str, Batch]) -> Tensor:
    """The reference's states of the rows of one pass."""
    trainer.passes.begin(parts)
    return trainer.reference.states(model, parts["forget"])


@contextmanager
def memorizer(model: PeftModel, seed: int) -> Iterator[list[nn.Parameter]]:
    """Within it a fresh LoRA adapter is on every layer that ΔW changes, as an attacker's would be: of its rank, B = 0.

    Yields its weights. It is added to the layers' outputs by hooks, so the model has no second PEFT adapter to save or to load.
    """
    generator, weights, hooks = torch.Generator().manual_seed(seed), [], []
    try:
        for _, layer in lora_layers(model):
            ours = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            bound = ours[0].shape[1] ** -0.5
            drawn = torch.empty(ours[0].shape).uniform_(-bound, bound, generator=generator)  # as PEFT draws it
            A = nn.Parameter(drawn.to(ours[0].device))
            B = nn.Parameter(torch.zeros(ours[1].shape, device=ours[1].device))
            weights += [A, B]
            hooks.append(layer.register_forward_hook(_adding(A, B)))
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def _adding(A: Tensor, B: Tensor) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # autocast would make a 16-bit copy of an input in fp32, and keep it for A's gradient.
        autocast = torch.is_autocast_enabled(inputs[0].device.type)
        x = inputs[0] if autocast else inputs[0].to(A.dtype)
        change = nn.functional.linear(nn.functional.linear(x, A), B)
        return output + change.to(output.dtype)

    return hook


def memorized(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> Term:
    """CE_F at θ_ref + ΔW, at the temperature."""
    beside = trainer.memorize_beside
    return Term("forget_loss", lambda a: a.cross_entropy(args.temperature), ("forget",), beside=beside)


def held(args: "UnlearnConfig", trainer: "UnlearnTrainer", scale: float, beside: bool = True) -> list[Term]:
    """KL_R at θ_ref + scale·ΔW, and of rows that earlier requests made the model forget, KL to the model with these in force.

    Where not `beside`, it is the KL to the model from which the forget rows are memorized, without the tuned adapter.
    """
    terms = retain(args, trainer, scale)
    if not beside:
        terms = [replace(term, beside=False, frozen=(trainer.origin,)) for term in terms]
    if terms:
        terms.append(Term("protected_kl", Answers.kl, ("protected",), scale, args.retain_weight, (trainer.now,)))
    return terms


def wanted(args: "UnlearnConfig") -> Term:
    """Targeted unlearning: CE of the wanted answer at θ_for (descent), or the paper's −CE of it at θ_ref + ΔW (ascent)."""
    descent = args.targeted == "descent"
    scale, weight = (args.forget_scale, 1.0) if descent else (1.0, -1.0)
    return Term("wanted_loss", Answers.cross_entropy, ("wanted",), scale, weight)


@method("mox", "MOX along a path, after arXiv 2602.06441", gradient=memorize_and_extrapolate, alpha_is_free=True,
        writes_retain=True, answers="wanted if given", settings=SHARED | {"alpha": 8.0, "beta": 2.1, "inner_steps": 8, "inner_lr": 1e-2, "temperature": 3.0})  # fmt: skip
def mox(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """KL_R at θ_for, and steps against the path along which a fresh adapter memorizes the forget rows from θ_for."""
    return [*held(args, trainer, args.forget_scale), wanted(args)]


@method("mox_static", "MOX, arXiv 2602.06441", alpha_is_free=True, static=True, answers="wanted if given",
        settings=SHARED | {"alpha": 4.0, "beta": 0.1, "forget_term": "cross_entropy", "temperature": 1.0, "kl_at": "memorization"})  # fmt: skip
def mox_static(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """CE_F + KL_R at θ_ref + ΔW, or with the preference variant +(2/β)·log σ(−β·log(p_θ/p_ref)) in place of CE_F.

    `temperature` divides the logits of CE_F; `kl_at` moves KL_R to θ_ref − alpha·ΔW, the model that ships.
    """
    forget, beside = memorized(args, trainer), trainer.memorize_beside
    if args.forget_term == "preference":
        forget = replace(forget, loss=lambda a: preference(a.log_ratio(), args.beta), frozen=(trainer.origin,))
    if args.kl_at == "memorization":
        retained = held(args, trainer, 1.0, beside)
    else:
        retained = held(args, trainer, args.forget_scale)
    return [forget, *retained, replace(wanted(args), beside=beside or args.targeted == "descent")]


@method("task_vector", "task vector, arXiv 2212.04089", alpha_is_free=True, static=True,
        settings={"alpha": 1.0, "retain_term": "none", "retain_weight": 1.0, "temperature": 1.0})  # fmt: skip
def task_vector(args: "UnlearnConfig", trainer: "UnlearnTrainer") -> list[Term]:
    """CE_F at θ_ref + ΔW, with nothing to hold the rest unless `retain_term` is kl."""
    return [memorized(args, trainer), *held(args, trainer, 1.0, trainer.memorize_beside)]
