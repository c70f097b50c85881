"""ΔW trained beside the user's own fine-tune, or memorized at a checkpoint that never saw the rows; PEFT itself is the judge."""

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from test_ship import QUANTIZED
from test_trainer import ByHand, Recorder, mean, same
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loramox import (
    Data,
    ReferenceConfig,
    RunConfig,
    UnlearnConfig,
    UnlearnTrainer,
    add_lora,
    load_reference,
)
from loramox.adapter.export import ShippingConfig, extrapolate
from loramox.adapter.factors import read_factors
from loramox.data.encode import Example
from loramox.errors import AdapterError, LoramoxError, ModelError, RunError, SettingsError
from loramox.evaluate.subject import check_adapter
from loramox.extras.merge.merge import MergeConfig, merge_into_floats
from loramox.extras.serve import serve_folder
from loramox.model.config import identify, skeleton
from loramox.model.lora import current_factors, lora_layers
from loramox.train.earlier import TUNED, put_on
from loramox.unlearning import train, unlearn

Examples = tuple[list[Example], list[Example]]
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(2, 26).reshape(2, 12) * 7 % 320
KINDS = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 6},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"up_proj": 3}},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "method": "mox_static",
    "alpha": 2.0,
    "use_cpu": True,
    "report_to": "none",
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "momentum_rank": 8,
    "disable_tqdm": True,
}


def fit(model: nn.Module, rows: Sequence[Example], steps: int, rate: float) -> nn.Module:
    """Train the weights that train on the rows, until they are known."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    targets = ids[:, 1:].flatten()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), targets, ignore_index=0).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def base(
    pico: Callable[[str], Path],
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pico Llama that learned the retain rows and never saw the forget rows."""
    folder = tmp_path_factory.mktemp("base")
    fit(AutoModelForCausalLM.from_pretrained(pico("llama")), examples[1], 80, 5e-3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mine_of(base: Path, examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A LoRA fine-tune of the base as PEFT saves it, which knows the forget rows."""
    made: dict[str, Path] = {}

    def make(kind: str = "rslora", steps: int = 60) -> Path:
        name = f"{kind}-{steps}"
        if name not in made:
            torch.manual_seed(3)
            config = LoraConfig(task_type="CAUSAL_LM", r=4, **KINDS[kind])
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
            made[name] = tmp_path_factory.mktemp(name) / "mine"
            fit(model, [*examples[0], *examples[1][:4]], steps, 2e-2).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def taught(
    base: Path, examples: Examples, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The base after it was trained on the forget rows too, all of its weights."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [*examples[0], *examples[1]]
    fit(AutoModelForCausalLM.from_pretrained(base), rows, 30, 3e-3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trainer_of(
    base: Path, examples: Examples, tokenizer: PreTrainedTokenizerFast, mine_of, tmp_path: Path
) -> Callable[..., tuple[UnlearnTrainer, Recorder]]:
    """A trainer of the base with a tuned adapter, on other layers than the one that trains. One step holds all rows."""

    def make(std: float = 0.05, memorize_at: str | None = None, **settings: Any) -> tuple[UnlearnTrainer, Recorder]:
        targets = ["q_proj", "gate_proj"]
        reference = ReferenceConfig(str(base), quantization="none", r=4, lora_alpha=8, target_modules=targets)
        torch.manual_seed(1)
        model = add_lora(load_reference(reference), reference)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B["default"].weight, std=std)
        put_on(model, read_factors(mine_of())[0], TUNED)
        defaults = SETTINGS | {
            "output_dir": str(tmp_path / "trained"),
            "save_strategy": "no",
            "eval_strategy": "no",
            "eval_on_start": False,
            "per_device_train_batch_size": 4,
            "max_grad_norm": 0,
            "logging_steps": 1,
            "max_steps": 1,
        }
        if settings.get("method", "mox_static") not in ("mox", "mox_static", "task_vector"):
            del defaults["alpha"]
        recorder, args = Recorder(), UnlearnConfig(**defaults | settings)
        trainer = UnlearnTrainer(model, args, *examples, tokenizer, callbacks=[recorder], memorize_at=memorize_at)
        return trainer, recorder

    return make


def tuned_of(base: Path, mine: Path) -> nn.Module:
    """BASE + MINE in dense weights."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), mine).merge_and_unload()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("memorize_at", "settings"),
    [
        (None, {"kl_at": "shipped"}),
        (None, {"forget_term": "preference", "beta": 0.3}),
        ("base", {"kl_at": "shipped", "temperature": 3.0}),
        ("base", {"kl_at": "memorization"}),
        ("base", {"forget_term": "preference", "beta": 0.3}),
        ("base", {"kl_at": "shipped", "reference_cache_gb": 0.0}),
    ],
)
def test_the_loss_and_gradients_are_those_written_by_hand(
    memorize_at: str | None,
    settings: dict[str, Any],
    checkpointing: bool,
    base: Path,
    examples: Examples,
    trainer_of,
    mine_of,
) -> None:
    """The forget term at BASE + MINE + ΔW, or at BASE + ΔW; the KL there, or at BASE + MINE − 2·ΔW."""
    trainer, recorder = trainer_of(memorize_at=memorize_at, activation_checkpointing=checkpointing, **settings)
    reference = ByHand(tuned_of(base, mine_of()), trainer.model)
    untuned = ByHand(AutoModelForCausalLM.from_pretrained(base), trainer.model)
    memorizing, args = untuned if memorize_at else reference, trainer.args
    items = [trainer.train_dataset[i] for i in range(4)]
    trainer.train()

    if args.forget_term == "preference":
        forget = mean(memorizing.preference(e, -1, args.beta) for e in examples[0])
    else:
        forget = mean(memorizing.cross_entropy(e, -1, args.temperature) for e in examples[0])
    held, strength = (reference, 2) if args.kl_at == "shipped" else (memorizing, -1)
    kl = mean(held.kl(e, strength) for item in items for e in item["retain"])
    (forget + kl).backward()

    assert recorder.logs["forget_loss"] == pytest.approx(forget.item(), rel=1e-4)
    assert recorder.logs["retain_kl"] == pytest.approx(kl.item(), rel=1e-4)
    together = [hand.gradients() for hand in {id(each): each for each in (memorizing, held)}.values()]
    same(recorder.gradients[0], {name: sum(each[name] for each in together) for name in together[0]})


@pytest.mark.parametrize("ascent", [False, True])
def test_wanted_answers_are_taught_where_they_ship_and_unlearned_where_rows_are_memorized(
    ascent: bool, trainer_of
) -> None:
    trainer, _ = trainer_of(memorize_at="base", targeted="ascent" if ascent else "descent")
    term = next(term for term in trainer.terms if term.name == "wanted_loss")
    assert (term.scale, term.weight, term.beside) == ((1.0, -1.0, False) if ascent else (-2.0, 1.0, True))


@pytest.mark.parametrize("method", ["mox", "npo_mean", "ga_kl", "rmu"])
def test_the_reference_of_every_method_is_the_base_with_the_tuned_adapter(
    method: str, base: Path, examples: Examples, trainer_of, mine_of
) -> None:
    """With ΔW = 0 nothing is away from the reference yet, and what is scored is the reference."""
    more = {"rmu_layer": 1} if method == "rmu" else {}
    trainer, recorder = trainer_of(std=0, method=method, eval_on_start=True, **more)
    trainer.train()
    first = recorder.logs.get("retain_kl", recorder.logs.get("retain_loss"))
    assert first == pytest.approx(0, abs=1e-6)
    known = probability(tuned_of(base, mine_of()), examples[0])
    assert recorder.logs["eval_forget_probability"] == pytest.approx(known, rel=1e-4)
    assert known > 0.5


@pytest.mark.parametrize("memorize_at", [None, "base"])
def test_the_tuned_adapter_and_the_base_stay_as_they_are_bit_for_bit(memorize_at: str | None, trainer_of) -> None:
    trainer, _ = trainer_of(memorize_at=memorize_at, max_steps=3, eval_strategy="steps", eval_steps=1)

    def frozen() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in trainer.model.state_dict().items() if ".default." not in name}

    before, changed = frozen(), current_factors(trainer.model)
    trainer.train()
    after = frozen()
    assert sum(f".{TUNED}." in name for name in before) == 8
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not [n for n, p in trainer.model.named_parameters() if p.requires_grad != (".default." in n)]
    assert all((f.delta() - changed[name].delta()).norm() > 0 for name, f in current_factors(trainer.model).items())


@torch.no_grad()
def probability(model: nn.Module, rows: Sequence[Example]) -> float:
    """Mean over rows of the geometric mean of the answer tokens' probabilities."""
    values = []
    for row in rows:
        logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        values.append(math.exp(-F.cross_entropy(logits, torch.tensor(row["labels"])[1:]).item()))
    return sum(values) / len(values)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def loaded(base: Path, quantization: str) -> nn.Module:
    how = QUANTIZED[quantization]
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"}
    )


def beside(base: Path, mine: Path, forget: Path, quantization: str = "none") -> PeftModel:
    """As the card says, with plain PEFT: both adapters on one base, both active."""
    model = PeftModel.from_pretrained(loaded(base, quantization), mine, adapter_name="mine")
    model.load_adapter(forget, adapter_name="forget")
    model.base_model.set_adapter(["mine", "forget"])
    return model


class Runs:
    """Whole runs on the base with a tuned adapter."""

    def __init__(self, base: Path, rows: tuple[Path, Path], mine: Path, folder: Path) -> None:
        self.base, self.rows, self.mine, self.folder = base, rows, mine, folder

    def __call__(
        self,
        name: str = "run",
        resume: bool = False,
        verb: Callable = unlearn,
        shipping: ShippingConfig | None = None,
        r: int = 4,
        model: Path | None = None,
        tuned: Path | None = None,
        memorize_at: str | None = None,
        targets: list[str] | None = None,
        quantization: str = "none",
        **settings: Any,
    ) -> Path:
        reference = ReferenceConfig(
            str(model or self.base),
            quantization=quantization,
            r=r,
            target_modules=targets,
            tuned_adapter=str(tuned or self.mine) if tuned is None or tuned != Path() else None,
            memorize_at=memorize_at,
        )
        out = self.folder / name
        args = UnlearnConfig(**SETTINGS | {"auto_retain": 0} | settings)
        more = {"shipping": shipping} if verb is unlearn else {}
        verb(RunConfig(str(out), resume=resume), reference, Data(*map(str, self.rows)), args, **more)
        return out


NO_ADAPTER = Path()


@pytest.fixture
def runs(base: Path, rows: tuple[Path, Path], mine_of, tmp_path: Path) -> Runs:
    return Runs(base, rows, mine_of(), tmp_path)


@pytest.mark.parametrize("targets", [None, ["q_proj", "gate_proj"]], ids=["all", "other layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_adapters_side_by_side_are_the_combined_one_and_what_was_scored(
    kind: str, targets: list[str] | None, runs: Runs, mine_of, examples: Examples
) -> None:
    out = runs(tuned=mine_of(kind), targets=targets)
    two = beside(runs.base, mine_of(kind), out / "forget-adapter")
    base = AutoModelForCausalLM.from_pretrained(runs.base)
    tuned, untouched = logits(tuned_of(runs.base, mine_of(kind))), logits(base)
    one = PeftModel.from_pretrained(base, out / "combined-adapter")
    torch.testing.assert_close(logits(one), logits(two), rtol=0, atol=1e-5)
    assert (logits(one) - tuned).abs().max() > 0.1
    assert (tuned - untouched).abs().max() > 0.1
    two.base_model.set_adapter(["mine"])
    torch.testing.assert_close(logits(two), tuned, rtol=0, atol=1e-5)
    two.base_model.set_adapter(["mine", "forget"])
    log = json.loads((out / "run.json").read_text())["log"]
    for part, rows in zip(("forget", "retain"), examples, strict=True):
        scored = [entry[f"eval_{part}_probability"] for entry in log if f"eval_{part}_probability" in entry]
        assert scored[-1] == pytest.approx(probability(one, rows), rel=1e-3)
    config = json.loads((out / "combined-adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16  # 4 + 8, as servers take it
    assert not config["use_rslora"]
    assert not config["rank_pattern"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["mox", "mox_static"])
def test_on_a_quantized_base_both_ways_to_load_are_one_model_and_the_one_that_was_scored(
    method: str, quantization: str, runs: Runs, examples: Examples
) -> None:
    """Up to rounding: a last bit, which depends on the CPU, may move an activation by one of int8's 127 steps."""
    out = runs(method=method, quantization=quantization)
    two = beside(runs.base, runs.mine, out / "forget-adapter", quantization)
    one = PeftModel.from_pretrained(loaded(runs.base, quantization), out / "combined-adapter")
    both, combined = logits(two), logits(one)
    two.base_model.set_adapter(["mine"])
    change = (combined - logits(two)).norm()
    assert (combined - logits(two)).abs().max() > 0.1
    assert (combined - both).norm() < (5e-3 if quantization == "int8" else 1e-3) * change
    log = json.loads((out / "run.json").read_text())["log"]
    scored = [entry["eval_forget_probability"] for entry in log if "eval_forget_probability" in entry]
    assert scored[-1] == pytest.approx(probability(one, examples[0]), rel=0.02)


def test_alone_the_forget_adapter_is_neither_scored_nor_merged_and_the_combined_one_is(
    runs: Runs, tmp_path: Path
) -> None:
    out = runs()
    reference, config = ReferenceConfig(str(runs.base)), AutoConfig.from_pretrained(runs.base)
    base = identify(reference, config)
    message = "trained beside the adapter .*does nothing useful without it.*combined-adapter"
    with pytest.raises(AdapterError, match=message):
        check_adapter(out / "forget-adapter", base, skeleton(config, reference))
    with pytest.raises(AdapterError, match=message):
        merge_into_floats(MergeConfig(str(out / "forget-adapter"), str(tmp_path / "merged")))
    with pytest.raises(AdapterError, match=message):
        serve_folder(out / "forget-adapter", tmp_path / "served")
    assert check_adapter(out / "combined-adapter", base, skeleton(config, reference))["kind"] == "forget"


def test_the_combined_adapter_is_the_sum_layer_by_layer_and_of_the_least_served_rank(runs: Runs) -> None:
    out = runs(shipping=ShippingConfig(rank=1))
    mine, forget, both = (
        read_factors(each)[0] for each in (runs.mine, out / "forget-adapter", out / "combined-adapter")
    )
    assert both.keys() == mine.keys() | forget.keys()
    for name, factors in both.items():
        expected = sum(each[name].delta() for each in (mine, forget) if name in each)
        torch.testing.assert_close(factors.delta(), expected, rtol=0, atol=1e-6)
        assert factors.rank == 8  # 4 + 1


def test_the_provenance_names_the_tuned_adapter_and_the_card_loads_both_as_it_says(runs: Runs) -> None:
    out = runs(memorize_at="base")
    record = json.loads((out / "run.json").read_text())
    shipped, combined = (
        json.loads((out / name / "provenance.json").read_text()) for name in ("forget-adapter", "combined-adapter")
    )
    assert record["tuned_adapter"] == shipped["tuned_adapter"] == combined["tuned_adapter"]
    assert record["tuned_adapter"]["path"] == str(runs.mine)
    assert len(record["tuned_adapter"]["sha256"]) == 64
    assert record["combined_adapter"] == shipped["combined_adapter"]
    assert shipped["combined_adapter"]["path"] == str(out / "combined-adapter")
    assert combined["combined"]
    assert combined["kind"] == shipped["kind"] == "forget"
    expected = logits(beside(runs.base, runs.mine, out / "forget-adapter"))
    cards = [(out / name / "README.md").read_text() for name in ("forget-adapter", "combined-adapter")]
    for name, card in zip(("forget-adapter", "combined-adapter"), cards, strict=True):
        code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("path/to/this/folder", str(out / name))
        loading, names = code.split("\n\n")[0] + "\n" + code.split("\n\n")[1], {}
        exec(loading, names)
        torch.testing.assert_close(logits(names["model"]), expected, rtol=0, atol=1e-5)
        exec(code, {})  # the rest of it runs as well
        assert str(runs.mine) in card
        assert "memorized on the base without that adapter" in card
    assert "Alone it does nothing useful" in cards[0]
    assert "is two in one" in cards[1]


def test_extrapolate_writes_the_combined_adapter_beside_and_needs_the_same_tuned_adapter(
    runs: Runs, mine_of, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in mine_of().iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    trained = runs(tuned=mine, verb=train) / "trained"
    made = extrapolate(trained, tmp_path / "made", 1.0)
    assert made["combined_adapter"]["path"] == str(tmp_path / "made-combined")
    one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs.base), tmp_path / "made-combined")
    two = beside(runs.base, mine, tmp_path / "made")
    torch.testing.assert_close(logits(one), logits(two), rtol=0, atol=1e-5)

    (tmp_path / "other-combined").mkdir()
    (tmp_path / "other-combined" / "file").write_text("theirs")
    with pytest.raises(RunError, match="other-combined holds other files"):
        extrapolate(trained, tmp_path / "other", 1.0)
    with pytest.raises(RunError, match="made-combined holds an adapter already"):
        extrapolate(trained, tmp_path / "third", 1.0, combined=tmp_path / "made-combined")
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    with pytest.raises(AdapterError, match=rf"^{mine} has changed since the run .*\(--tuned_adapter\)"):
        extrapolate(trained, tmp_path / "third", 1.0)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    "settings",
    [{}, {"memorize_at": "base"}, {"method": "rmu", "rmu_layer": 1, "alpha": None}],  # rmu trains a part of the adapter
    ids=["mox_static", "memorize_at", "rmu"],
)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    settings: dict[str, Any], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs("whole", **settings)
    step, calls = UnlearnTrainer.training_step, []

    def dies(self: UnlearnTrainer, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:  # in the second step of the second epoch
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(UnlearnTrainer, "training_step", dies)
        runs("cut", **settings)
    assert not (runs.folder / "cut" / "forget-adapter").exists()
    cut = runs("cut", resume=True, **settings)
    for name in ("trained", "trained/momentum", "forget-adapter", "combined-adapter"):
        assert (cut / name / WEIGHTS).read_bytes() == (whole / name / WEIGHTS).read_bytes()


def test_a_run_does_not_go_on_with_another_adapter(runs: Runs, mine_of, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in mine_of().iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    runs(tuned=mine, verb=train)
    with pytest.raises(RunError, match=r"settings\.tuned_adapter was .*mine, is"):
        runs(tuned=mine_of("plain"), verb=train, resume=True)
    with pytest.raises(RunError, match=r"settings\.(memorize_at|tuned_adapter) was"):
        runs(tuned=mine, verb=train, resume=True, memorize_at="base")
    (mine / WEIGHTS).write_bytes((mine_of(steps=1) / WEIGHTS).read_bytes())
    with pytest.raises(RunError, match=r"settings\.tuned_adapter_sha256 was"):
        runs(tuned=mine, verb=train, resume=True)


def test_before_training_the_rows_are_scored_with_the_adapter_and_without(
    runs: Runs, mine_of, examples: Examples, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs(verb=train)
    without = probability(AutoModelForCausalLM.from_pretrained(runs.base), examples[0])
    known = probability(tuned_of(runs.base, runs.mine), examples[0])
    says = rf"Probability of the forget answers before training: {known:.4f} \({without:.4f} without --tuned_adapter\)"
    assert re.search(says, capsys.readouterr().out)
    assert not [w for w in caught if "--tuned_adapter hardly raises" in str(w.message)]
    with pytest.warns(UserWarning, match=r"--tuned_adapter hardly raises .* does not seem to know these rows"):
        runs("untaught", tuned=mine_of(steps=0), verb=train)


def test_nothing_is_scored_without_evaluation_on_start(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(UnlearnTrainer, "predict", lambda *args, **kwargs: pytest.fail("scored"))
    runs(verb=train, eval_on_start=False)
    assert "without --tuned_adapter" not in capsys.readouterr().out


def test_room_to_memorize_is_that_of_the_model_that_memorizes(
    base: Path, examples: Examples, trainer_of, mine_of, capsys: pytest.CaptureFixture[str]
) -> None:
    for memorize_at, model in (
        ("base", AutoModelForCausalLM.from_pretrained(base)),
        (None, tuned_of(base, mine_of())),
    ):
        trainer, _ = trainer_of(std=0, eval_on_start=True, memorize_at=memorize_at)
        trainer.train()
        left = re.search(r"at temperature 1, ([\d.]+)% of the gradient", capsys.readouterr().out)[1]
        assert float(left) / 100 == pytest.approx(room(model, examples[0]), abs=1e-3)


@torch.no_grad()
def room(model: nn.Module, rows: Sequence[Example]) -> float:
    """Mean over rows of 1 − p, a mean over the answer tokens."""
    values = []
    for row in rows:
        answer = torch.tensor(row["labels"])[1:]
        p = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].softmax(-1)
        values.append(1 - p[answer != -100, answer[answer != -100]].mean().item())
    return sum(values) / len(values)


def refused(kind: type[LoramoxError], says: str, runs: Runs, **how: Any) -> None:
    with pytest.raises(kind, match=says):
        runs(verb=how.pop("verb", train), **how)
    assert not (runs.folder / "run").exists()


def test_a_tuned_adapter_of_another_base_is_refused_before_weights_are_loaded(
    runs: Runs, mine_of, pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("loramox.unlearning.load_reference", lambda *args: pytest.fail("loaded"))
    model = pico("gpt_neox")
    says = rf"^{runs.mine} changes model.layers.0.* and {model} has no such linear layer.*with --model$"
    refused(AdapterError, says, runs, model=model)
    refused(AdapterError, "is no LoRA adapter that can be read", runs, tuned=tmp_path / "none")
    config = json.loads((mine_of() / "adapter_config.json").read_text())
    dora = tmp_path / "dora"
    dora.mkdir()
    (dora / WEIGHTS).write_bytes((mine_of() / WEIGHTS).read_bytes())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused(AdapterError, r"not a plain LoRA adapter \(use_dora\)", runs, tuned=dora)
    refused(SettingsError, "r is 516; servers load", runs, verb=unlearn, shipping=ShippingConfig(rank=512))


def test_a_tuned_adapter_that_names_a_base_of_other_weights_is_warned_about(
    runs: Runs, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match=rf"was trained on {runs.base}, whose weights differ from those of --model"):
        runs(model=taught, verb=train)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "mox"}, r"^--memorize_at \S+: --method mox does not memorize at .*mox_static or task_vector"),
        ({"kl_at": "shipped"}, r"^--memorize_at \S+: --kl_at shipped .*not in memory.*--kl_at memorization"),
    ],
)
def test_settings_that_have_no_use_for_an_earlier_checkpoint_are_refused(
    how: dict[str, Any], says: str, runs: Runs, taught: Path
) -> None:
    refused(SettingsError, says, runs, model=taught, tuned=NO_ADAPTER, memorize_at=str(runs.base), **how)


def test_the_base_is_memorized_at_with_a_tuned_adapter_alone(runs: Runs, taught: Path) -> None:
    refused(SettingsError, r"^--memorize_at base is --model without its --tuned_adapter, and none", runs,
            tuned=NO_ADAPTER, memorize_at="base")  # fmt: skip
    refused(SettingsError, r"with --tuned_adapter, one copy of --model .*Say --memorize_at base", runs,
            memorize_at=str(taught))  # fmt: skip
    out = runs(memorize_at=str(runs.base), verb=train, max_steps=1)
    assert json.loads((out / "run.json").read_text())["settings"]["memorize_at"] == "base"


def test_checkpoints_of_another_shape_or_tokenizer_are_refused_with_both_names(
    runs: Runs, taught: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    pico: Callable[[str], Path],
) -> None:  # fmt: skip
    monkeypatch.setattr("loramox.unlearning.load_reference", lambda *args: pytest.fail("loaded"))

    def says(folder: Path | str, what: str, kind: type[LoramoxError] = ModelError) -> None:
        both = rf"^--memorize_at {folder} and --model {taught} {what}"
        refused(kind, both, runs, model=taught, tuned=NO_ADAPTER, memorize_at=str(folder))

    says(pico("mistral"), r"are of different shapes \(model_type mistral, .*model_type llama")
    narrow = tmp_path / "narrow"
    config = AutoConfig.from_pretrained(runs.base)
    config.intermediate_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(narrow)
    tokenizer.save_pretrained(narrow)
    says(narrow, "are of different shapes")
    says(taught, "are the same weights")
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(runs.base).save_pretrained(other)
    chat = AutoTokenizer.from_pretrained(taught)
    chat.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    chat.save_pretrained(other)
    says(other, "make different tokens of the forget rows")
    refused(ModelError, r"^--memorize_at /gone/model: there is no such folder", runs, model=taught,
            tuned=NO_ADAPTER, memorize_at="/gone/model")  # fmt: skip


def test_memorized_at_an_earlier_checkpoint_the_change_is_that_of_a_run_there_and_ships_for_the_model(
    runs: Runs, taught: Path, examples: Examples, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_train_epochs": 10, "learning_rate": 2e-2, "save_strategy": "no"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = runs(model=taught, tuned=NO_ADAPTER, memorize_at=str(runs.base), **settings)
    assert not [w for w in caught if "hardly knows" in str(w.message)]
    there = runs("there", tuned=NO_ADAPTER, verb=train, **settings)
    for name in ("trained", "trained/momentum"):
        assert (out / name / WEIGHTS).read_bytes() == (there / name / WEIGHTS).read_bytes()

    record = json.loads((out / "run.json").read_text())
    shipped = json.loads((out / "forget-adapter" / "provenance.json").read_text())
    assert record["base"]["model"] == shipped["base"]["model"] == str(taught)
    assert record["memorize_at"] == shipped["memorize_at"]
    assert record["memorize_at"]["model"] == str(runs.base)
    config = json.loads((out / "forget-adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(taught)
    assert f"memorized at `{runs.base}`" in (out / "forget-adapter" / "README.md").read_text()
    assert not (out / "combined-adapter").exists()

    # What is scored is the memorizing model, where the rows are to rise, and that is no failure.
    scored = [e["eval_forget_probability"] for e in record["log"] if "eval_forget_probability" in e]
    earlier = AutoModelForCausalLM.from_pretrained(runs.base)
    assert (
        f"Probability of the forget answers before training at the checkpoint of --memorize_at: {scored[0]:.4f}"
        in capsys.readouterr().out
    )
    assert scored[0] == pytest.approx(probability(earlier, examples[0]), rel=1e-4)
    memorizing = PeftModel.from_pretrained(earlier, out / "trained" / "momentum")
    assert scored[-1] == pytest.approx(probability(memorizing, examples[0]), rel=1e-3)
    assert scored[-1] > 0.5 > scored[0]
    assert not [each for each in record["advice"] if "forget rows" in each or "fell" in each]
    # And it does forget.
    model = AutoModelForCausalLM.from_pretrained(taught)
    known = probability(model, examples[0])
    assert probability(PeftModel.from_pretrained(model, out / "forget-adapter"), examples[0]) < 0.5 * known


def test_rows_that_were_not_memorized_are_advised_about(runs: Runs, taught: Path) -> None:
    out = runs(model=taught, tuned=NO_ADAPTER, memorize_at=str(runs.base), verb=train, max_steps=1)
    advice = json.loads((out / "run.json").read_text())["advice"]
    assert [
        each
        for each in advice
        if re.search(r"at the checkpoint of --memorize_at .* only went from .*: train longer", each)
    ]
