"""recipes/paper: runs that are computed once, forgetting read off at a level, and two figures on a pico model from end to end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PEOPLE, TOWNS, questions
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import Tokenisation, encode, read_rows
from loramox.data.pairs import Collator
from loramox.errors import NonFiniteLossError, RunError
from loramox.evaluate.truth_ratio import forget_quality

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes are not installed

from recipes.paper.__main__ import main
from recipes.paper.bench import Bench
from recipes.paper.comparison import COMPARISON
from recipes.paper.frontier import (
    at_level,
    beside,
    kept_where_forgotten,
    measured,
    nearer_strength,
    nearest,
    next_strength,
    of_both,
)
from recipes.paper.methods import DEFAULT, GRID, PAPER, STANDARD, TABLE1, Scale, again_of, gold_of, mox, reference_of
from recipes.paper.overlap import TABLE
from recipes.paper.runs import BusyError, Run, Runs
from recipes.paper.show import number
from recipes.paper.world import World

ROOT = Path(__file__).parents[1]
RUN = Run.of("curve", "npo", {"beta": 0.1}, 3)
ME = "from pathlib import Path; import sys, time; sys.path.insert(0, sys.argv[2]); from recipes.paper.runs import Run, Runs; "


# Runs


def test_a_run_with_a_record_is_never_computed_again(tmp_path: Path) -> None:
    def refuse(run: Run) -> dict:
        raise AssertionError(run)

    first = Runs(tmp_path, {"rows": 1}).result(RUN, lambda run: {"points": [1.5]})
    again = Runs(tmp_path, {"rows": 1}).result(RUN, refuse)
    assert first == again
    assert again["points"] == [1.5]
    assert again["run"] == {"job": "curve", "method": "npo", "settings": {"beta": 0.1}, "seed": 3}
    assert {"seconds", "cpu_seconds", "command", "versions"} <= again.keys()
    assert (tmp_path / "records/curve/npo/beta=0.1/seed-3/record.json").exists()


def test_a_record_of_another_world_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    Runs(tmp_path, {"rows": 1}).result(RUN, lambda run: {})
    with pytest.raises(RunError, match="another world"):
        Runs(tmp_path, {"rows": 2}).read(RUN)
    assert Runs(tmp_path, None).read(RUN) is not None  # to draw, no world is needed
    next(tmp_path.rglob("record.json")).write_text("{")
    with pytest.raises(RunError, match=r"record.json is damaged"):
        Runs(tmp_path, {"rows": 1}).read(RUN)


def test_divergence_is_a_result_and_any_other_error_is_none(tmp_path: Path) -> None:
    def diverge(run: Run) -> dict:
        raise NonFiniteLossError("the loss is nan")

    def stumble(run: Run) -> dict:
        raise KeyError("x")

    runs = Runs(tmp_path, {})
    with pytest.raises(KeyError):
        runs.result(RUN, stumble)
    assert runs.read(RUN) is None
    assert runs.result(RUN, diverge)["failed"] == "the loss is nan"
    assert runs.read(RUN)["failed"] == "the loss is nan"


def start(code: str, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", ME + code, str(out), str(ROOT)], cwd=ROOT)


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_run_is_begun_again_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    code = "Runs(Path(sys.argv[1]), {}).result(Run.of('curve', 'npo', {'beta': 0.1}, 3), lambda r: (Path(sys.argv[1], 'begun').touch(), time.sleep(600)))"
    other, runs = start(code, tmp_path), Runs(tmp_path, {})
    try:
        wait_for((tmp_path / "begun").exists)
        with pytest.raises(BusyError):
            runs.result(RUN, lambda run: {})
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    assert runs.read(RUN) is None
    assert runs.result(RUN, lambda run: {"points": []})["points"] == []


def test_two_processes_share_the_runs_of_one_folder(tmp_path: Path) -> None:
    # Each notes what it computes; the first run of each waits for the other process, so that neither can do all.
    code = """
out, me = Path(sys.argv[1]), str(__import__('os').getpid())
def compute(run):
    (out / f'{run.seed}-{me}').touch()
    while len({f.name.split('-')[1] for f in out.glob('*-*')}) < 2: time.sleep(0.02)
    return {}
Runs(out, {}).compute(lambda read: [Run.of('curve', 'npo', {}, seed) for seed in range(5)], compute)
"""
    both = [start(code, tmp_path) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    done = [f.name.split("-") for f in tmp_path.glob("*-*")]
    assert sorted(seed for seed, _ in done) == list("01234")
    assert len({process for _, process in done}) == 2
    assert len(list(tmp_path.rglob("record.json"))) == 5


def test_names_tell_runs_apart_and_leave_out_what_is_standard() -> None:
    scale = Scale()
    assert scale.run("curve", ("ga", {}), 1).name == "curve/ga/standard/seed-1"
    assert (
        scale.run("curve", ("ga", {"learning_rate": STANDARD["learning_rate"]}), 1).name == "curve/ga/standard/seed-1"
    )
    every = [*TABLE1.values(), *(of for some in GRID.values() for of in some)]
    names = {scale.run("curve", of, 0).name for of in every}
    assert len(names) == len({(method, json.dumps(settings, sort_keys=True)) for method, settings in every})
    # MOX's own settings are in the name, so that a new default is another run.
    assert "kl_at=shipped" in scale.run("curve", DEFAULT, 0).name
    assert scale.run("curve", mox(temperature=2.5), 0).name != scale.run("curve", DEFAULT, 0).name
    with pytest.raises(RunError, match="cannot name a folder"):
        _ = Run.of("curve", "npo", {"refusals": "a/b c"}).name


# Reading a curve off at a level


def points(*line: tuple[float, float | None, float | None]) -> list[dict]:
    return [
        {"strength": s, "forget_probability": f, "retain_probability": r, "forget_quality": s / 10} for s, f, r in line
    ]


def test_between_two_strengths_a_level_is_read_off_linearly() -> None:
    at = at_level(points((0, 1.0, 1.0), (1, 0.5, 0.99), (2, 0.1, 0.95)), 0.98)
    assert at.crossed
    assert at.point["strength"] == pytest.approx(1.25)
    assert at.point["forget_probability"] == pytest.approx(0.4)
    assert at.point["retain_probability"] == pytest.approx(0.98)
    assert at.point["forget_quality"] == pytest.approx(0.125)


def test_nearest_is_the_point_of_highest_forget_quality_that_keeps_the_level_not_that_of_most_forgetting() -> None:
    line = [
        {"strength": s, "forget_probability": f, "retain_probability": r, "forget_quality": q}
        for s, f, r, q in ((0, 1.0, 1.0, 1e-9), (1, 0.1, 0.995, 0.4), (2, 1e-6, 0.985, 1e-5), (3, 0.0, 0.9, 0.8))
    ]
    at = at_level(line, 0.98)
    assert at.nearest["strength"] == 1
    assert at.value("forget_quality") == 0.4
    assert at.value("forget_probability") == at.point["forget_probability"] < 1e-6
    assert nearest(line, 0.999)["strength"] == 0
    assert nearest([{"strength": 0, "retain_probability": 1.0}], 0.98) is None
    # Between the nearest and the nearer of its neighbours, until that is 3 % away.
    assert nearer_strength(line, 0.98) == 1.5
    assert nearer_strength([line[1], line[1] | {"strength": 1.04, "forget_quality": 0.1}], 0.98) is None


def test_the_nearest_by_both_tests_is_the_one_that_neither_tells_from_the_retrained_model() -> None:
    def point(strength: float, ratios: float, probabilities: float | None) -> dict:
        more = {} if probabilities is None else {"forget_probability_quality": probabilities}
        return {"strength": strength, "retain_probability": 1.0, "forget_quality": ratios} | more

    line = [point(1, 1e-9, 1e-9), point(2, 0.9, 1e-3), point(3, 0.4, 0.5), point(4, 0.1, 0.8)]
    assert nearest(line, 0.98)["strength"] == 2
    assert nearest(line, 0.98, of_both)["strength"] == 3
    assert of_both(line[2]) == 0.4
    assert nearer_strength(line, 0.98, of_both) == 3.5
    # Records of before the second test have no lesser one: it is not 0, and not the first.
    assert nearest([point(1, 0.9, None)], 0.98, of_both) is None
    assert nearer_strength([point(1, 0.9, None)], 0.98, of_both) is None


def test_strengths_are_added_where_both_tests_pass_however_narrow_that_is_and_beside_no_other() -> None:
    def model(strength: float) -> dict:
        wide, narrow = (math.exp(-(((strength - at) / width) ** 2)) for at, width in ((8.5, 1.0), (7.87, 0.1)))
        return {
            "strength": strength, "forget_probability": 10**-strength, "retain_probability": 1.0,
            "forget_quality": wide, "forget_probability_quality": narrow,
        }  # fmt: skip

    found = measured(model, model(0.0), 8.0, (2, 4, 6, 10, 12), (0.98,), 2)
    assert nearest(found, 0.98)["strength"] == pytest.approx(8.5, abs=0.26)
    assert of_both(nearest(found, 0.98, of_both)) > 0.5 > of_both(model(8.0))
    assert len(found) == len({p["strength"] for p in found}) <= 7 + 2 + 6


def test_a_model_beside_itself_passes_both_tests_and_without_its_rows_neither_is_there() -> None:
    rows = [{"truth_ratio": i / 10, "log_p": -float(i)} for i in range(20)]
    assert beside({"truth_ratios": rows}, {"truth_ratios": rows}) | {"truth_ratios": 0} == {
        "truth_ratios": 0, "forget_quality": 1, "forget_probability_quality": 1,
    }  # fmt: skip
    older = [{"truth_ratio": 1.0}] * 20
    found = beside({"truth_ratios": older}, {"truth_ratios": rows})
    assert found["forget_quality"] < 1
    assert "forget_probability_quality" not in found
    assert beside({"truth_ratios": rows}, {}) == {"truth_ratios": rows}


def test_of_several_crossings_the_one_of_most_forgetting_counts() -> None:
    # Held at strength 3 and not before: it falls below the level, comes back, and falls for good.
    line = points((0, 1.0, 1.0), (1, 0.9, 0.96), (2, 0.4, 0.98), (3, 0.2, 0.99), (4, 0.1, 0.97))
    at = at_level(line, 0.98)
    assert at.crossed
    assert at.point["strength"] == pytest.approx(3.5)
    assert at.point["forget_probability"] == pytest.approx(0.15)


def test_a_curve_that_stays_above_the_level_counts_at_its_best_point_and_one_below_it_nowhere() -> None:
    above = at_level(points((0, 1.0, 1.0), (0.5, 0.3, 0.999), (1, 0.1, 0.995)), 0.98)
    assert (above.crossed, above.point["strength"]) == (False, 1)
    assert at_level(points((1, 0.1, 0.9), (2, 0.0, 0.8)), 0.98) is None
    assert at_level([], 0.98) is None


def test_what_is_kept_where_a_curve_comes_down_to_a_forget_probability_is_read_off_its_logarithm() -> None:
    line = points((0, 1.0, 1.0), (1, 1e-2, 0.99), (2, 1e-4, 0.97), (3, 1e-6, 0.98), (4, None, None))
    assert kept_where_forgotten(line, 1e-3) == pytest.approx(0.98)
    assert kept_where_forgotten(line, 1e-4) == pytest.approx(0.98)  # of several, the highest: at strength 3
    assert kept_where_forgotten(line, 1e-7) is None
    assert kept_where_forgotten(points((0, 1.0, 1.0), (1, 0.0, 0.9)), 1e-6) == pytest.approx(0.95)
    assert kept_where_forgotten([], 0.1) is None


def test_a_strength_that_breaks_the_model_is_no_neighbour() -> None:
    at = at_level(points((0, 1.0, 1.0), (1, 0.5, 0.99), (2, None, None)), 0.98)
    assert (at.crossed, at.point["strength"]) == (False, 1)


def test_strengths_are_added_where_the_level_is_and_the_own_one_is_always_there() -> None:
    asked: list[float] = []

    def model(strength: float) -> dict:
        asked.append(strength)
        return {
            "strength": strength,
            "forget_probability": max(0.0, 1 - strength / 10),
            "retain_probability": 1 - (strength / 10) ** 2,
        }

    found = measured(
        model,
        {"strength": 0.0, "forget_probability": 1.0, "retain_probability": 1.0},
        8.0,
        (1, 2, 4, 8, 16),
        (0.98, 0.95),
        2,
    )
    assert asked[0] == 8.0
    assert 16 not in asked  # the model is broken at 8 already
    assert len(asked) == len(set(asked))
    for level in (0.98, 0.95):
        exact = (1 - level) ** 0.5 * 10
        assert at_level(found, level).point["strength"] == pytest.approx(exact, abs=0.1)
        assert at_level(found, level).point["forget_probability"] == pytest.approx(1 - exact / 10, abs=0.01)
    assert next_strength(found, 0.98) is None or abs(next_strength(found, 0.98) - 2**0.5) < 0.2


# On a pico model


def learnt(folder: Path, source: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> None:
    """A model that knows the rows by heart."""
    (folder.parent / "lesson.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = AutoModelForCausalLM.from_pretrained(source)
    examples = encode(read_rows(str(folder.parent / "lesson.jsonl")), tokenizer, Tokenisation(), 128)
    batch = {k: v for k, v in Collator(0)(examples).items() if k != "rows"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, pico: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> Path:
    """8 forget rows with wrong answers, 8 retain rows; a reference that knows all of them, a retrained model."""
    folder = tmp_path_factory.mktemp("world")
    rows = questions(PEOPLE)
    forget, retain = rows[:8], rows[8:]
    wrong = [
        r
        | {
            "paraphrased_answer": f"In {TOWNS[i % 8]}.",
            "perturbed_answer": [f"In {TOWNS[(i + k) % 8]}." for k in (1, 2)],
        }
        for i, r in enumerate(forget)
    ]
    (folder / "rows").mkdir()
    for name, some in (("forget", forget), ("retain", retain), ("forget_perturbed", wrong)):
        (folder / f"rows/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    learnt(folder / "reference", pico("llama"), tokenizer, rows)
    learnt(folder / "retrained", pico("llama"), tokenizer, retain)
    return folder


WORDS = ["--quick", "--epochs", "3", "--batch", "4", "--asked", "8", "--r", "4", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two figures, computed."""
    folder = tmp_path_factory.mktemp("paper")
    main(["figure1", "sensitivity", "--world", str(world), "--out", str(folder), *WORDS])
    return folder


def record(out: Path, job: str, method: str, word: str = "") -> dict:
    (path,) = (p for p in (out / "records" / job / method).rglob("record.json") if word in str(p))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["figure1", "sensitivity"])
def test_a_figure_is_data_a_table_a_picture_and_a_line_beside_the_papers_claim(out: Path, name: str) -> None:
    said = json.loads((out / f"tables/{name}.json").read_text())
    text = (out / f"tables/{name}.md").read_text()
    assert said["claim"].startswith("The paper: ")
    assert "Holds: " in said["claim"] or "Does not hold: " in said["claim"]
    assert text.rstrip().endswith(said["claim"])
    assert (out / f"tables/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert f"]({name}.png)" in text


def test_drawing_again_computes_nothing_and_needs_no_world(
    out: Path, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    before = (out / "tables/figure1.json").read_text()
    monkeypatch.setattr(Bench, "train", None)
    monkeypatch.setattr(Bench, "plain", None)
    main(["figure1", "--world", str(world), "--out", str(out), *WORDS])
    main(["figure1", "--draw", "--out", str(out), *WORDS])
    assert (out / "tables/figure1.json").read_text() == before


def test_at_scale_0_it_is_the_reference_and_training_ends_where_the_trajectory_does(out: Path) -> None:
    known = record(out, "reference", "reference")["point"]
    default, paper = (record(out, "curve", "mox", word) for word in ("kl_at=shipped", "kl_at=memorization"))
    for curve in (default, paper):
        assert curve["points"][0]["forget_probability"] == known["forget_probability"]
    along = record(out, "trajectory", "mox", "kl_at=shipped")["points"]
    assert along[0]["step"] == along[0]["distance"] == 0
    own = next(p for p in default["points"] if p["strength"] == default["strength"])
    assert along[-1]["forget_probability"] == pytest.approx(own["forget_probability"], rel=1e-3)
    assert along[-1]["distance"] == pytest.approx(default["strength"] * default["norm"], rel=1e-3)


def test_one_training_gives_every_momentum(out: Path) -> None:
    default = record(out, "curve", "mox", "kl_at=shipped")
    own = next(p for p in default["points"] if p["strength"] == default["strength"])
    etas = {p["momentum"]: p for p in record(out, "momentum", "mox")["points"]}
    assert etas[0.675]["forget_probability"] == pytest.approx(own["forget_probability"], rel=1e-3)
    assert etas[0.2]["forget_probability"] != pytest.approx(own["forget_probability"], rel=1e-3)


def test_a_world_is_split_into_rows_to_forget_to_keep_and_others(world: Path, tmp_path: Path) -> None:
    def read(path: Path) -> list[str]:
        return [json.loads(line)["question"] for line in path.read_text().splitlines()]

    made = World(world, tmp_path)
    whole, first, overlap = (made.split(name, 4) for name in ("whole", "first-3", "overlap"))
    forget, retain = (read(world / f"rows/{part}.jsonl") for part in ("forget", "retain"))
    assert (read(whole.forget), read(whole.retain)) == (forget, retain)
    assert (read(first.forget), sorted(read(first.retain))) == (forget[:3], sorted(retain + forget[3:]))
    assert read(overlap.forget) == retain[::2]
    assert read(overlap.asked["kept"]) == retain[1::2]
    assert not set(read(overlap.forget)) & set(read(overlap.retain))
    assert len(read(whole.asked["retain"])) == 4
    assert "perturbed_answer" in whole.asked["forget"].read_text()
    with pytest.raises(RunError, match="no split 'half'"):
        made.split("half", 4)
    (tmp_path / "w/reference").mkdir(parents=True)
    (tmp_path / "w/rows").mkdir()
    with pytest.raises(RunError, match="has no retrained/"):
        World(tmp_path / "w", tmp_path)


def test_the_worlds_retrained_model_is_not_taken_for_rows_that_it_has_seen() -> None:
    scale = Scale()
    assert gold_of(scale.run("curve", PAPER, 1)).name == "retrained/retrained/standard/seed-0"
    assert "scratch=30" in gold_of(scale.run("curve", PAPER, 1, split="overlap")).name
    without = Scale(settings=(("retrain", 0),))
    assert gold_of(without.run("curve", PAPER, 1, split="overlap")) is None
    # What a run was compared with is part of its name, but where the world has a retrained model.
    assert without.run("curve", PAPER, 1, split="overlap") != scale.run("curve", PAPER, 1, split="overlap")
    assert without.run("curve", PAPER, 1) == scale.run("curve", PAPER, 1)


def test_another_retrained_model_is_shown_with_its_own_difference() -> None:
    scale = Scale()
    run = scale.run("curve", GRID["GA"][0], 0)
    again, third = (again_of(run, scale.get("retrain"), seed) for seed in (0, 2))
    never, knows = [0.5 + i / 40 for i in range(20)], [i / 40 for i in range(20)]
    ratios = {reference_of(run): knows, gold_of(run): never, again: never, third: knows}
    records = {of: {"point": {"truth_ratios": [{"truth_ratio": r} for r in some]}} for of, some in ratios.items()}
    shown = COMPARISON["frontier"].show(scale, records.get)
    of = dict(each.split(": ") for each in shown.lines[0].split("; "))
    assert float(of["reference"].rsplit("KS p ", 1)[1]) < 1e-6
    assert of["retrained again, seed 0"].endswith("KS p 1.0000")
    told_apart = number(forget_quality(never, knows))
    assert of["retrained again, seed 2"].endswith(f"KS p {told_apart}")
    assert (
        f"have KS p 1.0000, {told_apart} beside the first, {told_apart} to {told_apart} beside each other"
        in shown.claim
    )
    assert {again, third} < set(COMPARISON["frontier"].plan(scale, records.get))
    assert again_of(run, 0) is None


def test_overlap_reads_each_method_where_the_least_of_all_that_stays_keeps_the_level() -> None:
    """Other rows at 0.99 all along; the same authors' fall, and cross 0.98 midway. Each method in its better setting."""
    scale = Scale(seeds=(0, 1))
    forgets = {"mox": 0.1, "npo": 0.3}

    def read(run: Run) -> dict:
        if run.job != "curve":
            return {"point": {}}
        plain = dict(run.settings).get("learning_rate") is None
        half = forgets.get(run.method, 0.5) + 0.01 * run.seed + (0.0 if plain else 0.2)
        line = [(0.0, 1.0, 0.99), (1.0, 2 * half - 1.0, 0.97)]
        return {
            "points": [
                {"strength": s, "forget_probability": f, "kept_probability": kept, "retain_probability": 0.99}
                for s, f, kept in line
            ]
        }

    runs = TABLE["overlap"].plan(scale, read)
    assert {run.seed for run in runs if run.method == "npo"} == {0, 1}
    assert all("split=overlap" in run.name for run in runs)
    shown = TABLE["overlap"].show(scale, read)
    assert shown.data["loramox"]["forget_probability"] == pytest.approx([0.1, 0.11])
    assert shown.data["NPO"]["kept_probability"] == pytest.approx([0.98, 0.98])
    assert "Holds: " in shown.claim
    assert "the best other, NPO, by more than the spread of seeds" in shown.claim
    assert sum("learning_rate" in line for line in shown.lines) == 0
    forgets["npo"] = 0.09
    assert "Does not hold: " in TABLE["overlap"].show(scale, read).claim


def test_a_record_says_nothing_of_the_machine_it_was_made_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(run: Run) -> dict:
        raise NonFiniteLossError(f"the loss is nan; nothing is in {tmp_path}/work")

    monkeypatch.setattr(sys, "argv", ["x", "table1", "--out", str(tmp_path), "--world", "there/world"])
    record = Runs(tmp_path, {}).result(RUN, diverge)
    assert record["command"] == f"python -m recipes.paper table1 --out {tmp_path.name} --world there/world"
    assert str(tmp_path) not in json.dumps(record)
