"""recipes/tofu_evaluation.py: what it collects, resumes, and makes of records alone."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

PATH = Path(__file__).parents[1] / "recipes/tofu_evaluation.py"
spec = importlib.util.spec_from_file_location("tofu_evaluation", PATH)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

STATES = [
    ("none", "reference model", {"forget_probability": 0.9}),
    ("none", "forget model", {"forget_probability": 0.2}),
    ("none", "retrained model", {"forget_probability": 0.1}),
    ("sample", "forget model", {"leak_at_8_by_rouge_l": 0.4}),
    ("sample", "retrained model", {"leak_at_8_by_rouge_l": 0.2}),
    ("relearn forget rows, rate 0.001", "step 20", {"forget_probability": 0.3}),
    ("relearn forget rows, all weights, rate 0.001", "step 20", {"forget_probability": 0.5}),
    ("relearn forget rows, rate 0.001", "step 20, retrained model", {"forget_probability": 0.15}),
    ("pair", "guidance 1", {"rouge_l_beyond_base": 0.0}),
    ("requantize", "adapter in 4 bits", {"forget_probability": 0.25}),
]


def write_records(out: Path) -> None:
    attacks = {
        "status": "done",
        "settings": {"sample_count": 8, "relearn_steps": [5, 20]},
        "control": {"model": "retrained"},
        "states": [{"attack": a, "state": s, "metrics": m} for a, s, m in STATES],
        "absent": {"requantize: Q8_0": "needs llama.cpp"},
    }
    for folder, record in (("attack", attacks), ("evaluation", {"metrics": {"general_ability": {"value": 0.99}}})):
        (out / "mine" / folder).mkdir(parents=True)
        name = "attacks.json" if folder == "attack" else "summary.json"
        (out / "mine" / folder / name).write_text(json.dumps(record))
    (out / "adapters.json").write_text('{"mine": "runs/mine/forget-adapter"}')


def test_table_and_picture_are_made_from_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "loramox", lambda words: pytest.fail("ran a command"))
    write_records(tmp_path)
    recipe.main(["--out", str(tmp_path), "--draw"])
    text = (tmp_path / "evaluation.md").read_text()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if " | " in line}
    assert cells["forget probability"][:3] == ["0.900", "0.200", "0.100"]
    assert cells["leak@8 by ROUGE-L"][:3] == ["–", "0.400, **missed**", "0.200"]
    assert cells["relearned on forget rows, 20 steps: probability"][:3] == ["–", "0.500", "0.150"]
    assert cells["pair: ROUGE-L beyond the base's"][1:3] == ["0.000, met", "0.000"]
    assert cells["adapter in 4 bits: probability"][:3] == ["–", "0.250", "–"]
    assert cells["general ability"][1] == "0.990, met"
    assert cells["worst form: leak"][1] == "–"
    assert "- not asked: requantize: Q8_0: needs llama.cpp" in text
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_with_a_record_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path)
    rows = tmp_path / "given"
    rows.mkdir()
    for name, count in (("forget", 3), ("retain", 100), ("never", 2)):
        (rows / f"{name}.jsonl").write_text(
            "".join(f'{{"question": "{name} {i}?", "answer": "A"}}\n' for i in range(count))
        )
    ran = []
    monkeypatch.setattr(recipe, "loramox", ran.append)
    words = ["--model", "M", "--adapter", "mine=A", "new=B", "--rows", str(rows), "--out", str(tmp_path)]
    recipe.main([*words, "--relearn_rate", "1e-3"])
    assert [(each[0], each[each.index("--adapter") + 1]) for each in ran] == [("evaluate", "B"), ("attack", "B")]
    evaluate, attack = ran
    assert evaluate[evaluate.index("--retain_test") + 1].endswith("never.jsonl")
    assert "--retrained_model" not in attack  # there is none
    assert attack[-6:-4] == ["--relearn_rate", "1e-3"]  # after the recipe's own, so that it wins
    assert len((tmp_path / "rows/some.jsonl").read_text().splitlines()) <= recipe.ATTACKED_RETAIN


def test_without_a_retrained_model_rows_never_known_are_the_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "loramox", lambda words: pytest.fail("ran a command"))
    write_records(tmp_path)
    path = tmp_path / "mine/attack/attacks.json"
    record = json.loads(path.read_text().replace("retrained model", "rows never known"))
    record["states"] += [
        {"attack": "pair", "state": "guidance 1, rows never known", "metrics": {"rouge_l_beyond_base": 0.02}},
        {"attack": "none", "state": "adapter off, rows never known", "metrics": {"forget_probability": 0.3}},
    ]
    path.write_text(json.dumps(record))
    recipe.main(["--out", str(tmp_path), "--draw"])
    text = (tmp_path / "evaluation.md").read_text()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if " | " in line}
    assert cells["forget probability"][:3] == ["0.900", "0.200", "0.100"]
    assert cells["leak@8 by ROUGE-L"][1:3] == ["0.400, **missed**", "0.200"]
    assert cells["relearned on forget rows, 20 steps: probability"][1:3] == ["0.500", "0.150"]
    assert cells["pair: ROUGE-L beyond the base's"][1:3] == ["0.000, met", "0.020"]


def test_holdout_rows_are_attacked_with_every_adapter_where_there_is_no_retrained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("forget", "retain", "holdout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "A"}}\n')
    ran = []
    monkeypatch.setattr(recipe, "loramox", ran.append)
    words = ["--model", "M", "--adapter", "one=A", "two=B", "--rows", str(tmp_path), "--out", str(tmp_path / "out")]
    recipe.main(words)
    recipe.main([*words[:-1], str(tmp_path / "again"), "--retrained", "R"])
    attacks = [each for each in ran if each[0] == "attack"]
    assert ["--holdout" in each for each in attacks] == [True, True, False, False]
    assert ["--retrained_model" in each for each in attacks] == [False, False, True, False]


def test_each_adapter_is_judged_by_its_own_rows_never_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "loramox", lambda words: pytest.fail("ran a command"))
    write_records(tmp_path)
    path = tmp_path / "mine/attack/attacks.json"
    path.write_text(path.read_text().replace("retrained model", "rows never known"))
    record = json.loads(path.read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/attack").mkdir()
    for state in record["states"]:
        if state["attack"] == "sample" and state["state"].endswith("never known"):
            state["metrics"]["leak_at_8_by_rouge_l"] = 0.3
    (tmp_path / "other/attack/attacks.json").write_text(json.dumps(record))
    (tmp_path / "adapters.json").write_text('{"mine": "a", "other": "b"}')
    recipe.main(["--out", str(tmp_path), "--draw"])
    line = next(each for each in (tmp_path / "evaluation.md").read_text().splitlines() if "leak@8 by ROUGE-L" in each)
    assert "| 0.400, **missed** | 0.400, met | 0.200, 0.300 |" in line
    assert "Controls: of mine, other." in (tmp_path / "evaluation.md").read_text()


def finishing(words: list[str]) -> None:
    """Stands in for `loramox`: writes what says that a part is done."""
    out = Path(words[words.index("--out") + 1])
    done = {"unlearn": "forget-adapter/adapter_config.json", "evaluate": "summary.json", "attack": "attacks.json"}
    path = out / done[words[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"states": [], "metrics": {}}')


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (["--adapter", "mine=B"], "evaluation"),
        (["--quick"], "attack"),
        (["--seed", "1"], "attack"),
        (["--sample_count", "3"], "attack"),
    ],
)
def test_a_part_that_was_made_with_other_settings_is_refused(
    changed: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "A"}}\n')
    words = ["--model", "M", "--adapter", "mine=A", "--rows", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(recipe, "loramox", finishing)
    recipe.main(words)
    monkeypatch.setattr(recipe, "loramox", lambda words: pytest.fail("ran a command"))
    recipe.main(words)
    with pytest.raises(SystemExit, match=rf"mine/{part} was made with other settings .*Choose another --out"):
        recipe.main([*words, *changed])


def test_an_adapter_of_a_quick_look_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "world/reference").mkdir(parents=True)
    (tmp_path / "world/rows").mkdir()
    for name in ("forget", "retain", "holdout"):
        (tmp_path / f"world/rows/{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "A"}}\n')
    ran = []
    monkeypatch.setattr(recipe, "loramox", lambda words: (ran.append(words), finishing(words)))
    words = ["--world", str(tmp_path / "world"), "--out", str(tmp_path / "out")]
    recipe.main([*words, "--quick"])
    assert "--overwrite" in ran[0]  # a stop during training leaves a run without an adapter
    with pytest.raises(
        SystemExit, match=r"forget-adapter was made with other settings \(then: --num_train_epochs 4; now: –\)"
    ):
        recipe.main(words)


@pytest.mark.parametrize("names", [["rows=A"], ["retrained=A"], ["a/b=A"], ["..=A"], ["one=A", "one=B"]])
def test_an_adapter_cannot_have_the_name_of_another_folder(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(recipe, "loramox", lambda words: pytest.fail("ran a command"))
    with pytest.raises(SystemExit):
        recipe.main(["--model", "M", "--adapter", *names, "--rows", str(tmp_path), "--out", str(tmp_path / "out")])
    assert f"an adapter cannot be named {names[0].partition('=')[0]}:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_of_other_inputs_are_refused(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in ("forget", "retain", "holdout"):
        (given / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "A"}}\n')
    work, rows = SimpleNamespace(rows=given, world=None), tmp_path / "out/rows"
    recipe.collect(work, rows)
    (rows / ".forget.jsonl.partial").write_text("left by a kill")
    (rows / "retain.jsonl").unlink()
    recipe.collect(work, rows)  # the same again, which writes what is missing
    assert (rows / "retain.jsonl").exists()
    (given / "holdout.jsonl").unlink()
    (given / "forget.jsonl").write_text('{"question": "Who?", "answer": "B"}\n')
    before = {path: path.read_bytes() for path in rows.iterdir()}
    with pytest.raises(
        SystemExit, match=r"other rows than .*given \(forget.jsonl, holdout.jsonl\).*another --out, or delete"
    ):
        recipe.collect(work, rows)
    assert {path: path.read_bytes() for path in rows.iterdir()} == before


def test_a_worlds_retain_rows_are_split_by_author(tmp_path: Path) -> None:
    rows = tmp_path / "world/rows"
    rows.mkdir(parents=True)
    for name, count in (("forget", 20), ("retain", 60), ("holdout", 20)):
        (rows / f"{name}.jsonl").write_text(
            "".join(json.dumps({"question": f"{i}", "answer": name}) + "\n" for i in range(count))
        )
    recipe.collect(SimpleNamespace(rows=None, world=tmp_path / "world"), tmp_path / "rows")
    numbers = {
        name: [int(json.loads(line)["question"]) for line in (tmp_path / f"rows/{name}.jsonl").read_text().splitlines()]
        for name in ("retain", "never")
    }
    assert numbers == {"retain": [*range(20), *range(40, 60)], "never": [*range(20, 40)]}
    assert json.loads((tmp_path / "rows/text.jsonl").read_text().splitlines()[0]) == {"text": "holdout"}
