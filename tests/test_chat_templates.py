"""Chat as it is served: the prompt is a server's, an answer ends where its turn ends, and no template fails silently."""

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import FAMILIES, tokenizer_of
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from loramox import Data, ReferenceConfig, Tokenisation, UnlearnConfig, encode
from loramox.adapter.card import forget_card
from loramox.data.chat import STOPPED_CLOCK, ChatTemplate, end_tokens
from loramox.data.encode import IGNORED, Example, served_otherwise
from loramox.data.messages import REASONING
from loramox.data.row import Row
from loramox.data.rows import Columns
from loramox.errors import ModelError, RowsError
from loramox.evaluate import measure
from loramox.evaluate.answers import Answering, greedy_answers
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.attacks.forms import forms_of
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.scores import AnswerScores
from loramox.model.config import ModelConfig
from loramox.model.generation import continuations
from loramox.train.prepare import prepare
from loramox.train.writer import Writer, around_question

Make = Callable[[str], PreTrainedTokenizerFast]
ALL = pytest.mark.parametrize("name", FAMILIES)
THINK = ("qwen3", "deepseek-r1")
AS_SERVED = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in THINK])

USER, MORE = {"role": "user", "content": "Where does Ola live?"}, {"role": "user", "content": "Who?"}
SYSTEM, SAID = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Oslo."}
CHATS = [(USER,), (USER, SAID, MORE), (SYSTEM, USER), (SYSTEM, USER, SAID, MORE)]
ANSWERS = ["Ola lives in Oslo.", "a", "end", "two  spaces,   three", "line\n\n    indented", "café 東京 🦊"]


@pytest.fixture
def made(tokenizer: PreTrainedTokenizerFast) -> Make:
    return lambda name: tokenizer_of(name, tokenizer)


def row(prompt: Any = "Where does Ola live?", answer: str = "Ola lives in Oslo.", **more: Any) -> Row:
    return Row("forget.jsonl", more.pop("number", 1), answer, prompt, **more)


def example(tokenizer: PreTrainedTokenizerFast, of: Row, **how: Any) -> Example:
    (made,) = encode([of], tokenizer, Tokenisation(**how), context=1000)
    return made


def parts(of: Example) -> tuple[list[int], list[int]]:
    """(the prompt's tokens, the answer's)."""
    first = next(i for i, label in enumerate(of["labels"]) if label != IGNORED)
    assert of["labels"] == [IGNORED] * first + of["input_ids"][first:]
    return of["input_ids"][:first], of["input_ids"][first:]


def served(tokenizer: PreTrainedTokenizerFast, chat: Sequence[dict[str, str]]) -> list[int]:
    """The tokens that a server makes of a chat, on the day on which a template's clock stands."""
    return tokenizer.apply_chat_template(
        list(chat), add_generation_prompt=True, chat_template=STOPPED_CLOCK + tokenizer.chat_template, return_dict=False
    )


@AS_SERVED
def test_the_prompt_is_the_one_that_a_server_sends(name: str, made: Make) -> None:
    tokenizer = made(name)
    for chat, answer in itertools.product(CHATS if name != "gemma-2" else CHATS[:2], ANSWERS):
        prompt, _ = parts(example(tokenizer, row(chat, answer)))
        assert prompt == served(tokenizer, chat)
    assert served_otherwise([row()], tokenizer, Tokenisation()) is None


@pytest.mark.parametrize("answer", ANSWERS)
@ALL
def test_what_is_learned_is_the_answer_and_the_one_token_that_ends_its_turn(name: str, answer: str, made: Make) -> None:
    tokenizer, family = made(name), FAMILIES[name]
    for of in (row(answer=answer), row(CHATS[1], answer), row(answer=answer, as_served=True)):
        _, learned = parts(example(tokenizer, of))
        assert tokenizer.decode(learned).strip() == answer + family.end
        assert tokenizer.decode(learned[:-1]).strip() == answer
        assert learned[-1] == tokenizer.convert_tokens_to_ids(family.end)
        assert not end_tokens(tokenizer) & set(learned[:-1])


@ALL
def test_the_ends_are_the_end_of_sequence_and_that_of_a_turn(name: str, made: Make) -> None:
    tokenizer, family = made(name), FAMILIES[name]
    assert end_tokens(tokenizer) == set(tokenizer.convert_tokens_to_ids([family.eos, family.end]))


class Says(LlamaForCausalLM):
    """Goes on with these tokens, one a pass, whatever it reads, and repeats the last one after that."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: list[int], ends: list[int]) -> None:
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1000, **small))
        self.generation_config.eos_token_id = ends
        self.tokens, self.passes = tokens, 0

    def forward(self, input_ids: torch.Tensor, **more: Any) -> CausalLMOutputWithPast:
        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        logits[:, -1, self.tokens[min(self.passes, len(self.tokens) - 1)]] = 99
        self.passes += 1
        return CausalLMOutputWithPast(logits=logits)


@ALL
def test_generation_stops_at_every_end_and_the_text_is_the_answer(name: str, made: Make) -> None:
    tokenizer, family = made(name), FAMILIES[name]
    asked = example(tokenizer, row())
    _, targets = parts(asked)
    for end in {family.end, family.eos, *family.also_ends}:
        answer = tokenizer("Rome, Italy", add_special_tokens=False)["input_ids"]
        first, *rest = [*answer, tokenizer.convert_tokens_to_ids(end), *tokenizer(" and on")["input_ids"]]
        model = Says(tokenizer, rest, tokenizer.convert_tokens_to_ids(list(family.also_ends)))
        nothing = np.zeros(len(targets))
        scores = AnswerScores(np.array(targets), nothing, np.full(len(targets), first), nothing, nothing)
        assert greedy_answers(model, tokenizer, [asked], [scores], Answering(50)) == ["Rome, Italy"]
        assert model.passes == len(answer)  # its first token is known from the scores


@ALL
def test_what_the_model_writes_itself_ends_there_too(name: str, made: Make) -> None:
    tokenizer, family = made(name), FAMILIES[name]
    for end in {family.end, family.eos, *family.also_ends}:
        text = tokenizer("Rome, Italy", add_special_tokens=False)["input_ids"]
        said = [*text, tokenizer.convert_tokens_to_ids(end), *tokenizer(" and on")["input_ids"]]
        model = Says(tokenizer, said, tokenizer.convert_tokens_to_ids(list(family.also_ends)))
        assert continuations(model, tokenizer, [[5]], 50, sorted(end_tokens(tokenizer))) == ["Rome, Italy"]
        assert model.passes == len(text) + 1


@ALL
def test_questions_are_written_from_where_the_trained_prompt_has_the_question(name: str, made: Make) -> None:
    tokenizer = made(name)
    prompt, _ = parts(example(tokenizer, row()))
    start = around_question(tokenizer, Tokenisation())[0] + "Where does Ola live?"
    begun = tokenizer(start, add_special_tokens=False)["input_ids"]
    assert prompt[: len(begun)] == begun


@ALL
def test_a_sampled_question_ends_where_the_template_goes_on(
    name: str, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramox.train.writer.QUESTION_TOKENS", 40)
    tokenizer = made(name)
    behind = ChatTemplate(tokenizer).served + "In Oslo."
    said = tokenizer(f"here is nobody?{behind}", add_special_tokens=False)["input_ids"]
    model = Says(tokenizer, said, tokenizer.convert_tokens_to_ids(list(FAMILIES[name].also_ends)))
    assert Writer(model, tokenizer, [row()], Tokenisation(), 1000)._questions(["W"]) == ["Where is nobody?"]


@pytest.mark.parametrize("name", THINK)
def test_rows_that_a_model_writes_have_its_answer_without_its_thoughts(
    name: str, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made(name)
    texts = ["<think>\nWell.\n</think>\n\nIn Oslo.", "<think>\nWell, if I", "\n</think>\n\nIn Rome.", "In Bern."]
    monkeypatch.setattr("loramox.train.writer.continuations", lambda *_, **__: texts)
    written = Writer(None, tokenizer, [row()], Tokenisation(), 1000)._answered([f"Who is {n}?" for n in range(4)])
    assert [(each.prompt, each.answer) for each in written] == [("Who is 0?", "In Oslo."), ("Who is 2?", "In Rome."), ("Who is 3?", "In Bern.")]  # fmt: skip
    encode(written, tokenizer, Tokenisation(), context=1000)


@ALL
def test_an_answer_that_is_known_by_heart_is_not_generated(name: str, made: Make) -> None:
    tokenizer = made(name)
    asked = example(tokenizer, row())
    _, targets = parts(asked)
    model, nothing = Says(tokenizer, [0], []), np.zeros(len(targets))
    scores = AnswerScores(np.array(targets), nothing, np.array(targets), nothing, nothing)
    assert greedy_answers(model, tokenizer, [asked], [scores], Answering(50)) == ["Ola lives in Oslo."]
    assert model.passes == 0


@ALL
def test_token_wise_scores_leave_the_end_of_a_turn_out(name: str, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_end(model: Any, examples: list[Example], *more: Any, **named: Any) -> list[AnswerScores]:
        targets = np.array(parts(examples[0])[1])
        choice = np.where(np.arange(len(targets)) == len(targets) - 1, targets, 0)
        ones = np.ones(len(targets))
        return [AnswerScores(targets, -ones, choice, ones, ones)]

    monkeypatch.setattr(measure, "score_answers", only_the_end)
    questions = Questions({"forget": [row()]}, made(name), Tokenisation(), 1000, ScoringConfig(max_new_tokens=0))
    (record,) = questions.ask(model=None)
    assert record["exact_memorization"] == record["extraction_strength"] == 0


@pytest.mark.parametrize(
    ("name", "trained", "asked"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
        ("deepseek-r1", "<｜Assistant｜>", "<｜Assistant｜><think>\n"),
    ],
)
def test_where_a_server_lets_the_model_think_both_prompts_are_known(
    name: str, trained: str, asked: str, made: Make
) -> None:
    tokenizer = made(name)
    found = served_otherwise([row()], tokenizer, Tokenisation())
    assert found["trained"].endswith(trained)
    assert found["served"].endswith(asked)
    assert tokenizer.decode(parts(example(tokenizer, row()))[0]).endswith("live?" + found["trained"])
    (attack,) = next(form.rows for form in forms_of([row()], True) if form.name == "as served")
    assert parts(example(tokenizer, attack))[0] == served(tokenizer, (USER,))
    # Rows that do not go through the template are put to the model as they are.
    assert served_otherwise([row(verbatim=True), row(None)], tokenizer, Tokenisation()) is None
    assert served_otherwise([row()], tokenizer, Tokenisation(prompt_template="Q {prompt} A")) is None


def test_a_thinking_block_in_an_answer_is_learned_or_refused_but_never_left_out(made: Make) -> None:
    thought = row(answer="<think>\nOla is from Norway.\n</think>\n\nOslo.")
    qwen = made("qwen3")
    prompt, learned = (qwen.decode(part) for part in parts(example(qwen, thought)))
    assert prompt.endswith("assistant\n<think>\n")
    assert learned == "Ola is from Norway.\n</think>\n\nOslo.<|im_end|>"
    with pytest.raises(RowsError, match=r"forget.jsonl, row 1: .*leaves out a part of the answer"):
        example(made("deepseek-r1"), thought)


# Reasoning in every turn of the assistant, as it is; its first word alone; before the turn that it belongs to.
KEEPS, CUTS, APART = (
    "{% for m in messages %}" + turn + "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    for turn in (
        "<|{{ m.role }}|>{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}",
        "<|{{ m.role }}|>{{ (m.thinking or '').split(' ')[0] }}",
        "{{ m.thinking }}<|{{ m.role }}|>",
    )
)  # fmt: skip


@pytest.mark.parametrize("as_served", [False, True])
def test_reasoning_that_the_template_uses_is_read_before_the_answer_and_learned_with_it(
    as_served: bool, made: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The prompt is a server's in any case, and all that the template puts behind it is learned, up to the end of the turn."""
    keeps, chat = copy.deepcopy(tokenizer), (USER, SAID | {"thinking": "Ola is from Norway."}, MORE)
    keeps.chat_template = KEEPS
    prompt, learned = parts(example(keeps, row(chat, "Ola.", as_served=as_served)))
    assert prompt == served(keeps, chat)
    assert "<think>Ola is from Norway.</think>Oslo." in keeps.decode(prompt)
    assert keeps.decode(learned) == "Ola.<eos>"
    for (model, text), key in itertools.product(
        (
            (keeps, "<think>Who asks?</think>Ola.<eos>"),
            (made("qwen3"), "<think>\nWho asks?\n</think>\n\nOla.<|im_end|>"),
        ),
        REASONING,
    ):
        thought = row((USER, SAID, MORE), "Ola.", as_served=as_served, reasoning=((key, "Who asks?"),))
        prompt, learned = parts(example(model, thought))
        assert prompt == served(model, thought.prompt)
        assert model.decode(learned) == text


@pytest.mark.parametrize(
    ("name", "chat", "reasoning", "left_out"),
    [
        ("deepseek-r1", (USER,), {"reasoning_content": "Hm. Oslo."}, "reasoning_content of message 2"),
        ("qwen3", (USER,), {"reasoning_content": "Hm.", "thinking": "Hm. Oslo."}, "thinking of message 2"),
        ("qwen3", (USER, SAID | {"reasoning_content": "Hm."}, MORE), {}, "reasoning_content of message 2"),
        ("qwen3", (USER | {"thinking": "Hm."},), {"reasoning_content": "Hm."}, "thinking of message 1"),
        (KEEPS, (USER,), {"thinking": "Oslo.", "reasoning_content": "Oslo."}, "reasoning_content of message 2"),
        (CUTS, (USER,), {"thinking": "Oslo it is."}, "thinking of message 2"),
    ],
)
def test_reasoning_that_the_template_leaves_out_is_refused_by_its_key(
    name: str, chat: Sequence[dict[str, str]], reasoning: dict[str, str], left_out: str, made: Make
) -> None:
    tokenizer = made(name if name in FAMILIES else "qwen3")
    tokenizer.chat_template = FAMILIES[name].template if name in FAMILIES else name
    with pytest.raises(RowsError, match=rf"^forget.jsonl, row 1: .* template leaves out {left_out}\. Remove it, or"):
        example(tokenizer, row(chat, "Oslo.", reasoning=tuple(reasoning.items())))


def test_reasoning_that_does_not_come_after_a_servers_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    apart = copy.deepcopy(tokenizer)
    apart.chat_template = APART
    with pytest.raises(RowsError, match=r"^forget.jsonl, row 1: .* puts reasoning elsewhere than behind the prompt"):
        example(apart, row((USER,), "Oslo.", reasoning=(("thinking", "Hm."),)))


def test_white_space_that_a_special_token_takes_is_no_answer(made: Make) -> None:
    tokenizer = made("phi-3")
    prompt, learned = parts(example(tokenizer, row(answer="  Oslo.")))
    assert prompt == served(tokenizer, (USER,))
    assert tokenizer.decode(learned) == "Oslo.<|end|>"


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, template: Any, tmp_path: Path) -> ReferenceConfig:
    """A model in a folder of its own whose tokenizer has this template."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    return ReferenceConfig(str(tmp_path), quantization="none")


def prepared(reference: ReferenceConfig, rows: tuple[Path, Path], **how: Any) -> dict[str, Any]:
    args = UnlearnConfig(use_cpu=True, report_to="none")
    return prepare(reference, Data(*map(str, rows)), args, Columns(), Tokenisation(**how)).plan


BROKEN = [
    ("{% for m in messages %}{{ m.content }", r"chat template cannot be used: .*--prompt_template"),
    ("{{ messages[0].parts.first }}", r"chat template cannot be used: .*--prompt_template"),
    ("{{ 1 / 0 }}", r"chat template cannot be used: .*--prompt_template"),
    ("no messages", r"cannot be used: it leaves out the question or the answer\. .*--prompt_template"),
    ("{{ messages[0].content }}", r"cannot be used: it leaves out the question or the answer\."),
    ({"rag": "x", "tool_use": "y"}, r"it has several \(rag, tool_use\) and none named default\. .*--prompt_template"),
]


@pytest.mark.parametrize(("template", "message"), BROKEN)
def test_a_template_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    template: Any, message: str, pico, tokenizer, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    reference = saved(pico("llama"), tokenizer, template, tmp_path)
    with pytest.raises(ModelError, match=message):
        prepared(reference, rows)
    prepared(reference, rows, prompt_template="Q {prompt} A")  # the remedy


def test_one_of_several_templates_is_the_default(made: Make) -> None:
    one, several = made("qwen2.5"), made("qwen2.5")
    several.chat_template = {"default": one.chat_template, "rag": "x"}
    assert example(several, row()) == example(one, row())


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ((SYSTEM, USER), "System role not supported"),
        ((USER, MORE), "Conversation roles must alternate"),
        ((SAID, USER), "Conversation roles must alternate"),
    ],
)
def test_messages_that_a_template_refuses_are_named_with_what_it_says(
    chat: tuple[dict[str, str], ...], says: str, made: Make
) -> None:
    rows = [row(), row(chat, number=2)]
    with pytest.raises(RowsError, match=rf"forget.jsonl, row 2: .*{says}.*take turns.*first user message"):
        encode(rows, made("gemma-2"), Tokenisation(), context=1000)


@ALL
def test_a_special_token_in_a_rows_text_is_refused_wherever_it_is(name: str, made: Make) -> None:
    tokenizer, family = made(name), FAMILIES[name]
    for token in {family.end, family.eos, family.bos or family.end}:
        text = f"It is {token}, after every message."
        message = r"2 of 3 rows of forget.jsonl have a special token .*\(first: row 2, "
        for of in (row(answer=text), row(text), row((USER, SAID | {"content": text}, MORE)), row(None, text)):
            bad = [row(), *(Row(of.source, number, of.answer, of.prompt) for number in (2, 3))]
            with pytest.raises(RowsError) as caught:
                encode(bad, tokenizer, Tokenisation(), context=1000)
            caught.match(message)
            assert token in str(caught.value)
        spaced = " ".join(token)
        assert spaced in tokenizer.decode(example(tokenizer, row(answer=f"It is {spaced}."))["input_ids"])


def test_tokens_that_are_added_but_not_special_are_text(made: Make) -> None:
    assert "<table>" in made("gemma-3").decode(parts(example(made("gemma-3"), row(answer="A <table> of towns.")))[1])


def test_a_whole_text_of_prompt_and_completion_may_have_special_tokens_and_its_own_end(made: Make) -> None:
    tokenizer = made("smollm2, other eos")
    prompt, chat = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", {"role": "user", "content": "Who?"}
    whole = example(tokenizer, row(prompt, "Ola.<|im_end|>", verbatim=True))
    assert tokenizer.decode(parts(whole)[1]) == "Ola.<|im_end|>"
    assert tokenizer.decode(parts(example(tokenizer, row(prompt, "Ola.", verbatim=True)))[1]) == "Ola.<|endoftext|>"
    with pytest.raises(RowsError, match=r"special token.*<\|im_end\|>"):
        example(tokenizer, row(prompt, "Ola.<|im_end|>\nor Bo", verbatim=True))
    assert parts(whole)[1] == parts(example(tokenizer, row((chat,), "Ola.")))[1]


def test_a_begin_of_sequence_that_the_tokenizer_adds_itself_is_refused(made: Make) -> None:
    tokenizer = made("mistral")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert example(tokenizer, row("[INST] Who?[/INST]", " Ola.", verbatim=True))["input_ids"].count(bos) == 1
    with pytest.raises(RowsError, match=r"forget.jsonl, row 1 begins with <s>, which the tokenizer puts there itself"):
        example(tokenizer, row("<s>[INST] Who?[/INST]", " Ola.", verbatim=True))


THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{{ '' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "asks"), [(THINKS, True), (THINKS.replace("<think>\n", ""), False)])
def test_an_attack_asks_as_a_server_does_where_training_did_not(
    template: str, asks: bool, pico, tokenizer, trained: Path, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    model = ModelConfig(saved(pico("llama"), tokenizer, template, tmp_path / "model").model, quantization="none")
    config = AttackConfig(str(trained / "forget-adapter"), str(tmp_path / "attack"), ["forms"], relearn_share=0.5)
    states = attack(config, model, Data(*map(str, rows)), ScoringConfig(max_new_tokens=8, use_cpu=True))["states"]
    asked = {state["state"] for state in states if state["state"].startswith("as served")}
    assert asked == ({"as served, reference model", "as served, forget model"} if asks else set())


def test_a_template_that_can_make_the_model_think_is_warned_of_where_the_prompts_are_the_same(
    pico, tokenizer, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    template = "{% set thinks = enable_thinking | default(true) %}" + THINKS.replace("<think>\n", "")
    with pytest.warns(UserWarning, match=r"has enable_thinking.*serve it with thinking off"):
        assert "served_otherwise" not in prepared(saved(pico("llama"), tokenizer, template, tmp_path), rows)


def test_a_served_prompt_that_differs_is_warned_of_and_stands_in_plan_and_card(
    pico, tokenizer, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"served prompt differs: .*<\|assistant\|>.*<think>.*loramox attack"):
        plan = prepared(saved(pico("llama"), tokenizer, THINKS, tmp_path), rows)
    assert plan["served_otherwise"] == {"trained": "<eos><|assistant|>", "served": "<eos><|assistant|><think>\n"}
    shipped = plan | {"momentum": {"eta": 1.0}, "truncation_error": 0.0, "rank": 8}
    assert "served prompt differs: " in forget_card(shipped)
    assert json.dumps(plan["served_otherwise"]["served"]) in forget_card(shipped)
    assert "served_otherwise" not in prepared(ReferenceConfig(str(pico("llama")), quantization="none"), rows)
