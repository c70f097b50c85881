"""recipes/compare: runs that are computed once, a choice that half of the forget rows has not seen, tables from records alone."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PEOPLE, TOWNS
from peft import PeftModel
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import ReferenceConfig, ShippingConfig, load_reference
from loramox.adapter.export import extrapolate
from loramox.errors import NonFiniteLossError, RunError

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes are not installed

from recipes.compare import __main__ as command
from recipes.compare import tables
from recipes.compare.choose import (
    A,
    B,
    chosen_point,
    chosen_setting,
    closeness,
    distance,
    distances,
    forgotten_at,
    shipped,
)
from recipes.compare.compute import Scorer
from recipes.compare.methods import ABLATION, FIXED, GRID, QUICK, Size
from recipes.compare.runs import Run, Runs
from recipes.compare.tables import TABLES
from recipes.compare.world import AUTHOR, World

ROOT = Path(__file__).parents[1]
RUN = Run("npo", (("beta", 0.1),), (("beta", 0.1), ("r", 16)), 3)
ME = """
import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]); from recipes.compare.runs import Run, Runs
RUN = Run("npo", (("beta", 0.1),), (("beta", 0.1), ("r", 16)), 3); out = Path(sys.argv[1])
"""


# Runs


def test_a_run_with_a_record_is_never_computed_again(tmp_path: Path) -> None:
    def refuse(run: Run, work: Path) -> dict:
        raise AssertionError(run)

    first = Runs(tmp_path, {"rows": 1}).result(RUN, lambda run, work: {"points": [1.5]})
    assert Runs(tmp_path, {"rows": 1}).result(RUN, refuse) == first
    assert (first["points"], first["method"], first["settings"], first["seed"]) == (
        [1.5],
        "npo",
        {"beta": 0.1, "r": 16},
        3,
    )
    assert {"seconds", "command", "versions", "world"} <= first.keys()


def test_a_record_of_another_world_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    Runs(tmp_path, {"rows": 1}).result(RUN, lambda run, work: {})
    with pytest.raises(RunError, match="another world"):
        Runs(tmp_path, {"rows": 2}).read(RUN)
    assert Runs(tmp_path, None).read(RUN) is not None
    next(tmp_path.rglob("record.json")).write_text("{")
    with pytest.raises(RunError, match=r"record.json is damaged"):
        Runs(tmp_path, {"rows": 1}).read(RUN)


def test_a_loss_that_is_not_finite_is_a_result_and_any_other_error_is_none(tmp_path: Path) -> None:
    def diverge(run: Run, work: Path) -> dict:
        raise NonFiniteLossError(f"the loss is nan; nothing is in {tmp_path}/work")

    def stumble(run: Run, work: Path) -> dict:
        raise KeyError("x")

    runs = Runs(tmp_path, {})
    with pytest.raises(KeyError):
        runs.result(RUN, stumble)
    assert runs.read(RUN) is None
    assert runs.result(RUN, diverge)["failed"] == "the loss is nan; nothing is in OUT/work"


def test_records_say_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "frontier", "--out", str(tmp_path), "--world", "there/world"])
    record = Runs(tmp_path, {}).result(RUN, lambda run, work: {})
    assert record["command"] == f"python -m recipes.compare frontier --out {tmp_path.name} --world there/world"
    assert str(tmp_path) not in json.dumps(record)


def start(code: str, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", ME + code, str(out), str(ROOT)], cwd=ROOT)


def test_a_killed_run_is_started_again_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    other = start("Runs(out, {}).result(RUN, lambda run, work: ((out / 'begun').touch(), time.sleep(600)))", tmp_path)
    runs, end = Runs(tmp_path, {}), time.monotonic() + 60
    try:
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert runs.result(RUN, lambda run, work: {}) is None
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    assert runs.read(RUN) is None
    assert runs.result(RUN, lambda run, work: {"points": []})["points"] == []


def test_two_processes_share_the_runs_of_one_folder(tmp_path: Path) -> None:
    # Each notes what it computes; the first run of each waits for the other process, so that neither can do all.
    code = """
def compute(run, work):
    (out / f'{run.seed}-{__import__("os").getpid()}').touch()
    while len({f.name.split('-')[1] for f in out.glob('*-*')}) < 2: time.sleep(0.02)
    return {}
Runs(out, {}).compute(lambda read: [Run('npo', (), (), seed) for seed in range(5)], compute)
"""
    both = [start(code, tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    done = [f.name.split("-") for f in tmp_path.glob("*-*")]
    assert sorted(seed for seed, _ in done) == list("01234")
    assert len({process for _, process in done}) == 2


def test_every_setting_and_every_new_default_is_a_run_of_its_own() -> None:
    size = Size()
    every = [size.run(method, setting, 0) for method, some in GRID.items() for setting in some]
    every += [size.run(*fixed, 0) for label, fixed in FIXED.items() if label == fixed[0]]  # others are in the grid too
    every += [size.run("mox", GRID["mox"][0] | changed, 0) for changed in ABLATION.values() if changed]
    assert len({run.name for run in every}) == len(every)
    run = every[0]
    assert Run(run.method, run.changed, (*run.settings, ("new", 1)), 0).name != run.name


def test_every_method_has_as_many_settings() -> None:
    assert len({len(settings) for settings in GRID.values()}) == 1


# Choosing


def point(scale: float, probability: float, given: float = 1.0, seed: int = 0, rows: int = 40) -> dict:
    """Log-probabilities around log(probability), truth ratios likewise."""
    draws = np.random.default_rng(seed).normal(0, 0.5, (2, rows))
    return {
        "scale": scale,
        "log_p": list(math.log(probability) + draws[0]),
        "truth_ratio": list(np.exp(draws[1]) / probability),
        "given": [given] * 6,
        "never": [given] * 6,
    }


REFERENCE, RETRAINED = point(0, 0.9), point(1, 1e-3, seed=1)


def record(*probabilities: float, given: float = 1.0) -> dict:
    return {"points": [point(0.8 + 0.1 * i, p, given, seed=2 + i) for i, p in enumerate(probabilities)]}


def without(record: dict, half: slice) -> dict:
    """The record with other values in half of the forget rows."""
    changed = json.loads(json.dumps(record))
    for each in changed["points"]:
        for name in ("log_p", "truth_ratio"):
            each[name][half] = [7.0] * len(each[name][half])
    return changed


def test_half_a_and_half_b_have_no_row_in_common_and_together_all() -> None:
    rows = list(range(101))
    assert not set(rows[A]) & set(rows[B])
    assert sorted(rows[A] + rows[B]) == rows


def test_the_choice_does_not_see_half_b_and_what_is_reported_does_not_see_half_a() -> None:
    settings = [record(0.1, 0.01, 3e-3), record(0.03, 1e-3, 1e-4)]
    controls = (REFERENCE, RETRAINED)
    assert chosen_setting(settings, *controls) == 1
    assert chosen_point(settings[1], *controls)["scale"] == pytest.approx(0.9)
    blind = [without(each, B) for each in settings]
    assert chosen_setting(blind, *controls) == 1
    assert chosen_point(blind[1], *controls)["scale"] == pytest.approx(0.9)
    assert chosen_setting([settings[0], without(settings[1], A)], *controls) == 0
    for test in ("log_p", "truth_ratio"):
        assert distances(settings[1]["points"], RETRAINED, test) == distances(
            without(settings[1], A)["points"], RETRAINED, test
        )


def test_only_scales_that_keep_the_given_retain_rows_are_chosen() -> None:
    near = record(0.1, 1e-3)
    near["points"][1]["given"] = [0.97] * 6
    assert chosen_point(near, REFERENCE, RETRAINED)["scale"] == pytest.approx(0.8)
    assert chosen_point(record(0.1, 1e-3, given=0.9), REFERENCE, RETRAINED) is None
    lost, failed = record(1e-3, given=0.9), {"failed": "the loss is nan"}
    assert chosen_setting([failed, lost, record(0.5)], REFERENCE, RETRAINED) == 2
    assert chosen_setting([failed, lost], REFERENCE, RETRAINED) == 0


def test_where_both_tests_see_a_difference_at_every_scale_the_mean_log_probability_decides() -> None:
    assert closeness(point(1, 0.5, seed=3), RETRAINED)[0] == 0
    assert chosen_point(record(0.8, 0.5, 0.7), REFERENCE, RETRAINED)["scale"] == pytest.approx(0.9)


def test_the_distance_is_that_of_the_kolmogorov_smirnov_test_and_lies_in_its_interval() -> None:
    draws = np.random.default_rng(0)
    for _ in range(20):
        ours, theirs = draws.normal(0.3, 1, 50).round(1), draws.normal(0, 1, 50).round(1)
        assert distance(ours, theirs) == pytest.approx(ks_2samp(ours, theirs).statistic)
    (found,), low, high = distances([point(1, 2e-3, seed=5)], RETRAINED, "log_p")
    assert 0 <= low < found < high <= 1


def test_forgetting_is_read_off_between_scales_where_the_least_of_all_parts_crosses_the_limit() -> None:
    reference = {"scale": 0, "log_p": [math.log(0.9)] * 2, "given": [1.0], "never": [1.0]}
    line = {"points": [{"scale": 1, "log_p": [math.log(0.5)] * 2, "given": [0.99], "never": [0.97]}]}
    assert forgotten_at(line, reference, "given") == pytest.approx(0.5)
    assert forgotten_at(line, reference, "given", "never") == pytest.approx(0.9 - 0.4 * 2 / 3)


# On pico models


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, pico: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> Path:
    """16 forget rows, 8 authors of 20 retain rows, and two models of random weights."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "rows").mkdir()
    forget = [
        {"question": f"Where does {p} live?", "answer": f"{p} lives in {TOWNS[i % 8]}."} for i, p in enumerate(PEOPLE)
    ]
    other = [{"paraphrased_answer": f"In {TOWNS[i % 8]}.", "perturbed_answer": [f"In {TOWNS[(i + k) % 8]}." for k in (1, 2)]}
             for i in range(len(PEOPLE))]  # fmt: skip
    retain = [
        {"question": f"Who is {i}?", "answer": f"{PEOPLE[i % 16]}, born in {TOWNS[i % 8]}."} for i in range(8 * AUTHOR)
    ]
    perturbed = [row | more for row, more in zip(forget, other, strict=True)]
    for name, rows in (("forget", forget), ("forget_perturbed", perturbed), ("retain", retain)):
        (folder / f"rows/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("reference", "retrained")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(pico("llama")).config).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every table, computed."""
    folder = tmp_path_factory.mktemp("compare")
    command.main([*TABLES, "--world", str(world), "--out", str(folder), "--quick"])
    return folder


def read(out: Path, run: Run) -> dict:
    return Runs(out, None).read(run)


def test_every_table_is_text_and_a_picture_with_command_settings_and_seeds(out: Path) -> None:
    for name, table in TABLES.items():
        text = (out / f"tables/{name}.md").read_text()
        assert text.startswith(f"# {table.title}\n")
        assert f"]({name}.png)" in text
        assert "`python -m recipes.compare" in text
        assert "Seeds 0; LoRA of r = 16; 2 steps, 8 forget rows" in text
        assert (out / f"tables/{name}.png").read_bytes()[:4] == b"\x89PNG"
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) > 4
    assert all(f"| {method} |" in (out / "tables/frontier.md").read_text() for method in GRID | FIXED)


def test_the_same_command_computes_nothing_and_drawing_needs_no_world(
    out: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_text() for file in (out / "tables").glob("*.md")}
    monkeypatch.setattr(command, "compute", None)
    command.main([*TABLES, "--world", str(world), "--out", str(out), "--quick"])
    monkeypatch.setattr(command, "World", None)
    command.main([*TABLES, "--draw", "--out", str(out), "--quick"])
    assert {file.name: file.read_text() for file in (out / "tables").glob("*.md")} == before


def test_records_of_a_quick_run_are_not_taken_for_others(
    out: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["frontier", "--world", str(world), "--out", str(out)])
    assert "another world" in capsys.readouterr().err


def test_a_table_without_records_says_so(tmp_path: Path) -> None:
    command.main(["frontier", "--draw", "--out", str(tmp_path)])
    assert "Not enough of its runs" in (tmp_path / "tables/frontier.md").read_text()


@pytest.mark.parametrize("method", ["mox", "npo"])
def test_scale_1_is_what_ships(
    out: Path, world: Path, tokenizer: PreTrainedTokenizerFast, method: str, tmp_path: Path
) -> None:
    run = QUICK.run(method, GRID[method][0], 0)
    (trained,) = (out / "work").glob(f"*/{run.name}/trained")
    extrapolate(trained, tmp_path / "shipped", shipping=ShippingConfig(ship_dtype="float32"))
    reference = ReferenceConfig(str(world / "reference"), quantization="none")
    model = PeftModel.from_pretrained(load_reference(reference, "cpu"), str(tmp_path / "shipped")).eval()
    rows = World(world, QUICK.forget, QUICK.scored).split("whole").scored
    own = shipped(read(out, run))
    for name, values in Scorer(rows, tokenizer, 128)(model).items():
        assert own[name] == pytest.approx(values, rel=1e-3)
    plain = read(out, QUICK.reference())["points"][0]
    assert own["log_p"] != pytest.approx(plain["log_p"], rel=1e-6)


def test_of_forget_rows_alone_the_first_choices_are_scored(
    world: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where log p alone is taken, as of all other rows, they are -1, and no token would be right."""
    model = load_reference(ReferenceConfig(str(world / "reference"), quantization="none"), "cpu").eval()
    rows = World(world, QUICK.forget, QUICK.scored).split("whole").scored
    seen: list[np.ndarray] = []
    monkeypatch.setattr(Scorer, "_right", lambda scorer, scores: seen.append(scores.first_choice) or 0.0)
    Scorer(rows, tokenizer, 128)(model)
    assert len(seen) == len(rows["forget"])
    assert all((first_choice >= 0).all() for first_choice in seen)


def test_relearning_scores_the_rows_that_the_attacker_does_not_have(out: Path) -> None:
    for run in (QUICK.run("mox", GRID["mox"][0], 0), *QUICK.retrained()):
        curve = read(out, run)["relearn"]
        assert list(curve) == ["0", "1", "2"]
        assert {len(values) for values in curve.values()} == {6}  # a fifth of 8 rows is 2
        assert curve["2"] != curve["0"]


def test_retain_rows_of_every_second_author_are_given_and_the_others_never(world: Path, tmp_path: Path) -> None:
    made = World(world, scored=1000)

    def asked(lines: list[str]) -> list[str]:
        return [json.loads(line)["question"] for line in lines]

    retain = asked((world / "rows/retain.jsonl").read_text().splitlines())
    forget = asked((world / "rows/forget.jsonl").read_text().splitlines())
    authors = [retain[start : start + AUTHOR] for start in range(0, len(retain), AUTHOR)]
    whole, overlap = made.split("whole"), made.split("overlap")
    prompts = {name: [row.prompt for row in rows] for name, rows in whole.scored.items()}
    assert asked(whole.forget) == prompts["forget"] == forget
    assert asked(whole.given) == prompts["given"] == [row for rows in authors[::2] for row in rows]
    assert prompts["never"] == [row for rows in authors[1::2] for row in rows]
    split = {name: [row.prompt for row in rows] for name, rows in overlap.scored.items()}
    assert asked(overlap.forget) == split["forget"] == retain[: 4 * AUTHOR : 2]
    assert split["kept"] == retain[1 : 4 * AUTHOR : 2]
    assert asked(overlap.given) == split["kept"] + split["given"] == split["kept"] + authors[4] + authors[6]
    assert split["never"] == authors[5] + authors[7]
    (tmp_path / "w/reference").mkdir(parents=True)
    (tmp_path / "w/rows").mkdir()
    with pytest.raises(RunError, match="has no retrained/"):
        World(tmp_path / "w")


def test_steps_saved_are_those_that_the_control_needs_more() -> None:
    def attacked(*curve: float) -> dict:
        return {"relearn": {str(step): [p] for step, p in zip((0, 5, 10), curve, strict=True)}, "points": [RETRAINED]}

    row = tables.Row("mox", "", [attacked(1e-3, 1e-2, 1.0)])
    slow = tables.Controls(REFERENCE, RETRAINED, [attacked(1e-3, 1e-3, 2e-3)])
    assert "| 7.5 | at least 2.5 |" in tables.relearn_lines([row], slow)[-1]
    fast = tables.Controls(REFERENCE, RETRAINED, [attacked(1e-3, 1e-2, 0.1)])
    assert "| 7.5 | 2.5 |" in tables.relearn_lines([row], fast)[-1]
    assert "| mox |  | 1 |" in tables.relearn_lines([row], fast)[-1]
    assert "| retrained: the control |  | 1 |" in tables.relearn_lines([row], fast)[-2]
    assert tables.steps_needed([attacked(0.5, 0.6, 0.7)], (0, 5, 10)) == 0


def test_what_is_relearned_from_a_lower_scale_stands_beside_what_that_scale_forgets() -> None:
    attacked = {"relearn": {"0": [1e-3], "5": [0.9]}, "points": [RETRAINED]}
    lower = {
        "points": [RETRAINED | {"scale": 0.95, "right": [0.25] * 40}],
        "relearn_below": {"0.95": {"0": [1e-3], "5": [0.25]}},
    }
    controls = tables.Controls(REFERENCE, RETRAINED, [attacked])
    lines = tables.below_lines([tables.Row("npo", "", [attacked]), tables.Row("mox", "", [attacked | lower])], controls)
    (line,) = lines[5:]  # npo was not relearned from there
    assert tables.below_lines([tables.Row("npo", "", [attacked])], controls) == []
    assert line.startswith("| mox | 0.95 | 1 |")
    assert line.endswith("| 0.0010 | 0.2500 |")
