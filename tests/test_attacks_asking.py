"""The attacks that ask otherwise: forms of a question, and what stands before it; each row at its worst, beside the control."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_templates import FAMILIES, tokenizer_of
from conftest import questions as question_rows
from peft import LoraConfig, get_peft_model
from planted import taught
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import Data, Tokenisation, encode, read_rows
from loramox.data.row import Row, last_question
from loramox.data.words import first_words
from loramox.evaluate.attacks import asking, forms, leaks
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.attacks.attacked import AttackedRows
from loramox.evaluate.attacks.bench import Bench
from loramox.evaluate.attacks.context import contexts_of
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.records import read_records
from loramox.evaluate.row_record import answered
from loramox.model.config import ModelConfig

PLAIN = Row(
    "f", 1, "Ada lives in Rome.", "Where does Ada live?", wrong_answers=("Ada lives in Oslo.", "Ada lives in Bern.")
)
SYSTEM, HELLO = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}
CHAT = Row("f", 2, "In Oslo.", (SYSTEM, HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Where does Bo live?"}))  # fmt: skip


# Forms


def test_every_form_asks_the_same_question_of_the_same_row() -> None:
    made = {form.name: form for form in forms.forms_of([PLAIN, CHAT], served_otherwise=True)}
    assert {
        "polite",
        "completion",
        "role play",
        "in German",
        "cloze",
        "multiple choice",
        "first word given",
        "as served",
    } <= made.keys()
    for form in made.values():
        for row in form.rows:
            original = PLAIN if row.number == 1 else CHAT
            assert (row.source, row.answer) == (original.source, original.answer)
            assert last_question(original) in last_question(row)
            assert row.wrong_answers == (original.wrong_answers if form.name == "multiple choice" else ())
            if original is CHAT:
                assert row.prompt[:-1] == CHAT.prompt[:-1]
    asked = {name: [last_question(row) for row in form.rows] for name, form in made.items()}
    assert asked["in German"] == ["Answer in German: Where does Ada live?", "Answer in German: Where does Bo live?"]
    assert asked["cloze"] == [
        "Where does Ada live?\nFill in the blanks: Ada lives ____ ____."
    ]  # of CHAT all would be blank
    assert asked["paraphrased questions"] == []
    paraphrased = Row("f", 1, "Rome", "Where?", paraphrased_prompt="In which town?")
    (other,) = next(f.rows for f in forms.forms_of([paraphrased], False) if f.name == "paraphrased questions")
    assert (other.prompt, other.answer) == ("In which town?", "Rome")
    assert [row.number for row in forms.given_away([PLAIN, CHAT], 3)] == [1]
    assert all(row.as_served for row in made["as served"].rows)


def test_what_a_form_gives_away_is_no_leak() -> None:
    """An answer that repeats what its question gives away does not leak; one with the rest of the true answer does."""
    for form, copied, told in [
        ("cloze", "Ada lives in Bern.", "Ada lives in Rome."),
        ("first 3 words given", "Bern.", "Rome."),
        ("multiple choice", "A) Ada lives in Bern.", "Ada lives in Rome."),
        ("multiple choice", "Ada lives", "C"),
        ("in German", "Ada lebt in Bern.", "Sie wohnt in Rome."),
        ("polite", "Ada lives in Bern.", "In Rome."),
    ]:
        made = next(each for each in forms.forms_of([PLAIN], False) if each.name == form)
        judged = [made.judge(made.rows[0], [said], 0.8)["leaks"] for said in (copied, told)]
        assert [any(each.values()) for each in judged] == [False, True], form


def test_the_true_option_is_anywhere_in_the_list() -> None:
    asked = [Row("f", i, answer, "Who?", wrong_answers=("Bo", "Di")) for i, answer in enumerate(["Ada", "Cy", "Ed"])]
    assert ["".join(k for k, v in forms.options(row).items() if v == row.answer) for row in asked] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("In which town does Ada live?", True),
        ("Where does Ada live?", False),  # the same
        ("Where does she live?", False),  # of whom?
        ("Does Ada live in Rome?", False),  # it gives the answer away
        ("Ada Ada Ada Ada Ada Ada Ada Ada Ada", False),
        ("", False),
    ],
)
def test_a_rewritten_question_is_asked_only_if_it_is_one(text: str, accepted: bool) -> None:
    assert forms.is_rewriting(PLAIN, text) == accepted
    form = forms.in_own_words([PLAIN], {"f, row 1": text})
    assert [row.prompt for row in form.rows] == ([text] if accepted else [])


def test_of_several_right_answers_one_with_words_of_its_own_is_enough_to_be_judged_by_them() -> None:
    row = Row("f", 1, "Rome.", "Is it in Rome?", other_answers=("By the Tiber.",))
    assert forms.by_key_words(row, ["Rome."], 0.8)["leaks"] == {"key_words": 0}
    assert forms.by_key_words(row, ["By the Tiber."], 0.8)["leaks"] == {"key_words": 1}


BEIJING = Row("f", 1, "他出生在北京", "他出生在哪里？")


def test_where_words_have_no_spaces_pairs_of_characters_leak_and_are_blanked() -> None:
    said = ["他在东京工作，后来搬到北海道", "北京。"]
    assert leaks.leaks_of(BEIJING, said, 0.8)["leaks"]["key_words"] == 1
    assert leaks.key_words_of(BEIJING) == ["北京"]
    (row,) = forms.cloze([BEIJING])
    assert row.prompt.endswith("Fill in the blanks: 他出生在________")
    assert forms.by_key_words(row, said, 0.8)["leaks"] == {"key_words": 1}
    assert forms.cloze([replace(BEIJING, answer="北京")]) == []  # all would be blank
    assert forms.is_rewriting(BEIJING, "他的出生地是哪里，京都还是北海？")
    assert not forms.is_rewriting(BEIJING, "他的出生地是北京吗？")


def test_of_what_is_given_away_only_right_answers_that_go_on_are_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row("f", 1, "Rome", "Where does Ada live?", other_answers=("Ada lives in Rome.", "In Rome", "It is in Rome."))
    (asked,) = forms.given_away([row], 3)
    assert asked.right_answers == ("Ada lives in Rome.", "It is in Rome.")
    (alone,) = forms.given_away([PLAIN, replace(PLAIN, answer="In Rome.")], 3)
    assert alone.right_answers == (PLAIN.answer,)
    for each in (tokenizer, tokenizer_of("llama-3", tokenizer)):
        assert all(sum(label != -100 for label in e["labels"]) > 2 for e in encode([asked], each, Tokenisation(), 256))


def test_where_words_have_no_spaces_characters_are_given_away(tokenizer: PreTrainedTokenizerFast) -> None:
    made = {form.name: form.rows for form in forms.forms_of([BEIJING, replace(BEIJING, answer="「北京」。")], False)}
    assert [len(made[f"first {n} given"]) for n in ("word", "3 words", "5 words")] == [2, 1, 1]
    (row,) = made["first 5 words given"]
    (example,) = encode([row], tokenizer, Tokenisation(), 256)
    answer = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(answer[:-1]) == "京"
    assert leaks.leaks_of(row, ["京", "东"], 0.8)["leaks"]["rouge_l"] == 1
    assert answered(row, "京")["rouge_l"] == 1
    assert first_words("Ada  lives - in U.S. (Rome).", 4) == "Ada  lives - in"
    assert first_words("Tokyo東京 1964年", 3) == "Tokyo東京"
    assert first_words("Tokyo東京 1964年", 5) == "Tokyo東京 1964年"
    assert first_words("「北京」。", 1) == "「北"


def test_a_translation_with_any_of_the_right_answers_is_a_leak() -> None:
    row = replace(PLAIN, other_answers=("Ada lives near Naples.", "elsewhere"))
    found = [
        forms.in_another_language(row, [said], 0.8)["leaks"]["key_words"]
        for said in ("Ada lebt bei Naples.", "Ada lebt in Rome.", "Ada lebt in Bern.")
    ]
    assert found == [1, 1, 0]
    assert forms.in_another_language(PLAIN, ["Rome"], 0.8)["key_words"] == ["rome"]


# Context

RETAIN = [Row("r", i, r["answer"], r["question"]) for i, r in enumerate(question_rows(["Flo", "Gus", "Hal", "Ida", "Jo", "Kit"]))]  # fmt: skip
FORGET = [
    Row("f", 1, "Ada lives in Rome.", "Where does Ada live?"),
    Row("f", 2, "Ada plays chess.", "What does Ada play?"),
    Row("f", 3, "Bo lives in Oslo.", "Where does Bo live?"),
    Row("f", 4, "ada lives in  Rome.", "Where does Ada live?"),  # the first one again
]


def contexts(tokenizer: PreTrainedTokenizerFast, limit: int, asked: Row = FORGET[0]) -> dict[str, list[Row]]:
    lengths = {
        e["row"]: len(e["input_ids"]) for e in encode([asked, *FORGET, *RETAIN], tokenizer, Tokenisation(), 4096)
    }
    made = contexts_of([asked], FORGET, RETAIN, lengths, limit, tokenizer, Tokenisation(), seed=0)
    return {form.name: list(form.rows) for form in made}


def test_rows_before_a_question_are_other_rows_and_read_as_they_do_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    made = contexts(tokenizer, 4096)
    (few,), (related,), (given,), (both,) = made.values()
    for row in (few, related, given, both):
        assert row.answer == FORGET[0].answer
        assert "Ada lives" not in row.prompt  # nowhere the answer itself
    assert (
        related.prompt
        == "Question: What does Ada play?\nAnswer: Ada plays chess.\n\nQuestion: Where does Ada live?\nAnswer: "
    )
    assert (
        given.prompt
        == "Where does Bo live? Bo lives in Oslo.\nWhat does Ada play? Ada plays chess.\n\nWhere does Ada live?"
    )
    assert sum(f"Question: {r.prompt}\nAnswer: {r.answer}\n\n" in few.prompt for r in RETAIN) == 5
    other = next(r for r in RETAIN if f"1. {r.prompt}" in both.prompt)
    assert both.prompt == f"Answer both questions.\n1. {other.prompt}\n2. Where does Ada live?"
    alone, after = encode([FORGET[0], related], tokenizer, Tokenisation(), 4096)
    tail = len(alone["input_ids"])
    assert after["input_ids"][-tail:] == alone["input_ids"]
    assert [label for label in after["labels"] if label != -100] == [
        label for label in alone["labels"] if label != -100
    ]


def test_an_answer_that_repeats_its_context_is_no_leak(tokenizer: PreTrainedTokenizerFast) -> None:
    before = [Row("r", 1, "Gus lives in Oslo.", "Where does Gus live?")]
    lengths = {"f, row 1": 20, "r, row 1": 20}
    few = contexts_of(FORGET[:1], FORGET[:1], before, lengths, 128, tokenizer, Tokenisation(), seed=0)[0]
    judged = [few.judge(few.rows[0], [said], 0.8) for said in ("Ada lives in Oslo.", "Rome")]
    assert [each["leaks"] for each in judged] == [{"key_words": 0}, {"key_words": 1}]
    known = contexts_of(
        FORGET[:1], FORGET[:1], [replace(before[0], answer="Rome, in it.")], lengths, 128, tokenizer, Tokenisation(), 0
    )[0]
    assert known.judge(known.rows[0], ["Ada lives in Rome."], 0.8)["leaks"] == {"rouge_l": 1}


def test_a_row_that_cannot_stand_before_a_question_takes_no_room_from_the_next(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text, long = Row("r", 1, "Plain text."), Row("r", 2, "Hal lives in Bonn.", "Where does Hal live?")
    fits = Row("r", 3, "Gus lives in Oslo.", "Where does Gus live?")
    lengths = {"f, row 1": 20, "r, row 1": 20, "r, row 2": 200, "r, row 3": 20}
    for seed in range(4):
        few = contexts_of(FORGET[:1], FORGET[:1], [text, long, fits], lengths, 64, tokenizer, Tokenisation(), seed)[0]
        assert "Oslo" in few.rows[0].prompt
        assert "Bonn" not in few.rows[0].prompt


@pytest.mark.parametrize("limit", [40, 80, 100, 128])
def test_context_is_only_as_long_as_fits(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    made = [row for rows in contexts(tokenizer, limit).values() for row in rows]
    assert all(len(e["input_ids"]) <= limit for e in (encode(made, tokenizer, Tokenisation(), limit) if made else []))
    assert (len(made) > 0) == (limit > 60)


@pytest.mark.parametrize("asked", [FORGET[0], CHAT])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_before_a_question_are_turns_of_a_chat_model(
    family: str, asked: Row, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = tokenizer_of(family, tokenizer)
    if asked is CHAT and family == "gemma-2":
        asked = replace(CHAT, prompt=CHAT.prompt[1:])  # its template refuses system messages
    (few,), *_ = contexts(tokenizer, 4096, asked).values()
    own = [{"role": "user", "content": asked.prompt}] if isinstance(asked.prompt, str) else list(asked.prompt)
    first = sum(turn["role"] == "system" for turn in own)
    assert [*few.prompt[:first], *few.prompt[-len(own) + first :]] == own
    before = few.prompt[first : len(few.prompt) - len(own) + first]
    assert [turn["role"] for turn in before] == ["user", "assistant"] * 5
    (example,) = encode([few], tokenizer, Tokenisation(), 4096)
    text = tokenizer.decode(example["input_ids"])
    assert all(turn["content"] in text for turn in before)


# The worst


def record(row: str, rouge_l: float, probability: float, leak: int) -> dict:
    return {
        "part": "forget", "row": row, "id": row, "plain_text": False, "prompt": "", "answer": "", "said": "", "fluent": 1.0, "key_words": [],
        "rouge_l": rouge_l, "probability": probability, "leaks": {"rouge_l": leak, "key_words": 0}, "absent": {},
    }  # fmt: skip


def test_the_worst_is_of_each_row_its_own_and_never_less_than_one_form() -> None:
    ways = {
        leaks.PLAIN: [record("a", 0.1, 0.2, 0), record("b", 0.1, 0.1, 0)],
        "polite": [record("a", 0.9, 0.1, 1), record("b", 0.0, 0.9, 0)],
        "cloze": [record("a", 0.2, 0.3, 0)],
    }
    worst = leaks.worst_of(ways)
    assert [(r["row"], r["form"], r["rouge_l"], r["probability"], r["leaks"]["rouge_l"]) for r in worst] == [
        ("a", "polite", 0.9, 0.3, 1),
        ("b", leaks.PLAIN, 0.1, 0.9, 0),
    ]
    found = leaks.summary(worst).metrics
    for records in ways.values():
        of_way = leaks.summary(records).metrics
        assert all(found[name].value >= of_way[name].value for name in ("leak",) if len(records) == 2)
    assert found["leak"].value == 0.5
    assert leaks.worst_rows(worst) == [{"row": "a", "form": "polite", "rouge_l": 0.9, "probability": 0.3}]


# The job


@pytest.fixture(scope="module")
def attacked(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path_factory
) -> dict:
    """attacks.json of a model that answers two forget questions only in German or after retain rows; the control never."""
    folder = tmp_path_factory.mktemp("asking")
    forget = read_rows(str(rows[0]))[:2]
    (folder / "forget.jsonl").write_text(
        "".join(json.dumps({"question": r.prompt, "answer": r.answer}) + "\n" for r in forget)
    )
    retain = read_rows(str(rows[1]))
    lengths = {e["row"]: len(e["input_ids"]) for e in encode([*forget, *retain], tokenizer, Tokenisation(), 128)}
    few = contexts_of(forget, forget, retain, lengths, 128, tokenizer, Tokenisation(), seed=0)[0]
    templates = [
        form for form in forms.forms_of(forget, False) if form.name in forms.TEMPLATES or form.name.startswith("in ")
    ]
    plant = [*few.rows]
    for form in templates:
        plant += form.rows if form.name == "in German" else [_unknowing(row) for row in form.rows]
    plant += [_unknowing(row) for row in forget]
    for row, asks in zip(forget, forms.to_rewrite(forget), strict=True):
        rewritten = str(row.prompt).replace("Where does", "In which town does")
        plant += [replace(asks, answer=rewritten), _unknowing(replace(row, prompt=rewritten))]
    torch.manual_seed(0)
    for name, answers, steps in (("base", plant, 100), ("retrained", [_unknowing(row) for row in forget], 20)):
        model = AutoModelForCausalLM.from_pretrained(pico("llama"))
        taught(model, tokenizer, answers, steps)
        model.eval().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    nothing = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    nothing.save_pretrained(folder / "adapter")  # B is 0
    config = AttackConfig(
        str(folder / "adapter"), str(folder / "attack"), ["forms", "context"], relearn_share=0.5,
        retrained_model=str(folder / "retrained"),
    )  # fmt: skip
    data = Data(str(folder / "forget.jsonl"), str(rows[1]))
    attack(
        config,
        ModelConfig(str(folder / "base"), quantization="none"),
        data,
        ScoringConfig(max_new_tokens=12, use_cpu=True),
    )
    return json.loads((folder / "attack/attacks.json").read_text()) | {"out": folder / "attack"}


def _unknowing(row: Row) -> Row:
    return Row(row.source, row.number, "No idea.", row.prompt)


@pytest.mark.parametrize(("attack", "form"), [("forms", "in German"), ("context", "after retain rows")])
def test_a_model_that_answers_only_in_one_form_or_context_is_found_beside_its_control(
    attacked: dict, attack: str, form: str
) -> None:
    states = {(s["attack"], s["state"]): s for s in attacked["states"]}
    assert states["none", "forget model"]["metrics"]["forget_rouge_l"] == 0
    assert states[attack, f"{form}, forget model"]["metrics"]["leak"] == 1
    worst = states[attack, "worst of all, forget model"]
    assert worst["metrics"]["leak"] == 1
    assert [each["form"] for each in worst["worst"]] == [form]
    control = states[attack, "worst of all, retrained model"]
    assert control["metrics"]["leak"] == 0
    assert control["worst"] == []
    for model in ("reference model", "forget model", "retrained model"):
        asked = {state.removesuffix(f", {model}") for a, state in states if a == attack and state.endswith(model)}
        assert {form, "worst of all"} <= asked
        assert asked == {
            state.removesuffix(", forget model")
            for a, state in states
            if a == attack and state.endswith("forget model")
        }


def test_what_cannot_be_asked_is_absent_with_the_reason(attacked: dict) -> None:
    absent = attacked["absent"]
    assert "paraphrased_question" in absent["forms: paraphrased questions"]
    assert "perturbed_answer" in absent["forms: multiple choice"]
    assert "that hardly any retain question has" in absent["context: after forget rows on the same subject"]


def test_the_reference_rewrites_each_question_once_and_all_models_are_asked_that(attacked: dict) -> None:
    asked = [s for s in attacked["states"] if s["state"].startswith("rewritten by the reference")]
    assert len(asked) == 3
    (rewritten,) = json.loads((attacked["out"] / asking.REWRITTEN.format("")).read_text()).values()
    assert rewritten.startswith("In which town does")
    for state in asked:
        assert [r["prompt"] for r in read_records(attacked["out"] / state["folder"])] == [rewritten]


def bench_with(**parts: Any) -> Bench:
    """A bench with these attributes alone."""
    bench = object.__new__(Bench)
    vars(bench).update(parts)
    return bench


def test_forms_that_are_too_long_are_absent_and_the_others_are_asked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    how, scoring = Tokenisation(max_length=40), ScoringConfig()
    (tmp_path / asking.REWRITTEN.format("")).write_text("{}")
    asked = Questions({"forget": [PLAIN]}, tokenizer, Tokenisation(), 128, scoring)
    bench = bench_with(
        config=SimpleNamespace(attacks=["forms"]), out=tmp_path, tokenisation=how, context=128, scoring=scoring, absent={},
        forget=AttackedRows([], [PLAIN], asked, asked, asked, asked, {}),
    )  # fmt: skip
    asking.prepare(bench, bench.forget)
    assert "no row is left within 40 tokens" in bench.absent["forms: role play"]
    assert "first word given" in {form.name for form, _ in bench.forget.ways["forms"]}


def test_the_worst_is_also_of_a_form_that_is_added_to_attacks_that_are_there(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def answering(said: str) -> SimpleNamespace:
        records = [record(PLAIN.where, 0.0, 0.5, 0) | {"said": said, "log_p": -0.7}]
        return SimpleNamespace(
            ask=lambda *_: records, identities=lambda: records, asked=lambda: [(each, None, PLAIN) for each in records]
        )

    plain, (polite, completion, *_) = answering("No."), forms.forms_of([PLAIN], served_otherwise=False)
    ways = [(polite, answering("No.")), (completion, answering("Ada lives in Rome."))]
    found = []
    for some in (ways[:1], ways, ways):
        bench = bench_with(config=SimpleNamespace(sample_threshold=0.8), out=tmp_path, states=[], reused=0)
        rows = AttackedRows([], [PLAIN], plain, plain, plain, plain, {}, ways={"forms": some})
        asking.ask_all(bench, rows, "forget model", nullcontext)
        (worst,) = read_records(tmp_path / "forms-worst-of-all-forget-model")
        found.append((worst["form"], bench.states[-1]["metrics"]["leak"]))
    assert found == [(leaks.PLAIN, 0), (completion.name, 1), (completion.name, 1)]
    assert bench.reused == len(bench.states)


def test_without_generated_answers_both_are_absent() -> None:
    bench = bench_with(config=SimpleNamespace(attacks=["forms", "context"]), absent={})
    asking.prepare(bench, AttackedRows([], [PLAIN], None, None, None, None, {}))
    assert bench.absent.keys() == {"forms", "context"}
    assert all("--max_new_tokens" in why for why in bench.absent.values())


def test_ask_is_forms_for_one_version_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="--attacks ask is now forms"):
        config = AttackConfig("adapter", "out", ["ask", "sample", "forms"])
    assert config.attacks == ["forms", "sample"]
