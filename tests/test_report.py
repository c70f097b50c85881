"""The report: its figures and sentences, what it leaves out, damaged and hostile files, and that a browser draws it."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib import pyplot as plt

from loramox import Tokenisation, colours
from loramox.cli import main
from loramox.errors import RunError
from loramox.evaluate.asked import Asked
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.show import show, show_states
from loramox.evaluate.summary import MEANS, RETRAINED, summarise
from loramox.extras.report import FACTS, PAGE, SUMMARY, report
from loramox.extras.report import page as page_module
from loramox.extras.report.answers import LONGEST, fit
from loramox.extras.report.facts import METRICS, adapter_at, choices, leak_curves, relearned, shown
from loramox.extras.report.glossary import GLOSSARY, linked
from loramox.extras.report.pictures import relearning_picture, sampling_picture
from loramox.extras.report.read import FORGET, again_command, read_inputs, sweep_command
from loramox.extras.report.recovery import asked_rows, families
from loramox.extras.report.svg import COLOURS, Picture
from loramox.extras.report.verdict import NOT_COMPARED
from loramox.model.config import ModelConfig
from loramox.run import is_of_report, not_of_run
from loramox.sweep.plot import draw_frontier
from loramox.sweep.sweep import SweepConfig, sweep

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": "\"'><img src=//evil.example/x onerror=alert(2)>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "emoji": "👩‍👩‍👧 🏳️‍🌈",
    "right to left": "שלום \u202eevil",
    "control": "a\x00b\x1b[31mc\ud800d",
    "mathematics": "$\\frac{1}{0}$ & < >",
}
LONG = "<b>" + "long " * 20_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Parsed(HTMLParser):
    """Tags with their attributes, the text outside style, and that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open
        self.text = "".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs))
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def attributes(self, name: str) -> list[str]:
        return [a[name] or "" for _, a in self.tags if name in a]


def records(part: str, n: int, around: float, texts: list[str], said: bool = True) -> list[dict[str, Any]]:
    found = []
    for i, p in enumerate(np.clip(around * np.linspace(0.7, 1.3, n), 0, 0.9999).tolist()):
        text = texts[i % len(texts)]
        found.append(
            {"part": part, "row": f"{part}.jsonl, row {i}", "id": f"{part}{i}", "tokens": 3, "log_p": -1.0, "probability": p}
            | {"plain_text": False, "prompt": f"Question {i}? {text}", "answer": f"True {i} {text}"}
            | ({"said": f"Says {i} {text}", "rouge_l": 0.5, "rouge_l_f1": 0.5} if said else {})
        )  # fmt: skip
    return found


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if path.suffix == ".jsonl" else None
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if rows is not None else json.dumps(value))


RUN: dict[str, Any] = {
    "status": "done",
    "command": "loramox unlearn --out run",
    "base": {"model": "base", "revision": None, "shape": "llama", "weights": "74b4"},
    "data": {part: {"source": f"{part}.jsonl", "rows": 9, "sha256": part} for part in ("forget", "retain")},
    "method": "MOX", "alpha": 4.0,
    "settings": {"model": "base", "quantization": "none", "r": 4, "alpha": 4.0, "method": "mox", "hub_token": "a-secret", "bf16": None},
    "versions": {"loramox": "0.2.0"},
    "timings": {"train_seconds": 12.0},
    "log": [{"epoch": e, f"eval_{p}_probability": v} for e in (0, 1, 2) for p, v in (("forget", 0.9 - e / 3), ("retain", 0.9))]
    + [{"epoch": e, "forget_loss": 3.0 - e, "retain_kl": 0.1} for e in (0, 1, 2)],
    "forget_adapter": {"alpha": 4.0},
}  # fmt: skip
POINTS = [
    {"at": s, "forget_probability": f, "retain_probability": r, "retain_kl": s / 100, "forget_quality": q, "mia_min_k": m}
    for s, f, r, q, m in ((0.0, 0.95, 0.96, 1e-9, 1.0), (2.0, 0.5, 0.95, 1e-4, 0.9), (4.0, 0.1, 0.94, 0.01, 0.8))
]  # fmt: skip
REFUSAL = "no alpha makes forget rows look like holdout rows"
FRONTIER: dict[str, Any] = {
    "status": "done",
    "trained": "run/trained",
    "unit": "alpha",
    "data": RUN["data"] | {"holdout": {"source": "holdout.jsonl", "rows": 9, "sha256": "h"}},
    "points": POINTS,
    "choices": [
        {"rule": "budget", "at": 4.0, "low": 2.0, "high": 4.0, "reason": "the largest"},
        {"rule": "holdout", "at": None, "low": None, "high": None, "reason": REFUSAL},
    ],
    "rule": "budget",
    "chosen": 4.0,
    "warning": None,
    "command": "loramox sweep --out run/sweep",
}
STATES = [
    {"attack": attack, "state": state, "metrics": {"forget_probability": p, "retain_probability": 0.9}}
    for attack, state, p in (
        ("none", "reference model", 0.95),
        ("none", "forget model", 0.1),
        ("relearn forget rows", "step 1", 0.2),
        ("relearn forget rows", "step 5", 0.7),
        ("ask otherwise", "first 3 words given, reference model", 0.99),
        ("ask otherwise", "first 3 words given, forget model", 0.3),
    )
]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make() → the folder of a whole run; make(texts=…, said=False, frontier={…}) → one that differs in that."""

    def made(texts: tuple[str, ...] = ("plain",), said: bool = True, **changes: Any) -> Path:
        run = tmp_path / "run"
        write(run / "run.json", RUN | changes.get("run", {}))
        frontier = FRONTIER | {"retrained": str(tmp_path / "retrained")} | changes.get("frontier", {})
        write(run / "sweep" / "frontier.json", frontier)
        for folder, forget in (
            (run / "sweep/at-0", 0.95),
            (run / "sweep/at-4", 0.1),
            (tmp_path / "retrained", 0.01),
        ):
            rows = [*records("forget", 9, forget, list(texts), said), *records("retain", 9, 0.9, list(texts), said)]
            write(folder / "records.jsonl", rows)
        absent = {
            "control": "needs a model trained without them",
            "ask: cloze": "needs words",
            "ask: in Latin": "needs Latin",
        }
        attacks = {"status": "done", "states": STATES, "rows": {"attacker's": 2, "asked": 7}, "absent": absent}
        attacks |= changes.get("attacks", {})
        write(run / "attack" / "attacks.json", attacks)
        return run

    return made


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time, and most tests do not look at them."""
    monkeypatch.setattr("loramox.extras.report.pictures.picture", lambda *a: Picture("<svg></svg>", a[-1]))


def page_of(run: Path) -> tuple[str, Parsed]:
    report(run)
    page = (run / PAGE).read_text(encoding="utf-8")
    return page, Parsed(page)


def test_the_page_has_every_part_in_order_and_the_figures_that_were_read(make: Callable[..., Path]) -> None:
    _, parsed = page_of(make())
    sections = [a["id"] for tag, a in parsed.tags if tag == "section"]
    assert sections == [
        "verdict",
        "figures",
        "frontier",
        "rows",
        "training",
        "answers",
        "attacks",
        "settings",
        "not-proven",
        "glossary",
    ]
    text = parsed.text.replace("\u00a0", " ")
    for words in (
        "Partly forgotten; the rest is slightly harmed.",
        "At alpha = 4 the mean probability of the true answers to all 9 forget rows fell from 0.9500 to 0.1000.",
        "still 10 times as probable as in a model that never saw the rows (0.0100)",
        "to all 9 retain rows fell from 0.9600 to 0.9400: 97.9 % of it is left",
        "The truth-ratio test can tell it from a model that never saw the rows (p = 0.01). Membership inference: AUC 0.800; 0.5 is guessing",
        "The model base was to forget 9 rows (forget.jsonl) and keep 9 rows (retain.jsonl), by MOX. Run of 20",
        "Most was recovered by “Trained for some steps more, forget rows: step 5”: probability of the true answers 0.7000, 0.1000 before any",
        "There is no control for it. These are means over the 7 of 9 forget rows that the attacker did not train on.",
        "Sampled many times: not tried (--attacks sample).",
        "Control: needs a model trained without them.",
        "Asked otherwise: not as cloze, in Latin.",
        "General ability: no rows of other subjects were scored",
        "2 to 4",
        REFUSAL,
        "Says 0 plain",
        "loramox sweep --out run/sweep",
        "suppression, not erasure",
    ):
        assert words in text
    assert "a-secret" not in text


def test_nothing_on_the_page_comes_from_elsewhere(make: Callable[..., Path]) -> None:
    page, parsed = page_of(make())
    for address in (
        "http",
        "://",
        "//",
        "url(",
        "src=",
        "@import",
        "xmlns",
        "xlink",
        "<script",
        "<link",
        "<iframe",
        "<!ENTITY",
    ):
        assert address not in page, address
    assert page.count("<!DOCTYPE") == 1
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    links = parsed.attributes("href")
    assert links
    assert all(link[0] == "#" and link[1:] in ids for link in links)


def test_every_picture_says_in_words_what_it_shows_and_its_text_is_text(make: Callable[..., Path]) -> None:
    _, parsed = page_of(make())
    pictures = [a for tag, a in parsed.tags if tag == "svg"]
    assert [p["id"] for p in pictures] == [
        "recovery", "along-the-axis", "spread-forget", "spread-retain", "watched", "relearning"
    ]  # fmt: skip
    assert all(p["role"] == "img" and len(p["aria-label"]) > 40 for p in pictures)
    assert "alpha (0: the reference)" in parsed.text
    assert "alpha 2: forget 0.5000, retain 0.9500" in pictures[1]["aria-label"]


def test_hostile_text_is_shown_and_does_nothing(make: Callable[..., Path]) -> None:
    evil = HOSTILE["attribute"]
    run = make(
        texts=(" ".join(HOSTILE.values()), LONG),
        run={
            "settings": RUN["settings"] | {"prompt_template": evil},
            "command": evil,
            "data": {"forget": {"source": evil, "rows": 9}},
        },
        frontier={"choices": [FRONTIER["choices"][0] | {"reason": evil}], "warning": evil},
        attacks={"states": [*STATES, {"attack": evil, "state": HOSTILE["mathematics"] * 9, "metrics": {"forget_probability": 0.8}}]},
    )  # fmt: skip
    path = run / "sweep/at-4/records.jsonl"
    write(path, [json.loads(line) | {"row": HOSTILE["script"] + evil} for line in path.read_text().splitlines()])
    page, parsed = page_of(run)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img", "iframe", "link", "b"})
    assert not any(name.startswith("on") or name == "src" for _, attributes in parsed.tags for name in attributes)
    for name in ("script", "attribute", "template", "emoji", "mathematics"):
        assert HOSTILE[name] in parsed.text, name
    assert "a\ufffdb\ufffd[31mc\ufffdd" in parsed.text
    assert f"shortened: {LONGEST} of 100,0" in parsed.text
    assert len(page) < 600_000
    assert "dir" in next(a for _, a in parsed.tags if a.get("class") == "text")
    summary = (run / SUMMARY).read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<", summary)


@pytest.mark.usefixtures("undrawn")
def test_no_row_is_quoted_in_the_summary(make: Callable[..., Path]) -> None:
    run = make()
    report(run)
    summary = (run / SUMMARY).read_text(encoding="utf-8")
    assert "**Partly forgotten; the rest is slightly harmed.**" in summary
    assert "forget.jsonl, row 8: ROUGE-L 0.5000" in summary
    assert "| metric | reference | forget model, alpha = 4 | retrained model | better |" in summary
    assert "| Probability of forget answers | 0.9500 | 0.1000 | 0.0100 | lower |" in summary
    assert "suppression, not erasure" in summary
    assert "Question" not in summary
    assert "Says" not in summary


def test_the_same_run_gives_the_same_bytes(make: Callable[..., Path]) -> None:
    run = make(texts=tuple(HOSTILE.values()))
    report(run)
    before = {name: (run / name).read_bytes() for name in (PAGE, SUMMARY, FACTS)}
    report(run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob(".*"))


@pytest.mark.usefixtures("undrawn")
def test_what_is_within_chance_depends_on_the_number_of_scores_as_the_area_does(make: Callable[..., Path]) -> None:
    """A text has a score for each of its blocks."""
    run = make()
    for at in (0, 4):
        file = run / f"sweep/at-{at}/records.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        blocks = [r | {"part": "holdout", "id": f"holdout {i}"} for i, r in enumerate(rows[:5])]
        write(file, [r | {"mia_min_k": 1.0} if r["part"] != "retain" else r for r in [*rows, *blocks]])
    text = page_of(run)[1].text.replace("\u00a0", " ")
    assert "AUC 0.800; 0.5 is guessing, and 0.5 ± 0.33 is within chance for 9 and 5 rows." in text


MISSING = {
    "sweep": ("This run has no sweep", "loramox sweep --trained"),
    "attack": ("No attack was made", "loramox attack --adapter"),
    "../retrained": ("The records of the retrained model are missing", "loramox evaluate --model RETRAINED"),
    "sweep/at-4": ("The sweep's records of single rows are missing", "loramox sweep --trained"),
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", MISSING)
def test_what_is_missing_is_said_with_the_command_that_makes_it(make: Callable[..., Path], part: str) -> None:
    run = make()
    shutil.rmtree(run / part)
    what, command = MISSING[part]
    _, parsed = page_of(run)
    assert what in parsed.text
    assert command in parsed.text
    assert what in (run / SUMMARY).read_text(encoding="utf-8")


def test_a_run_of_which_nothing_is_known_says_so(make: Callable[..., Path]) -> None:
    run = make(run={"log": []})
    shutil.rmtree(run / "sweep")
    shutil.rmtree(run / "attack")
    _, parsed = page_of(run)
    assert "nothing is known yet about what the adapter forgets" in parsed.text
    assert "No rows were scored while training" in parsed.text
    assert "svg" not in {tag for tag, _ in parsed.tags}


@pytest.mark.usefixtures("undrawn")
def test_without_answers_the_page_says_how_to_get_them(make: Callable[..., Path]) -> None:
    assert "The sweep generated no answers" in page_of(make(said=False))[1].text


@pytest.mark.usefixtures("undrawn")
def test_attacks_that_have_not_finished_are_not_shown(make: Callable[..., Path]) -> None:
    assert "The attacks have not finished" in page_of(make(attacks={"status": "running", "states": []}))[1].text


@pytest.mark.usefixtures("undrawn")
def test_attacks_that_bring_nothing_back_are_said_to(make: Callable[..., Path]) -> None:
    text = page_of(make(attacks={"states": [*STATES[:2], STATES[2] | {"metrics": {"forget_probability": 0.05}}]}))[
        1
    ].text
    assert "No attack recovered anything. The most is by “Trained for some steps more, forget rows: step 1”" in text
    assert "0.0500, 0.1000 before any attack" in text


@pytest.mark.usefixtures("undrawn")
def test_a_warning_and_another_alpha_in_the_folder_stand_beside_the_verdict(make: Callable[..., Path]) -> None:
    run = make(
        run={"advice": ["5 retain rows hold little but themselves"]},
        frontier={"warning": "the direction is poor", "data": {"forget": {"sha256": "other"}}},
        attacks={"adapter": {"folder": "run/forget-adapter", "scale": 0.5, "made_by": {"alpha": 4.0}}},
    )
    write(run / "forget-adapter" / "provenance.json", {"alpha": 2.0})
    text = page_of(run)[1].text.replace("\u00a0", " ")
    assert "The sweep warns: the direction is poor." in text
    assert "Training warns: 5 retain rows hold little but themselves." in text
    assert (
        "is at alpha = 2, not at the chosen alpha = 4 that is shown here; at alpha = 2 the probabilities are forget 0.5000"
        in text
    )
    assert "The attacks were made at alpha = 2, not at the alpha = 4 that is shown here." in text
    assert "scored other forget rows than those that were trained on" in text


@pytest.mark.usefixtures("undrawn")
def test_attacks_on_other_forget_rows_are_warned_of_beside_the_verdict(make: Callable[..., Path]) -> None:
    warning = "The attacks are on other forget rows than those that were trained on."
    for digest, warned in (("other", 1), ("forget", 0)):
        run = make(attacks={"data": {"forget": {"sha256": digest}}})
        report(run)
        assert (run / SUMMARY).read_text(encoding="utf-8").count(warning) == warned


@pytest.mark.parametrize(("column", "warned"), [(None, {"same rows", "same attacked rows"}), ("wanted", set())])
def test_digests_that_wanted_answers_are_a_part_of_are_not_compared(make, column: str | None, warned: set[str]) -> None:
    """Training reads wanted answers, and sweeps and attacks do not."""
    other = {"data": {"forget": {"sha256": "other"}}}
    run = make(run={"settings": RUN["settings"] | {"wanted_column": column}}, frontier=other, attacks=other)
    assert read_inputs(run).missing.keys() == warned


@pytest.mark.parametrize("chosen", [None, 0.9])
@pytest.mark.usefixtures("undrawn")
def test_the_shipped_alpha_is_the_measured_one_that_a_sweep_has_rounded(make, chosen: float | None) -> None:
    trained = 0.75 * 1.2
    assert trained != 0.9
    points = [*POINTS[:2], POINTS[2] | {"at": 0.9}]
    made = {"adapter": {"scale": 1.0, "made_by": {"alpha": 0.9000004}}}
    run = make(run={"forget_adapter": {"alpha": trained}, "alpha": trained}, frontier={"points": points, "chosen": chosen}, attacks=made)  # fmt: skip
    inputs = read_inputs(run)
    assert inputs.at == inputs.shipped == 0.9
    text = page_of(run)[1].text
    assert "that is shown here" not in text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("more", "shipped"),
    [
        ({"forget_adapter": {"alpha": 2.0}, "forget_to": {"unit": "alpha", "at": 2.0}}, 2.0),
        ({"forget_adapter": {"alpha": 2.0}}, 2.0),
        ({"forget_adapter": {"strength": 4.0}}, 4.0),  # of 0.1
        ({"alpha": None, "forget_adapter": {"alpha": None}, "forget_to": {"unit": "scale", "at": 0.5}}, 0.5),
        ({"alpha": None, "forget_adapter": {"alpha": None}}, 1.0),
        ({"forget_adapter": None}, None),
    ],
)
def test_of_an_adapter_that_was_moved_the_alpha_is_the_one_that_was_shipped(make, more: dict, shipped: float) -> None:
    run = make(run=more)
    shutil.rmtree(run / "sweep")
    assert read_inputs(run).shipped == shipped


@pytest.mark.usefixtures("undrawn")
def test_retrained_records_of_other_texts_are_missing_and_the_page_is_made(make, tmp_path: Path) -> None:
    run, path = make(), tmp_path / "retrained/records.jsonl"
    write(path, [json.loads(line) | {"tokens": 7} for line in path.read_text().splitlines()])
    text = page_of(run)[1].text
    assert "The records of the retrained model cannot be compared" in text
    assert "has other texts of forget.jsonl, row 0: evaluate the retrained model again on the same files" in text


def test_commands_name_the_file_of_retain_rows_that_the_reference_wrote(make) -> None:
    run = make(run={"data": RUN["data"] | {"retain": {"source": "auto"}}}, frontier={"retrained": None})
    shutil.rmtree(run / "attack")
    missing = read_inputs(run).missing
    for part in ("retrained", "attacks"):
        assert f"--retain {shlex.quote(str(run / 'retain-auto.jsonl'))} " in missing[part].command


@pytest.mark.parametrize(
    ("tuned", "adapter"), [({}, "forget-adapter"), ({"tuned_adapter": "mine"}, "combined-adapter")]
)
def test_the_attack_that_is_shown_is_on_an_adapter_that_can_be_alone(make, tuned: dict, adapter: str) -> None:
    run = make(run={"settings": RUN["settings"] | tuned})
    shutil.rmtree(run / "attack")
    words = shlex.split(read_inputs(run).missing["attacks"].command)
    assert words[words.index("--adapter") + 1] == str(run / adapter)


def test_the_sweeps_own_command_is_shown_without_the_values_that_are_to_change(make) -> None:
    words = ["loramox", "sweep", "--trained", "it's/trained", "--out", "my runs/sweep", "--retrained", "seed 1", "b"]
    words += ["--max-new-tokens=0", "--ship", "to ship", "--alphas", "1", "2"]
    run = make(frontier={"command": shlex.join(words)})
    again = again_command(read_inputs(run))
    assert shlex.split(again) == [*words[:4], *words[-3:], "--out", str(run / "sweep")]
    unclosed = read_inputs(make(frontier={"command": "loramox sweep --trained it's"}))
    assert again_command(unclosed) == sweep_command(unclosed)


def test_the_commands_that_are_shown_leave_out_the_rows_that_training_did(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    retain, run = tmp_path / "retain.jsonl", tmp_path / "run"
    retain.write_text(rows[0].read_text().splitlines()[0] + "\n" + rows[1].read_text())
    words = [
        "train",
        "--model",
        str(pico("llama")),
        "--forget",
        str(rows[0]),
        "--retain",
        str(retain),
        "--out",
        str(run),
    ]
    words += [
        "--drop_overlap",
        "true",
        "--lora_r",
        "4",
        "--quantization",
        "none",
        "--use_cpu",
        "true",
        "--max_steps",
        "1",
    ]
    words += ["--report_to", "none", "--eval_strategy", "no"]
    main(words)
    missing = read_inputs(run).missing
    command = shlex.split(missing["frontier"].command)
    main([*command[1:], "--use_cpu", "true", "--alphas", "1", "--refine", "0", "--max_new_tokens", "0"])
    assert "--drop_overlap true" in missing["attacks"].command
    assert "--drop_overlap true" in read_inputs(run).missing["retrained"].command.partition("\n")[0]
    record = json.loads((run / "run.json").read_text())
    del record["settings"]["drop_overlap"]  # as before it was recorded
    write(run / "run.json", record)
    main([*words, "--resume"])
    assert "drop_overlap" not in read_inputs(run).missing["attacks"].command


def test_the_trained_adapter_of_a_method_with_alpha_is_at_no_alpha(make: Callable[..., Path]) -> None:
    inputs = read_inputs(make())

    def at(**made_by: Any) -> float:
        return adapter_at(inputs, {"adapter": {"scale": 1.0, "made_by": made_by}})

    assert math.isnan(at(kind="trained", alpha=4.0))
    assert at(kind="forget", alpha=4.0) == 4
    inputs.run["alpha"] = None
    assert at(kind="trained", alpha=None) == 1  # without alpha it is the forget model itself


@pytest.mark.usefixtures("undrawn")
def test_the_commands_that_are_shown_ask_the_rows_as_training_did(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt_template": "Q: {prompt}\nIt's\n", "max_length": 64, "long_rows": "truncate"}
    settings, data = (
        RUN["settings"] | asked | {"revision": "v 1"},
        {part: {"source": f"on/{part}"} for part in RUN["data"]},
    )
    run = make(run={"settings": settings, "data": data}, frontier={"retrained": None})
    shutil.rmtree(run / "attack")
    missing = read_inputs(run).missing
    given: dict[str, tuple[Any, ...]] = {}
    for verb, module in (("evaluate", "evaluate.evaluate"), ("attack", "evaluate.attacks.attack")):
        monkeypatch.setattr(
            f"loramox.{module}.{verb}", lambda *settings, verb=verb: given.update({verb: settings}) or 1 / 0
        )
        words = shlex.split(
            missing["retrained" if verb == "evaluate" else "attacks"].command.split("\nloramox sweep")[0]
        )
        with pytest.raises(ZeroDivisionError):
            main(words[1:])
        model, tokenisation = (
            next(s for s in given[verb] if isinstance(s, kind)) for kind in (ModelConfig, Tokenisation)
        )
        assert asdict(tokenisation) == asked
        assert (model.quantization, model.revision) == ("none", "v 1" if verb == "attack" else None)


@pytest.mark.parametrize("more", [{"variants": "ab"}, {"other_answers": ["Rome"]}, {"absent": {"rouge_l": "no words"}}])
def test_records_of_rows_with_other_answers_or_without_words_are_sound(make: Callable[..., Path], more: dict) -> None:
    run = make()
    path = run / "sweep/at-4/records.jsonl"
    write(path, [json.loads(line) | more for line in path.read_text().splitlines()])
    assert read_inputs(run).records[FORGET][0].items() >= more.items()


@pytest.mark.usefixtures("undrawn")
def test_when_the_rule_refuses_the_shipped_alpha_is_shown_as_such(make: Callable[..., Path]) -> None:
    text = page_of(make(frontier={"chosen": None}))[1].text.replace("\u00a0", " ")
    assert "The rule chose no alpha; shown is the one that was shipped, alpha = 4." in text
    refused = make(frontier={"chosen": None}, run={"forget_adapter": None})
    assert "No alpha was chosen" in page_of(refused)[1].text


HEADLINES = [
    # Before, after, the retrained model's records, and what is said.
    (0.95, 0.1, 0.01, "Partly forgotten", "still 10 times as probable as in a model that never saw the rows"),
    (0.95, 0.6, 0.01, "Not forgotten", "still 60 times as probable"),
    (0.95, 0.015, 0.01, "Forgotten on average;", "1.5 times as probable as in a model that never saw the rows"),
    (0.95, 0.001, 0.01, "Forgotten on average, and beyond", "To know even less than such a model also shows which rows were removed"),
    (0.95, 0.1, None, "Answers much less probable than before", "nothing here says what a model that never saw the rows would give"),
    (0.95, 0.95, None, "Not forgotten", "hardly moved"),
]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("before", "after", "theirs", "headline", "says"), HEADLINES)
def test_the_verdict_says_plainly_whether_it_is_forgotten(
    make: Callable[..., Path], before: float, after: float, theirs: float | None, headline: str, says: str
) -> None:
    points = [POINTS[0] | {"forget_probability": before}, POINTS[2] | {"forget_probability": after}]
    run = make(frontier={"points": points, **({} if theirs else {"retrained": None})})
    line = report(run)["verdict"]
    assert line.startswith(headline)
    assert says in line
    assert f"{shown(before)} to {shown(after)}" in line  # without a retrained model that is all there is


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("kept", "word"), [(0.95, "intact"), (0.9, "slightly harmed"), (0.5, "harmed")])
def test_the_verdict_says_whether_the_rest_is_intact(make: Callable[..., Path], kept: float, word: str) -> None:
    points = [p | {"retain_probability": 0.96 if p["at"] == 0 else kept} for p in POINTS]
    assert f"; the rest is {word}." in report(make(frontier={"points": points}))["verdict"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("quality", "area", "says"),
    [
        (0.94, 0.5, ["truth-ratio test cannot tell it", "(p = 0.94).", "Membership inference: AUC 0.500; 0.5 is guessing"]),
        (0.01, 0.9, ["truth-ratio test can tell it", "(p = 0.01).", "Membership inference: AUC 0.900; 0.5 is guessing"]),
        (0.05, math.nan, ["truth-ratio test cannot tell it", "(p = 0.05)."]),
        (math.nan, 0.5, ["Membership inference: AUC 0.500; 0.5 is guessing"]),
    ],
)  # fmt: skip
def test_the_words_follow_each_test(make: Callable[..., Path], quality: float, area: float, says: list[str]) -> None:
    points = [POINTS[0], *(p | {"forget_quality": quality, "mia_min_k": area} for p in POINTS[1:])]
    line = report(make(frontier={"points": points}))["verdict"]
    assert all(words in line for words in says)
    assert ("truth-ratio test" in line, "Membership" in line) == (quality == quality, area == area)  # NaN: not made
    assert "test on probabilities" not in line  # of a sweep that had no such test


@pytest.mark.usefixtures("undrawn")
def test_what_the_truth_ratio_does_not_see_the_test_on_probabilities_says(make: Callable[..., Path]) -> None:
    points = [p | {"forget_quality": 0.9, "forget_probability_quality": 0.001} for p in POINTS]
    line = report(make(frontier={"points": points}))["verdict"]
    assert "The truth-ratio test cannot tell it" in line
    assert "The test on probabilities can tell it from a model that never saw the rows (p = 0.001)." in line


@pytest.mark.usefixtures("undrawn")
def test_the_worst_leaks_are_named_in_the_verdict_and_shown_with_the_reason(make: Callable[..., Path]) -> None:
    """The row that is said word for word is neither the most probable one nor the least."""
    run = make()
    path = run / "sweep/at-4/records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5] |= {"rouge_l": 1.0, "said": "the secret itself"}
    rows[2] |= {"probability": None}  # as of a row that overflowed
    write(path, rows)
    text = page_of(run)[1].text.replace("\u00a0", " ")
    line = report(run)["verdict"]
    assert "Worst leak by the answer, forget.jsonl, row 5: ROUGE-L 1.0000 (the retrained model 0.5000)." in line
    assert "By probability, forget.jsonl, row 8: its true answer still has 0.1300 (the retrained model 0.0130)." in line
    assert "Worst leak by the answer: the highest ROUGE-L of the 9 rows" in text
    assert "Worst leak by probability: the highest of the 9 rows" in text
    assert "the secret itself" in text
    assert re.search(r"The least probable: number 9 of 9 by probability\s+forget.jsonl, row 2", text)


@pytest.mark.usefixtures("undrawn")
def test_a_row_that_is_worst_in_both_ways_stands_once_and_ties_are_counted(make: Callable[..., Path]) -> None:
    text = page_of(make())[1].text
    assert re.search(r"ROUGE-L of the 9 rows \(as high in 9 rows\)\s+Worst leak by probability", text)
    assert "as for 8 other rows" in text


@pytest.mark.usefixtures("undrawn")
def test_without_generated_answers_the_rows_of_the_worst_leak_are_still_shown(make: Callable[..., Path]) -> None:
    text = page_of(make(said=False))[1].text
    assert "Worst leak by probability" in text
    assert "Question 8? plain" in text
    assert "ROUGE‑L" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_test_that_cannot_tell_even_the_reference_says_so(make: Callable[..., Path]) -> None:
    points = [p | {"forget_quality": 0.9} for p in POINTS]
    assert "it cannot tell even the reference" in report(make(frontier={"points": points}))["verdict"]


@pytest.mark.usefixtures("undrawn")
def test_what_a_test_that_was_not_made_needs_is_said_and_rules_not_used_are_left_out(make: Callable[..., Path]) -> None:
    points = [{k: v for k, v in p.items() if k not in ("forget_quality", "mia_min_k")} for p in POINTS]
    run = make(frontier={"points": points})
    assert NOT_COMPARED in report(run)["verdict"]
    not_tested = json.loads((run / FACTS).read_text())["not_tested"]
    assert any("never knew: the truth-ratio test needs a retrained model's records" in each for each in not_tested)
    assert [row[0] for row in choices(read_inputs(run))] == ["budget (used)", "holdout"]


@pytest.mark.usefixtures("undrawn")
def test_the_reference_is_no_attack_and_two_means_before_say_on_which_rows(make: Callable[..., Path]) -> None:
    run = make()
    text = page_of(run)[1].text
    summary = (run / SUMMARY).read_text(encoding="utf-8")
    assert "reference model" not in summary
    assert (
        "| Asked otherwise | otherwise: first 3 words given | probability of the true answers | 0.9900 | 0.3000 | – |"
        in summary
    )
    assert "| Not attacked | – | probability of the true answers | 0.9500 | 0.1000 | – |" in summary
    assert (
        "| Trained for some steps more | forget rows: step 5 | probability of the true answers | (0.9500) | 0.7000 | – |"
        in summary
    )
    for words in (text, summary):
        assert "all 9 forget rows" in words
        assert "the 7 of 9 forget rows that the attacker did not train on" in words


@pytest.mark.usefixtures("undrawn")
def test_every_abbreviation_is_linked_to_its_one_sentence(make: Callable[..., Path]) -> None:
    _, parsed = page_of(make())
    there = {anchor.removeprefix("term-") for anchor in parsed.attributes("id") if anchor.startswith("term-")}
    assert there == {term.anchor for term in GLOSSARY}
    assert all(term.means.endswith(".") and ". " not in term.means for term in GLOSSARY)
    links = {link for link in parsed.attributes("href") if link.startswith("#term-")}
    wanted = ("axis", "auc", "nats", "kl", "rouge-l", "truth-ratio", "forget-quality", "min-k")
    assert {f"#term-{anchor}" for anchor in wanted} <= links
    for words, _ in METRICS.values():
        assert "#term-" in linked(words), words


def test_links_to_terms_leave_text_as_it_is_and_markup_whole() -> None:
    for text in (*HOSTILE.values(), "AUC <KL title=KS>", "alpha & nats"):
        assert Parsed(linked(text)).text == fit(text)["text"]
    inside = Markup('<code title="AUC">--KL</code> AUC')
    assert linked(inside) == '<code title="AUC">--KL</code> <a class="term" href="#term-auc">AUC</a>'


def test_each_meaning_has_one_colour_in_every_picture(tmp_path: Path) -> None:
    """On the page, in its pictures, and in the sweep's."""
    css = (Path(page_module.__file__).parent / "page.css").read_text()
    meanings = {
        "forget": colours.FORGET,
        "retain": colours.RETAIN,
        "retrained": colours.RETRAINED,
        "ink": colours.CHOSEN,
    }
    assert {name: COLOURS[name] for name in meanings} == meanings
    assert len(set(meanings.values())) == 4
    for name in ("forget", "retain", "retrained"):
        assert f"--{name}: {meanings[name]};" in css
    draw_frontier(tmp_path / "frontier.png", POINTS, 4.0, {"forget": 0.01, "retain": 0.9}, "alpha")
    drawn = (plt.imread(tmp_path / "frontier.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    seen = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(drawn, axis=0)}
    assert {meanings[name] for name in ("forget", "retain", "ink")} <= seen


@pytest.mark.parametrize("width", [80, 70])
def test_names_are_whole_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"{part}_{name}" for part in ("forget", "real_authors", "world_facts") for name in MEANS] + [
        "mia_min_k_plus_plus"
    ]
    metric = {"value": 0.123456, "direction": "nearer to the retrained model's", "n": 100, "reference": RETRAINED}
    show({"metrics": dict.fromkeys(names, metric), "absent": {}})
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in names)
    assert out.count("0.1235") == len(names)
    assert max(map(len, out.splitlines())) <= width
    show_states(STATES)
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.index("reference model") > out.index("relearn")


def test_what_model_utility_lacks_is_told_by_the_part() -> None:
    rows = [{**r, "exact_memorization": 1.0} for r in records("retain", 3, 0.9, ["x"])]
    absent = summarise(rows).absent["model_utility"]
    assert absent == "needs rows of real_authors and world_facts, retain_truth_ratio (all of them are in --suite tofu)"


def test_numbers_that_are_not_finite_are_dashes(make: Callable[..., Path]) -> None:
    broken = POINTS[0] | {"at": 9.0, "forget_probability": float("nan"), "retain_probability": float("nan")}
    _, parsed = page_of(make(frontier={"points": [*POINTS, broken]}))
    assert not re.search(r"\bnan\b", parsed.text, re.IGNORECASE)
    assert [shown(v) for v in (None, float("nan"), "x", 0, 0.99941, 0.00123, -98.14)] == [
        "–", "–", "–", "0", "0.9994", "0.00123", "-98.1"
    ]  # fmt: skip


DAMAGED = {
    "run.json": [('{"status": ', "run.json is damaged"), ("[1]", "run.json is damaged: expected a JSON object"), ('{"id": 1}', "is no record")],
    "sweep/frontier.json": [
        ("{", "frontier.json is damaged.*sweep again"),
        ("[]", "frontier.json is damaged: expected a JSON object.*sweep again"),
        ('{"status": "done", "points": [], "choices": [], "data": {}}', "it is no frontier"),
        ('{"status": "running"}', "this sweep has not finished. Rerun loramox sweep"),
    ],
    "attack/attacks.json": [("{", "attacks.json is damaged.*attack again"), ('{"status": "done"}', "it holds no states")],
    "sweep/at-4/records.jsonl": [("{", "records.jsonl is damaged or incomplete. Delete .*at-4"), ('{"part": "x", "id": 1}\n', "incomplete")],
    "../retrained/records.jsonl": [("{", "has no records of an evaluation that can be read")],
}  # fmt: skip


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("file", "text", "message"), [(f, *case) for f, cases in DAMAGED.items() for case in cases])
def test_damaged_files_are_named_with_a_remedy(make: Callable[..., Path], file: str, text: str, message: str) -> None:
    run = make()
    (run / file).write_text(text)
    with pytest.raises(RunError, match=message):
        report(run)
    assert not (run / PAGE).exists()


def test_a_folder_that_is_no_run_and_a_run_that_goes_on_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run: it has no run.json. Give the folder that loramox unlearn wrote"):
        report(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"this run has not finished.*--resume"):
        report(make(run={"status": "running"}))


@pytest.mark.usefixtures("undrawn")
def test_the_command_says_what_it_wrote(make: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    run = make()
    shutil.rmtree(run / "attack")
    main(["report", str(run)])
    out = capsys.readouterr().out
    assert "At alpha = 4" in out
    assert f"{run / PAGE} is the page" in out
    assert "Missing: No attack was made" in out
    with pytest.raises(SystemExit) as caught:
        main(["report", str(run / "nowhere")])
    assert caught.value.code == 2


def test_text_is_shortened_with_a_note() -> None:
    assert fit("short") == {"text": "short", "note": ""}
    assert fit("x" * 2000)["note"] == f"shortened: {LONGEST:,} of 2,000 characters"
    assert fit("\n" * 2000)["text"].count("\n") < 20


def test_a_real_run_and_its_real_sweep_make_a_page(trained: Path, rows: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = SweepConfig(str(run / "trained"), str(run / "sweep"), alphas=[1.0, 2.0], refine=0)
    sweep(config, Asked(str(rows[0]), str(rows[1])), ScoringConfig(max_new_tokens=8, use_cpu=True))
    _, parsed = page_of(run)
    assert "Where does Ada live?" in parsed.text
    assert "Reference says" in parsed.text
    assert {"along-the-axis", "spread-forget", "watched"} <= set(parsed.attributes("id"))


def test_a_method_without_alpha_has_scales_on_its_page_and_no_word_of_memorizing(make: Callable[..., Path]) -> None:
    settings = {k: v for k, v in RUN["settings"].items() if k != "alpha"} | {"method": "npo"}
    points = [p | {"at": p["at"] / 4} for p in POINTS]
    choices = [c | {"at": c["at"] and c["at"] / 4} for c in FRONTIER["choices"]]
    run = make(
        run={"method": "NPO", "alpha": None, "settings": settings, "forget_adapter": {"alpha": None}},
        frontier={"unit": "scale", "points": points, "choices": choices, "chosen": 1.0},
        attacks={"adapter": {"folder": "run/forget-adapter", "scale": 0.5, "made_by": {"alpha": None}}},
    )
    (run / "sweep/at-4").rename(run / "sweep/at-1")
    page, parsed = page_of(run)
    text = parsed.text.replace("\u00a0", " ")
    assert "At scale = 1 the mean probability" in text
    assert "scale (0: the reference)" in text
    assert "The attacks were made at scale = 0.5, not at the scale = 1 that is shown here." in text
    assert "shipped adapterscale = 1" in "".join(text.splitlines())
    assert "Says 0 plain" in text
    assert "memorize" not in page.lower()
    assert "memorization adapter" not in page.lower()
    assert "alpha =" not in text
    assert "forget model, scale = 1" in (run / SUMMARY).read_text(encoding="utf-8")


def as_by_0_1(record: dict[str, Any]) -> dict[str, Any]:
    """A point or a choice as loramox 0.1 wrote it."""
    return {"strength" if name == "at" else name: value for name, value in record.items()}


@pytest.mark.usefixtures("undrawn")
def test_a_run_and_a_sweep_of_0_1_make_the_same_page(make: Callable[..., Path]) -> None:
    run = make(attacks={"adapter": {"folder": "a", "scale": 0.5, "made_by": {"alpha": 4.0}}})
    report(run)
    expected = (run / SUMMARY).read_text(encoding="utf-8")
    settings = {k: v for k, v in RUN["settings"].items() if k not in ("alpha", "method")}
    before = {k: v for k, v in RUN.items() if k not in ("alpha", "forget_adapter")}
    before |= {"settings": settings | {"strength": 4.0, "objective": "npo"}, "forget_adapter": {"strength": 4.0}}
    write(run / "run.json", before)
    frontier = json.loads((run / "sweep/frontier.json").read_text())
    frontier |= {name: [as_by_0_1(each) for each in frontier[name]] for name in ("points", "choices")}
    frontier["memorization"] = frontier.pop("trained")
    del frontier["unit"]
    write(run / "sweep/frontier.json", frontier)
    for at in (0, 4):
        (run / f"sweep/at-{at}").rename(run / f"sweep/strength-{at}")
    made_by = {"adapter": {"folder": "a", "strength": 0.5, "made_by": {"strength": 4.0}}}
    write(run / "attack/attacks.json", json.loads((run / "attack/attacks.json").read_text()) | made_by)
    report(run)
    assert (run / SUMMARY).read_text(encoding="utf-8") == expected
    (run / "memorization").mkdir()
    shutil.rmtree(run / "sweep")
    assert f"loramox sweep --trained {run / 'memorization'}" in page_of(run)[1].text


MEASURE = """<body style="margin:0"><iframe id="f" style="width:390px;height:900px;border:0" src="run/report.html"></iframe><script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument, box = e => e.getBoundingClientRect();
  const drawn = [...page.querySelectorAll("svg")].map(s => [box(s).width, box(s).height, s.getBBox().width,
    [...s.querySelectorAll("use")].every(u => u.getBBox().width + u.getBBox().height > 0)]);
  document.title = JSON.stringify([drawn, page.documentElement.scrollWidth, page.body.scrollHeight]);
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_a_browser_draws_every_picture_and_nothing_scrolls_sideways_on_a_phone(make: Callable[..., Path]) -> None:
    run = make(texts=(*HOSTILE.values(), LONG, "x" * 500))
    report(run)
    (run.parent / "measure.html").write_text(MEASURE)
    flags = "--headless=new --no-sandbox --disable-gpu --allow-file-access-from-files --enable-logging=stderr --dump-dom --virtual-time-budget=5000"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={run.parent / 'profile'}", (run.parent / "measure.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    drawn, width, height = json.loads(re.search(r"<title>(.*)</title>", done.stdout)[1])
    assert len(drawn) == 5
    for across, down, inside, marked in drawn:
        assert across > 300
        assert down > 100
        assert inside > 0
        assert marked
    assert width <= 390
    assert height > 3000


FAMILIES = [
    {"attack": attack, "state": state, "metrics": metrics} | ({"worst": worst} if worst else {})
    for attack, state, metrics, worst in (
        ("none", "retrained model", {"forget_probability": 0.01}, None),
        ("pair", "guidance 1", {"forget_rouge_l": 0.6, "rouge_l_beyond_base": 0.2}, [{"row": "rows/forget.jsonl, row 3", "rouge_l": 0.9, "base": 0.1}]),
        ("sample", "forget model", {"leak_at_1_by_rouge_l": 0.1, "leak_at_16_by_rouge_l": 0.45}, [{"row": "forget.jsonl, row 5", "samples": 16, "key_words": 2}]),
        ("sample", "retrained model", {"leak_at_16_by_rouge_l": 0.0}, None),
        ("forms", "cloze, forget model", {"leak": 0.3, "forget_probability": 0.9}, None),
        ("forms", "multiple choice, forget model", {"leak": 0.9}, None),  # no part of the worst: guessing is often right
        ("forms", "worst of all, forget model", {"leak": 0.4}, [{"row": "forget.jsonl, row 7", "form": "cloze"}]),
        ("forms", "worst of all, retrained model", {"leak": 0.25}, None),
        ("relearn forget rows", "step 5, retrained model", {"forget_probability": 0.02}, None),
        ("newer", "some state", {"forget_probability": 0.3}, None),
    )
]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_each_family_of_attacks_is_shown_by_its_worst_state_beside_reference_and_control(make) -> None:
    saved = {"relearn forget rows": {"probability": 0.02, "control_step": 5, "step": 1}}
    run = make(attacks={"states": [*STATES[:4], *FAMILIES], "absent": {}, "steps_saved": saved})
    text = page_of(run)[1].text
    summary, found = (run / SUMMARY).read_text(), json.loads((run / FACTS).read_text())
    for line in (
        "| Not attacked | – | probability of the true answers | 0.9500 | 0.1000 | 0.0100 |",
        "| Asked in other forms | worst of all | share of rows that leak | – | 0.4000 | 0.2500 |",
        "| Sampled many times | – | leak@16 by ROUGE-L | – | 0.4500 | 0 |",
        "| Trained for some steps more | forget rows: step 5 | probability of the true answers | (0.9500) | 0.7000 | 0.0200 |",
        "| Base and adapter together | guidance 1 | ROUGE-L beyond the base's own answers | – | 0.2000 | – |",
        "| newer | some state | probability of the true answers | (0.9500) | 0.3000 | (0.0100) |",
    ):
        assert line in summary
    assert "The control, the retrained model, has 0.0200 there." in text
    assert "| attacks | worst state | measure | reference | forget model | control: retrained model |" in summary
    assert (
        "on the retrained model, 5 steps reach a probability of 0.02. On the forget model, the forget rows reach it after 1 (4 saved)"
        in text
    )
    assert "cloze" in text  # every state is there, and the rows that leak
    assert "forget.jsonl, row 5" in text
    assert [each["family"] for each in found["attacks"]] == ["none", "forms", "sample", "relearn", "pair", "newer"]
    assert found["attacks"][3] == {
        "family": "relearn", "attack": "relearn forget rows", "state": "step 5", "measure": "forget_probability",
        "values": {"reference": 0.95, "forget model": 0.7, "retrained model": 0.02}, "not_attacked": ["reference"],
    }  # fmt: skip
    assert found["steps_saved"] == saved


@pytest.mark.usefixtures("undrawn")
def test_general_ability_is_on_the_first_page_from_an_evaluation_of_the_same_adapter(make) -> None:
    run = make()
    assert "General ability: no rows of other subjects were scored" in page_of(run)[1].text
    metrics = {
        "general_ability": {"value": 0.9123, "interval": [0.85, 0.95], "source": "mean of lm_eval_towns_ratio"},
        "unlearning_depth": {"value": 0.77},
    }
    adapter = {"folder": "a", "scale": 1.0, "made_by": {"alpha": 4.0}}
    write(run / "evaluation/summary.json", {"adapter": adapter, "metrics": metrics})
    text = page_of(run)[1].text
    assert "General ability: 0.9123 (0.8500 to 0.9500) of the reference's, the mean of lm_eval_towns_ratio." in text
    assert "no rows of other subjects" not in text
    assert json.loads((run / FACTS).read_text())["metrics"]["unlearning_depth"]["forget model"] == 0.77
    write(run / "evaluation/summary.json", {"adapter": adapter | {"scale": 0.5}, "metrics": metrics})
    text = page_of(run)[1].text
    assert "The evaluation was made at alpha = 2, not at the alpha = 4" in text.replace("\u00a0", " ")
    assert "0.9123" not in text
    write(run / "evaluation/summary.json", {"adapter": adapter, "metrics": [1]})
    with pytest.raises(RunError, match="it holds no metrics"):
        report(run)


def test_relearning_is_drawn_step_by_step_beside_the_control_at_its_worst_rate(make) -> None:
    def steps(attack: str, curve: dict[int, float], of: str = "") -> list[dict[str, Any]]:
        return [
            {"attack": f"relearn {attack}", "state": f"step {step}{of}", "metrics": {"forget_probability": p}}
            for step, p in curve.items()
        ]

    states = [
        *steps("forget rows, rate 0.001", {5: 0.2, 20: 0.6}),
        *steps("forget rows, rate 0.001", {20: 0.1, 5: 0.05}, ", retrained model"),
        *steps("forget rows, all weights, rate 0.001", {5: 0.3, 20: 0.4}),
        *steps("retain rows, rate 0.001", {5: 0.11}),
    ]
    inputs = read_inputs(make(attacks={"states": [*STATES[:2], *states]}))
    assert relearned(inputs) == {
        "retain rows": {FORGET: ([5], [0.11])},
        "forget rows": {FORGET: ([5, 20], [0.2, 0.6]), "retrained model": ([5, 20], [0.05, 0.1])},
    }
    picture = relearning_picture(inputs)
    assert picture.caption.endswith("dotted: the control, retrained model.")
    assert "retrained model, trained on forget rows: step 5 0.0500, step 20 0.1000" in picture.svg


def on(states: list[dict[str, Any]], control: str) -> list[dict[str, Any]]:
    """The states with another control in the place of the retrained model."""
    return [each | {"state": each["state"].replace("retrained model", control)} for each in states]


@pytest.mark.usefixtures("undrawn")
def test_rows_never_known_are_the_control_where_there_is_no_retrained_model(make) -> None:
    never = [
        {"attack": "pair", "state": "guidance 1, rows never known", "metrics": {"rouge_l_beyond_base": 0.05}},
        {"attack": "none", "state": "adapter off, rows never known", "metrics": {"forget_probability": 0.03}},
    ]
    counted = {"attacker's": 2, "asked": 7, "rows never known": {"attacker's": 1, "asked": 5}}
    states = [*STATES[:4], *on(FAMILIES, "rows never known"), *never]
    run = make(attacks={"states": states, "rows": counted, "absent": {}})
    text = page_of(run)[1].text
    summary, found = (run / SUMMARY).read_text(), json.loads((run / FACTS).read_text())
    for line in (
        "| attacks | worst state | measure | reference | forget model | control: rows never known |",
        "| Asked in other forms | worst of all | share of rows that leak | – | 0.4000 | 0.2500 |",
        "| Trained for some steps more | forget rows: step 5 | probability of the true answers | (0.9500) | 0.7000 | 0.0200 |",
        "| Base and adapter together | guidance 1 | ROUGE-L beyond the base's own answers | – | 0.2000 | 0.0500 |",
    ):
        assert line in summary
    assert "The control, rows never known, has 0.0200 there. These are means over the 7 of 9 forget rows" in text
    assert "did not train on and, for the control, over 5 rows never known." in text
    assert found["control"] == "rows never known"
    assert found["attacks"][3]["values"] == {"reference": 0.95, "forget model": 0.7, "rows never known": 0.02}
    both = make(attacks={"states": [*STATES[:4], *FAMILIES, *on(FAMILIES[3:4], "rows never known")], "absent": {}})
    text = page_of(both)[1].text
    assert "control: retrained model" in text  # the better one
    assert "rows never known: leak@16 by ROUGE-L" in text  # with every state


def test_leak_at_k_is_drawn_with_its_intervals_beside_the_control(make) -> None:
    def sampled(model: str, *values: float, **intervals: list[float]) -> dict[str, Any]:
        metrics = {f"leak_at_{2**i}_by_{by}": v for i, v in enumerate(values) for by in ("rouge_l", "key_words")}
        return {"attack": "sample", "state": model, "metrics": metrics, "intervals": intervals}

    ours = sampled(FORGET, 0.1, 0.2, 0.3, leak_at_4_by_rouge_l=[0.1, 0.5], leak_at_1_by_rouge_l=[None, 3])
    inputs = read_inputs(make(attacks={"states": [*STATES[:2], ours, sampled("rows never known", 0, 0.01, 0.02)]}))
    curve = leak_curves(inputs)["rouge_l"][FORGET]
    assert [(each["k"], each["value"]) for each in curve] == [(1, 0.1), (2, 0.2), (4, 0.3)]
    assert (curve[2]["low"], curve[2]["high"]) == (0.1, 0.5)
    picture = sampling_picture(inputs)
    assert picture.caption.endswith("the control: rows never known.")
    assert "forget model, by ROUGE-L: k = 1 0.1000, k = 2 0.2000, k = 4 0.3000" in picture.svg
    assert "rows never known, by key words: k = 1 0, k = 2 0.0100, k = 4 0.0200" in picture.svg
    for by in ("rouge_l", "key_words"):  # the family is judged by the criterion by which more leaks
        ours["metrics"] |= {"leak_at_4_by_rouge_l": 0.3, "leak_at_4_by_key_words": 0.3, f"leak_at_4_by_{by}": 0.4}
        assert families(read_inputs(make(attacks={"states": [*STATES[:2], ours]})))[1].measure == f"leak_at_4_by_{by}"
    alone = read_inputs(make(attacks={"states": [*STATES[:2], ours]}))
    assert sampling_picture(alone).caption.endswith("no control.")
    assert sampling_picture(read_inputs(make())) is None
    assert "sampling" in page_of(make(attacks={"states": [*STATES[:2], ours]}))[1].attributes("id")


@pytest.mark.usefixtures("undrawn")
def test_of_two_reports_of_one_run_at_once_one_is_refused(make) -> None:
    run = make()
    code = "import sys; from loramox.files import locked\nwith locked(sys.argv[1]): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"{run} is in use by process {other.pid}"):
            report(run)
        other.communicate("\n")
    assert not (run / PAGE).exists()
    assert report(run)["page"].exists()


@pytest.mark.parametrize("name", [PAGE, SUMMARY, FACTS])
@pytest.mark.usefixtures("undrawn")
def test_a_report_replaces_its_own_files_and_nobody_elses(name: str, make) -> None:
    run = make()
    for _ in range(2):
        assert all(is_of_report(path) for path in map(report(run).__getitem__, ("page", "summary", "facts")))
    others = {each: (run / each).read_bytes() for each in {PAGE, SUMMARY, FACTS} - {name}}
    for theirs in ("# My summary\n", "{}", "<!DOCTYPE html><title>Mine</title>", ""):
        (run / name).write_text(theirs)
        with pytest.raises(RunError, match=rf"{name} is not of loramox, and the report would replace it. Move it"):
            report(run)
        assert (run / name).read_text() == theirs
        assert not_of_run(run) == [run / name]
    assert others == {each: (run / each).read_bytes() for each in others}
    (run / name).rename(run.parent / "mine")
    (run / name).symlink_to(run.parent / "mine")  # a link is no loss
    report(run)
    assert (run.parent / "mine").read_text() == ""


@pytest.mark.usefixtures("undrawn")
def test_what_was_recovered_is_counted_beyond_the_control(make) -> None:
    """A probability that the retrained model has too is not recovered, however high; a leak that it has not is."""
    control = STATES[3] | {"state": "step 5, retrained model", "metrics": {"forget_probability": 0.69}}
    text = page_of(make(attacks={"states": [*STATES[:4], *FAMILIES, control]}))[1].text
    assert "Most was recovered by “Sampled many times”" in text
    control["metrics"] = {"forget_probability": 0.7}
    text = page_of(make(attacks={"states": [*STATES[:2], STATES[3], control]}))[1].text
    assert "No attack recovered more than from the retrained model. The most is by “Trained for some steps more" in text


@pytest.mark.parametrize(
    ("asked", "rows", "words"),
    [
        (80, {"rows": 100}, "the 80 of 100 forget"),
        (20, {"rows": 100}, "20 of the 80 forget"),
        (80, {}, "the 80 of 100 forget"),
    ],
)
def test_forget_rows_that_a_quick_attack_leaves_out_are_counted_too(make, asked: int, rows: dict, words: str) -> None:
    changes = {"rows": {"attacker's": 20, "asked": asked}, "data": {"forget": rows}}
    found = asked_rows(read_inputs(make(attacks=changes)))
    assert found == f"{words} rows that the attacker did not train on"


@pytest.mark.usefixtures("undrawn")
def test_the_facts_are_those_of_the_page_and_quote_no_row(make) -> None:
    run = make()
    made = report(run)
    text = made["facts"].read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["request"]["rows"]["forget"] == {"rows": 9, "source": "forget.jsonl", "sha256": "forget"}
    assert found["request"]["model"] == "base"
    assert made["verdict"].startswith(found["headline"])
    assert found["answers"]["How hard to recover?"] == made["attacked"]
    assert found["metrics"]["forget_probability"]["forget model"] == 0.1
    assert found["shown"] == {"alpha": 4.0}
    assert all(each in (run / SUMMARY).read_text().replace("\\", "") for each in found["not_tested"])
    assert "Question" not in text
    assert "Says" not in text


def test_the_pair_is_not_the_verdict_since_whoever_has_it_has_the_base(make) -> None:
    more = [{"attack": "pair", "state": "sign flipped", "metrics": {"forget_probability": 0.99}}]
    text = page_of(make(attacks={"states": [*STATES, *more]}))[1].text
    assert "Most was recovered by “Trained for some steps more, forget rows: step 5”" in text
