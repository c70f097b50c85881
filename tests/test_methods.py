"""The other methods: their formulas by hand and as OpenUnlearning has them, what they do, and what they ship."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from test_trainer import ByHand, Recorder, mean, probability, same
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import (
    Columns,
    Data,
    ReferenceConfig,
    RunConfig,
    Tokenisation,
    UnlearnConfig,
    UnlearnTrainer,
    add_lora,
    encode,
    load_reference,
    read_rows,
    unlearn,
)
from loramox.adapter.export import extrapolate
from loramox.adapter.factors import read_factors
from loramox.cli.arguments import settings_of
from loramox.data.encode import Example
from loramox.data.microbatches import OVERHEAD
from loramox.errors import AdapterError, RowsError, SettingsError
from loramox.model.lora import current_factors, lora_layers
from loramox.train.losses import (
    dpo,
    generic_targets,
    log_prob,
    npo,
    simnpo,
    squared_distance,
    steering_vector,
)
from loramox.train.registry import METHODS

Examples = tuple[list[Example], list[Example]]
KINDS = (RunConfig, ReferenceConfig, Data, UnlearnConfig, Columns, Tokenisation)
REFUSALS = ["I do not know.", "I cannot say."]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_npo_by_hand() -> None:
    # σ(−β·r) is 1/2 at r = 0, 1/4 at β·r = ln 3 and 3/4 at β·r = −ln 3.
    ratio = double(0.0, math.log(3) / 0.1, -math.log(3) / 0.1)
    assert torch.allclose(npo(ratio, 0.1), 20 * double(math.log(2), math.log(4), math.log(4 / 3)), rtol=1e-12)


def test_npo_slows_down_on_rows_that_are_less_likely_than_before() -> None:
    ratio = double(-60.0, 0.0, 60.0).requires_grad_()
    (gradient,) = torch.autograd.grad(npo(ratio, 0.1).sum(), ratio)
    assert torch.allclose(gradient, 2 * torch.sigmoid(0.1 * ratio), rtol=1e-9)


def test_npo_at_small_beta_is_gradient_ascent_up_to_a_constant() -> None:
    ratio = double(-3.0, 0.0, 7.0)
    assert torch.allclose(npo(ratio, 1e-5) - 2e5 * math.log(2), ratio, atol=1e-3)


def test_simnpo_by_hand() -> None:
    # −β·(log p)/|y| = 2·ln 3 / 2 = ln 3: σ = 3/4; with a margin of ln 3 it is σ(0) = 1/2.
    value = double(-math.log(3) / 2)
    assert simnpo(value, 2.0).item() == pytest.approx(math.log(4 / 3))
    assert simnpo(value, 2.0, math.log(3)).item() == pytest.approx(math.log(2))


def test_dpo_by_hand_and_with_an_answer_as_likely_as_before_it_is_npo() -> None:
    # σ(0.5·(1 + 3)) = 1/(1 + e⁻²)
    assert dpo(double(1.0), double(-3.0), 0.5).item() == pytest.approx(4 * math.log(1 + math.exp(-2)))
    ratio = double(-4.0, 0.3, 5.0)
    assert torch.equal(dpo(torch.zeros(3, dtype=torch.float64), ratio, 0.1), npo(ratio, 0.1))


def test_squared_distance_by_hand() -> None:
    assert squared_distance(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([3.0, 1.0])).tolist() == [2.5, 5.0]


def test_steering_vector_has_the_length_asked_for_and_a_direction_of_the_seed() -> None:
    vector = steering_vector(64, 6.5, seed=3)
    assert vector.norm().item() == pytest.approx(6.5, rel=1e-6)
    assert (vector >= 0).all()
    assert torch.allclose(steering_vector(64, 13.0, seed=3), 2 * vector)
    assert not torch.allclose(steering_vector(64, 6.5, seed=4), vector)


def test_generic_targets_by_hand() -> None:
    # Token 0 is raised by 1, token 2 is lowered: 5 − 5·1 = 0, 3, 4.
    reference, reinforced = torch.tensor([[5.0, 3.0, 4.0]]), torch.tensor([[6.0, 3.0, 1.0]])
    assert generic_targets(reference, reinforced, 5.0).tolist() == [2]
    assert generic_targets(reference, reinforced, 0.5).tolist() == [0]
    assert generic_targets(reference, reference, 5.0).tolist() == [0]


@pytest.fixture
def padded() -> tuple[Tensor, Tensor, Tensor]:
    """(logits, reference logits [rows, tokens, vocabulary], labels) with 3, 3 and 3 answer tokens at different places."""
    generator = torch.Generator().manual_seed(0)
    logits, known = (3 * torch.randn(3, 7, 13, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.full((3, 7), -100)
    for row, start in enumerate((1, 2, 4)):
        labels[row, start : start + 3] = torch.randint(13, (3,), generator=generator)
    return logits, known, labels


def sequence_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """OpenUnlearning's `compute_batch_nll`, of logits: cross-entropy of the shifted labels, summed over each sequence."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return losses.sum(-1)


def row_log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """Ours: log p of the answer tokens alone, summed by row."""
    at = labels[:, 1:] != -100
    values = log_prob(logits[:, :-1][at], labels[:, 1:][at])
    return torch.zeros(len(labels), dtype=torch.float64).index_add(0, at.nonzero()[:, 0], values)


def test_npo_simnpo_and_graddiff_are_openunlearnings(padded: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, known, labels = padded
    ours, theirs = row_log_p(logits, labels), sequence_nll(logits, labels)
    lose = -(theirs - sequence_nll(known, labels))
    # compute_dpo_loss with no winner; SimNPO's compute_loss with delta, which is γ / β; GradDiff's with -outputs.loss.
    assert torch.allclose(
        npo(ours - row_log_p(known, labels), 0.1).mean(), -2 / 0.1 * F.logsigmoid(0.1 * (0.0 - lose)).mean(), rtol=1e-12
    )
    per_token = theirs / (labels != -100).sum(-1)
    for beta, delta in ((4.5, 0.0), (2.5, 0.4)):
        their_loss = -F.logsigmoid(beta * (per_token - delta)).mean() * 2 / beta
        assert torch.allclose(simnpo(ours / 3, beta, beta * delta).mean(), their_loss, rtol=1e-12)
    outputs_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose((ours / 3).mean(), -outputs_loss, rtol=1e-12)


@pytest.fixture(scope="module")
def knowing(
    pico: Callable[[str], Path],
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pico Llama that knows forget and retain rows, without being sure of every token."""
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [*examples[0], *examples[1]]
    width = max(len(e["input_ids"]) for e in rows)
    ids, labels = (
        torch.tensor([e[name] + [fill] * (width - len(e[name])) for e in rows])
        for name, fill in (("input_ids", 0), ("labels", -100))
    )
    for _ in range(60):
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("knowing")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, rows: tuple[Path, Path]) -> dict[str, Path]:
    """forget.jsonl with a column of other answers, retain.jsonl, refusals.txt."""
    folder = tmp_path_factory.mktemp("files")
    known = [json.loads(line) for line in rows[0].read_text().splitlines()]
    others = [
        r | {"other": k["answer"].replace("lives", "dwells")} for r, k in zip(known, known[1:] + known[:1], strict=True)
    ]
    (folder / "forget.jsonl").write_text("".join(json.dumps(r) + "\n" for r in others))
    (folder / "refusals.txt").write_text("\n".join(REFUSALS) + "\n\n")
    return {"forget": folder / "forget.jsonl", "retain": rows[1], "refusals": folder / "refusals.txt"}


@pytest.fixture(scope="module")
def run_of(
    knowing: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """A whole run of `unlearn` by a method: (its folder, its record). Each is run once."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(method: str) -> tuple[Path, dict[str, Any]]:
        if method not in done:
            more: dict[str, Any] = {
                "dpo": {"refusals": str(files["refusals"])},
                "po": {"refusals": str(files["refusals"])},
                "simnpo": {"beta": 1.0, "forget_weight": 1.0},  # the paper's are slow
                "rmu": {"rmu_layer": 1, "retain_weight": 1.0},
                "task_vector": {"alpha": 2.0},
                "npo_mean": {"beta": 0.3, "momentum": 1.0},
                "mox": {"beta": 0.3, "momentum": 1.0},
                "mox_static": {"temperature": 6.0, "retain_weight": 0.0, "alpha": 8.0, "momentum": 1.0},
            }.get(method, {})
            if method == "whp":
                more = {"reinforced": str(run("mox_static")[0] / "trained"), "whp_strength": 50.0}
            out = tmp_path_factory.mktemp(method) / "run"
            args = UnlearnConfig(
                **{"method": method} | more, use_cpu=True, num_train_epochs=12, learning_rate=2e-2, warmup_steps=0, save_strategy="no",
                eval_strategy="no", eval_on_start=False, retain_per_forget=1, report_to="none", disable_tqdm=True,
            )  # fmt: skip
            reference = ReferenceConfig(str(knowing), quantization="none", r=8, lora_alpha=16)
            data = Data(str(files["forget"]), str(files["retain"]))
            columns = Columns(wanted_column="other") if method == "altpo" else None
            done[method] = out, unlearn(RunConfig(str(out)), reference, data, args, columns)
        return done[method]

    return run


def loaded(knowing: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(knowing), adapter)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_and_ships_the_adapter_that_it_trained(
    method: str, run_of, knowing: Path, examples: Examples
) -> None:
    out, record = run_of(method)
    model = loaded(knowing, out / "forget-adapter")
    forget = probability(model, examples[0])
    assert probability(model.get_base_model(), examples[0], model) > 0.7
    # Another answer is taught by its first tokens; what comes after the true ones stays likely.
    assert forget < (0.6 if method in ("dpo", "po", "altpo") else 0.35)

    shipped, trained = (read_factors(out / name)[0] for name in ("forget-adapter", "trained/momentum"))
    turned = -record["settings"]["alpha"] if METHODS[method].alpha_is_free else 1.0
    assert shipped.keys() == trained.keys()
    assert all(torch.equal(shipped[name].delta(), turned * trained[name].delta()) for name in shipped)

    provenance = json.loads((out / "forget-adapter/provenance.json").read_text())
    title = record["method"]
    assert provenance["method"] == title
    assert provenance["settings"]["method"] == record["settings"]["method"] == method
    assert f"({title})" in (out / "forget-adapter/README.md").read_text()
    assert ("taught" in record["data"]) is (method in ("dpo", "po", "llmu"))
    cards = [(out / folder / "README.md").read_text() for folder in ("forget-adapter", "trained")]
    if METHODS[method].alpha_is_free:
        assert provenance["alpha"] == record["forget_adapter"]["alpha"] == record["settings"]["alpha"]
        assert "memoriz" in cards[0]
        assert "Do not ship" in cards[1]
    else:
        assert provenance["alpha"] is record["forget_adapter"]["alpha"] is None
        assert not any(word in card for card in cards for word in ("alpha", "α", "memoriz", "Do not ship"))


@pytest.mark.parametrize("method", ["ga_kl", "graddiff", "npo", "simnpo", "dpo", "altpo", "po", "rmu", "llmu"])
def test_a_method_with_a_retain_term_keeps_more_than_gradient_ascent(
    method: str, run_of, knowing: Path, examples: Examples
) -> None:
    kept, lost = (probability(loaded(knowing, run_of(m)[0] / "forget-adapter"), examples[1]) for m in (method, "ga"))
    assert kept > 2 * lost


@pytest.mark.parametrize(("method", "likelier"), [("po", True), ("dpo", True), ("altpo", True), ("npo", False)])
def test_answers_that_are_taught_become_likely(
    method: str, likelier: bool, run_of, knowing: Path, files: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [json.loads(line) for line in files["forget"].read_text().splitlines()]
    answers = [[r["other"]] if method == "altpo" else REFUSALS for r in rows]
    path = files["forget"].with_name("taught.jsonl")
    asked = [{"question": r["question"], "answer": a} for r, of in zip(rows, answers, strict=True) for a in of]
    path.write_text("".join(json.dumps(r) + "\n" for r in asked))
    taught = encode(read_rows(str(path)), tokenizer, Tokenisation(), context=128)
    model = loaded(knowing, run_of(method)[0] / "forget-adapter")
    before, after = probability(model.get_base_model(), taught, model), probability(model, taught)
    assert (after > 10 * before) is likelier


@pytest.fixture
def trainer_of(
    knowing: Path, examples: Examples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., tuple[UnlearnTrainer, Recorder]]:
    """A trainer whose adapter is not 0 to begin with, and what it records. One step holds all rows and taught answers."""

    def make(method: str, **settings: Any) -> tuple[UnlearnTrainer, Recorder]:
        reference = ReferenceConfig(str(knowing), quantization="none", r=4, lora_alpha=8)
        torch.manual_seed(1)
        model = add_lora(load_reference(reference), reference)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        defaults = {
            "output_dir": str(tmp_path / "trained"), "use_cpu": True, "report_to": "none", "save_strategy": "no",
            "eval_strategy": "no", "eval_on_start": False, "per_device_train_batch_size": 4, "warmup_steps": 0, "max_steps": 1,
            "max_grad_norm": 0, "logging_steps": 1, "disable_tqdm": True, "retain_per_forget": 2,
        }  # fmt: skip
        recorder = Recorded()
        wanted = examples[1][:4] if METHODS[method].answers not in (None, "wanted if given") else []
        args = UnlearnConfig(method=method, **defaults | settings)
        return UnlearnTrainer(model, args, *examples, tokenizer, wanted, callbacks=[recorder]), recorder

    return make


class Recorded(Recorder):
    """Without the weights that a loss does not reach: PEFT marks them as trained each time it switches the adapter on."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class OthersByHand(ByHand):
    """The terms of the other methods in plain PyTorch, beside those of `ByHand`."""

    def log_p(self, example: Example) -> Tensor:
        return self.log_probs(example, -1)[0]

    def ratio(self, example: Example) -> Tensor:
        return self.log_p(example).sum() - self.log_probs(example, 0)[0].sum().detach()

    def states(self, example: Example, strength: float, layer: int) -> Tensor:
        """What `layer` gives to the next, at the tokens before each of the answer's."""
        seen: list[Tensor] = []
        hook = self.base.model.layers[layer].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        self.log_probs(example, strength)
        hook.remove()
        return seen[0][0, :-1][torch.tensor(example["labels"])[1:] != -100]


SETTINGS: dict[str, dict[str, Any]] = {
    "npo": {"beta": 0.3, "retain_weight": 0.7},
    "simnpo": {"beta": 2.5, "margin": 0.2},
    "dpo": {"refusals": "not read here"},
    "po": {"refusals": "not read here"},
    "rmu": {"rmu_layer": 1, "retain_weight": 20.0},
    "ga": {},
}


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("mox")])
def test_loss_and_gradients_are_those_of_the_method_written_by_hand(
    method: str, trainer_of, run_of, knowing: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OVERHEAD, "cpu", 0)  # a pass for each length, so that this is told as well
    settings = SETTINGS.get(method, {})
    if method == "whp":
        settings = {"reinforced": str(run_of("mox_static")[0] / "trained"), "whp_strength": 50.0}
    trainer, recorder = trainer_of(method, **settings)
    hand = OthersByHand(AutoModelForCausalLM.from_pretrained(knowing), trainer.model)
    args, forget, wanted = trainer.args, examples[0], examples[1][:4]
    retain = [e for i in range(4) for e in trainer.train_dataset[i].get("retain", [])]
    assert len(retain) == (0 if method in ("ga", "whp", "task_vector") else 8)
    trainer.train()

    ga = mean(hand.log_p(e).mean() for e in forget)
    ce = mean(hand.cross_entropy(e, -1) for e in retain) if retain else 0.0
    kl = mean(hand.kl(e, -1) for e in retain) if retain else 0.0
    taught = mean(hand.cross_entropy(e, -1) for e in wanted)
    preferred = mean(
        20 * torch.log1p(torch.exp(-0.1 * (hand.ratio(w) - hand.ratio(e)))) for w, e in zip(wanted, forget, strict=True)
    )
    loss = {
        "npo_mean": lambda: mean(hand.npo(e, -1, 1.6) for e in forget) + kl,
        "task_vector": lambda: -ga,
        "ga": lambda: ga,
        "ga_kl": lambda: ga + kl,
        "graddiff": lambda: ga + ce,
        "npo": lambda: mean(2 / 0.3 * torch.log1p(hand.ratio(e).exp() ** 0.3) for e in forget) + 0.7 * ce,
        "simnpo": lambda: (
            0.125 * mean(2 / 2.5 * torch.log1p(torch.exp(2.5 * hand.log_p(e).mean() + 0.2)) for e in forget) + ce
        ),
        "dpo": lambda: preferred + ce,
        "altpo": lambda: preferred + ce,
        "po": lambda: taught + ce,
        "llmu": lambda: 0.5 * ga + taught + kl,
        "rmu": lambda: (
            mean((hand.states(e, -1, 1) - steering_vector(64, 6.5, args.seed)).square().mean() for e in forget)
            + 20 * mean((hand.states(e, -1, 1) - hand.states(e, 0, 1).detach()).square().mean() for e in retain)
        ),
        "whp": lambda: generic_by_hand(hand, knowing, args, forget),
    }[method]()
    loss.backward()

    assert recorder.logs["loss"] == pytest.approx(loss.item(), rel=1e-4)
    found, expected = recorder.gradients[0], hand.gradients()
    if method == "rmu":  # the layers above the steered one are not touched
        assert {name for name, g in expected.items() if g is None} == {n for n in expected if "layers.1." in n}
        expected = {name: g for name, g in expected.items() if g is not None}
    same(found, expected)


def generic_by_hand(hand: OthersByHand, knowing: Path, args: UnlearnConfig, forget: Sequence[Example]) -> Tensor:
    reinforced = loaded(knowing, Path(args.reinforced)).eval()
    losses, differ = [], 0
    for example in forget:
        at = torch.tensor(example["labels"])[1:] != -100
        with torch.no_grad():
            raised = reinforced(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1][at]
            with reinforced.disable_adapter():
                known = reinforced(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1][at]
        generic = (known - args.whp_strength * (raised - known).clamp(min=0)).argmax(-1)
        differ += (generic != torch.tensor(example["labels"])[1:][at]).sum().item()
        losses.append(-hand.log_probs(example, -1)[1][torch.arange(len(generic)), generic].mean())
    assert differ
    return mean(losses)


def test_the_adapter_that_is_saved_is_the_trainers_model_and_so_is_the_one_that_was_watched(
    trainer_of, knowing: Path, examples: Examples, tmp_path: Path
) -> None:
    trainer, recorder = trainer_of("npo", max_steps=3, learning_rate=1e-2, eval_strategy="steps", eval_steps=3)
    trainer.train()
    trainer.save_model()
    extrapolate(tmp_path / "trained", tmp_path / "shipped")
    model = loaded(knowing, tmp_path / "shipped").eval()
    ids = torch.tensor([examples[0][0]["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5)
    for name, factors in read_factors(tmp_path / "shipped")[0].items():
        assert torch.equal(factors.delta(), current_factors(trainer.model)[name].delta())
    assert recorder.logs["eval_forget_probability"] == pytest.approx(probability(model, examples[0]), rel=1e-4)
    assert {"forget_loss", "retain_loss"} <= recorder.logs.keys()


def test_accumulated_batches_are_one_batch_also_with_a_reinforced_adapter_of_another_rank(trainer_of, run_of) -> None:
    reinforced = {"reinforced": str(run_of("mox_static")[0] / "trained")}
    whole, expected = trainer_of("whp", **reinforced)
    whole.train()
    halves, found = trainer_of("whp", per_device_train_batch_size=2, gradient_accumulation_steps=2, **reinforced)
    halves.train()
    same(found.gradients[0], expected.gradients[0])


def test_a_method_that_was_trained_to_forget_has_no_alpha(run_of, tmp_path: Path) -> None:
    folder = run_of("npo")[0] / "trained"
    with pytest.raises(SettingsError, match=r"--alpha 4: NPO, arXiv 2404.05868 has no alpha.*its scale"):
        extrapolate(folder, tmp_path / "shipped", alpha=4.0)
    assert extrapolate(folder, tmp_path / "shipped")["alpha"] is None
    with pytest.raises(SettingsError, match=r"--alpha -1: .* below it is on the memorizing side"):
        extrapolate(run_of("mox_static")[0] / "trained", tmp_path / "other", alpha=-1.0)


def test_npo_mean_ships_the_same_change_as_npos_loss_on_the_other_side_of_the_reference(
    knowing: Path, examples: Examples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """loramox 0.1 trained npo_mean at θ_ref − 8·ΔW. With LoRA's scale at 8 instead it is the same, bit for bit: B → −B changes
    nothing at B = 0, nor for Adam. So nothing of it is memorized or extrapolated."""
    changes = []
    for scale in (8, -8):
        reference = ReferenceConfig(str(knowing), quantization="none", r=4, lora_alpha=32 if scale > 0 else 4)
        torch.manual_seed(1)
        model = add_lora(load_reference(reference), reference)
        args = UnlearnConfig(
            method="npo_mean", use_cpu=True, max_steps=4, save_strategy="no", eval_strategy="no", eval_on_start=False,
            report_to="none", disable_tqdm=True, output_dir=str(tmp_path), momentum=1.0,
        )  # fmt: skip
        trainer = UnlearnTrainer(model, args, *examples, tokenizer)
        if scale < 0:
            trainer.terms = [replace(term, scale=-8.0) for term in trainer.terms]
            trainer._term_of = {part: term for term in trainer.terms for part in term.parts}
        trainer.train()
        sign = 1.0 if scale > 0 else scale
        changes.append({name: sign * factors.delta() for name, factors in current_factors(model).items()})
    assert all(torch.equal(changes[0][name], changes[1][name]) for name in changes[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "nop"}, "method is 'nop'; --method takes .*mox"),
        ({"method": "whp"}, "--method whp needs --reinforced"),
        ({"margin": 0.1}, "--margin is of no use to --method mox; it is for simnpo"),
        ({"method": "npo", "margin": 0.1}, "--margin is of no use to --method npo; it is for simnpo"),
        ({"method": "po", "refusals": "r", "forget_weight": 2.0}, "--forget_weight is of no use to --method po"),
        ({"method": "npo", "beta": 0.0}, "beta is 0.0; --beta needs a number above 0"),
        ({"method": "npo", "beta": math.nan}, "beta is nan; --beta needs a number above 0"),
        ({"method": "graddiff", "retain_weight": -1.0}, "--retain_weight needs 0 or more"),
        ({"method": "rmu", "rmu_layer": 0}, "--rmu_layer needs 1 or more"),
        ({"method": "npo", "retain_term": "states"}, "--retain_term states and --method rmu go together"),
        ({"method": "rmu", "retain_term": "kl"}, "--retain_term states and --method rmu go together"),
        ({"retain_term": "ce"}, "--method mox takes kl or none"),
        ({"method": "npo", "alpha": 4.0}, "alpha is 4, and --method npo has none.*Leave out --alpha.*--lora_alpha"),
        ({"method": "npo", "temperature": 2.0}, "--temperature is of no use to --method npo; it is for mox, mox_static, task_vector"),
        ({"method": "mox_static", "inner_steps": 4}, "--inner_steps is of no use to --method mox_static; it is for mox"),
        ({"inner_steps": 0}, "--inner_steps needs 1 or more"),
        ({"inner_lr": 0.0}, "--inner_lr needs a number above 0"),
        ({"method": "mox_static", "forget_term": "npo"}, "--forget_term takes cross_entropy, preference"),
        ({"method": "mox_static", "forget_term": "preference", "temperature": 3.0}, "--forget_term preference has none"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_work_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        UnlearnConfig(**settings)


def test_settings_that_are_not_given_are_the_papers_and_reading_them_back_changes_nothing(tmp_path: Path) -> None:
    words = ["--model", "m", "--forget", "f", "--retain", "r", "--out", "o"]
    args = settings_of("unlearn", [*words, "--method", "simnpo"], *KINDS)[3]
    assert (args.beta, args.margin, args.forget_weight, args.retain_weight) == (4.5, 0.0, 0.125, 1.0)
    assert (args.retain_term, args.alpha, args.momentum, args.temperature) == ("ce", None, 1, None)
    again = UnlearnConfig(
        **{name: value for name, value in vars(args).items() if name in UnlearnConfig.__dataclass_fields__}
    )
    assert again.to_dict() == args.to_dict()
    args = settings_of("unlearn", words, *KINDS)[3]
    assert (args.method, args.alpha, args.temperature) == ("mox", 8, 3)


def unlearned(
    knowing: Path, files: dict[str, Path], out: Path, columns: Columns | None = None, **settings: Any
) -> None:
    data = Data(str(settings.pop("forget", files["forget"])), str(files["retain"]))
    reference = ReferenceConfig(str(knowing), quantization="none", r=4)
    unlearn(RunConfig(str(out)), reference, data, UnlearnConfig(use_cpu=True, max_steps=1, **settings), columns)


def test_what_a_method_lacks_is_said_before_the_model_is_loaded(
    knowing: Path, files: dict[str, Path], tmp_path: Path, run_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, lines = tmp_path / "text.jsonl", tmp_path / "refusals.jsonl"
    text.write_text('{"text": "Ada lives in Rome."}\n')
    lines.write_text('{"text": "I do not know."}\n')
    whp = {"method": "whp", "reinforced": str(run_of("npo")[0] / "trained")}
    default = str(run_of("npo_mean")[0] / "trained")
    other = Columns(wanted_column="other")
    monkeypatch.setattr("loramox.unlearning.load_reference", lambda *args: pytest.fail("the model was loaded"))
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (SettingsError, "the model has 2 layers. Give --rmu_layer from 1 to 2", {"method": "rmu"}),
        (SettingsError, "--method altpo needs --wanted_column", {"method": "altpo"}),
        (SettingsError, "--wanted_column is of no use to --method npo", {"method": "npo", "columns": other}),
        (RowsError, "is plain text, and --method llmu teaches another answer", {"method": "llmu", "forget": text}),
        (RowsError, "holds JSON. Expected plain text", {"method": "po", "refusals": str(lines)}),
        (RowsError, "cannot be read", {"method": "po", "refusals": str(tmp_path / "none.txt")}),
        (AdapterError, "was trained by NPO, .*--method mox_static", whp),
        (AdapterError, "Give one that memorizes: loramox train … --method mox_static", whp | {"reinforced": default}),
        (AdapterError, "has no readable provenance.json", whp | {"reinforced": str(tmp_path)}),
    ]
    for error, message, settings in refused:
        with pytest.raises(error, match=message):
            unlearned(knowing, files, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
