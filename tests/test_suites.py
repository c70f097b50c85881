"""The rows of public benchmarks, as their own code puts them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from loramox import Tokenisation
from loramox.data.encode import IGNORED
from loramox.data.rows import Columns
from loramox.errors import RowsError, SettingsError
from loramox.evaluate import membership
from loramox.evaluate.answers import Answering, _text
from loramox.evaluate.asked import Asked
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.records import read_records
from loramox.evaluate.subject import Subject
from loramox.evaluate.suites import ANSWERING, _texts, read_part, suite_sources
from loramox.model.config import ModelConfig


@pytest.fixture
def muse(tmp_path: Path) -> Path:
    """A small MUSE folder in the form of its own files."""
    files = {
        "verbmem/forget": [{"prompt": "Ada lives", "gt": "in Rome."}, {"prompt": "Bo lives", "gt": "in Oslo."}],
        "knowmem/forget_qa": [{"question": "Where does Ada live?", "answer": "Rome"}],
        "knowmem/forget_qa_icl": [{"question": "Where does Cy live?", "answer": "Lima"}],
        "knowmem/retain2_qa": [{"question": "Where does Di live?", "answer": "Bern"}],
        "knowmem/retain2_qa_icl": [{"question": "Where does Ed live?", "answer": "Kyiv"}],
        "privleak/forget": ["Ada lives in Rome.", "Bo lives in Oslo."],
        "privleak/holdout": ["Flo lives in Doha.", "Gus lives in Riga. " * 60],
    }
    for name, rows in files.items():
        path = tmp_path / "muse" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    return tmp_path / "muse"


def test_muse_questions_follow_their_few_shot_examples_and_texts_are_one_row_each(muse: Path) -> None:
    sources = suite_sources("muse", "forget10", str(muse))
    parts = {part: read_part("muse", part, source, Columns()) for part, source in sources.items()}
    (question,) = parts["knowmem_forget"]
    shots = "Question: Where does Cy live?\nAnswer: Lima\n\n"
    assert question.prompt == f"{shots}Question: Where does Ada live?\nAnswer:"
    assert (question.answer, question.verbatim) == (" Rome", True)
    assert parts["knowmem_retain"][0].prompt.startswith("Question: Where does Ed live?")
    assert [(r.prompt, r.answer) for r in parts["verbmem"]] == [("Ada lives", " in Rome."), ("Bo lives", " in Oslo.")]
    assert [(r.prompt, r.answer) for r in parts["forget"]] == [("", "Ada lives in Rome."), ("", "Bo lives in Oslo.")]


def test_muse_on_the_hub_has_a_config_and_a_split_for_each_part() -> None:
    sources = suite_sources("muse", "forget10", None)
    assert sources["knowmem_retain"] == "muse-bench/MUSE-News:knowmem:retain_qa"
    assert sources["forget"] == "muse-bench/MUSE-News:privleak:forget"


def test_a_muse_folder_is_evaluated_and_leaks_are_measured_on_whole_texts(
    muse: Path, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = Asked(suite="muse", data=str(muse))
    model, scoring = ModelConfig(str(pico("llama")), quantization="none"), ScoringConfig(use_cpu=True)
    retrained = evaluate(Subject(str(tmp_path / "a")), model, asked, scoring)
    assert "--retrained" in retrained["absent"]["priv_leak"]
    again = Asked(suite="muse", data=str(muse), retrained=str(tmp_path / "a"))
    metrics = evaluate(Subject(str(tmp_path / "b")), model, again, scoring)["metrics"]
    assert metrics["priv_leak"]["value"] in (0.0, pytest.approx(0.0)) or metrics["mia_min_k"]["value"] == 1.0
    directions = {part: metrics[f"{part}_rouge_l"]["direction"] for part in ("verbmem", "knowmem_forget")}
    assert set(directions.values()) == {"lower"}
    assert metrics["knowmem_retain_rouge_l"]["direction"] == "higher"
    records = read_records(tmp_path / "b")
    assert [r["part"] for r in records].count("holdout") == 2  # the long text is cut off, not cut into blocks
    assert not any("said" in r for r in records if r["part"] in ("forget", "holdout"))
    assert all("said" in r for r in records if r["part"] == "verbmem")


def test_muse_texts_are_scored_as_openunlearning_does(muse: Path, pico: Callable[[str], Path], tokenizer) -> None:
    """No end of sequence, no more than 2048 tokens, none predicted from nothing; the last one counts in the loss alone."""
    long = "Gus lives in Riga. " * 600
    (muse / "privleak/holdout.json").write_text(json.dumps([long, "Flo lives in Doha."]))
    (muse / "verbmem/forget.json").write_text(json.dumps([{"prompt": "Ada lives", "gt": "\n\nin Rome."}]))
    sources = suite_sources("muse", "forget10", str(muse))
    parts = {part: read_part("muse", part, sources[part], Columns()) for part in ("verbmem", "holdout")}
    with_start = copy.deepcopy(tokenizer)
    with_start.add_special_tokens({"bos_token": "<pad>"})
    pair = [("<pad>", with_start.bos_token_id)]
    with_start.backend_tokenizer.post_processor = processors.TemplateProcessing("<pad> $A", special_tokens=pair)
    for encoder in (tokenizer, with_start):
        asked = Questions(parts, encoder, Tokenisation(), 8192, ScoringConfig(), ANSWERING["muse"])
        verbmem, holdout = asked.parts
        start, scored = (
            len(encoder("")["input_ids"]),
            [sum(i != IGNORED for i in e["labels"][1:]) for e in holdout.answers],
        )
        assert verbmem.answers[0]["input_ids"] == encoder("Ada lives \n\nin Rome.")["input_ids"]
        texts = [encoder(text)["input_ids"] for text in (long, "Flo lives in Doha.")]
        assert [e["input_ids"] for e in holdout.answers] == [texts[0][: start + 2048], texts[1]]
        assert scored == [2048 - (not start), len(texts[1]) - 1]

    model = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    record = Questions({"holdout": parts["holdout"][1:]}, tokenizer, Tokenisation(), 128, None, ANSWERING["muse"]).ask(
        model
    )[0]
    ids = torch.tensor([tokenizer("Flo lives in Doha.")["input_ids"]])
    with torch.no_grad():
        log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()
    assert record["mia_loss"] == pytest.approx(-log_p.mean(), rel=1e-5)
    assert record["mia_min_k"] == pytest.approx(membership.min_k(log_p[:-1]), rel=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a text", "anoth', "cannot be read as JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text of no list": "x"}', "has columns text of no list"),
        ('["a text", 3]', "row 1 does not fit the columns"),
    ],
)
def test_a_damaged_list_of_texts_is_refused_by_its_name(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "verbmem.json"
    path.write_text(content)
    with pytest.raises(RowsError, match=rf"{path}.*{message}"):
        _texts(str(path))
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert _texts(str(path)) == ["one", "two"]


def test_an_answer_ends_before_the_first_of_its_stops(pico: Callable[[str], Path], tokenizer) -> None:
    tokens = tokenizer("Rome\n\nQuestion: and then?")["input_ids"]
    assert _text(tokenizer, tokens, set(), Answering(9, ("Question", "\n\n")).stops) == "Rome"
    assert _text(tokenizer, tokens, set(), ()) == "Rome\n\nQuestion: and then?"


def test_a_folder_without_a_suites_files_is_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match=r"has no verbmem/forget.jsonl, knowmem/forget_qa.jsonl.*MUSE-News on the hub"):
        suite_sources("muse", "forget10", str(tmp_path))
    with pytest.raises(SettingsError, match="brings its own holdout rows"):
        Asked(suite="muse", holdout="mine.jsonl")
