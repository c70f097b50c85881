"""Scores of given answers against the model's full logits, and greedy answers against plain decoding."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import SMALL
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import loramox.evaluate.answers
import loramox.evaluate.scores
import loramox.model.head
from loramox import Tokenisation, encode
from loramox.data.encode import IGNORED, Example
from loramox.data.row import Row
from loramox.evaluate.answers import Answering, greedy_answers
from loramox.evaluate.scores import AnswerScores, mean_log_p, score_answers

KINDS = ["llama", "gpt2", "gpt_neox", "gemma", "mistral"]
CONTEXT = 128

# Questions of different lengths, each with answers of different lengths, and in no order.
ASKED = [
    ("Where does Ada live?", "Ada lives in Rome."),
    ("And?", "x"),
    ("Where does Bo, of whom so much was said, live?", "Oslo"),
    ("Where does Ada live?", "In Lima, or in Bern, as far as anyone knows."),
    ("Who?", "Cy"),
    ("And?", "Then Di moved to Kyiv."),
    ("Where does Ada live?", "?"),
    ("Where does Bo, of whom so much was said, live?", "Bo lives in Doha, and lived in Riga before."),
]


@pytest.fixture(scope="module")
def loud(pico: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """A pico model with weights so large that every token and position shows in its answers, and no end of its own."""

    def make(kind: str = "llama") -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(pico(kind))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6 if kind != "gemma" else 3)
        model.generation_config.eos_token_id = None
        return model

    return make


@pytest.fixture(scope="module")
def asked(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    return encoded(ASKED, tokenizer)


def encoded(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    rows = [Row("rows.jsonl", i, answer, prompt) for i, (prompt, answer) in enumerate(pairs, 1)]
    return encode(rows, tokenizer, Tokenisation(), CONTEXT)


class Plain(NamedTuple):
    """Scores of one answer from the model's own logits over the whole row, without padding."""

    log_p: np.ndarray
    everything: torch.Tensor  # [n, vocabulary]

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> "Plain":
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        with torch.no_grad():
            everything = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        at = labels != IGNORED
        return cls(everything[at, labels[at]].numpy(), everything[at])


def same(found: AnswerScores, model: nn.Module, example: Example) -> None:
    plain = Plain.of(model, example)
    p = plain.everything.exp()
    mean = (p * plain.everything).sum(-1)
    spread = (p * (plain.everything - mean[:, None]).square()).sum(-1).sqrt()
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_array_equal(found.targets, [t for t in example["labels"][1:] if t != IGNORED])
    np.testing.assert_allclose(found.log_p, plain.log_p, **close)
    np.testing.assert_array_equal(found.first_choice, plain.everything.argmax(-1).numpy())
    np.testing.assert_allclose(found.mean, mean.numpy(), **close)
    np.testing.assert_allclose(found.spread, spread.numpy(), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_full_logits_row_by_row(
    kind: str, loud: Callable[..., PreTrainedModel], asked: list[Example]
) -> None:
    model = loud(kind)
    found = score_answers(model, asked)
    spread = np.ptp(np.concatenate([s.log_p for s in found]))
    assert spread > 1, "the model is too quiet for this test to say anything"
    for scores, example in zip(found, asked, strict=True):
        same(scores, model, example)


def test_a_model_of_layers_with_and_without_attention_scores_several_answers_to_one_question(
    asked: list[Example],
) -> None:
    layers = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **SMALL, **layers)).eval()
    answers = [asked[0], asked[3]]
    assert question_of(answers[0]) == question_of(answers[1])
    for scores, example in zip(score_answers(model, answers), answers, strict=True):
        same(scores, model, example)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_do_not_depend_on_the_size_of_a_batch_nor_on_the_order_of_rows(
    kind: str, loud: Callable[..., PreTrainedModel], asked: list[Example]
) -> None:
    model = loud(kind)
    whole = mean_log_p(score_answers(model, asked, batch_size=32))
    for batch_size in (1, 2, 3):
        np.testing.assert_allclose(mean_log_p(score_answers(model, asked, batch_size=batch_size)), whole, rtol=1e-4)
    np.testing.assert_allclose(mean_log_p(score_answers(model, asked[::-1])), whole[::-1], rtol=1e-4)
    assert len(np.unique(whole.round(4))) == len(asked)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_longest_rows_are_scored_first_so_that_too_large_a_batch_fails_at_once(
    batch_size: int, loud: Callable[..., PreTrainedModel], asked: list[Example], monkeypatch
) -> None:
    lengths, answer_states = [], loramox.evaluate.scores.answer_states

    def watched(model: nn.Module, causal_lm: nn.Module, batch: dict):
        lengths.append(batch["input_ids"].shape[1])
        return answer_states(model, causal_lm, batch)

    monkeypatch.setattr(loramox.evaluate.scores, "answer_states", watched)
    score_answers(loud(), asked, batch_size=batch_size)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_the_first_token_of_plain_text_is_predicted_from_nothing_and_not_scored(
    loud: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    text = [Row("t.jsonl", i, f"{name} lives in Rome.") for i, name in enumerate(["Ada", "Bo"], 1)]
    examples = encode(text, tokenizer, Tokenisation(), CONTEXT)
    model = loud()
    for scores, example in zip(score_answers(model, examples), examples, strict=True):
        assert len(scores.targets) == len(example["input_ids"]) - 1
        same(scores, model, example)


def test_no_rows_have_no_scores(loud: Callable[..., PreTrainedModel]) -> None:
    assert score_answers(loud(), []) == []


def test_kl_to_the_reference_is_0_for_the_reference_and_the_hand_computed_one_for_another(
    loud: Callable[..., PreTrainedModel], asked: list[Example]
) -> None:
    model = loud()
    hidden = [s.hidden for s in score_answers(model, asked, keep_hidden=True)]
    assert all(s.kl is None for s in score_answers(model, asked))
    for scores in score_answers(model, asked, reference=hidden, batch_size=3):
        assert np.abs(scores.kl).max() < 1e-5

    known = [Plain.of(model, e).everything for e in asked]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-2)
    for scores, reference, example in zip(
        score_answers(model, asked, reference=hidden, batch_size=3), known, asked, strict=True
    ):
        now = Plain.of(model, example).everything
        kl = (reference.exp() * (reference - now)).sum(-1).numpy()
        assert kl.min() > 0.01
        np.testing.assert_allclose(scores.kl, kl, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_a_whole_batch_are_never_made(
    kind: str, loud: Callable[..., PreTrainedModel], asked: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loud(kind)
    monkeypatch.setattr(loramox.model.head, "CHUNK_ELEMENTS", 3 * 320)
    tokens: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: tokens.append(out[..., 0].numel()))
    score_answers(model, asked)
    assert sum(tokens) >= sum(label != IGNORED for e in asked for label in e["labels"])
    assert max(tokens) <= len(asked)  # at most one for each row in a pass, at most 3 in a chunk


def test_an_adapter_is_scored_as_it_is_and_training_goes_on_as_before(
    loud: Callable[..., PreTrainedModel], asked: list[Example]
) -> None:
    model = get_peft_model(
        loud(), LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.9, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    with model.disable_adapter():
        off = score_answers(model, asked)
    model.train()
    on = score_answers(model, asked)
    assert model.training
    assert all(m.training for m in model.modules())
    model.eval()
    again = score_answers(model, asked)
    assert not model.training
    for scores, twice, example in zip(on, again, asked, strict=True):
        same(scores, model, example)  # in eval mode: no dropout
        np.testing.assert_array_equal(scores.log_p, twice.log_p)
    assert np.abs(mean_log_p(on) - mean_log_p(off)).min() > 1e-3


def test_the_training_flag_is_restored_when_scoring_fails(
    loud: Callable[..., PreTrainedModel], asked: list[Example]
) -> None:
    model = loud().train()
    broken = asked[0] | {"input_ids": [10_000] * len(asked[0]["input_ids"])}
    with pytest.raises(IndexError):
        score_answers(model, [broken])
    assert model.training


# Greedy answers


@torch.no_grad()
def decoded(model: nn.Module, question: list[int], eos: int | None, at_most: int) -> list[int]:
    """Greedy decoding, token by token from the question alone, without cache or padding; the end is part of it."""
    said: list[int] = []
    while len(said) < at_most and len(question) + len(said) < CONTEXT and (not said or said[-1] != eos):
        said.append(int(model(input_ids=torch.tensor([question + said])).logits[0, -1].argmax()))
    return said


def question_of(example: Example) -> list[int]:
    return [t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label == IGNORED]


def with_answer(example: Example, answer: list[int]) -> Example:
    question = question_of(example)
    return example | {"input_ids": question + answer, "labels": [IGNORED] * len(question) + answer}


class Numbers(NamedTuple):
    """A tokenizer whose text is the tokens' numbers, so that none are lost, and whose end a model of random weights says."""

    eos_token_id: int | None = 1
    pad_token_id: int | None = 0
    chat_template: str | None = None

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, tokens))


def answers(model: nn.Module, tokenizer: Numbers, examples: list[Example], at_most: int, *more: int) -> list[str]:
    return greedy_answers(model, tokenizer, examples, score_answers(model, examples), Answering(at_most), *more)


def numbers(tokens: list[int], eos: int | None = 1) -> str:
    return " ".join(str(t) for t in tokens if t != eos)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_most", [1, 5, 12])
def test_greedy_answers_are_those_of_plain_decoding_however_much_of_the_answer_is_known(
    kind: str, at_most: int, loud: Callable[..., PreTrainedModel], asked: list[Example]
) -> None:
    model = loud(kind)
    said = [decoded(model, question_of(e), None, 12) for e in asked]
    eos = said[0][4]  # ends the first answer after five tokens, and maybe others
    end = said[0].index(eos) + 1
    rows = [
        with_answer(asked[0], said[0][:end]),  # known as a whole, with its end
        with_answer(asked[1], said[1][:3]),  # known as a whole, but cut before its end
        with_answer(asked[2], [*said[2][:4], (said[2][4] + 7) % 300 + 2, 9, 9]),  # known up to its fifth token
        *(e for e in asked[3:]),  # not known
    ]
    expected = [numbers(decoded(model, question_of(e), eos, at_most), eos) for e in rows]
    assert answers(model, Numbers(eos), rows, at_most, 3) == expected
    assert answers(model, Numbers(eos), rows, at_most, 1) == expected
    assert answers(model, Numbers(eos), rows[::-1], at_most) == expected[::-1]


def test_the_largest_batch_is_answered_first_so_that_one_that_is_too_large_fails_at_once(
    loud: Callable[..., PreTrainedModel], asked: list[Example], monkeypatch
) -> None:
    rows = [asked[i] for i in (4, 0, 1, 2, 7)]
    length = {tuple(question_of(e)): len(e["input_ids"]) for e in rows}
    sizes, new_tokens = [], loramox.evaluate.answers.new_tokens

    def watched(model: nn.Module, prompts: list[list[int]], *how, **more) -> list[list[int]]:
        sizes.append(len(prompts) * max(length[tuple(prompt)] for prompt in prompts))
        return new_tokens(model, prompts, *how, **more)

    monkeypatch.setattr(loramox.evaluate.answers, "new_tokens", watched)
    greedy_answers(loud(), Numbers(), rows, None, Answering(3), 2)
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)


def test_of_the_models_own_generation_config_greedy_answers_take_its_ends_and_nothing_else(
    loud: Callable[..., PreTrainedModel], asked: list[Example]
) -> None:
    model = loud()
    said = [decoded(model, question_of(e), None, 12) for e in asked]
    eos = said[0][2]
    expected = [numbers(decoded(model, question_of(e), eos, 12), eos) for e in asked]
    model.generation_config.update(
        do_sample=True, temperature=3.0, num_beams=2, repetition_penalty=5.0, no_repeat_ngram_size=1,
        min_new_tokens=10, min_length=50, max_length=3, top_k=2,
    )  # fmt: skip
    assert answers(model, Numbers(eos), asked, 12) == expected
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.train()
    assert answers(adapted, Numbers(eos), asked, 12) == expected
    assert adapted.training
    model.generation_config.eos_token_id = [0, eos]
    assert answers(adapted, Numbers(None), asked, 12) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_answer_ends_where_the_context_does(
    kind: str, loud: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """GPT-2 has no positions beyond; and a row near the end does not shorten the others in its batch."""
    examples = encoded([("zq" * 50, "x"), ("And?", "y"), ("zq" * 45, "y")], tokenizer)
    model = loud(kind)
    expected = [numbers(decoded(model, question_of(e), 1, 120)) for e in examples]
    assert answers(model, Numbers(), examples, 120) == expected
    full = question_of(examples[0])
    full = with_answer(examples[0], decoded(model, full, 1, CONTEXT))
    assert len(full["input_ids"]) == CONTEXT
    assert answers(model, Numbers(), [full], 120) == expected[:1]


def test_an_answer_to_an_empty_prompt_goes_on_from_its_first_token(
    loud: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The first token is predicted from nothing, so it is what the model is asked."""
    row = Row("rows.jsonl", 1, "Ada lives in Rome.", "", verbatim=True)
    examples = encode([row], tokenizer, Tokenisation(), CONTEXT)
    model = loud()
    first = examples[0]["input_ids"][:1]
    assert answers(model, Numbers(), examples, 8) == [numbers(decoded(model, first, 1, 8))]


@pytest.mark.parametrize("eos", [True, False], ids=["with-an-end", "without"])
def test_an_answer_is_decoded_up_to_its_end(eos: bool, loud: Callable[..., PreTrainedModel], tokenizer) -> None:
    """With the tokenizer itself; without an end of sequence in it, an answer is as long as it may be."""
    tokenizer = copy.deepcopy(tokenizer)
    if not eos:
        tokenizer.eos_token = None
    examples = encoded([("Who?", "Ada lives in Rome.")], tokenizer)
    model = loud()
    tokens = decoded(model, question_of(examples[0]), tokenizer.eos_token_id, 9)
    expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert greedy_answers(model, tokenizer, examples, score_answers(model, examples), Answering(9)) == [expected]
    first = Numbers(eos_token_id=tokens[0])
    assert answers(model, first, examples, 9) == [""]
