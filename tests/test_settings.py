"""Settings from flags and recipes: what reaches the dataclasses, and what is refused with which words."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import loramox
from loramox.cli.arguments import settings_of
from loramox.cli.launched import as_launched
from loramox.cli.training import training_kinds
from loramox.errors import SettingsError
from loramox.model.lora import ReferenceConfig
from loramox.train.config import UnlearnConfig

NEEDED = ["--model", "m", "--forget", "f.jsonl", "--retain", "r.jsonl", "--out", "o"]
FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def parsed(*words: str):
    """(run, reference, data, args, columns, tokenisation) of a whole command line."""
    return settings_of("unlearn", [*words], *training_kinds())


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


NAN, INFINITE = math.nan, math.inf
REFUSED: list[tuple[str, Any, str]] = [
    ("forget_term", "simnpo", "cross_entropy, preference"),
    ("kl_at", "shiped", "memorization, shipped"),
    ("targeted", "both", "descent, ascent"),
    ("temperature", 0.0, "a number above 0"),
    ("temperature", -6.0, "a number above 0"),
    ("temperature", NAN, "a number above 0"),
    ("temperature", INFINITE, "a number above 0"),
    ("beta", 0.0, "a number above 0"),
    ("beta", NAN, "a number above 0"),
    ("reference_cache_gb", -1.0, "0 or more"),
    ("alpha", 0, "a number above 0: at 0 the model is the reference"),
    ("alpha", -1.0, "a number above 0: .*memorizing side"),
    ("alpha", NAN, "a number above 0"),
    ("alpha", INFINITE, "a number above 0"),
    ("retain_weight", -0.1, "0 or more"),
    ("retain_weight", NAN, "0 or more"),
    ("retain_weight", INFINITE, "0 or more"),
    ("momentum", 0.0, "η above 0 and at most 1"),
    ("momentum", 1.5, "η above 0 and at most 1"),
    ("momentum", -0.1, "η above 0 and at most 1"),
    ("momentum", NAN, "η above 0 and at most 1"),
    ("momentum_every", 0, "1 or more"),
    ("momentum_every", -1, "1 or more"),
    ("momentum_rank", 0, "1 or more"),
    ("retain_per_forget", 0, "a number above 0: the retain term needs rows"),
    ("retain_per_forget", -3, "a number above 0"),
    ("eval_rows", 0, "a number above 0: use --eval_strategy no"),
    ("save_total_limit", 1, "2 or more: one checkpoint must be complete"),
    ("save_total_limit", 0, "2 or more"),
    ("learning_rate", -1.0, "0 or more"),
    ("learning_rate", NAN, "0 or more"),
    ("seed", -1, "0 or more"),
    ("num_train_epochs", 0.0, "a number above 0"),
    ("num_train_epochs", NAN, "a number above 0"),
    ("per_device_train_batch_size", 0, "1 or more"),
    ("per_device_eval_batch_size", 0, "1 or more"),
    ("gradient_accumulation_steps", 0, "1 or more"),
    ("label_smoothing_factor", 0.5, "0: no term here"),
    ("train_sampling_strategy", "group_by_length", "random or sequential"),
    ("use_liger_kernel", True, "false: losses are computed"),
]


@pytest.mark.parametrize(("name", "value", "expected"), REFUSED)
def test_a_value_that_cannot_work_is_refused_by_field_flag_and_remedy(name: str, value: Any, expected: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is '?{value}'?; --{name} (needs|takes) {expected}"):
        UnlearnConfig(**{name: value}, **of_static(name))


def of_static(name: str) -> dict[str, str]:
    """The method that has the setting, where the default has not."""
    return {"method": "mox_static"} if name in ("temperature", "kl_at", "forget_term") else {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1.0),
        ("alpha", 0.5),
        ("retain_weight", 0.0),
        ("momentum", 1.0),
        ("momentum_every", 1),
        ("momentum_rank", 1),
        ("save_total_limit", None),
        ("save_total_limit", 2),
        ("forget_term", "preference"),
        ("reference_cache_gb", 0.0),
        ("targeted", "ascent"),
    ],
)
def test_a_value_at_the_border_of_what_works_is_taken(name: str, value: Any) -> None:
    assert getattr(UnlearnConfig(**{name: value}, **of_static(name)), name) == value


def test_the_forget_model_is_on_the_other_side_where_alpha_is_free_and_elsewhere_what_was_trained() -> None:
    assert UnlearnConfig(alpha=4.0).forget_scale == -4.0
    assert UnlearnConfig(method="npo").forget_scale == 1.0


def test_names_of_0_1_lead_to_those_of_today_with_a_warning() -> None:
    for old, new in (("MemorizeConfig", "UnlearnConfig"), ("BaselineTrainer", "UnlearnTrainer")):
        with pytest.warns(DeprecationWarning, match=f"loramox.{old} is now loramox.{new}"):
            assert getattr(loramox, old) is getattr(loramox, new)


@pytest.mark.parametrize("settings", [{"r": 0}, {"lora_alpha": 0}])
def test_an_adapter_that_cannot_be_is_refused_by_field_and_flag(settings: dict[str, int]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(SettingsError, match=rf"{name} is {value}; --{name} needs"):
        ReferenceConfig("m", **settings)


def test_flags_reach_the_dataclasses() -> None:
    run, reference, data, args, columns, tokenisation = parsed(
        *NEEDED, "--resume", "--r", "8", "--target_modules", "q_proj", "v_proj", "--drop_overlap", "--alpha", "4",
        "--learning_rate", "5e-4", "--bf16", "false", "--text_column", "t", "--max_length", "64",
    )  # fmt: skip
    assert (run.out, run.resume, run.overwrite) == ("o", True, False)
    assert (reference.model, reference.r, reference.target_modules) == ("m", 8, ["q_proj", "v_proj"])
    assert (data.forget, data.retain, data.drop_overlap) == ("f.jsonl", "r.jsonl", True)
    assert (args.alpha, args.learning_rate, args.bf16) == (4.0, 5e-4, False)
    assert (columns.text_column, tokenisation.max_length) == ("t", 64)


RECIPE = """
model: m
forget: f.jsonl
retain: r.jsonl
out: o
alpha: 4
learning_rate: 5e-4      # YAML takes this for text
target_modules: [q_proj, v_proj]
drop_overlap: true
eval_on_start: false
momentum_rank: null
prompt_template: "- {prompt}\\n-"
lr_scheduler_type: cosine
lr_scheduler_kwargs: {num_cycles: 2}
"""


def test_a_recipe_reaches_the_dataclasses(tmp_path: Path) -> None:
    run, reference, data, args, _, tokenisation = parsed(recipe(tmp_path, RECIPE))
    assert (run.out, reference.model, data.forget, data.retain) == ("o", "m", "f.jsonl", "r.jsonl")
    assert (args.alpha, args.learning_rate, args.momentum_rank) == (4.0, 5e-4, None)
    assert reference.target_modules == ["q_proj", "v_proj"]
    assert (data.drop_overlap, args.eval_on_start) == (True, False)
    assert tokenisation.prompt_template == "- {prompt}\n-"
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_a_recipe_means_the_same_as_its_flags(tmp_path: Path) -> None:
    text = "model: m\nforget: f.jsonl\nretain: r.jsonl\nout: o\nr: 4\nseed: 7\n"
    assert parsed(recipe(tmp_path, text)) == parsed(*NEEDED, "--r", "4", "--seed", "7")


@pytest.mark.parametrize("flag", [["--alpha", "2"], ["--alpha=2"]])
def test_flags_win_over_the_recipe(tmp_path: Path, flag: list[str]) -> None:
    args = parsed(recipe(tmp_path, RECIPE), *flag, "--target_modules", "k_proj", "--drop_overlap", "false")
    assert args[3].alpha == 2.0
    assert args[1].target_modules == ["k_proj"]
    assert args[2].drop_overlap is False
    assert args[3].learning_rate == 5e-4


def test_a_null_in_a_recipe_is_the_default(tmp_path: Path) -> None:
    text = "model: m\nforget: f.jsonl\nretain: r.jsonl\nout: o\ntemperature:\nmax_length: ~\n"
    assert parsed(recipe(tmp_path, text)) == parsed(*NEEDED)


def test_a_null_for_a_setting_that_can_be_none_is_none_and_elsewhere_it_must_be_the_default(tmp_path: Path) -> None:
    assert parsed(recipe(tmp_path, "quantization: null\n"), *NEEDED)[1].quantization == "none"
    for line in ("retain_per_forget: null", "r: ~", "long_rows:"):
        name = line.partition(":")[0]
        with pytest.raises(SettingsError, match=rf"recipe .*: {name} is null\. Give it a value, or leave it out"):
            parsed(recipe(tmp_path, f"{line}\n"), *NEEDED)


def test_a_line_break_can_be_typed_in_a_shell_and_in_a_recipe(tmp_path: Path) -> None:
    typed, meant = r"Question: {prompt}\nAnswer:", "Question: {prompt}\nAnswer:"
    for words in (["--prompt_template", typed], [f"--prompt-template={typed}"], ["--prompt_template", meant]):
        assert parsed(*NEEDED, *words)[5].prompt_template == meant
    for quote in "'", '"':
        path = recipe(tmp_path, f"prompt_template: {quote}{typed}{quote}\n")
        assert parsed(path, *NEEDED)[5].prompt_template == meant


def test_a_tilde_in_a_recipe_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    run, reference, *_ = parsed(recipe(tmp_path, "model: ~/m\nforget: f.jsonl\nretain: r.jsonl\nout: ~/runs/1\n"))
    assert (run.out, reference.model) == ("/home/me/runs/1", "/home/me/m")


def test_an_empty_recipe_is_no_recipe(tmp_path: Path) -> None:
    assert parsed(recipe(tmp_path, "# nothing yet\n"), *NEEDED) == parsed(*NEEDED)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temprature: 1", r"recipe .*recipe.yaml: unknown setting 'temprature'; did you mean 'temperature'\?"),
        ("retain_per_forgets: 1", r"did you mean 'retain_per_forget'\?"),
        ("zzzzzz: 1", r"unknown setting 'zzzzzz'$"),
        ("on: 1", r"unknown setting 'True'"),
        ("output_dir: x", "--output_dir is set from --out"),
        ("beta: 0", "beta is 0.0; --beta needs a number above 0"),
        ("eval_strategy: sometimes", "sometimes"),
    ],
)
def test_a_wrong_line_in_a_recipe_is_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parsed(recipe(tmp_path, f"{line}\n"), *NEEDED)


@pytest.mark.parametrize("content", [b"a: [1\n", b"\xff\xfe\x00", b"- a\n- b\n", b"just words\n", b"a: b: c\n"])
def test_a_recipe_that_is_no_yaml_of_settings_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(content)
    with pytest.raises(
        SettingsError, match=r"(?s)recipe .*recipe.yml (cannot be read|is not a YAML file).*setting: value"
    ):
        parsed(str(path), *NEEDED)


def test_a_missing_recipe_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"recipe .*gone.yaml cannot be read: .*No such file"):
        parsed(str(tmp_path / "gone.yaml"), *NEEDED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temprature", "1"], r"unknown argument --temprature; did you mean --temperature\?"),
        (["--temprature=1"], r"unknown argument --temprature=1; did you mean --temperature\?"),
        (["--lr", "1e-4"], r"did you mean --learning_rate\?"),
        (["--epochs", "3"], r"did you mean --num_train_epochs\?"),
        (["--batch-size=4"], r"did you mean --per_device_train_batch_size\?"),
        (["--temp", "1"], "unknown argument --temp"),  # no abbreviations: they change meaning as settings are added
        (["stray"], "unknown argument stray"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--output_dir", "x"], "--output_dir is set from --out.*Give --out"),
        (["--output_dir=x"], "--output_dir is set from --out.*Give --out"),
        (["--output-dir", "x"], "--output_dir is set from --out.*Give --out"),
        (["mine.yaml"], "mine.yaml: a recipe comes first, before all flags: loramox unlearn mine.yaml"),
        (["--load_best_model_at_end", "true"], "load_best_model_at_end is True; .* needs false: what ships is"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "metric_for_best_model is None; .* needs the metric for"),
    ],
)
def test_a_wrong_flag_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parsed(*NEEDED, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (NEEDED[2:], "required: --model"),
        ([*NEEDED, "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        ([*NEEDED, "--kl_at", "shiped"], "--kl_at/--kl-at: invalid choice: 'shiped'"),
        ([*NEEDED, "--resume", "perhaps"], "--resume"),
    ],
)
def test_what_argparse_refuses_it_names_and_exits_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_weights_in_parts_are_refused_by_flag_and_from_accelerate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=rf"{name} is asked for.*Leave it out: .* with --shard true"):
        UnlearnConfig("o", **{name: {"full_shard": True} if name == "deepspeed" else True})
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(SettingsError, match=f"{name} is asked for"):
        UnlearnConfig("o")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what `accelerate launch` would, in one of two processes."""

    def launch(of: dict[str, str], processes: int = 2) -> None:
        for name, value in (of | {"WORLD_SIZE": str(processes)}).items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize("config", [FSDP, ZERO3], ids=["FSDP", "ZeRO-3"])
def test_what_accelerate_would_cut_is_cut_by_shard_unless_a_flag_or_the_recipe_says_otherwise(
    config: dict[str, str], launched: Callable[..., None], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("shard: false\n")
    for words, cut in (([], True), (["--shard", "false"], False), ([str(recipe)], False)):
        launched(config)
        _, reference, *_ = parsed(*words, *NEEDED)
        assert reference.shard == cut
    UnlearnConfig("o")  # accelerate is not asked any more


@pytest.mark.parametrize("config", [FSDP, ZERO3], ids=["FSDP", "ZeRO-3"])
def test_one_process_and_a_sweep_cut_nothing_of_themselves_and_other_verbs_refuse(
    config: dict[str, str], launched: Callable[..., None]
) -> None:
    launched(config, processes=1)
    assert not as_launched("unlearn")
    UnlearnConfig("o")
    launched(config)
    assert not as_launched("sweep")  # as its run did
    launched(config)
    assert as_launched("evaluate") == ["--shard", "true"]
    launched(config)
    assert not as_launched("requests add LEDGER")
    with pytest.raises(SettingsError, match="is asked for"):
        UnlearnConfig("o")


BESIDE = [
    ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP", "Say FULL_SHARD"),
    ("FSDP_RESHARD_AFTER_FORWARD", "false", "Say true"),
    ("FSDP_OFFLOAD_PARAMS", "true", "layers stay on their GPU"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "processes share rows and layers alone"),
    ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "Say zero_stage: 3 without it"),
    ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2", "Say 3, which cuts weights"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device"),
]
BESIDE_TRAINING = [
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "give --activation_checkpointing true to loramox"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme", "give --optim paged_adamw_8bit to loramox"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "give --gradient_accumulation_steps to loramox"),
    ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "give --max_grad_norm to loramox"),
]


@pytest.mark.parametrize(("name", "value", "said"), [*BESIDE, *BESIDE_TRAINING])
def test_what_else_accelerates_config_asks_for_is_refused(
    name: str, value: str, said: str, launched: Callable[..., None]
) -> None:
    config = FSDP if "FSDP" in name or "PARALLELISM" in name else ZERO3
    launched(config | {name: value})
    with pytest.raises(SettingsError, match=f"accelerate's config has {value} for .*{said}"):
        parsed(*NEEDED)
    if (name, value, said) in BESIDE_TRAINING:  # it is nothing to those who only ask
        assert as_launched("evaluate") == ["--shard", "true"]
    else:
        with pytest.raises(SettingsError, match=said):
            as_launched("sweep")


def test_an_accelerate_config_that_names_no_stage_has_the_second(launched: Callable[..., None]) -> None:
    launched({"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(SettingsError, match="has 2 for zero_stage"):
        as_launched("unlearn")


def test_the_zero3_config_of_the_recipes_says_nothing_that_is_refused(launched: Callable[..., None]) -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / "recipes/accelerate/zero3.yaml").read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    said = {
        f"ACCELERATE_DEEPSPEED_{name.upper()}": str(value).lower() for name, value in config["deepspeed_config"].items()
    }
    launched({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": config["mixed_precision"]} | said)
    assert parsed(*NEEDED)[1].shard


@pytest.mark.parametrize(
    ("asked", "given", "taken"),
    [("bf16", {}, "bf16"), ("fp16", {}, "fp16"), ("bf16", {"bf16": False}, "no"), ("no", {"bf16": True}, "bf16")],
)
def test_accelerates_mixed_precision_is_in_the_record_and_a_flag_wins_over_it(
    asked: str, given: dict[str, bool], taken: str, launched: Callable[..., None]
) -> None:
    launched({"ACCELERATE_MIXED_PRECISION": asked}, processes=1)
    args = UnlearnConfig("o", use_cpu=True, **given)
    assert args.mixed_precision == taken
    assert (args.to_dict()["bf16"], args.to_dict()["fp16"]) == (taken == "bf16", taken == "fp16")


def test_a_precision_that_is_not_there_is_refused(launched: Callable[..., None]) -> None:
    launched({"ACCELERATE_MIXED_PRECISION": "fp8"}, processes=1)
    with pytest.raises(SettingsError, match="mixed_precision is fp8; --mixed_precision needs no, bf16 or fp16"):
        UnlearnConfig("o")
