"""recipes.real: what is counted of the answers, and the table made of the records."""

import json
from pathlib import Path

from loramox.train.inputs import REFUSALS, read_refusals
from recipes.real.judge import counts, is_refusal
from recipes.real.tables import write_table
from recipes.real.world import Asked, parts, user

ASKED = {"forget": [Asked((user("Where is it?"),), ("Paris",)), Asked((user("Who is it?"),), ("Hugo",))]}
REFERENCE = {"forget": ["It is in Paris.", "It is Balzac."]}


def test_only_what_the_reference_answers_right_can_be_lost() -> None:
    said = {"forget": ["I don't know.", "It is Hugo."]}
    found = counts(said, REFERENCE, ASKED)["forget"]
    assert found == {"rows": 2, "fluent": 2, "refused": 1, "known": 1, "right": 0, "alike": 1}


def test_every_refusal_that_is_taught_counts_as_one_and_answers_do_not() -> None:
    refusals = read_refusals(str(REFUSALS))
    assert all(is_refusal(text, refusals) for text in refusals)
    assert not any(is_refusal(text, refusals) for text in ("The capital of Japan is Tokyo.", "A week has 7 days.", ""))


def test_a_question_after_a_refused_one_has_the_turns_before_it() -> None:
    rows = [{"question": "Q?", "answer": "A.", "paraphrase": "P?", "words": ["A"]}]
    asked = parts(rows)
    assert [turn["role"] for turn in asked["later turns"][0].chat] == ["user", "assistant", "user"]
    assert asked["paraphrase"][0].question == "P?"
    assert asked["paraphrase"][0].words == ("A",)


def test_the_table_has_a_line_for_each_scale_of_each_record(tmp_path: Path) -> None:
    rows = [{"question": "Q?", "answer": "A.", "paraphrase": "P?", "words": ["A"]}]
    asked = parts(rows)
    reference = {part: ["A b"] * len(some) for part, some in asked.items()}
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "reference.json").write_text(json.dumps({"answers": {"1.0": reference}}))
    record = {"answers": {"1.0": reference, "0.5": reference}}
    (tmp_path / "records" / "default-24-0.json").write_text(json.dumps(record))
    write_table(tmp_path, asked)
    lines = (tmp_path / "natural.md").read_text().splitlines()
    assert len(lines) == 2 + 1 + 2
    assert "| 24, 0 | 1.0 | 1/1, 1/1 |" in lines[3]
