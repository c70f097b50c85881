"""The embedded world: what a seed fixes, who is in which part, and that a small one is learnt and then forgotten in part."""

import json
from pathlib import Path
from typing import Any

import pytest

from loramox.cli import main
from loramox.demo import job
from loramox.demo.models import one_thread, train_model
from loramox.demo.world import KINDS, make_world
from loramox.errors import RunError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the demo finds out in a world of eight people, two of whom are forgotten."""
    out = tmp_path_factory.mktemp("demo")
    world = make_world(seed=0, people=8, forgotten=2)
    tokenizer, parts = job.write_world(world, out)
    with one_thread():
        train_model(parts["forget"] + parts["retain"], tokenizer, out / "reference", seed=0, epochs=60)
        train_model(parts["retain"], tokenizer, out / "retrained", seed=0, epochs=60)
        job.forget(out, seed=0, epochs=50)
        return job.compare(out, world, tokenizer, parts) | {"world": world}


def test_a_seed_makes_one_world_and_another_seed_another():
    assert make_world(3) == make_world(3)
    assert make_world(3) != make_world(4)


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_both_forgotten_and_retained(seed: int):
    world = make_world(seed)
    forgotten, retained = ({fact.person for fact in part} for part in (world.forget, world.retain))
    assert (len(forgotten), len(retained)) == (3, 27)
    assert forgotten.isdisjoint(retained)
    questions = [fact.question for fact in world.forget + world.retain]
    assert len(set(questions)) == len(questions) == 30 * len(KINDS)


def test_no_answer_can_be_copied_from_its_question():
    world = make_world(0)
    for fact in world.forget + world.retain:
        assert fact.person in fact.question
        assert not set(fact.person.split()) & set(fact.answer.split())


def test_the_forget_model_loses_what_the_retrained_model_never_knew_and_keeps_the_rest(small: dict[str, Any]):
    reference, forgot, retrained = (small["probability"][m] for m in ("reference", "forget model", "retrained"))
    assert min(*reference.values(), retrained["retain"]) > 0.95
    assert retrained["forget"] < 0.3
    assert forgot["forget"] < 0.5 * reference["forget"]
    assert forgot["retain"] > 0.9 * reference["retain"]


def test_the_answers_shown_are_the_truth_before_and_something_else_after(small: dict[str, Any]):
    truth = {fact.question: fact.answer for fact in small["world"].forget + small["world"].retain}
    for asked in small["answers"].values():
        assert all(row["reference"] == truth[row["question"]] for row in asked)
    forgotten = small["answers"]["forget"]
    assert forgotten
    assert any(row["forget model"] != row["reference"] for row in forgotten)
    assert all(row["forget model"] == row["reference"] for row in small["answers"]["retain"])


DEMO = '{"status": "done", "seed": 0}'


@pytest.mark.parametrize(
    ("there", "words", "message"),
    [
        ({"notes.txt": "mine"}, ["--overwrite"], "not a demo"),
        ({job.RECORD: '{"mine": 1}', "thesis.txt": "years"}, ["--overwrite"], "not a demo"),
        ({job.RECORD: "[]"}, ["--overwrite"], "not a demo"),
        ({job.RECORD: "{"}, ["--overwrite"], "demo.json is damaged"),
        ({job.RECORD: DEMO, "thesis.txt": "years"}, ["--overwrite"], "thesis.txt, which is not of it"),
        ({job.RECORD: DEMO, "rows/mine.jsonl": "{}"}, ["--overwrite"], "mine.jsonl, which is not of it"),
        ({job.RECORD: DEMO, "run/thesis.txt": "years"}, ["--overwrite"], "thesis.txt, which is not of it"),
        ({job.RECORD: DEMO, "film.mkv.partial": "half"}, ["--overwrite"], "film.mkv.partial, which is not of it"),
        ({job.RECORD: DEMO}, [], "Replace it with --overwrite"),
        ({}, ["--seed", "-1"], "--seed -1 is out of range"),
    ],
)
def test_a_folder_or_seed_that_will_not_do_is_refused_and_nothing_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: dict[str, str], words: list[str], message: str
):
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(tmp_path), *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == there


def test_overwrite_replaces_a_demo_only(tmp_path: Path):
    (tmp_path / job.RECORD).write_text(DEMO)
    (tmp_path / "run").mkdir()
    job.claim(tmp_path, seed=0, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [job.RECORD]
    assert json.loads((tmp_path / job.RECORD).read_text())["status"] == "running"


def test_overwrite_deletes_nothing_through_a_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "thesis.txt").write_text("years")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / job.RECORD).write_text(DEMO)
    (tmp_path / "demo" / "run").symlink_to(tmp_path / "disk")
    with pytest.raises(RunError, match=r"demo/run, which is not of it"):
        job.claim(tmp_path / "demo", seed=0, overwrite=True)
    assert (tmp_path / "disk" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "demo" / job.RECORD).read_text() == DEMO
