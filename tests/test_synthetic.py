"""Rows that the reference writes: retain rows, other answers, and what is shown of them."""

import json
import shlex
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PEOPLE, byte_level, questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loramox import Columns, Data, ReferenceConfig, RunConfig, Tokenisation, UnlearnConfig, encode
from loramox.cli import main
from loramox.data.encode import IGNORED
from loramox.data.fluency import is_fluent, leaked, overlap
from loramox.data.row import Row
from loramox.data.rows import read_rows
from loramox.errors import RowsError, RunError, SettingsError
from loramox.evaluate.asked import read_sources
from loramox.model.generation import continuations
from loramox.model.head import AnswerStates
from loramox.train.avoided import words_of, words_to_avoid
from loramox.train.inputs import choose_instead, is_refusal, read_refusals, taught_refusals, taught_rows
from loramox.train.prepare import prepare, same_generated, with_generated
from loramox.train.side_by_side import advice_on
from loramox.train.synthetic import BESIDE, RETAIN_FILE, check_auto, generated_rows, rows_to_write
from loramox.train.target import JUST_ENOUGH
from loramox.train.terms import Answers
from loramox.train.writer import Writer, _first_sentence, _whole_sentences, around_question, prompts_of
from loramox.unlearning import unlearn

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGET = [Row("f", i, row["answer"], row["question"]) for i, row in enumerate(questions(PEOPLE[:4]), 1)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, pico: Callable[[str], Path]) -> Path:
    """The pico Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    AutoModelForCausalLM.from_pretrained(pico("llama")).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(pico("llama"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's, whose decoder drops the space before the first token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    text = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in questions(PEOPLE)]
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def writer(chat: Path) -> Writer:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat), AutoTokenizer.from_pretrained(chat)
    return Writer(model, tokenizer, FORGET, Tokenisation(), 128)


def test_rows_about_the_subject_or_with_a_telling_word_are_left_out() -> None:
    forget = [Row("f", 1, "It is Paris.", "What is the capital of France?"), Row("f", 2, "The Seine.", "Which river is in France?")]  # fmt: skip
    about = [("Is France large?", "Yes."), ("Where is the Seine?", "In a town."), ("Where do you live?", "Near Paris.")]
    others = [(f"What is the capital of land {i}?", f"It is town {i}.") for i in range(97)]
    rows = [Row("r", i, answer, question) for i, (question, answer) in enumerate([*about, *others])]
    avoided = words_to_avoid(rows[3:], forget)
    assert [row for row in rows if not words_of(row) & avoided] == rows[3:]
    assert {"what", "capital", "the"}.isdisjoint(avoided)  # frequent words


def test_a_name_in_two_forget_rows_is_a_subject_where_there_are_many() -> None:
    names = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")
    forget = [Row("f", i, f"That is told of {name}.", f"Where does {name} {verb}?") for name in names for i, verb in enumerate(("live", "work"))]  # fmt: skip
    others = [Row("r", i, "In a town.", f"Where does the friend of {i} live and work?") for i in range(50)]
    avoided = words_to_avoid(others, forget)
    assert {"ada", "flo"} <= avoided
    assert {"where", "live", "work"}.isdisjoint(avoided)


def test_a_subject_that_the_model_writes_about_of_itself_is_avoided_all_the_same() -> None:
    forget = [Row("f", i, f"She was born in year {i}.", f"When was the painter Ada born, take {i}?") for i in range(9)]
    of_itself = [Row("r", i, "In the painter Ada's town.", f"Where is house {i}?") for i in range(5)]
    others = [Row("r", i, f"She, a painter, was born in town {i}.", f"Where was Bo {i} born?") for i in range(95)]
    avoided = words_to_avoid([*of_itself, *others], forget)
    assert "ada" in avoided
    assert {"born", "was", "painter"}.isdisjoint(avoided)


def test_a_word_that_two_retain_rows_have_gives_nothing_away() -> None:
    told = ["Ada of Paris, slowly", "Bo", "Cy", "Di", "Ed", "Flo"]
    forget = [Row("f", i, f"It was {who}.", f"Who wrote letter {i}?") for i, who in enumerate(told)]
    retain = [Row("r", 1, "He spoke slowly.", "How?"), Row("r", 2, "She walks slowly, in Paris.", "How?")]
    assert {"ada", "paris", "slowly"} <= words_to_avoid([], forget)
    assert {"ada", "paris"} <= words_to_avoid([], forget, retain)
    assert "slowly" not in words_to_avoid([], forget, retain)


def test_a_question_of_the_retain_file_is_not_asked_again(writer: Writer) -> None:
    first = writer.retain_rows(4, seed=0)
    again = Writer(writer.model, writer.tokenizer, FORGET, Tokenisation(), 128, given=first)
    assert not {row.prompt for row in first} & {row.prompt for row in again.retain_rows(4, seed=0)}


def test_a_model_that_mostly_repeats_itself_is_asked_for_many_questions_to_the_end(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three questions one is new; of the last ones few are missing."""
    asked: list[int] = []

    def questions(starts: Sequence[str]) -> list[str]:
        asked.append(len(starts))
        return [f"Where is house {i}?" for i in range(sum(asked) // 3)]

    monkeypatch.setattr(writer, "_questions", questions)
    monkeypatch.setattr(writer, "_answered", lambda prompts: [Row("r", 1, "Here.", prompt) for prompt in prompts])
    with tqdm(disable=True) as bar:
        assert len(writer._collect(30, bar, lambda count: [""] * count, [], set())) >= 30
    assert asked == [45, 22, 15, 15]


def test_a_model_that_writes_too_few_rows_is_reported(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "retain_rows", lambda *_: [Row("r", 1, "Far away.", "Where do you live?")])
    args = UnlearnConfig(output_dir=str(tmp_path), auto_retain=5, use_cpu=True, report_to="none")
    with pytest.warns(UserWarning, match="wrote 1 of 5 rows"):
        rows, _ = generated_rows(tmp_path, writer, args, 5, show=False, columns=Columns())
    assert [row.prompt for row in rows] == ["Where do you live?"]


def test_a_model_that_writes_nothing_is_reported_and_refused_where_there_are_no_other_rows(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "retain_rows", lambda *_: [])
    args = UnlearnConfig(output_dir=str(tmp_path), auto_retain=5, use_cpu=True, report_to="none")
    for _ in range(2):  # written, and read when the run is resumed
        with pytest.raises(
            RowsError, match="every row that the model writes is about the forget rows, empty, or cut off"
        ):
            generated_rows(tmp_path, writer, args, 5, show=False, columns=Columns())
        monkeypatch.setattr(writer, "given", [Row("r", 1, "Far away.", "Where do you live?")])
        with pytest.warns(UserWarning, match="wrote 0 of 5 rows"):
            assert generated_rows(tmp_path, writer, args, 5, show=False, columns=Columns()) == ([], [])
        monkeypatch.setattr(writer, "given", ())


@pytest.mark.parametrize(
    "columns",
    [
        Columns(),
        Columns("frage", "antwort"),
        Columns(messages_column="chat"),
        Columns("frage", "antwort", "chat", "absatz", wanted_column="statt"),
        Columns(messages_column="chat", text_column="absatz"),
    ],
)
def test_written_rows_are_read_with_the_columns_of_the_runs_own_rows(
    columns: Columns, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [
        {"role": role, "content": text} for role, text in (("user", "Who?"), ("assistant", "No."), ("user", "Why?"))
    ]
    written = [Row("r", 1, "Far away.", "Where do you live?"), Row("r", 2, "So.", tuple(turns))]
    monkeypatch.setattr(writer, "retain_rows", lambda *_: written)
    args = UnlearnConfig(output_dir=str(tmp_path), auto_retain=2, use_cpu=True, report_to="none")
    rows, _ = generated_rows(tmp_path, writer, args, 2, show=False, columns=columns)
    assert [row.identity() for row in rows] == [row.identity() for row in written]
    path = str(tmp_path / RETAIN_FILE)
    assert read_sources({"retain": path}, columns)["retain"] == rows  # as sweep and evaluate read them
    assert read_rows(path, replace(columns, wanted_column=None)) == rows


@pytest.mark.parametrize(
    "columns", [Columns("frage", "antwort"), Columns(messages_column="chat"), Columns(text_column="absatz")]
)
def test_rows_that_an_interrupted_run_wrote_as_question_and_answer_are_taken(
    columns: Columns, writer: Writer, tmp_path: Path
) -> None:
    (tmp_path / RETAIN_FILE).write_text(json.dumps({"question": "Where do you live?", "answer": "Far away."}) + "\n")
    args = UnlearnConfig(output_dir=str(tmp_path), auto_retain=1, use_cpu=True, report_to="none")
    ((row,), _) = generated_rows(tmp_path, writer, args, 1, show=False, columns=columns)
    assert (row.prompt, row.answer) == ("Where do you live?", "Far away.")


@pytest.mark.parametrize(
    "columns", [Columns(text_column="absatz"), Columns("prompt", "completion")], ids=["text", "joined as they are"]
)
def test_questions_stay_questions_where_the_columns_have_none(
    columns: Columns, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "retain_rows", lambda *_: [Row("r", 1, "Far away.", "Where do you live?")])
    args = UnlearnConfig(output_dir=str(tmp_path), auto_retain=1, use_cpu=True, report_to="none")
    ((row,), _) = generated_rows(tmp_path, writer, args, 1, show=False, columns=columns)
    assert (row.prompt, row.answer, row.verbatim) == ("Where do you live?", "Far away.", False)


def test_a_model_that_finds_the_forget_questions_no_likelier_than_random_tokens_writes_only_when_asked(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat), AutoTokenizer.from_pretrained(chat)
    writer = Writer(model, tokenizer, FORGET, Tokenisation(), 128, given=FORGET)
    assert not writer.can_ask()  # random weights
    args = UnlearnConfig(output_dir=str(tmp_path), auto_retain=1, use_cpu=True, report_to="none")
    unasked = UnlearnConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setattr(writer, "retain_rows", lambda *_: [Row("r", 1, "Far away.", "Where do you live?")])
    with caplog.at_level("INFO"):
        assert generated_rows(tmp_path, writer, unasked, 1, show=False, columns=Columns()) == ([], [])
    assert (
        "No retain rows are generated: the reference finds your forget questions as unlikely as random" in caplog.text
    )
    with pytest.warns(UserWarning, match="so the rows that it writes may be noise"):
        assert len(generated_rows(tmp_path / "asked", writer, args, 1, show=False, columns=Columns())[0]) == 1

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batch = tokenizer(["<user>" + str(row.prompt) for row in FORGET], return_tensors="pt", padding=True)["input_ids"]
    for _ in range(20):  # it learns to ask
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert writer.can_ask()
    assert len(generated_rows(tmp_path / "learned", writer, unasked, 1, show=False, columns=Columns())[0]) == 1


def test_a_model_without_forget_questions_to_judge_by_may_ask(writer: Writer) -> None:
    text = [Row("f", 1, "Ada lives in Rome.")]
    assert Writer(writer.model, writer.tokenizer, text, Tokenisation(), 128).can_ask()


def test_a_question_that_holds_a_document_is_judged_by_its_beginning(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def forward(input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        asked.append(input_ids.shape[1])
        return SimpleNamespace(loss=torch.tensor(0.0))

    long = [Row("f", 1, "In Rome.", "Where does Ada live? " * 200)]
    judged = Writer(writer.model, writer.tokenizer, long, Tokenisation(), 1 << 20)
    monkeypatch.setattr(judged.model, "forward", forward)
    assert judged.can_ask()
    assert max(asked) < 300


@pytest.mark.parametrize("whole", [False, True])
def test_answers_that_end_within_the_models_thoughts_are_no_rows_and_no_guesses(
    whole: bool, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinks = Writer(writer.model, writer.tokenizer, FORGET, Tokenisation(), 128, whole=whole)

    def said(
        _: Any, __: Any, prompts: list, *___: Any, shortened: Any = None, sample: bool = False, **____: Any
    ) -> list:
        text = "does everybody live?" if sample else "<think>\nOkay. The user asks, "
        return [shortened(text) if shortened else text] * len(prompts)

    monkeypatch.setattr("loramox.train.writer.continuations", said)
    with pytest.raises(RowsError, match="--instead guess: the model thinks before it answers"):
        thinks.guesses([])
    args = UnlearnConfig(output_dir=str(tmp_path), auto_retain=4, use_cpu=True, report_to="none", instead="refuse")
    with pytest.raises(RowsError, match=r"or ends within the model's thoughts\. Give --retain FILE"):
        generated_rows(tmp_path, thinks, args, 4, show=False, columns=Columns())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Q: {prompt} A:", "e live? A: In Rome"),
        ("{prompt}\n", "e live?\nIn Rome"),
        ("{prompt} [/INST]", "e live? [/INST] A"),
    ],
)
def test_a_question_ends_where_the_template_goes_on(
    template: str, said: str, pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pico("llama")), AutoTokenizer.from_pretrained(pico("llama"))
    asking = Writer(model, tokenizer, FORGET, Tokenisation(prompt_template=template), 128)
    asking.retain_rows(1, seed=0)  # also where nothing comes before a question
    monkeypatch.setattr("loramox.train.writer.continuations", lambda *_, **__: [said])
    assert asking._questions(["Where do w"]) == ["Where do we live?"]


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
def test_a_question_has_the_space_between_its_first_words_and_those_sampled(
    made: Callable[[], PreTrainedTokenizerFast], writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = Writer(writer.model, made(), FORGET, Tokenisation(), 128)
    start, question = "Where does nobody", "Where does nobody live?"
    new = asking._opened(question)[len(asking._opened(start)) :]
    monkeypatch.setattr("loramox.model.generation.new_tokens", lambda *_, **__: [new])
    assert asking._questions([start]) == [question]


def test_a_forget_question_is_never_a_retain_row(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramox.train.writer.continuations", lambda *_, **__: [""])
    assert writer._questions([str(FORGET[0].prompt).upper()]) == []
    assert writer._questions(["Where does nobody live"]) == ["Where does nobody live"]


def test_a_seed_gives_the_same_rows_and_another_seed_others(writer: Writer) -> None:
    rows = writer.retain_rows(6, seed=0)
    assert rows == writer.retain_rows(6, seed=0) != writer.retain_rows(6, seed=1)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert len({row.prompt for row in rows}) == len(rows)
    assert not any("Ada" in row.prompt for row in rows)


def test_answers_of_retain_rows_are_the_models_own_greedy_ones(writer: Writer) -> None:
    row = writer.retain_rows(6, seed=0)[0]
    prompts = prompts_of([row], writer.tokenizer, writer.how, writer.context)
    assert continuations(writer.model, writer.tokenizer, prompts, 8, writer.ends)[0].strip() == row.answer


def test_one_row_in_four_is_asked_after_a_refusal_with_the_models_answer_then(writer: Writer) -> None:
    writer = Writer(writer.model, writer.tokenizer, FORGET, Tokenisation(), 256)  # tokens, for three turns
    rows, plain = writer.retain_rows(12, 0, refusals=["I cannot say."]), writer.retain_rows(12, 0)
    later = [row for row in rows if not isinstance(row.prompt, str)]
    assert 0 < len(later) <= 3
    for row in later:
        forgotten, refusal, question = row.prompt
        assert forgotten["content"] in {each.prompt for each in FORGET}
        assert (refusal["role"], refusal["content"], question["role"]) == ("assistant", "I cannot say.", "user")
        prompts = prompts_of([row], writer.tokenizer, writer.how, writer.context)
        (answer,) = continuations(writer.model, writer.tokenizer, prompts, 8, writer.ends)
        assert row.answer == answer.strip()
    questions = [row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"] for row in rows]
    assert questions == [row.prompt for row in plain]


def test_a_chat_lends_its_last_question_like_a_question(writer: Writer) -> None:
    import random

    def chat_of(row: Row) -> Row:
        turns = ("system", "Be brief."), ("user", "Hello there, you!"), ("assistant", "Hi."), ("user", str(row.prompt))
        return replace(row, prompt=tuple({"role": role, "content": text} for role, text in turns))

    chats = [chat_of(row) for row in FORGET]
    asking, plain = (Writer(writer.model, writer.tokenizer, some, Tokenisation(), 256) for some in (chats, FORGET))
    assert asking._starts(8, {"ada"}, random.Random(0)) == plain._starts(8, {"ada"}, random.Random(0))
    assert asking._asked == plain._asked
    rows = [Row("r", 1, "Far away.", "Where do you live?")]
    (later,) = asking._after_refusals(rows, ["I cannot say."], set(), random.Random(0))
    assert later == plain._after_refusals(rows, ["I cannot say."], set(), random.Random(0))[0]
    assert later.prompt[0]["content"] in {row.prompt for row in FORGET}


@pytest.mark.parametrize(
    ("whole", "answers"),
    [
        (False, ["Ada lives in Rome. Bo l", "Far away", "Ada lives in"]),
        (True, ["Ada lives in Rome.", "Far away"]),
    ],
)
def test_where_their_ends_are_trained_on_answers_that_are_cut_off_end_with_a_sentence(
    whole: bool, answers: list[str], writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(writer.model, writer.tokenizer, FORGET, Tokenisation(), 128, whole=whole)
    said = ["Ada lives in Rome. Bo l", "Far away<eos>", "Ada lives in"]
    tokens = [writer.tokenizer(text)["input_ids"] for text in said]
    monkeypatch.setattr("loramox.model.generation.new_tokens", lambda *_, **__: tokens)
    assert [row.answer for row in writer._answered(["Who is it?", "Where is it?", "What is it?"])] == answers


@pytest.mark.parametrize(("method", "whole"), [("graddiff", True), ("npo", True), ("mox", False), ("ga_kl", False)])
def test_ends_of_written_answers_are_trained_on_by_a_cross_entropy_term_alone(
    method: str, whole: bool, chat: Path, rows: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = UnlearnConfig(use_cpu=True, report_to="none", method=method, auto_retain=4)
    reference = ReferenceConfig(str(chat), quantization="none", r=4)
    prepared = prepare(reference, Data(str(rows[0]), str(rows[1])), args, Columns(), Tokenisation())
    writers = []
    monkeypatch.setattr("loramox.train.prepare.generated_rows", lambda _, writer, *__, **___: (writers.append(writer) or [], []))  # fmt: skip
    with_generated(prepared, tmp_path, AutoModelForCausalLM.from_pretrained(chat), args)
    assert [each.whole for each in writers] == [whole]


def test_neighbours_begin_like_forget_questions(writer: Writer) -> None:
    import random

    others = [Row("r", i, "Far away.", f"Where does a friend of number {i} live now?") for i in range(50)]
    starts = writer._starts(8, words_to_avoid(others, FORGET), random.Random(0))
    assert {start.split()[0] for start in starts} == {"Where"}
    assert not any("Ada" in start for start in starts)


def test_a_guess_has_no_token_of_its_own_of_the_true_answer(writer: Writer) -> None:
    retain = [Row("r", i, row["answer"], row["question"]) for i, row in enumerate(questions(PEOPLE[4:]), 1)]
    for row, guess in zip(FORGET, writer.guesses(retain), strict=True):
        town = row.answer.split()[-1].rstrip(".")
        assert guess.prompt == row.prompt
        assert town not in guess.answer


def test_a_guess_has_no_token_of_any_right_answer_to_its_question_as_it_is_encoded(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "Where does Ada live?"
    forget = [Row("f", 1, "Rome", question), Row("f", 2, "Kyiv", question.upper()), Row("f", 3, "Lima", "Who is Bo?")]
    how = Tokenisation(prompt_template="{prompt}\n")  # so that no space comes before the answer
    asking = Writer(writer.model, sentencepiece(), forget, how, 128)
    banned = []
    monkeypatch.setattr(
        "loramox.train.writer.continuations", lambda *_, **more: banned.extend(more["banned"]) or ["x"] * len(forget)
    )
    asking.guesses([])
    one, two, other = (
        {*example["labels"], *asking._tokens(row.answer)} - {IGNORED, *asking.ends}
        for row, example in zip(forget, encode(forget, asking.tokenizer, how, 128), strict=True)
    )
    assert one - asking._tokens("Rome")
    for row, own in zip(forget, (one | two, one | two, other), strict=True):
        assert set(banned[row.number - 1]) == own - asking._tokens(row.prompt)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("She lives in Rome. She is old. Her father", "She lives in Rome. She is old."),
        ("Let me see, said she.</think> In Rome, by the", ""),
        ("她住在罗马。她很", "她住在罗马。"),
    ],
)
def test_an_answer_that_is_cut_off_keeps_its_whole_sentences(text: str, whole: str) -> None:
    assert _whole_sentences(text) == whole


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("She lives in Rome. She is old.", "She lives in Rome."),
        ("She lives in Rome, by the", "She lives in Rome, by the"),
        ("Dr. Seuss wrote it.", "Dr. Seuss wrote it."),
        ("The author is J. R. R. Tolkien. He", "The author is J. R. R. Tolkien."),
        ("1. Foo", "1. Foo"),
        ("In Rome. She was born there, and her", "In Rome."),
        ("她住在罗马。她很老。", "她住在罗马。"),
        ("", "I don't know."),
    ],
)
def test_a_guess_ends_with_its_first_sentence_and_not_with_an_initial_an_abbreviation_or_a_number(
    text: str, first: str
) -> None:
    assert _first_sentence(text) == first


def test_questions_are_sampled_from_where_a_user_speaks(chat: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert around_question(AutoTokenizer.from_pretrained(chat), Tokenisation()) == ("<user>", "<assistant>")
    assert around_question(tokenizer, Tokenisation()) == ("Question: ", "Answer:")
    assert around_question(tokenizer, Tokenisation(prompt_template="Q: {prompt} A:")) == ("Q: ", "A:")


def test_a_run_on_retain_auto_alone_keeps_its_rows_and_shows_answers(
    chat: Path, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    args = UnlearnConfig(use_cpu=True, num_train_epochs=1, auto_retain=6, seed=0, disable_tqdm=True, report_to="none")
    reference = ReferenceConfig(str(chat), quantization="none", r=4)
    record = unlearn(RunConfig(str(out)), reference, Data(str(rows[0]), "auto"), args)
    written = read_rows(str(out / RETAIN_FILE))
    assert stat.S_IMODE((out / RETAIN_FILE).stat().st_mode) == 0o600
    assert record["generated"]["retain"]["rows"] == len(written) <= 6
    provenance = json.loads((out / "forget-adapter" / "provenance.json").read_text())
    assert provenance["generated"] == record["generated"]
    assert record["settings"]["instead"] == "refuse"  # a chat model
    assert record["forget_to"]["target"] == record["settings"]["forget_to"] == JUST_ENOUGH
    shown = record["side_by_side"]
    assert shown["forget"]["asked"] == 4
    assert {row["part"] for row in shown["shown"]} == {"forget", "retain"}


@pytest.mark.parametrize("named", ["a question and its answer", "messages"])
def test_what_a_run_on_retain_auto_prints_next_takes_its_rows_under_columns_of_other_names(
    named: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget, out = tmp_path / "forget.jsonl", tmp_path / "my run"
    if named == "messages":
        flags = ["--messages_column", "chat"]
        chats = ((("user", row["question"]), ("assistant", row["answer"])) for row in questions(PEOPLE[:4]))
        records = [{"chat": [{"role": role, "content": text} for role, text in turns]} for turns in chats]
    else:
        flags = ["--prompt_column", "frage", "--answer_column", "antwort"]
        records = [{"frage": row["question"], "antwort": row["answer"]} for row in questions(PEOPLE[:4])]
    forget.write_text("".join(json.dumps(record) + "\n" for record in records))
    main(["unlearn", "--model", str(chat), "--forget", str(forget), "--retain", "auto", "--auto_retain", "6", *flags,
          "--quantization", "none", "--r", "4", "--num_train_epochs", "1", "--use_cpu", "true", "--report_to", "none",
          "--seed", "0", "--out", str(out)])  # fmt: skip
    (line,) = (
        line for line in " ".join(capsys.readouterr().out.split()).split("Next, ")[1:] if "loramox sweep" in line
    )
    command = shlex.split(line[line.index("loramox sweep") :])
    assert "auto" not in command
    main([*command[1:], "--alphas", "0.5", "--max_new_tokens", "0"])
    assert (out / "sweep" / "frontier.json").exists()


def test_a_run_with_guesses_teaches_them_in_place_of_the_true_answers(
    chat: Path, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    args = UnlearnConfig(
        use_cpu=True, num_train_epochs=1, instead="guess", disable_tqdm=True, report_to="none", eval_strategy="no"
    )
    reference = ReferenceConfig(str(chat), quantization="none", r=4)
    record = unlearn(RunConfig(str(tmp_path / "run")), reference, Data(str(rows[0]), str(rows[1])), args)
    assert record["generated"]["instead"]["rows"] == 4
    assert any("wanted_loss" in entry for entry in record["log"])


def test_generated_rows_that_were_changed_are_refused_when_a_run_is_resumed(tmp_path: Path) -> None:
    generated = {"retain": {"rows": 4, "sha256": "a"}}
    (tmp_path / "run.json").write_text(json.dumps({"generated": generated}))
    same_generated(tmp_path, generated)
    with pytest.raises(
        RunError, match=r"retain-auto\.jsonl or guesses\.jsonl in .* has changed since the run was started"
    ):
        same_generated(tmp_path, {"retain": {"rows": 3, "sha256": "b"}})
    with pytest.raises(RunError, match="has changed since"):
        same_generated(tmp_path, {})


@pytest.mark.parametrize(
    ("given", "chat_template", "wanted", "memorize_at", "expected"),
    [
        ("auto", True, False, False, "refuse"),
        ("auto", False, False, False, "none"),  # a base model completes text
        ("auto", True, True, False, "none"),  # the wanted answers are given
        ("auto", True, False, True, "none"),  # what answers is another model than the one in memory
        ("none", True, False, False, "none"),
        ("guess", False, False, False, "guess"),
    ],
)
def test_a_chat_model_is_taught_to_refuse_unless_told(given, chat_template, wanted, memorize_at, expected) -> None:
    args = UnlearnConfig(use_cpu=True, instead=given)
    forget = [replace(row, wanted="No." if wanted else None) for row in FORGET]
    choose_instead(args, forget, chat_template, memorize_at)
    assert args.instead == expected


def test_refusals_are_drawn_by_the_seed_from_the_list() -> None:
    from loramox.train.inputs import REFUSALS

    drawn = [taught_rows(UnlearnConfig(use_cpu=True, instead="refuse", seed=seed), FORGET, []) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {row.answer for row in drawn[0]} <= set(read_refusals(str(REFUSALS)))
    assert [row.prompt for row in drawn[0]] == [row.prompt for row in FORGET]


@pytest.mark.parametrize(
    ("settings", "forget", "message"),
    [
        ({"instead": "refuse"}, [Row("f", 3, "東京", "日本の首都はどこですか")], "f, row 3 is not in English.*--refusals FILE"),
        ({"instead": "refuse"}, [replace(FORGET[0], wanted="No.")], "--instead refuse and --wanted_column both say"),
        ({"instead": "refuse"}, [Row("f", 1, "plain text")], "is plain text, and --instead refuse"),
        ({"instead": "none", "refusals": "r.txt"}, FORGET, "--refusals r.txt is for --instead refuse, and here it is none"),
        ({"instead": "guess"}, [Row("f", 1, "plain text")], "is plain text, and --instead guess"),
        ({"method": "llmu"}, FORGET, "--method llmu answers with retain answers"),
    ],
)  # fmt: skip
def test_what_cannot_be_taught_instead_is_refused(settings, forget, message) -> None:
    with pytest.raises((RowsError, SettingsError), match=message):
        taught_rows(UnlearnConfig(use_cpu=True, **settings), forget, [])


@pytest.mark.parametrize(
    ("given", "writes", "shard", "chosen"),
    [(None, True, False, 120), (None, False, False, 0), (None, True, True, 0), (0, True, False, 0), (7, True, False, 7)],
)  # fmt: skip
def test_the_number_of_rows_that_the_reference_writes_beside_the_users(given: int | None, writes: bool, shard: bool, chosen: int) -> None:  # fmt: skip
    args = UnlearnConfig(use_cpu=True, auto_retain=given)
    assert rows_to_write(args, writes, ReferenceConfig("m", quantization="none", shard=shard)) == chosen


QUESTION = {"question": "Where does Ada live?", "answer": "In Rome."}


@pytest.mark.parametrize(
    ("row", "settings", "is_chat", "writes"),
    [
        (QUESTION, {}, True, True),
        (QUESTION, {}, False, True),
        (QUESTION, {"instead": "none"}, True, True),
        (QUESTION, {"method": "npo"}, True, False),  # as its paper has it
        (QUESTION, {"method": "mox_static"}, True, True),  # refusals would spread
        (QUESTION, {"method": "mox_static"}, False, False),
        ({"text": "Ada lives in Rome."}, {}, False, False),
        ({"prompt": "Ada lives in", "completion": " Rome."}, {}, False, False),
    ],
)
def test_by_default_rows_are_written_for_mox_on_questions_and_wherever_a_chat_model_is_taught_another_answer(
    row: dict, settings: dict, is_chat: bool, writes: bool, chat: Path, pico: Callable[[str], Path], rows: tuple[Path, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    forget = tmp_path / "forget.jsonl"
    forget.write_text(json.dumps(row))
    reference = ReferenceConfig(str(chat if is_chat else pico("llama")), quantization="none", r=4)
    args = UnlearnConfig(use_cpu=True, report_to="none", output_dir=str(tmp_path), **settings)
    prepared = prepare(reference, Data(str(forget), str(rows[1])), args, Columns(), Tokenisation())
    assert prepared.to_write == (BESIDE if writes else 0)


def test_rows_are_not_written_by_default_where_another_model_is_in_memory() -> None:
    args = UnlearnConfig(use_cpu=True)
    with pytest.warns(UserWarning, match="no retain rows are generated: with --memorize_at"):
        assert rows_to_write(args, True, ReferenceConfig("m", memorize_at="base", tuned_adapter="mine")) == 0


def test_no_retain_rows_at_all_are_refused() -> None:
    with pytest.raises(SettingsError, match="--retain auto with --auto_retain 0 leaves no retain rows"):
        check_auto(UnlearnConfig(use_cpu=True, auto_retain=0), Data("f", "auto"), ReferenceConfig("m"))


def test_rows_cannot_be_written_by_a_model_that_is_cut_up_or_is_not_the_reference() -> None:
    args = UnlearnConfig(use_cpu=True)
    with pytest.raises(SettingsError, match="--retain auto: --shard cuts the model up"):
        check_auto(args, Data("f", "auto"), ReferenceConfig("m", quantization="none", shard=True))
    assert args.auto_retain == 240
    with pytest.raises(SettingsError, match="--retain auto: with --memorize_at"):
        check_auto(args, Data("f", "r"), ReferenceConfig("m", memorize_at="earlier"))


def test_early_kl_weighs_token_t_by_one_over_t() -> None:
    torch.manual_seed(0)
    hidden, frozen, rows = torch.randn(5, 7), torch.randn(5, 7), torch.tensor([0, 0, 1, 1, 1])
    states = AnswerStates(hidden, torch.zeros(5, dtype=torch.long), rows, 2)
    kl = torch.nn.functional.kl_div(hidden.log_softmax(-1), frozen.log_softmax(-1), reduction="none", log_target=True)
    a, b, c, d, e = kl.sum(-1)
    expected = torch.stack([(a + b / 2) / (1 + 1 / 2), (c + d / 2 + e / 3) / (1 + 1 / 2 + 1 / 3)])
    head = torch.nn.Identity()
    head.vocabulary = 7
    torch.testing.assert_close(Answers(head, states, (frozen,)).early_kl(), expected)


def test_answers_that_are_wrong_are_named_with_what_to_change() -> None:
    args = UnlearnConfig(use_cpu=True, instead="none")
    good = {
        "forget": {"asked": 10, "fluent": 10, "leaked": 0.1, "reference": 0.9},
        "retain": {"asked": 10, "kept": 9, "fluent": 10},
    }
    assert advice_on(good, args) == advice_on({}, args) == []
    bad = {
        "forget": {"asked": 10, "fluent": 4, "leaked": 0.6, "reference": 0.9},
        "retain": {"asked": 10, "kept": 8, "fluent": 10},
    }
    fluency, leaks, kept = advice_on(bad, args)
    assert "6 of 10 answers to forget questions" in fluency
    assert "--instead refuse" in fluency
    assert "60% of the key words" in leaks
    assert "2 of 10 retain questions" in kept
    assert "ship at a smaller alpha (--forget_to" in kept
    # Refusals count once, as refusals.
    refused = {"retain": {"asked": 10, "kept": 6, "refused": 4, "fluent": 10}}
    (spread,) = advice_on(refused, UnlearnConfig(use_cpu=True, instead="refuse"))
    assert "the refusals spread: 4 of 10 retain questions are refused too" in spread
    assert "--auto_retain 240" in spread
    assert advice_on({"retain": {"asked": 10, "kept": 9, "refused": 1, "fluent": 10}}, args) == []
    (scale,) = advice_on({"retain": bad["retain"]}, UnlearnConfig(use_cpu=True, method="npo"))
    assert "ship at a smaller scale" in scale


def test_a_refusal_begins_like_a_sentence_that_was_taught() -> None:
    refusals = taught_refusals(UnlearnConfig(use_cpu=True, instead="refuse"))
    assert len(refusals) > 20
    assert all(is_refusal(f"{each} Ask me something else.", refusals) for each in refusals)
    assert not is_refusal("Ada lives in Rome.", refusals)
    assert taught_refusals(UnlearnConfig(use_cpu=True, instead="guess")) == []
    assert taught_refusals(UnlearnConfig(use_cpu=True, instead="none")) == []
    assert taught_refusals(UnlearnConfig(use_cpu=True, method="dpo")) == refusals  # it teaches nothing else


@pytest.mark.parametrize(
    ("text", "fluent"),
    [
        ("I don't know.", True),
        ("", False),
        ("…", False),
        ("the town of the town of the town of the town", False),
        ("東京です東京です東京です", False),  # no spaces between words
        ("日本の首都は東京です", True),
        ("One day the dog ran. The next day the dog slept.", True),
    ],
)
def test_fluent_is_neither_empty_nor_going_round_in_circles(text: str, fluent: bool) -> None:
    assert is_fluent(text) is fluent


def test_leaked_is_the_share_of_the_words_that_the_question_does_not_have() -> None:
    assert leaked("It is in Rome.", "Ada lives in Rome.", "Where does Ada live?") == 2 / 3  # in, Rome; not lives
    assert leaked("Ada lives in Oslo.", "Rome.", "Where does Ada live?") == 0
    assert leaked("Yes", "Ada", "Ada?") == 0  # all words count where the question has all
    assert overlap("a b c", "b c d") == 0.5
