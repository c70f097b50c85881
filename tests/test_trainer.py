"""The trainer: its objective is the one that is written down, its steps touch ΔW alone, and it watches what is shipped."""

import contextlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from loramox import ReferenceConfig, UnlearnConfig, UnlearnTrainer, add_lora, load_reference
from loramox.data.encode import IGNORED, Example
from loramox.data.microbatches import OVERHEAD
from loramox.data.pairs import Collator
from loramox.errors import NonFiniteLossError, RunError
from loramox.model.algebra import Factors
from loramox.model.head import backbone
from loramox.model.lora import current_factors, lora_layers
from loramox.run import MAY_DIFFER
from loramox.train.earlier import EARLIER, put_on
from loramox.train.momentum import Momentum
from loramox.train.mox import GIVEN, _adding, beginnings, falling
from loramox.train.terms import Answers

Examples = tuple[list[Example], list[Example]]
SCALE = 2  # lora_alpha / r


class Recorder(TrainerCallback):
    """Keeps the gradients of each optimiser step, and ΔW and the log as they were after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.deltas: list[dict[str, Tensor]] = []
        self.logs: dict[str, float] = {}
        self.forget_rows: list[str] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.deltas.append({name: f.delta() for name, f in current_factors(model).items()})

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        self.logs |= logs


@pytest.fixture
def trainer_of(
    pico: Callable[[str], Path], examples: Examples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., tuple[UnlearnTrainer, Recorder]]:
    """A trainer of the pico Llama whose adapter is not 0 to begin with, and what it records. One step holds all rows."""

    def make(
        base: Path | None = None,
        quantization: str = "none",
        wanted: Sequence[Example] = (),
        retain: Sequence[Example] = examples[1],
        protected: Sequence[Example] = (),
        earlier: bool = False,
        **settings,
    ) -> tuple[UnlearnTrainer, Recorder]:
        reference = ReferenceConfig(str(base or pico("llama")), quantization=quantization, r=4, lora_alpha=4 * SCALE)
        torch.manual_seed(1)
        model = add_lora(load_reference(reference), reference)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        if earlier:
            change = {
                n: Factors(torch.randn_like(f.A), 0.02 * torch.randn_like(f.B))
                for n, f in current_factors(model).items()
            }
            put_on(model, change)
        defaults = {
            "output_dir": str(tmp_path / "trained"),
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "eval_on_start": False,
            "per_device_train_batch_size": 4,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "max_grad_norm": 0,
            "logging_steps": 1,
            "alpha": 2.0,
            "disable_tqdm": True,
        }
        recorder = Recorder()
        trainer = UnlearnTrainer(
            model,
            UnlearnConfig(**defaults | settings),
            examples[0],
            retain,
            tokenizer,
            wanted,
            protected_dataset=protected,
            callbacks=[recorder],
        )
        step = trainer.training_step

        def watched(model: nn.Module, inputs: dict, *more) -> Tensor:
            recorder.forget_rows += inputs["forget"]["rows"]
            return step(model, inputs, *more)

        trainer.training_step = watched
        return trainer, recorder

    return make


class ByHand:
    """The objective in plain PyTorch: dense weights, one row at a time without padding, all the logits."""

    def __init__(self, base: PreTrainedModel, model: PeftModel) -> None:
        self.base, self.leaves, self.weights, self.memorizer = base.eval(), {}, {}, {}
        for name, layer in lora_layers(model):
            A, B = (part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
            prefix = f"base_model.model.{name}.lora_"
            self.leaves |= {f"{prefix}A.default.weight": A, f"{prefix}B.default.weight": B}
            self.weights[f"{name}.weight"] = (base.get_submodule(name).weight.detach(), A, B)

    def log_probs(self, example: Example, strength: float, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(log p of each answer token, log p of the whole vocabulary there) at θ_ref − strength·ΔW."""
        weights = {name: W - strength * SCALE * (B @ A) for name, (W, A, B) in self.weights.items()}
        if self.memorizer and strength:
            weights = {n: W + self.memorizer[f"{n}.B"] @ self.memorizer[f"{n}.A"] for n, W in weights.items()}
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        logits = functional_call(self.base, weights, kwargs={"input_ids": ids}).logits[0, :-1]
        at = labels != -100
        everything = torch.log_softmax(logits[at] / temperature, dim=-1)
        return everything[torch.arange(len(everything)), labels[at]], everything

    def cross_entropy(self, example: Example, strength: float, temperature: float = 1.0) -> Tensor:
        return -temperature * self.log_probs(example, strength, temperature)[0].mean()

    def npo(self, example: Example, strength: float, beta: float, given: int = 0) -> Tensor:
        known = self.log_probs(example, 0)[0].detach()[given:]
        weights = known.exp()
        ratio = (weights * (self.log_probs(example, strength)[0][given:] - known)).sum() / max(1, weights.sum().item())
        return 2 / beta * torch.log(1 + torch.exp(beta * ratio))

    def preference(self, example: Example, strength: float, beta: float) -> Tensor:
        ratio = (self.log_probs(example, strength)[0] - self.log_probs(example, 0)[0].detach()).sum()
        return -2 / beta * torch.log(1 + torch.exp(beta * ratio))

    def released_cross_entropy(
        self, example: Example, strength: float, beta: float, temperature: float = 1.0, given: int = 0
    ) -> Tensor:
        """The row's cross-entropy at a temperature, each token by p_ref, times w = 2σ(beta·r) as it is now. Of the tokens after
        the first `given` alone."""
        known = self.log_probs(example, 0)[0].detach()[given:]
        weights = known.exp() / max(1, known.exp().sum().item())
        ratio = (weights * (self.log_probs(example, strength)[0].detach()[given:] - known)).sum()
        tokens = -temperature * self.log_probs(example, strength, temperature)[0][given:]
        return 2 * torch.sigmoid(beta * ratio) * (weights * tokens).sum()

    def add_memorizer(self, seed: int) -> None:
        """A fresh LoRA adapter on every layer: A uniform in ±1/√in, B = 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, (_, A, B) in self.weights.items():
            drawn = torch.empty(A.shape).uniform_(-(A.shape[1] ** -0.5), A.shape[1] ** -0.5, generator=generator)
            self.memorizer |= {f"{name}.A": drawn.requires_grad_(), f"{name}.B": torch.zeros(B.shape).requires_grad_()}

    def kl(self, example: Example, strength: float, reference: "ByHand | None" = None, early: bool = False) -> Tensor:
        """With `early`, token t of the answer, counted from 1, has a weight of 1/t."""
        known, now = (reference or self).log_probs(example, 0)[1].detach(), self.log_probs(example, strength)[1]
        of_tokens = (known.exp() * (known - now)).sum(-1)
        weights = 1 / torch.arange(1, len(of_tokens) + 1) if early else torch.ones(len(of_tokens))
        return (weights * of_tokens).sum() / weights.sum()

    def gradients(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in self.leaves.items()}


def mean(terms) -> Tensor:
    return torch.stack(list(terms)).mean()


@pytest.mark.parametrize(
    ("settings", "targeted"),
    [
        ({"kl_at": "shipped", "temperature": 3.0}, None),
        ({}, None),
        ({"forget_term": "preference", "beta": 0.3}, None),
        ({"kl_at": "shipped"}, "descent"),
        ({}, "ascent"),
    ],
    ids=["shipped", "paper", "preference", "descent", "ascent"],
)
def test_mox_static_has_the_loss_and_gradients_of_the_paper_written_by_hand(
    settings: dict[str, str | float], targeted: str | None, pico: Callable[[str], Path], examples: Examples, trainer_of
) -> None:
    # The wanted answers are those of other people, in the order of the forget rows.
    wanted = examples[1][:4] if targeted else []
    if targeted:
        settings = settings | {"targeted": targeted}
    trainer, recorder = trainer_of(wanted=wanted, max_steps=1, method="mox_static", **settings)
    hand = ByHand(AutoModelForCausalLM.from_pretrained(pico("llama")), trainer.model)
    args, items = trainer.args, [trainer.train_dataset[i] for i in range(4)]
    trainer.train()

    if args.forget_term == "preference":
        forget = mean(hand.preference(e, -1, args.beta) for e in examples[0])
    else:
        forget = mean(hand.cross_entropy(e, -1, args.temperature) for e in examples[0])
    at = 2 if args.kl_at == "shipped" else -1
    kl = mean(hand.kl(e, at, early=bool(wanted)) for item in items for e in item["retain"])
    loss = forget + args.retain_weight * kl
    if targeted:
        sign, at = (1, 2) if targeted == "descent" else (-1, -1)
        loss = loss + sign * mean(hand.cross_entropy(e, at) for e in wanted)
    loss.backward()

    logged = recorder.logs
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["forget_loss"] == pytest.approx(forget.item(), rel=1e-4)
    assert logged["retain_kl"] == pytest.approx(kl.item(), rel=1e-4)
    same(recorder.gradients[0], hand.gradients())


@pytest.mark.parametrize(
    ("steps", "temperature", "targeted"),
    [(1, 3.0, None), (2, 3.0, None), (4, 3.0, None), (4, 1.0, None), (2, 3.0, "descent")],
)
def test_a_step_of_mox_goes_against_the_path_on_which_a_fresh_adapter_memorizes_from_the_forget_model(
    steps: int, temperature: float, targeted: str | None, pico: Callable[[str], Path], examples: Examples, trainer_of
) -> None:
    wanted = examples[1][:4] if targeted else []
    trainer, recorder = trainer_of(
        wanted=wanted,
        max_steps=1,
        seed=1,
        inner_steps=steps,
        inner_lr=0.02,
        beta=0.3,
        retain_weight=0.5,
        temperature=temperature,
    )
    hand = ByHand(AutoModelForCausalLM.from_pretrained(pico("llama")), trainer.model)
    items = [trainer.train_dataset[i] for i in range(4)]
    trainer.train()

    kl = mean(hand.kl(e, 2, early=bool(wanted)) for item in items for e in item["retain"])
    terms = 0.5 * kl + (mean(hand.cross_entropy(e, 2) for e in wanted) if targeted else 0)
    terms.backward()
    expected = {name: gradient.clone() for name, gradient in hand.gradients().items()}
    # The rows as the loader dealt them to this step: mini-batch k has every K-th of them.
    order = [next(e for e in examples[0] if e["row"] == row) for row in recorder.forget_rows]
    hand.add_memorizer(trainer.args.seed)
    given = [0] * len(order)
    if targeted:
        trainer.state.global_step = 0
        given = beginnings(trainer, Collator(0)(order)).tolist()
        assert max(given) > 0
    cut = list(zip(order, given, strict=True))
    losses = []
    for k in range(steps):
        for leaf in [*hand.leaves.values(), *hand.memorizer.values()]:
            leaf.grad = None
        losses.append(mean(hand.npo(e, 2, 0.3, n) for e, n in cut[k::steps]) / steps)
        (mean(hand.released_cross_entropy(e, 2, 0.3, temperature, n) for e, n in cut[k::steps]) / steps).backward()
        for name, leaf in hand.leaves.items():
            expected[name] -= leaf.grad
        for leaf in hand.memorizer.values():
            leaf.data -= 0.02 * leaf.grad.sign()

    assert recorder.logs["forget_loss"] == pytest.approx(sum(losses).item(), rel=1e-4)
    assert recorder.logs["retain_kl"] == pytest.approx(kl.item(), rel=1e-4)
    same(recorder.gradients[0], expected)


def test_of_every_second_row_a_beginning_is_given_which_depends_on_row_and_step_alone(
    examples: Examples, trainer_of
) -> None:
    forget = examples[0]
    assert beginnings(trainer_of()[0], Collator(0)(forget)) is None  # no other answer is taught
    trainer, _ = trainer_of(wanted=examples[1][:4])
    lengths = torch.tensor([len(each) - 1 for each in Collator(0)(forget)["answers"]])  # without the token that ends it
    found = []
    for trainer.state.global_step in range(200):
        found.append(beginnings(trainer, Collator(0)(forget)))
        assert torch.equal(found[-1][2:], beginnings(trainer, Collator(0)(forget[2:])))  # in whatever pass
    shares = torch.stack(found) / lengths
    assert 0.4 < (shares == 0).double().mean() < 0.65
    assert 0.6 < shares.max() <= GIVEN
    assert len({tuple(each.tolist()) for each in found}) > 100


def test_the_gradient_of_npos_loss_is_against_the_cross_entropy_weighted_by_what_is_not_released(
    pico: Callable[[str], Path], examples: Examples, trainer_of
) -> None:
    """So going up NPO's loss memorizes: it is going down w·CE, w = 2σ(beta·r)."""
    trainer, _ = trainer_of()
    hand = ByHand(AutoModelForCausalLM.from_pretrained(pico("llama")), trainer.model)
    hand.npo(examples[0][0], 2, 0.3).backward()
    expected = {name: -gradient.clone() for name, gradient in hand.gradients().items()}
    for leaf in hand.leaves.values():
        leaf.grad = None
    hand.released_cross_entropy(examples[0][0], 2, 0.3).backward()
    same(hand.gradients(), expected)


def test_with_one_inner_step_and_a_temperature_of_1_mox_has_the_gradients_of_npo_mean_at_the_model_that_ships(
    pico: Callable[[str], Path], examples: Examples, trainer_of
) -> None:
    trainer, recorder = trainer_of(max_steps=1, inner_steps=1, temperature=1.0, beta=0.3)
    hand = ByHand(AutoModelForCausalLM.from_pretrained(pico("llama")), trainer.model)
    items = [trainer.train_dataset[i] for i in range(4)]
    trainer.train()
    kl = mean(hand.kl(e, 2) for item in items for e in item["retain"])
    (mean(hand.npo(e, 2, 0.3) for e in examples[0]) + kl).backward()
    same(recorder.gradients[0], hand.gradients())


def test_a_task_vector_with_a_retain_term_has_its_gradient(
    pico: Callable[[str], Path], examples: Examples, trainer_of
) -> None:
    trainer, recorder = trainer_of(max_steps=1, method="task_vector", retain_term="kl", alpha=1.0)
    hand = ByHand(AutoModelForCausalLM.from_pretrained(pico("llama")), trainer.model)
    items = [trainer.train_dataset[i] for i in range(4)]
    trainer.train()
    kl = mean(hand.kl(e, -1) for item in items for e in item["retain"])
    (mean(hand.cross_entropy(e, -1) for e in examples[0]) + kl).backward()
    same(recorder.gradients[0], hand.gradients())


def test_the_temperature_falls_to_1_in_three_quarters_of_the_training_and_stays_there(trainer_of, monkeypatch) -> None:
    assert [falling(3.0, done) for done in (0, 0.375, 0.75, 1)] == [3, 2, 1, 1]
    seen = []
    known = Answers.known_cross_entropy
    monkeypatch.setattr(Answers, "known_cross_entropy", lambda a, t, given: (seen.append(t), known(a, t, given))[1])
    trainer, _ = trainer_of(max_steps=4, inner_steps=1, temperature=4.0)
    trainer.train()
    assert seen == [4, 3, 2, 1]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_after_the_path_every_weight_is_back_bit_for_bit(quantization: str, trainer_of) -> None:
    trainer, recorder = trainer_of(max_steps=1, inner_lr=0.1, quantization=quantization)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    seen: list[dict[str, Tensor]] = []

    class Before(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    trainer.add_callback(Before())
    trainer.train()
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in before.items())
    assert all(gradient.norm() > 0 for gradient in recorder.gradients[0].values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_top_of_earlier_requests_the_sum_is_held_at_the_reference_and_their_rows_where_they_are(
    checkpointing: bool, pico: Callable[[str], Path], examples: Examples, trainer_of
) -> None:
    forget, retain = examples
    protected, retain = retain[:4], retain[4:]
    trainer, recorder = trainer_of(
        method="mox_static",
        kl_at="shipped",
        retain=retain,
        protected=protected,
        earlier=True,
        max_steps=1,
        activation_checkpointing=checkpointing,
    )
    reference, now = (AutoModelForCausalLM.from_pretrained(pico("llama")) for _ in range(2))
    change = {name: factors.delta() for name, factors in current_factors(trainer.model, EARLIER).items()}
    for name, delta in change.items():
        now.get_submodule(name).weight.data += delta
    items = [trainer.train_dataset[i] for i in range(4)]
    hand, known = ByHand(now, trainer.model), ByHand(reference, trainer.model)
    trainer.train()

    memorized = mean(hand.cross_entropy(e, -1) for e in forget)
    kl = mean(hand.kl(e, 2, known) for item in items for e in item["retain"])
    stays = mean(hand.kl(e, 2) for e in protected)
    assert sorted(e["row"] for item in items for e in item["protected"]) == sorted(e["row"] for e in protected)
    loss = memorized + trainer.args.retain_weight * (kl + stays)
    loss.backward()
    for name, expected in {"loss": loss, "forget_loss": memorized, "retain_kl": kl, "protected_kl": stays}.items():
        assert recorder.logs[name] == pytest.approx(expected.item(), rel=1e-4)
    same(recorder.gradients[0], hand.gradients())
    # What is forgotten already has not moved, and is no part of what is kept.
    assert all(torch.equal(f.delta(), change[n]) for n, f in current_factors(trainer.model, EARLIER).items())
    trainer.save_model()
    weights = load_file(Path(trainer.args.output_dir) / "adapter_model.safetensors")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in weights.items()} == {4}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_a_step_in_several_passes_has_the_losses_and_gradients_of_one_in_one_pass(
    trainer_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(overhead: int) -> tuple[Recorder, int]:
        monkeypatch.setitem(OVERHEAD, "cpu", overhead)
        trainer, recorder = trainer_of(max_steps=1)
        passes, descend = [], trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: passes.append(1) or descend(*args, **kwargs)
        trainer.train()
        return recorder, len(passes)

    (one, together), (several, apart) = step(10**6), step(0)
    assert together == 1 < apart
    for name in ("loss", "forget_loss", "retain_kl"):
        assert several.logs[name] == pytest.approx(one.logs[name], rel=1e-5)
    same(several.gradients[0], one.gradients[0])


@contextlib.contextmanager
def too_little_memory(trainer: UnlearnTrainer, at_pass: int, way: str = "forward", tokens: int = 0):
    """Within it memory runs out once, in the forward or backward pass of this number; or in each pass of more than `tokens`.

    Yields the tokens of each pass.
    """
    passes: list[int] = []

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
        passes.append(kwargs["input_ids"].numel())
        if way == "forward" and (passes[-1] > tokens > 0 or len(passes) == at_pass):
            fail()

    def backward(module: nn.Module, args: tuple, output: Tensor) -> None:
        if way == "backward" and len(passes) == at_pass and output.requires_grad:
            output.register_hook(lambda gradient: fail())

    # Gradients of the upper layer's weights are there already when the lower one's output has its own.
    layers = backbone(trainer.causal_lm)
    hooks = [
        layers.register_forward_pre_hook(forward, with_kwargs=True),
        layers.layers[0].mlp.register_forward_hook(backward),
    ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def hooks_of(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]


# Settings, and the pass at which memory runs out.
TOO_LITTLE = {
    "on the path": ({"inner_steps": 2, "inner_lr": 0.02}, 4),
    "in the terms of the last micro-batch": (
        {"inner_steps": 2, "inner_lr": 0.02, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        -1,
    ),
    "in pairs": ({"method": "dpo", "alpha": None}, -1),
}


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("where", TOO_LITTLE)
def test_where_memory_runs_out_the_step_is_computed_again_in_smaller_passes_with_the_same_gradients(
    where: str, way: str, examples: Examples, trainer_of
) -> None:
    settings, number = TOO_LITTLE[where]
    settings = settings | {"max_steps": 1, "wanted": examples[1][:4] if where == "in pairs" else []}
    trainer, expected = trainer_of(**settings)
    with too_little_memory(trainer, at_pass=0) as passes:
        trainer.train()
    number = number % (len(passes) + 1)
    trainer, found = trainer_of(**settings)
    before = hooks_of(trainer.model)
    with (
        too_little_memory(trainer, number, way) as again,
        pytest.warns(UserWarning, match=f"memory ran out in a pass of {passes[number - 1]:,} tokens.*at most"),
    ):
        trainer.train()
    assert len(again) > len(passes)
    assert hooks_of(trainer.model) == before
    same(found.gradients[0], expected.gradients[0])
    for name in ("loss", "forget_loss"):
        assert found.logs[name] == pytest.approx(expected.logs[name], rel=1e-4)


class Waits(TorchDispatchMode):
    """Counts the operations of loramox that would wait for a GPU to have computed all before them."""

    ALWAYS = frozenset(
        f"aten::{name}" for name in ("_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero")
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        masked = name in ("aten::index", "aten::index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in self.ALWAYS or masked:
            frame = sys._getframe(1)
            while frame and not any(
                f"/{package}/" in frame.f_code.co_filename for package in ("loramox", "transformers", "peft")
            ):
                frame = frame.f_back
            if frame and "/loramox/" in frame.f_code.co_filename:
                self.seen.append(f"{name} in {frame.f_code.co_name}")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("targeted", [False, True])
def test_a_step_waits_for_the_gpu_once_however_many_passes_it_has(
    targeted: bool, examples: Examples, monkeypatch: pytest.MonkeyPatch, trainer_of
) -> None:
    monkeypatch.setitem(OVERHEAD, "cpu", 0)  # a pass for each length
    trainer, _ = trainer_of(
        max_steps=2, inner_steps=2, reference_cache_gb=0, wanted=examples[1][:4] if targeted else ()
    )
    step, waits = trainer.training_step, []

    def counted(*args: Any) -> Tensor:
        with Waits() as found:
            loss = step(*args)
        waits.append(found.seen)
        return loss

    trainer.training_step = counted
    trainer.train()
    assert waits[1] == ["aten::_local_scalar_dense in close"]


def test_passes_stay_as_small_as_they_had_to_become(trainer_of) -> None:
    trainer, _ = trainer_of(num_train_epochs=2, per_device_train_batch_size=2, inner_steps=1, reference_cache_gb=0)
    longest = max(len(e["input_ids"]) for e in [*trainer.train_dataset.forget, *trainer.train_dataset.retain])
    with too_little_memory(trainer, 0, tokens=2 * longest) as passes, pytest.warns(UserWarning, match="at most"):
        trainer.train()
    too_large = [number for number, tokens in enumerate(passes) if tokens > 2 * longest]
    assert 0 < len(too_large) < 4
    assert trainer.state.global_step == 4
    assert max(passes[too_large[-1] + 1 :]) <= 2 * longest


@pytest.mark.parametrize(
    ("processes", "what"), [(1, r"in a pass of a single row .*jsonl, row \d"), (2, r"in training \(CUDA out of memory")]
)
def test_a_step_that_does_not_fit_is_an_error_that_says_what_to_change(
    processes: int, what: str, trainer_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = trainer_of(max_steps=1)
    monkeypatch.setattr("loramox.train.passes.PartialState", lambda: SimpleNamespace(num_processes=processes))
    with (
        too_little_memory(trainer, 0, tokens=1),
        pytest.raises(
            RunError,
            match=rf"{what}.*--activation_checkpointing true.*--max_length.*--quantization nf4",
        ) as refused,
    ):
        trainer.train()
    resumed, anew = (
        set(re.findall(r"--(\w+)", part)) for part in str(refused.value).split("Or start from the beginning")
    )
    assert resumed - {"resume"} <= set(MAY_DIFFER)  # as --resume takes it
    assert "overwrite" in anew
    assert not anew & set(MAY_DIFFER)


@pytest.mark.parametrize("method", ["mox", "mox_static"])
def test_where_memory_runs_out_fewer_of_the_watched_rows_are_scored_at_a_time_and_the_scores_are_the_same(
    method: str, trainer_of
) -> None:
    trainer, _ = trainer_of(method=method, per_device_eval_batch_size=4)
    expected = trainer.evaluate()
    longest = max(len(e["input_ids"]) for e in [*trainer.train_dataset.forget, *trainer.train_dataset.retain])
    with (
        too_little_memory(trainer, 0, tokens=3 * longest) as passes,
        pytest.warns(UserWarning, match="memory ran out with --per_device_eval_batch_size 4: 2 at a time"),
    ):
        found = trainer.evaluate()
    too_large = [tokens for tokens in passes if tokens > 3 * longest]
    assert len(too_large) < len(passes) / 2  # not tried again
    for name in ("loss", "probability", "tokens_right", "rows_right", "late_probability"):
        assert found[f"eval_forget_{name}"] == pytest.approx(expected[f"eval_forget_{name}"], rel=1e-4)


def test_under_autocast_the_memorizing_adapter_keeps_no_copy_of_a_layers_input() -> None:
    layer = nn.Linear(8, 4, dtype=torch.bfloat16).requires_grad_(False)
    layer.register_forward_hook(_adding(nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(4, 2))))
    x, kept = torch.randn(3, 8, dtype=torch.bfloat16), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)
    with keep, torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert [tensor.data_ptr() for tensor in kept if tensor.shape == x.shape] == [x.data_ptr()]


def test_other_errors_are_raised_as_they_are(trainer_of) -> None:
    trainer, _ = trainer_of(max_steps=1)

    def fail(*args: object) -> None:
        raise RuntimeError("expected scalar type Half but found Float")

    backbone(trainer.causal_lm).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="scalar type"):
        trainer.train()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("flag", ["activation_checkpointing", "gradient_checkpointing"])
def test_gradients_with_checkpointed_activations_are_those_without(flag: str, quantization: str, trainer_of) -> None:
    plain, expected = trainer_of(max_steps=1, quantization=quantization)
    plain.train()
    trainer, found = trainer_of(max_steps=1, quantization=quantization, **{flag: True})
    assert not plain.model.is_activation_checkpointing
    trainer.train()
    assert trainer.model.is_activation_checkpointing
    same(found.gradients[0], expected.gradients[0])


def test_rows_that_come_round_again_are_passed_through_the_reference_once_and_nothing_else_changes(
    trainer_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(gigabytes: float) -> tuple[Recorder, int]:
        trainer, recorder = trainer_of(num_train_epochs=6, reference_cache_gb=gigabytes)
        passed: list[int] = []
        through = trainer.reference._pass

        def counted(model: nn.Module, batch: dict, layer: int | None = None) -> Tensor:
            passed.append(len(batch["rows"]))
            return through(model, batch, layer)

        monkeypatch.setattr(trainer.reference, "_pass", counted)
        trainer.train()
        return recorder, sum(passed)

    (with_it, few), (without, many) = run(8.0), run(0.0)
    rows = [*trainer_of()[0].train_dataset.forget, *trainer_of()[0].train_dataset.retain]
    assert few == len(rows) < many
    for name in ("loss", "forget_loss", "retain_kl"):
        assert with_it.logs[name] == pytest.approx(without.logs[name], rel=1e-4)
    same(with_it.gradients[-1], without.gradients[-1])


def test_two_batches_of_two_accumulated_are_one_batch_of_four(trainer_of) -> None:
    whole, expected = trainer_of(max_steps=1)
    whole.train()
    halves, found = trainer_of(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    halves.train()
    assert len(found.gradients) == 1
    same(found.gradients[0], expected.gradients[0])
    for name in ("loss", "forget_loss", "retain_kl"):
        assert found.logs[name] == pytest.approx(expected.logs[name], rel=1e-5)


def test_each_epoch_holds_other_retain_rows_also_when_other_processes_load_them(trainer_of) -> None:
    def rows_seen(**settings) -> list[list[str]]:
        trainer, _ = trainer_of(num_train_epochs=2, retain_per_forget=1, **settings)
        seen, step = [], trainer.training_step

        def watch(model: nn.Module, inputs: dict, *more) -> Tensor:
            seen.append(sorted(inputs["retain"]["rows"]))
            return step(model, inputs, *more)

        trainer.training_step = watch
        trainer.train()
        return seen

    here = rows_seen()
    assert not set(here[0]) & set(here[1])
    assert rows_seen(dataloader_num_workers=1) == here


def test_what_is_logged_has_every_part_of_the_objective_and_both_watched_probabilities(trained: Path) -> None:
    log = json.loads((trained / "run.json").read_text())["log"]
    logged = {name for entry in log for name in entry}
    assert {"forget_loss", "retain_kl", "eval_forget_probability", "eval_retain_probability"} <= logged
    assert all(math.isfinite(v) for entry in log for v in entry.values())


def test_the_forget_model_that_is_watched_while_training_is_the_one_that_is_shipped(
    trained: Path, pico: Callable[[str], Path], examples: Examples
) -> None:
    record = json.loads((trained / "run.json").read_text())
    assert record["forget_adapter"]["truncation_error"] == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico("llama")), trained / "forget-adapter")
    for part, rows in zip(("forget", "retain"), examples, strict=True):
        watched = [entry[f"eval_{part}_probability"] for entry in record["log"] if f"eval_{part}_probability" in entry]
        assert watched[-1] == pytest.approx(probability(model, rows), rel=1e-4)
        assert watched[0] == pytest.approx(probability(model.get_base_model(), rows, model), rel=1e-4)
        assert watched[-1] != pytest.approx(watched[0], rel=1e-2)
        right = [e[name] for e in record["log"] if (name := f"eval_{part}_tokens_right") in e]
        assert right[-1] == pytest.approx(tokens_right(model, rows), rel=1e-4)
        assert right[0] == pytest.approx(tokens_right(model, rows, model), rel=1e-4)


@torch.no_grad()
def probability(model: nn.Module, rows: Sequence[Example], peft: PeftModel | None = None) -> float:
    """Mean over rows of the geometric mean of the answer tokens' probabilities; with `peft`, its adapter off."""
    values = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        if peft:
            with peft.disable_adapter():
                logits = peft(input_ids=ids).logits
        else:
            logits = model(input_ids=ids).logits
        values.append(math.exp(-F.cross_entropy(logits[0, :-1], labels).item()))
    return sum(values) / len(values)


@torch.no_grad()
def tokens_right(model: nn.Module, rows: Sequence[Example], peft: PeftModel | None = None) -> float:
    """Mean over rows of the share of answer tokens that are the first choice; with `peft`, its adapter off."""
    shares = []
    for row in rows:
        with peft.disable_adapter() if peft else contextlib.nullcontext():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        shares.append((logits.argmax(-1) == labels)[labels != IGNORED].float().mean().item())
    return sum(shares) / len(shares)


def test_momentum_is_the_recursion_on_delta_once_an_epoch_and_off_it_is_delta_itself(trainer_of) -> None:
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "momentum_rank": 64}
    trainer, recorder = trainer_of(momentum=0.3, **settings)
    trainer.train()
    assert len(recorder.deltas) == 6
    for name, factors in trainer.momentum.average.items():
        M = recorder.deltas[1][name]
        for delta in (recorder.deltas[step][name] for step in (3, 5)):
            M = 0.3 * delta + 0.7 * M
        torch.testing.assert_close(factors.delta(), M, rtol=1e-4, atol=1e-6)
        assert (factors.delta() - recorder.deltas[-1][name]).norm() > 0.01 * M.norm()

    trainer, recorder = trainer_of(momentum=1.0, **settings)
    trainer.train()
    for name, factors in trainer.momentum.average.items():
        assert torch.equal(factors.delta(), recorder.deltas[-1][name])


def test_momentum_also_takes_in_the_last_step_when_it_ends_no_interval(trainer_of) -> None:
    trainer, recorder = trainer_of(max_steps=3, momentum=0.5, momentum_every=2)
    trainer.train()
    assert trainer.momentum.ticks == 2
    for name, factors in trainer.momentum.average.items():
        expected = 0.5 * recorder.deltas[2][name] + 0.5 * recorder.deltas[1][name]
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-4, atol=1e-6)


def test_without_averaging_every_checkpoint_has_delta_itself_as_it_was_then(trainer_of, tmp_path: Path) -> None:
    """Two steps an epoch: the average would be updated after every other step."""
    trainer, recorder = trainer_of(
        num_train_epochs=2,
        per_device_train_batch_size=2,
        momentum=1.0,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
    )
    trainer.train()
    for step in range(1, 5):
        for name, factors in Momentum.load(tmp_path / "trained" / f"checkpoint-{step}").average.items():
            assert torch.equal(factors.delta(), recorder.deltas[step - 1][name])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_training_and_watching_leave_every_frozen_weight_as_it_was_bit_by_bit(quantization: str, trainer_of) -> None:
    trainer, _ = trainer_of(num_train_epochs=2, quantization=quantization, eval_strategy="epoch")
    frozen = {n: t.clone() for n, t in trainer.model.state_dict().items() if "lora_" not in n}
    trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], before) for name, before in frozen.items())


@pytest.fixture(scope="module")
def saturated(
    pico: Callable[[str], Path],
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pico Llama that knows its forget rows by heart."""
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    width = max(len(e["input_ids"]) for e in examples[0])
    ids = torch.tensor([e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples[0]])
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("saturated")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reference_that_knows_the_rows_by_heart_is_warned_about_at_temperature_1_and_not_at_6(
    saturated: Path, trainer_of, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"base": saturated, "method": "mox_static", "max_steps": 1, "eval_on_start": True}

    def fresh(temperature: float) -> UnlearnTrainer:
        trainer, _ = trainer_of(temperature=temperature, **settings)
        for _, layer in lora_layers(trainer.model):
            nn.init.zeros_(layer.lora_B["default"].weight)
        return trainer

    with pytest.warns(UserWarning, match="by heart.*raise --temperature"):
        fresh(1.0).train()
    assert "at temperature 1," in capsys.readouterr().out
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh(6.0).train()
    assert not [w for w in caught if "by heart" in str(w.message)]


@pytest.mark.parametrize("momentum", [0.675, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_rows_and_leaves_good_checkpoints(
    momentum: float, trainer_of, tmp_path: Path
) -> None:
    """A learning rate of 1e30 makes weights after the first step that are finite, and of no use."""
    trainer, _ = trainer_of(
        max_steps=5, learning_rate=1e30, momentum=momentum, save_strategy="steps", save_steps=1, save_total_limit=5
    )
    with pytest.raises(
        NonFiniteLossError, match=r"at step 2, in the forget rows of its batch \(.*forget.jsonl, row \d"
    ):
        trainer.train()
    assert (tmp_path / "trained" / "checkpoint-1" / "momentum.safetensors").exists()


class Poison(TrainerCallback):
    """Puts one NaN into the adapter in the optimiser's third step."""

    def on_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == 2:
            next(lora_layers(model))[1].lora_A["default"].weight.data[0, 0] = math.nan


@pytest.mark.parametrize("last", [3, 5], ids=["in-the-last-step", "before-the-last-step"])
def test_weights_that_are_not_finite_are_never_saved_nor_averaged(last: int, trainer_of, tmp_path: Path) -> None:
    trainer, _ = trainer_of(max_steps=last, momentum_every=1, save_strategy="steps", save_steps=1, save_total_limit=5)
    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteLossError, match="step 3"):
        trainer.train()
    checkpoints = sorted(folder.name for folder in (tmp_path / "trained").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]


def test_a_forget_model_that_overflows_in_the_last_step_is_not_saved(trainer_of, tmp_path: Path) -> None:
    """Its weights are finite, and its answers are not."""
    trainer, _ = trainer_of(
        max_steps=1, learning_rate=1e30, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1
    )
    with pytest.raises(NonFiniteLossError, match=r"probability is nan after step 1.*lower --learning_rate"):
        trainer.train()
    assert not list((tmp_path / "trained").glob("checkpoint-*"))


def test_a_reference_that_does_not_know_the_rows_is_warned_about(trainer_of) -> None:
    trainer, _ = trainer_of(max_steps=1, eval_on_start=True)
    with pytest.warns(UserWarning, match="hardly knows the forget rows.*--prompt_template"):
        trainer.train()


def test_progress_is_one_bar_with_the_newest_numbers_behind_it(trainer_of, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = trainer_of(num_train_epochs=2, eval_strategy="epoch", disable_tqdm=False)
    trainer.train()
    shown = capsys.readouterr()
    last = shown.err.replace("\r", "\n").strip().splitlines()[-1]
    assert all(f"{part}=" in last for part in ("forget", "retain", "loss"))
    assert "eval_runtime" not in shown.out + shown.err
