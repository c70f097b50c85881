"""What a run will take: predicted without weights, compared with what torch allocates in a real run; and the fit to a budget."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from loramox.cli import main
from loramox.cli.arguments import given_settings
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns, Data
from loramox.errors import SettingsError
from loramox.extras.plan.config import Choice, FitConfig, PlanConfig, budget_of, choices, size_of
from loramox.extras.plan.estimate import estimate, in_8_bits, sweeping, watch
from loramox.extras.plan.job import fit, plan
from loramox.extras.plan.outline import Setting
from loramox.extras.plan.recorder import Speed
from loramox.extras.plan.rows import Rows
from loramox.extras.plan.rows import rows_of as planned_rows
from loramox.extras.plan.show import show_plan
from loramox.extras.plan.trace import at_depth, shallow, trace_step
from loramox.model.algebra import Factors
from loramox.model.config import skeleton
from loramox.model.load import load_reference
from loramox.model.lora import ReferenceConfig, add_lora, lora_layers
from loramox.run import RunConfig
from loramox.train.config import UnlearnConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes are not installed

from recipes.bench import plan as bench

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 320}
SPEED = Speed(1e12, 1e10, "made up")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """How fast this machine is does not matter here."""
    monkeypatch.setattr("loramox.extras.plan.job.measured_speed", lambda *args: SPEED)


@pytest.fixture
def outline(tmp_path, pico):
    """The pico Llama's folder without its weights, and with one layer, to be quick."""
    folder = tmp_path / "outline"
    shutil.copytree(pico("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    return folder


def setting_of(tokenizer, layers=1, quantization="none", speed=SPEED, shape=SHAPE, **args):
    config = LlamaConfig(**shape, num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=True)
    reference = ReferenceConfig("made up", quantization=quantization, r=4)
    settings = UnlearnConfig("made up", use_cpu=True, report_to="none", **args)
    return Setting(reference, settings, config, tokenizer, torch.float32, speed, momentum_rank=8)


def rows_of(length=16, count=16):
    row = {"input_ids": [1] * length, "labels": [-100] * (length // 2) + [1] * (length // 2), "row": "made up"}
    return Rows({"forget": [row] * count, "retain": [row] * count, "wanted": [], "protected": []}, 3)


def parts(length=16, forget=2):
    row = rows_of(length).datasets["forget"][0]
    return {"forget": [row] * forget, "retain": [row] * 3 * forget}


def choice(size=2, checkpointing=False):
    return Choice(size, 8 // size, checkpointing, "adamw_torch_fused", 8)


@pytest.mark.parametrize(("method", "checkpointing"), [("npo_mean", False), ("mox", True)])
def test_memory_and_time_are_affine_in_the_layers(tokenizer, method, checkpointing):
    more = {"inner_steps": 1} if method == "mox" else {}
    setting = setting_of(tokenizer, layers=4, method=method, activation_checkpointing=checkpointing, **more)
    rows = {"forget": parts()["forget"]}
    extrapolated = at_depth(trace_step, setting, rows)
    whole = trace_step(setting, 4, rows)
    for name, stage in whole.items():
        assert extrapolated[name].peak.total == pytest.approx(stage.peak.total, rel=1e-3), name
        assert extrapolated[name].seconds == pytest.approx(stage.seconds, rel=1e-6)
        assert extrapolated[name].flops == pytest.approx(stage.flops, rel=1e-6)


def test_alternating_layers_are_traced_in_whole_patterns():
    config = LlamaConfig(**SHAPE, num_hidden_layers=12)
    assert shallow(config, 0) == (2, 3)
    config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    assert shallow(config, 0) == (3, 6)
    assert shallow(config, 7) == (9, 12)


def test_larger_micro_batches_take_more_and_checkpointing_less(tokenizer):
    setting, rows = setting_of(tokenizer, layers=4, method="npo_mean"), rows_of()
    sizes = [estimate(setting, rows, choice(size), None) for size in (1, 4)]
    assert sizes[0].peak < sizes[1].peak
    again = estimate(setting, rows, choice(4, checkpointing=True), None)
    assert again.peak < sizes[-1].peak
    assert again.held["activations"] < sizes[-1].held["activations"] / 2
    assert again.flops > 1.2 * sizes[-1].flops  # each forward pass with gradients a second time
    assert estimate(setting, rows_of(length=64), choice(1), None).peak > sizes[0].peak


def test_checkpointing_some_layers_is_between_all_and_none(tokenizer):
    def activations(every: int | None) -> float:
        kwargs = {"activation_checkpointing_kwargs": {"every_n_layers": every}} if every else {}
        checkpoints = {"activation_checkpointing": every is not None, **kwargs}
        setting = setting_of(tokenizer, layers=4, method="npo_mean", **checkpoints)
        return trace_step(setting, 4, parts())["step"].peak.held["activations"]

    assert activations(1) < 0.9 * activations(2) < 0.9 * 0.9 * activations(None)


def test_static_parts_are_the_sizes_of_their_tensors(tokenizer):
    setting = setting_of(tokenizer)
    held = estimate(setting, rows_of(), choice(2), None).held
    wide = 4 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64 + 64 + 128 + 64 + 128 + 128 + 64)  # r · (in + out) of a layer
    adapter = 4 * wide  # bytes
    assert held["adapter"] == held["gradients"] == adapter
    assert held["momentum"] == 2 * adapter  # rank 8
    assert held["optimiser"] == pytest.approx(2 * adapter, rel=1e-2)  # and the step count of each tensor


@pytest.mark.parametrize(("settings", "times"), [({}, 4), ({"momentum": 1.0}, 1), ({"momentum_rank": 6}, 1.5)])
def test_the_average_of_the_momentum_counts_at_the_rank_that_it_can_have(outline, settings, times):
    args = UnlearnConfig("made up", use_cpu=True, report_to="none", per_device_train_batch_size=1, **settings)
    reference = ReferenceConfig(str(outline), quantization="none", r=4)
    (planned,) = plan(PlanConfig("8GB"), reference, args, tokenisation=Tokenisation(max_length=16)).planned
    for each in planned.estimates:
        assert each.held["momentum"] == times * each.held["adapter"]


def test_a_tuned_adapter_counts_with_its_own_rank_and_its_pass_of_the_reference(tokenizer):
    setting, rows = setting_of(tokenizer), rows_of()
    without = estimate(setting, rows, choice(2), None)
    names = dict(lora_layers(add_lora(skeleton(setting.config, setting.reference), setting.reference)))
    change = {n: Factors(torch.zeros(16, m.in_features), torch.zeros(m.out_features, 16)) for n, m in names.items()}
    found = estimate(setting._replace(tuned=change), rows, choice(2), None)
    # Four times the trained adapter's rank, in fp32; it has no gradients and no states.
    assert found.held["adapter"] == 5 * without.held["adapter"]
    assert found.held["gradients"] == without.held["gradients"]
    assert found.held["optimiser"] == without.held["optimiser"]
    assert found.flops > without.flops


def test_the_adapter_that_memorizes_along_the_path_of_mox_counts(tokenizer):
    """Its weights and their gradients are as large as the trained one's, and neither is there with npo_mean."""
    wide = SHAPE | {"hidden_size": 512, "intermediate_size": 2048}
    few = {"forget": parts(length=4, forget=1)["forget"]}  # activations of next to nothing
    held = {
        method: trace_step(setting_of(tokenizer, shape=wide, method=method), 1, few)["step"].peak
        for method in ("mox", "npo_mean")
    }
    more = held["mox"].total - held["npo_mean"].total
    assert more == pytest.approx(2 * held["mox"].held["adapter"], rel=0.2)


@pytest.mark.parametrize("method", ["npo_mean", "mox"])
def test_flops_are_those_of_the_passes_of_a_step(tokenizer, method):
    """Forget and retain, each: reference forward, forward and backward; attention and the head apart."""
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 8}
    setting = setting_of(tokenizer, shape=shape, method=method)
    flops = trace_step(setting, 1, parts(forget=2))["step"].flops
    weights = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 1024
    tokens_forget, tokens_retain = 2 * 16, 6 * 16
    first = 256 * 256 + 2 * 256 * 128  # q, k and v of the first layer pass no gradient on: nothing below it trains
    passes = 2 * (weights * 3 * (tokens_forget + tokens_retain) - first * (tokens_forget + tokens_retain))
    assert passes < flops < 1.1 * passes


@pytest.mark.parametrize(("inner_steps", "minibatches"), [(1, 1), (2, 2), (3, 3), (8, 4)])
def test_the_path_of_mox_is_traced_with_every_mini_batch_of_its_forget_rows(tokenizer, inner_steps, minibatches):
    setting = setting_of(tokenizer, inner_steps=inner_steps)
    stage = trace_step(setting, 1, parts(forget=4))["step"]
    names = [section.name for section in stage.sections]
    assert names.count("backward") == 1 + minibatches  # the retain rows', and the path's
    assert names.count("forward") == 2 * names.count("backward")  # the reference's besides


def test_the_path_of_mox_is_over_the_forget_rows_of_a_whole_step(tokenizer):
    """So micro-batches cost what one large batch does: its mini-batches are as large, of whichever micro-batch their rows are."""
    rows = rows_of()._replace(retain_per_forget=0)  # nothing but the path

    def estimated(inner_steps, size):
        return estimate(setting_of(tokenizer, retain_weight=0.0, inner_steps=inner_steps), rows, choice(size), None)

    whole, parted = (estimated(2, size) for size in (8, 2))
    assert parted.flops == pytest.approx(whole.flops, rel=1e-3)
    assert parted.held["activations"] == pytest.approx(whole.held["activations"], rel=1e-2)
    assert parted.held["activations"] > 1.5 * estimated(8, 2).held["activations"]


@pytest.mark.parametrize(
    "more", [{"activation_checkpointing": True}, {"gradient_accumulation_steps": 2, "method": "graddiff"}]
)
def test_predicted_is_within_a_tenth_of_measured(pico, tmp_path, more):
    model = shutil.copytree(pico("llama"), tmp_path / "model")  # beside its files is the trainer's folder
    case = (2, more.get("gradient_accumulation_steps", 1), 64, {k: v for k, v in more.items() if k[0] != "g"})
    said = bench.predicted(*bench.settings(model, case, "cpu"))
    taken = bench.taken(bench.trainer_of(*bench.settings(model, case, "cpu")))
    assert said.peak == pytest.approx(taken, rel=0.1)


def test_4_bit_weights_are_as_large_as_those_of_bitsandbytes(pico, tokenizer):
    reference = ReferenceConfig(str(pico("llama")), quantization="nf4", r=4)
    model = load_reference(reference)
    real = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in bench.tensors_of(model)}
    args = UnlearnConfig("made up", use_cpu=True, report_to="none")
    setting = Setting(reference, args, model.config, tokenizer, torch.float32, SPEED, 8)
    stage = watch(setting, rows_of(), 2)
    # bitsandbytes shares its two tables of code words between layers, which are counted in each here.
    tables = 14 * 4 * (256 + 16)
    assert sum(real.values()) <= stage.peak.held["weights"] <= sum(real.values()) + tables


def test_8_bit_states_are_as_large_as_those_of_bitsandbytes(tokenizer):
    from bitsandbytes.optim import AdamW8bit

    setting = setting_of(tokenizer, shape=SHAPE | {"hidden_size": 1024, "intermediate_size": 2048})
    found = estimate(setting, rows_of(), choice(1), None)
    (eight,) = in_8_bits(setting, [found])
    large, small = torch.nn.Parameter(torch.zeros(4, 2048)), torch.nn.Parameter(torch.zeros(4, 512))
    optimiser = AdamW8bit([large, small])
    for parameter in (large, small):
        optimiser.init_state(optimiser.param_groups[0], parameter, 0, 0)
    sizes = [
        sum(optimiser.state[p][name].nbytes for name in ("state1", "state2", "absmax1", "absmax2") if name in optimiser.state[p])
        for p in (large, small)
    ]  # fmt: skip
    assert sizes[0] < 2.1 * large.numel()  # 8-bit
    assert sizes[1] == 8 * small.numel()  # too small for it
    # A of 4 × 1024 numbers and B of up to 2048 × 4: some are in 8 bits, others not.
    assert 2.03 / 8 * found.held["optimiser"] < eight.held["optimiser"] < found.held["optimiser"]
    assert eight.peak < found.peak


def test_sweeping_holds_the_cache_of_its_answers(tokenizer):
    setting = setting_of(tokenizer)
    short, long = (sweeping(setting, rows_of(), 8, tokens) for tokens in (300, 600))
    # K and V · rows · heads · their size · bytes · tokens; and the old V of a layer beside the new, which is one token longer
    more = (2 + 1) * 8 * 2 * 16 * 4 * (600 - 300)
    assert sum(long.held.values()) - sum(short.held.values()) == pytest.approx(more, rel=0.05)
    assert long.seconds > short.seconds


def test_a_plan_reads_no_weights(outline, rows, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = f"plan --model {outline} --gpu_memory 1GB --use_cpu true --quantization none --r 4"
    words += f" --forget {rows[0]} --retain {rows[1]} --per_device_train_batch_size 2 --activation_checkpointing true"
    main(words.split())
    said = capsys.readouterr().out
    assert "Training on 4 forget rows" in said
    assert "…" not in said
    assert (
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --activation_checkpointing true --optim"
        in said
    )
    assert "A sweep of 32 answers at a time:" in said
    assert "A merge takes" in said
    assert "arithmetic, not measured" in said
    assert "total time is not given" in said


@pytest.mark.parametrize(("retain", "auto"), [("auto", 240), ("file", 5)])
def test_rows_that_the_reference_would_write_count_at_their_greatest_length(outline, rows, retain, auto):
    args = UnlearnConfig(
        "made up", use_cpu=True, report_to="none", instead="guess", auto_retain=None if retain == "auto" else 5
    )
    data = Data(str(rows[0]), "auto" if retain == "auto" else str(rows[1]))
    found = planned_rows(ReferenceConfig(str(outline), quantization="none", r=4), data, args, Columns(), Tokenisation())
    prompt = max(e["labels"].index(next(x for x in e["labels"] if x != -100)) for e in found.datasets["forget"])
    lengths = [len(e["input_ids"]) for e in found.datasets["retain"]]
    assert len(lengths) == auto + (0 if retain == "auto" else 12)
    assert lengths[-auto:] == [prompt + 40 + 48] * auto  # what is sampled of a question, and of its answer
    assert len(found.datasets["wanted"]) == 4  # guesses


def test_a_card_that_is_not_here_is_planned_for_in_16_bits(outline):
    args = UnlearnConfig("made up", report_to="none", per_device_train_batch_size=1)
    reference = ReferenceConfig(str(outline), r=4)
    found = plan(PlanConfig("8GB", tflops=100), reference, args, tokenisation=Tokenisation(max_length=64))
    assert found.device == ("this GPU" if torch.cuda.is_available() else "a GPU that is not here")
    (planned,) = found.planned
    assert planned.length == 64
    assert {e.choice.optim for e in planned.estimates} == {"adamw_torch_fused", "adamw_8bit"}
    seconds = [e.seconds for e in planned.estimates]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(("dtype", "half"), [("auto", True), ("float32", False)])
def test_a_model_in_float32_is_planned_for_in_float32(outline, monkeypatch, dtype, half):
    def see(reference, args, _):
        raise InterruptedError(args.bf16)

    monkeypatch.setattr("loramox.extras.plan.job._setting", see)
    args = UnlearnConfig("made up", report_to="none")
    with pytest.raises(InterruptedError, match=str(half)):
        plan(PlanConfig("8GB", tflops=100), ReferenceConfig(str(outline), dtype=dtype, r=4), args)


def test_a_plan_says_when_nothing_fits_and_what_the_smallest_holds(outline, capsys):
    args = UnlearnConfig("made up", use_cpu=True, report_to="none", per_device_train_batch_size=1)
    reference = ReferenceConfig(str(outline), quantization="none", r=4)
    show_plan(plan(PlanConfig("1MB", max_new_tokens=60), reference, args, tokenisation=Tokenisation(max_length=64)))
    said = capsys.readouterr().out
    assert "Nothing fits" in said
    assert "32 answers at a time, which do not fit" in said


def test_the_budget_on_a_card_is_what_is_free_and_never_what_it_is_sold_with(monkeypatch):
    gigabyte, cuda = 2**30, torch.device("cuda")
    assert budget_of(8 * gigabyte, cuda, here=False) == pytest.approx((0.93 * 8 - 0.8) * gigabyte, rel=1e-6)
    assert budget_of(gigabyte // 2, cuda, here=False) == 0
    assert budget_of(8 * gigabyte, torch.device("cpu"), here=True) == pytest.approx(0.9 * 8 * gigabyte)
    for name, value in {"memory_reserved": 3 * gigabyte, "memory_allocated": gigabyte}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * gigabyte, 24 * gigabyte))
    assert budget_of(24 * gigabyte, cuda, here=True) == pytest.approx(0.93 * 6 * gigabyte)
    assert budget_of(6 * gigabyte, cuda, here=True) == pytest.approx((0.93 * 6 - 0.8) * gigabyte)


def fitted(budget, folder, rows, tmp_path, words):
    kinds = (RunConfig, ReferenceConfig, Data, UnlearnConfig, Columns, Tokenisation, FitConfig)
    from loramox.cli.arguments import settings_of

    said = f"--model {folder} --forget {rows[0]} --retain {rows[1]} --out {tmp_path / 'run'} --quantization none"
    said += f" --use_cpu true --r 4 --retain_weight 0 --fit {budget} {words}"  # the later of two flags wins
    said = said.split()
    *settings, _ = settings_of("unlearn", said, *kinds)
    return fit(budget, *settings, given=given_settings("unlearn", said, *kinds))


def test_the_fit_leaves_what_is_given_as_it_is(outline, rows, tmp_path):
    given = "--activation_checkpointing true --per_device_train_batch_size 2 --per_device_eval_batch_size 3"
    taken, found = fitted("1GB", outline, rows, tmp_path, given)
    assert taken == found.choice == Choice(2, 1, True, "adamw_torch_fused", 3)
    assert not (tmp_path / "run").exists()


def test_the_fit_takes_checkpointing_where_the_memory_is_less(outline, rows, tmp_path):
    given = "--per_device_train_batch_size 2 --per_device_eval_batch_size 1 --retain_weight 5"
    wide, most = fitted("1GB", outline, rows, tmp_path, given)
    budget = f"{most.peak / 2**20:.3f}MB"  # of which nine tenths may be filled
    narrow, least = fitted(budget, outline, rows, tmp_path, given)
    assert (wide.activation_checkpointing, narrow.activation_checkpointing) == (False, True)
    assert least.peak <= 0.9 * size_of(budget, "fit") < most.peak
    assert most.seconds < least.seconds


def test_an_impossible_budget_is_one_clear_error(outline, rows, tmp_path, capsys):
    words = f"unlearn --model {outline} --forget {rows[0]} --retain {rows[1]} --use_cpu true --quantization none"
    words += f" --out {tmp_path / 'run'} --fit 1MB --per_device_train_batch_size 1 --activation_checkpointing true"
    words += " --per_device_eval_batch_size 1"
    with pytest.raises(SystemExit) as left:
        main(words.split())
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "--fit 1MB: nothing fits" in said
    assert "Leave out --activation_checkpointing, --per_device_eval_batch_size, --per_device_train_batch_size" in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_keeps_its_choice(outline, rows, tmp_path):
    settings = Choice(4, 2, True, "adamw_torch", 5)._asdict()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({"settings": settings, "data": {}, "base": {}}))
    taken, found = fitted("1GB", outline, rows, tmp_path, "--resume true")
    assert taken == Choice(4, 2, True, "adamw_torch", 5)
    assert found is None


def test_unlearn_trains_with_the_choice_that_fits(pico, rows, tmp_path, capsys):
    words = f"unlearn --model {pico('llama')} --forget {rows[0]} --retain {rows[1]} --r 4 --quantization none"
    words += f" --use_cpu true --max_steps 1 --out {tmp_path / 'run'} --fit 1GB --gradient_accumulation_steps 2"
    main([*words.split(), "--eval_on_start", "false", "--activation_checkpointing", "false"])
    assert "--fit 1GB takes" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert record["gradient_accumulation_steps"] == 2
    assert record["per_device_train_batch_size"] == 8


@pytest.mark.parametrize("size", ["", "12", "0GB", "12XB", "GB12", "-1GB"])
def test_sizes(size):
    if size == "12":
        assert size_of(size, "fit") == size_of("12GB", "fit") == size_of("12 gib", "fit") == 12 * 2**30
        assert size_of("512MB", "fit") == 2**29
    else:
        with pytest.raises(SettingsError, match="--fit needs a size like 12GB"):
            size_of(size, "fit")


def test_what_cannot_be_planned_is_refused(outline, rows):
    args = UnlearnConfig("made up", use_cpu=True, report_to="none")
    with pytest.raises(SettingsError, match="quantization is int8"):
        plan(PlanConfig("8GB"), ReferenceConfig(str(outline), quantization="int8"), args)
    with pytest.raises(SettingsError, match="--forget and --retain go together"):
        PlanConfig("8GB", forget=str(rows[0]))
    with pytest.raises(SettingsError, match="--bandwidth goes with --tflops"):
        PlanConfig("8GB", bandwidth=900)


def test_every_choice_has_the_batch_that_was_set():
    args = UnlearnConfig(
        "made up", use_cpu=True, report_to="none", per_device_train_batch_size=4, gradient_accumulation_steps=3
    )
    found = list(choices(args, frozenset()))
    assert {c.per_device_train_batch_size * c.gradient_accumulation_steps for c in found} == {12}
    assert {c.per_device_train_batch_size for c in found} == {1, 2, 3, 4, 6, 12}
    assert {c.per_device_train_batch_size for c in choices(args, {"gradient_accumulation_steps"})} == {4}
