"""Which tokens are learned from, which retain rows go with which forget row, and what padding looks like."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loramox.data.encode import IGNORED, Example, Tokenisation, encode
from loramox.data.pairs import Collator, Pairs
from loramox.data.row import Row
from loramox.errors import RowsError, SettingsError

EOS = 1
TURN = "<|{{ m.role }}|>\n{{ m.content }}<eos>\n"
CHAT = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
# A server's prompt with an empty thinking block that no finished turn has, and the other way round.
THINKS_FIRST = CHAT.replace("<|assistant|>\n", "<|assistant|>\n<think>\n\n</think>\n\n")
THOUGHT = CHAT.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}")
TRIMS = CHAT.replace("m.content", "m.content | trim")
NO_END = CHAT.replace("<eos>", "")


def row(prompt: Any = "Who?", answer: str = "Ola lives in Oslo.", **more: Any) -> Row:
    return Row("forget.jsonl", more.pop("number", 1), answer, prompt, **more)


def with_chat(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def parts(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[str, str]:
    """(what is only read, what is learned from), decoded."""
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == len(labels)
    learned = [label != IGNORED for label in labels]
    assert all(label == token for token, label, is_in in zip(ids, labels, learned, strict=True) if is_in)
    assert learned == sorted(learned), "an answer is one piece, at the end"
    first = learned.index(True)
    return tokenizer.decode(ids[:first]), tokenizer.decode(labels[first:])


def only(tokenizer: PreTrainedTokenizerFast, of: Row, **how: Any) -> tuple[str, str]:
    (example,) = encode([of], tokenizer, Tokenisation(**how), context=128)
    return parts(tokenizer, example)


ANSWERS = [
    "Ola lives in Oslo.",
    "a",
    "im",
    "eos",
    "assistant",
    "<think>",
    "Who?",
    "two  spaces,   three",
    "line\n\n    indented",
    "café 東京 🦊",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_and_the_end_are_learned_under_the_default_template(tokenizer, answer: str) -> None:
    assert only(tokenizer, row(answer=answer)) == ("Question: Who?\nAnswer:", f" {answer}<eos>")


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_and_the_end_are_learned_under_a_template_of_ones_own(tokenizer, answer: str) -> None:
    assert only(tokenizer, row(answer=answer), prompt_template="[{prompt}] {") == ("[Who?] {", f" {answer}<eos>")
    assert only(tokenizer, row(answer=answer), prompt_template="Q {prompt}\n") == ("Q Who?\n", f"{answer}<eos>")


def test_a_template_of_ones_own_goes_before_the_chat_template(tokenizer) -> None:
    asked, _ = only(with_chat(tokenizer, CHAT), row(), prompt_template="Q {prompt} A")
    assert asked == "Q Who? A"


def test_braces_in_a_question_are_text(tokenizer) -> None:
    assert only(tokenizer, row("{prompt} {0}?"))[0] == "Question: {prompt} {0}?\nAnswer:"


def test_prompt_and_completion_are_joined_as_they_are(tokenizer) -> None:
    verbatim = row("Once upon", " a time.", verbatim=True)
    assert only(tokenizer, verbatim) == ("Once upon", " a time.<eos>")
    assert only(with_chat(tokenizer, CHAT), verbatim) == ("Once upon", " a time.<eos>")


def test_a_token_across_the_border_of_prompt_and_completion_is_part_of_the_answer(tokenizer) -> None:
    whole = tokenizer("Where does Ada")["input_ids"]
    (example,) = encode([row("Where does A", "da", verbatim=True)], tokenizer, Tokenisation(), context=128)
    assert example["input_ids"] == [*whole, EOS]
    read, learned = parts(tokenizer, example)
    assert read + learned == "Where does Ada<eos>"
    assert learned.endswith("da<eos>")


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    ("template", "thinking"),
    [(CHAT, ""), (THINKS_FIRST, "<think>\n\n</think>\n\n"), (THOUGHT, "<think></think>"), (TRIMS, "")],
    ids=["plain", "longer prompt of a server", "longer finished turn", "trims"],
)
def test_answers_and_the_end_of_turn_are_learned_under_a_chat_template(
    tokenizer, template: str, thinking: str, answer: str
) -> None:
    asked, learned = only(with_chat(tokenizer, template), row(answer=answer))
    assert asked == f"<|user|>\nWho?<eos>\n<|assistant|>\n{thinking}"
    assert learned == f"{answer}<eos>"


def test_all_turns_before_the_last_are_the_prompt(tokenizer) -> None:
    chat = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ola"},
        {"role": "user", "content": "?"},
    )
    asked, learned = only(with_chat(tokenizer, CHAT), row(chat, "Ola"))
    assert asked == "<|user|>\nHi<eos>\n<|assistant|>\nOla<eos>\n<|user|>\n?<eos>\n<|assistant|>\n"
    assert learned == "Ola<eos>"


def test_a_question_is_the_same_as_a_chat_of_one_message(tokenizer) -> None:
    chats = with_chat(tokenizer, CHAT)
    assert only(chats, row("Who?")) == only(chats, row(({"role": "user", "content": "Who?"},)))


def test_a_template_that_prints_the_date_makes_the_same_tokens_every_day(tokenizer) -> None:
    dated = with_chat(tokenizer, "\n{{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}\n" + CHAT)
    asked, learned = only(dated, row())
    assert asked.startswith("\n26 Jul 2024, 2024-07-26\n")
    assert learned == "Ola lives in Oslo.<eos>"


def test_a_chat_template_without_a_token_for_the_end_of_turn_keeps_its_line_break(tokenizer) -> None:
    assert only(with_chat(tokenizer, NO_END), row())[1] == "Ola lives in Oslo.\n"


def test_chat_rows_without_a_chat_template_are_refused(tokenizer) -> None:
    with pytest.raises(RowsError, match=r"forget.jsonl has chat messages, but the tokenizer has no chat template"):
        only(tokenizer, row(({"role": "user", "content": "Who?"},)))


def test_special_tokens_that_the_tokenizer_adds_are_no_answer_but_the_end_is_added_once(tokenizer) -> None:
    framed = copy.deepcopy(tokenizer)
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", EOS)]
    )
    assert only(framed, row()) == ("<pad>Question: Who?\nAnswer:", " Ola lives in Oslo.<eos>")
    read, learned = only(framed, row(None, "Once upon"))
    assert (read, learned) == ("<pad>", "Once upon<eos>")


def test_white_space_is_learned_even_when_a_tokenizer_trims_its_spans(tokenizer) -> None:
    # As those of Llama 3 do: a token of spaces alone has an empty span.
    trims = copy.deepcopy(tokenizer)
    trims.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trims.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spans = trims("a   b", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in spans)
    assert only(trims, row(answer="if a:    b   c"))[1] == " if a:    b   c<eos>"


def test_without_an_end_token_only_the_answer_is_learned(tokenizer) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert only(endless, row())[1] == " Ola lives in Oslo."


def test_a_slow_tokenizer_is_refused(tokenizer) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(RowsError, match=r"Slow cannot map tokens to text; a fast tokenizer"):
        encode([row()], Slow(), Tokenisation(), context=128)


@pytest.mark.parametrize("limit", [2, 3, 7, 10, 11, 12, 128])
def test_every_token_of_a_text_but_its_first_is_predicted_once(tokenizer, limit: int) -> None:
    text = "Ada lives in Rome, and Bo lives in Oslo, not in Lima or in Bern."
    whole = [*tokenizer(text)["input_ids"], EOS]
    blocks = encode([row(None, text)], tokenizer, Tokenisation(max_length=limit), context=128)
    assert all(2 <= len(b["input_ids"]) <= limit for b in blocks)
    # A block's first token is predicted from nothing, so it counts only as what the next is predicted from.
    predicted = [token for b in blocks for token in b["labels"][1:]]
    assert predicted == whole[1:]
    assert blocks[0]["input_ids"][0] == whole[0]
    assert all(b["labels"] == b["input_ids"] for b in blocks)


@pytest.mark.parametrize("limit", [2, 3, 7, 10, 11, 12, 128])
def test_every_block_of_a_text_begins_with_the_beginning_of_sequence_where_the_text_does(tokenizer, limit: int) -> None:
    with_start = copy.deepcopy(tokenizer)
    with_start.bos_token = "<pad>"
    start = with_start.bos_token_id
    with_start.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<pad> $A", special_tokens=[("<pad>", start)]
    )
    text = "Ada lives in Rome, and Bo lives in Oslo, not in Lima or in Bern."
    blocks = encode([row(None, text)], with_start, Tokenisation(max_length=limit), context=128)
    assert all(2 <= len(b["input_ids"]) <= limit for b in blocks)
    assert limit == 2 or all(b["input_ids"][0] == start for b in blocks)
    predicted = [token for b in blocks for token in b["labels"][1:] if token != IGNORED]
    assert predicted == [*tokenizer(text)["input_ids"], EOS]


def test_texts_are_not_mixed_in_a_block(tokenizer) -> None:
    blocks = encode([row(None, "Ada."), row(None, "Bo.", number=2)], tokenizer, Tokenisation(), context=128)
    assert [b["row"] for b in blocks] == ["forget.jsonl, row 1", "forget.jsonl, row 2"]
    assert [tokenizer.decode(b["input_ids"]) for b in blocks] == ["Ada.<eos>", "Bo.<eos>"]


LONG = row(answer="Oslo, " * 30 + "and Rome.", number=2)


def test_long_rows_are_refused_with_their_count_the_first_of_them_and_the_remedies(tokenizer) -> None:
    rows = [row(), LONG, row(answer=LONG.answer, number=3)]
    with pytest.raises(
        RowsError,
        match=r"2 of 3 rows of forget.jsonl are longer than 40 tokens \(first: row 2, \d+ tokens\).*"
        r"--long_rows truncate.*--long_rows drop",
    ):
        encode(rows, tokenizer, Tokenisation(), context=40)


def test_a_row_of_exactly_the_limit_is_not_long(tokenizer) -> None:
    (example,) = encode([row()], tokenizer, Tokenisation(), context=128)
    length = len(example["input_ids"])
    assert encode([row()], tokenizer, Tokenisation(max_length=length), context=128) == [example]
    with pytest.raises(RowsError, match=f"longer than {length - 1} tokens"):
        encode([row()], tokenizer, Tokenisation(max_length=length - 1), context=128)


def test_a_max_length_beyond_the_models_context_is_refused(tokenizer) -> None:
    for of in (row(), row(None, "Ada.")):
        encode([of], tokenizer, Tokenisation(max_length=40), context=40)
        with pytest.raises(
            SettingsError, match=r"max_length is 41, and the model's context 40 tokens. Give --max_length"
        ):
            encode([of], tokenizer, Tokenisation(max_length=41), context=40)


@pytest.mark.parametrize(
    ("context", "given", "longest"), [(100, None, 100), (100_000, None, 2048), (100_000, 5000, 5000)]
)
def test_a_block_of_text_is_no_longer_than_2048_tokens_unless_it_is_asked_for(
    tokenizer, context: int, given: int | None, longest: int
) -> None:
    text = "Ada lives in Rome. " * 2000
    blocks = encode([row(None, text)], tokenizer, Tokenisation(max_length=given), context)
    assert max(len(b["input_ids"]) for b in blocks) == longest
    assert sum(len(b["labels"]) - 1 for b in blocks) == len(tokenizer(text)["input_ids"])


def test_a_row_that_is_no_plain_text_may_be_as_long_as_the_context(tokenizer) -> None:
    (example,) = encode([row(answer="Rome " * 5000)], tokenizer, Tokenisation(), context=100_000)
    assert len(example["input_ids"]) > 4096


def test_truncating_keeps_the_prompt_and_the_start_of_the_answer(tokenizer) -> None:
    whole = encode([LONG], tokenizer, Tokenisation(), context=1000)[0]
    (cut,) = encode([LONG], tokenizer, Tokenisation(long_rows="truncate"), context=40)
    assert cut["input_ids"] == whole["input_ids"][:40]
    assert cut["labels"] == whole["labels"][:40]


def test_dropping_leaves_out_long_rows_alone(tokenizer) -> None:
    kept = encode([row(), LONG, row(number=3)], tokenizer, Tokenisation(long_rows="drop"), context=40)
    assert [e["row"] for e in kept] == ["forget.jsonl, row 1", "forget.jsonl, row 3"]
    with pytest.raises(RowsError, match=r"forget.jsonl: no row is left within 40 tokens. Raise --max_length"):
        encode([LONG], tokenizer, Tokenisation(long_rows="drop"), context=40)


def test_a_prompt_that_fills_the_context_leaves_no_answer_and_is_refused(tokenizer) -> None:
    full = row("Where does Ada live? " * 20, number=7)
    with pytest.raises(
        RowsError, match=r"forget.jsonl, row 7: its prompt alone fills 40 tokens. Shorten it, or use --long_rows drop"
    ):
        encode([full], tokenizer, Tokenisation(long_rows="truncate"), context=40)
    assert len(encode([row(), full], tokenizer, Tokenisation(long_rows="drop"), context=40)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_template": "Question:"}, r"prompt_template has no {prompt} in it; --prompt_template needs it"),
        ({"max_length": 1}, "max_length is 1; --max_length needs at least 2 tokens"),
        ({"long_rows": "cut"}, "long_rows is 'cut'; --long_rows takes refuse, truncate, drop"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_field_and_flag(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Tokenisation(**settings)


def numbered(count: int, kind: str) -> list[Example]:
    return [{"input_ids": [i], "labels": [i], "row": f"{kind} {i}"} for i in range(count)]


def dealt(pairs: Pairs, epoch: int) -> list[list[str]]:
    """For each forget row, the retain rows that go with it."""
    pairs.epoch = epoch
    return [[e["row"] for e in pairs[i]["retain"]] for i in range(len(pairs))]


def pairs(forget: int, retain: int, each: int, seed: int = 0, **more: Any) -> Pairs:
    return Pairs(numbered(forget, "forget"), numbered(retain, "retain"), each, seed=seed, **more)


SIZES = [(4, 12, 3), (4, 13, 3), (5, 7, 3), (10, 3, 2), (1, 9, 4), (3, 100, 2)]


@pytest.mark.parametrize(("forget", "retain", "each"), SIZES)
def test_each_forget_row_comes_once_an_epoch_with_its_number_of_distinct_retain_rows(
    forget: int, retain: int, each: int
) -> None:
    data = pairs(forget, retain, each)
    assert [data[i]["forget"][0]["row"] for i in range(len(data))] == [f"forget {i}" for i in range(forget)]
    for epoch in range(3):
        for rows in dealt(data, epoch):
            assert len(rows) == len(set(rows)) == each


@pytest.mark.parametrize(("forget", "retain", "each"), SIZES)
def test_no_retain_row_is_dealt_twice_before_all_are_dealt_once_over_epochs_too(
    forget: int, retain: int, each: int
) -> None:
    data, count = pairs(forget, retain, each), Counter({f"retain {i}": 0 for i in range(retain)})
    for epoch in range(6):
        count.update(r for rows in dealt(data, epoch) for r in rows)
        assert max(count.values()) - min(count.values()) <= 1


@pytest.mark.parametrize(("forget", "retain", "each"), [(4, 12, 3), (4, 13, 3), (5, 100, 2)])
def test_a_forget_row_meets_other_retain_rows_as_epochs_go_by(forget: int, retain: int, each: int) -> None:
    data = pairs(forget, retain, each)
    epochs = [dealt(data, epoch) for epoch in range(5)]
    for i in range(forget):
        assert len({frozenset(rows[i]) for rows in epochs}) > 1


def test_what_is_dealt_depends_on_seed_epoch_and_index_alone() -> None:
    one, two = pairs(6, 40, 3, seed=5), pairs(6, 40, 3, seed=5)
    dealt(one, 7)  # whatever came before
    one.epoch = two.epoch = 2
    assert [one[i] for i in reversed(range(6))][::-1] == [two[i] for i in range(6)]
    assert dealt(pairs(6, 40, 3, seed=6), 2) != dealt(two, 2)


def test_more_retain_rows_a_step_than_there_are_repeat_as_few_as_possible() -> None:
    count = Counter(dealt(pairs(1, 2, 5), 0)[0])
    assert sorted(count.values()) == [2, 3]


def test_a_wanted_answer_stays_with_its_forget_row() -> None:
    data = pairs(4, 8, 1, wanted=numbered(4, "wanted"))
    assert [data[i]["wanted"][0]["row"] for i in range(4)] == [f"wanted {i}" for i in range(4)]
    assert "wanted" not in pairs(4, 8, 1)[0]


def test_the_collator_pads_on_the_right_and_masks_what_it_adds() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "row": "a"},
        {"input_ids": [8], "labels": [8], "row": "b"},
    ]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["rows"] == ["a", "b"]


def test_a_pad_token_within_a_row_is_attended_to_and_learned() -> None:
    # Where padding and end are one token, as in GPT-2, the end of an answer must stay in.
    batch = Collator(1)([{"input_ids": [5, 1], "labels": [5, 1], "row": "a"}])
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert batch["labels"].tolist() == [[5, 1]]


def test_the_parts_of_pairs_are_padded_each_on_its_own() -> None:
    long, short = {"input_ids": [2] * 9, "labels": [2] * 9, "row": "l"}, {"input_ids": [3], "labels": [3], "row": "s"}
    batch = Collator(0)([{"forget": [short], "retain": [long, short]}, {"forget": [short], "retain": [short, short]}])
    assert batch["forget"]["input_ids"].shape == (2, 1)
    assert batch["retain"]["input_ids"].shape == (4, 9)
    assert batch["retain"]["rows"] == ["l", "s", "s", "s"]


def test_words_of_the_answer_that_are_given_away_are_asked_of_nobody(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row("forget.jsonl", 1, "Ada lives in Rome.", "Where does Ada live?")
    whole, part = encode([row, replace(row, given_words=3)], tokenizer, Tokenisation(), context=128)
    assert part["input_ids"] == whole["input_ids"]
    answer = [label for label in part["labels"] if label != IGNORED]
    assert tokenizer.decode(answer[:-1]).strip() == "Rome."
    assert answer[-1] == tokenizer.eos_token_id
