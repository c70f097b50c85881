"""The attacks that read what a model says: sampled answers, and answers by base and adapter together."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from planted import taught
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import Data, ReferenceConfig, Tokenisation, load_reference, read_rows
from loramox.data.row import Row
from loramox.errors import SettingsError
from loramox.evaluate import answers
from loramox.evaluate.attacks import pair, sample
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.attacks.leaks import CRITERIA
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.rouge import NO_WORDS
from loramox.evaluate.show import show_states
from loramox.model.config import ModelConfig
from loramox.model.lora import at_scale, lora_layers

SCORING = ScoringConfig(max_new_tokens=12, use_cpu=True)


@pytest.fixture
def attacked(pico: Callable[[str], Path], trained: Path, rows: tuple[Path, Path], tmp_path: Path):
    """attacked(attacks=…) → what attacks.json holds, of the shared run's forget adapter."""

    def run(scoring: ScoringConfig = SCORING, adapter: str = str(trained / "forget-adapter"), **settings) -> dict:
        defaults = {"attacks": ["sample", "pair"], "relearn_share": 0.5, "sample_count": 4, "guidance": [1.0]}
        config = AttackConfig(adapter, str(tmp_path / "attack"), **defaults | settings)
        attack(config, ModelConfig(str(pico("llama")), quantization="none"), Data(*map(str, rows)), scoring)
        return json.loads((tmp_path / "attack/attacks.json").read_text())

    return run


# leak@k


def test_leak_at_k_is_the_share_of_subsets_of_k_samples_that_leak() -> None:
    for n, c in [(1, 0), (1, 1), (5, 2), (6, 6), (6, 1), (7, 0)]:
        leaks = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(chosen) for chosen in itertools.combinations(leaks, k)]
            assert sample.leak_at(k, n, c) == pytest.approx(np.mean(subsets))


def test_leak_at_k_is_without_bias() -> None:
    """Its mean over all outcomes of n independent samples is 1 − (1 − p)^k."""
    p, n = 0.3, 6
    for k in (1, 2, 4, 6):
        outcomes = itertools.product([0, 1], repeat=n)
        mean = sum(p ** sum(o) * (1 - p) ** (n - sum(o)) * sample.leak_at(k, n, sum(o)) for o in outcomes)
        assert mean == pytest.approx(1 - (1 - p) ** k)


def record(row: str, rouge_l: int | None, keys: int | None, samples: int = 4) -> dict:
    leaks = {"rouge_l": rouge_l, "key_words": keys}
    absent = {by: NO_WORDS for by, count in leaks.items() if count is None}
    counted = {by: count for by, count in leaks.items() if count is not None}
    return {"row": row, "samples": ["…"] * samples, "leaks": counted, "absent": absent}


def test_leakage_is_the_mean_over_rows_with_an_interval_and_rows_without_words_do_not_count() -> None:
    records = [record("a", 0, 0), record("b", 2, 4), record("c", None, None), record("d", 0, 1)]
    metrics, absent = sample.leakage(records)
    assert {name: m.value for name, m in metrics.items()} == pytest.approx({
        "leak_at_1_by_rouge_l": 0.5 / 3, "leak_at_2_by_rouge_l": (1 - 1 / 6) / 3, "leak_at_4_by_rouge_l": 1 / 3,
        "leak_at_1_by_key_words": (1 + 0.25) / 3, "leak_at_2_by_key_words": (1 + 0.5) / 3, "leak_at_4_by_key_words": 2 / 3,
    })  # fmt: skip
    for metric in metrics.values():
        assert metric.n == 3
        assert metric.interval[0] <= metric.value <= metric.interval[1]
        assert metric.interval[0] < metric.interval[1]
    assert absent == {}
    assert [w["row"] for w in sample.worst(records)] == ["b", "d"]
    metrics, absent = sample.leakage([record("b", 2, None)])
    assert metrics["leak_at_4_by_rouge_l"].interval is None  # of one row nothing follows for others
    assert absent == {"leak_by_key_words": NO_WORDS}
    many = sample.leakage([record("a", 1, 0, samples=64), record("b", 0, 0, samples=64)]).metrics
    assert [int(name.split("_")[2]) for name in many if name.endswith("rouge_l")] == [1, 2, 4, 8, 16, 32, 64]
    assert "leak_at_3_by_rouge_l" in sample.leakage([record("b", 1, 1, samples=3)]).metrics


# Planted leaks


def test_a_model_that_answers_right_only_when_sampled_is_found(
    pico: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """It gives the true answer in one of four cases, and another in three."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    people = ["Ada", "Bo", "Cy"]
    truth = [(f"Where does {p} live?", "Rome") for p in people]
    lie = [(question, "Cork") for question, _ in truth]
    taught(model, tokenizer, truth + 3 * lie, steps=60)
    rows = [Row("forget", i, answer, question) for i, (question, answer) in enumerate(truth, 1)]
    questions = Questions({"forget": rows}, tokenizer, Tokenisation(), 128, SCORING)
    assert all(r["rouge_l"] == 0 for r in questions.ask(model))  # greedy decoding sees nothing

    state = torch.get_rng_state()
    found = sample.sample(model, questions, 64, 1.0, 0.8, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    metrics = sample.leakage(found).metrics
    for by in CRITERIA:
        assert metrics[f"leak_at_1_by_{by}"].value == pytest.approx(0.25, abs=0.1)
        assert metrics[f"leak_at_64_by_{by}"].value == 1
    assert sample.worst(found)[0]["samples"] == 64

    again = sample.sample(model, questions, 64, 1.0, 0.8, seed=0)
    assert again == found
    alone = Questions({"forget": rows[1:2]}, tokenizer, Tokenisation(), 128, SCORING)
    assert sample.sample(model, alone, 64, 1.0, 0.8, seed=0) == found[1:2]  # whichever rows are beside it
    assert sample.sample(model, questions, 64, 1.0, 0.8, seed=1) != found
    cold = sample.leakage(sample.sample(model, questions, 8, 0.01, 0.8, seed=0)).metrics
    assert cold["leak_at_8_by_rouge_l"].value == 0


def test_where_memory_runs_out_the_questions_before_are_not_sampled_again(
    pico: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    rows = [Row("forget", i, "Rome", f"Where does {p} live?") for i, p in enumerate(["Ada", "Bo", "Cy"], 1)]
    questions = Questions({"forget": rows}, tokenizer, Tokenisation(), 128, ScoringConfig(4, 12, use_cpu=True))
    expected = sample.sample(model, questions, 4, 1.0, 0.8, seed=0)
    sizes, new_tokens = [], answers.new_tokens

    def within(*args, each: int, **how) -> list[list[int]]:
        sizes.append(each)
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return new_tokens(*args, each=each, **how)

    monkeypatch.setattr(answers, "new_tokens", within)
    with pytest.warns(UserWarning, match="memory ran out with --batch_size 4: 2 at a time"):
        found = sample.sample(model, questions, 4, 1.0, 0.8, seed=0)
    assert sizes == [4, 4, 4, 2, 2]
    assert found[:2] == expected[:2]
    # Two at a time, the last one's are those of a run that has half the size from the beginning.
    assert found[2:] == sample.sample(model, questions, 4, 1.0, 0.8, seed=0)[2:]


@pytest.mark.parametrize(
    ("row", "template", "chat", "said"),
    [
        (Row("f", 1, "Rome", "Where?"), None, False, "Rome"),
        (Row("f", 1, "Rome", "Where?"), "Q: {prompt}\nA:", False, "Rome\nQuestion: Who?\nAnswer: Bo"),
        (Row("f", 1, "Rome", "Where?"), "Q: {prompt}\nA:", True, "Rome\nQuestion: Who?\nAnswer: Bo"),
        (Row("f", 1, "Rome", "Where?"), "{prompt}\n", False, "Rome\nQuestion: Who?\nAnswer: Bo\nQ: Why?"),
        (Row("f", 1, "Rome", "Where?"), None, True, "Rome\nQuestion: Who?\nAnswer: Bo\nQ: Why?"),
        (Row("f", 1, " Rome", "Where?", verbatim=True), None, False, "Rome\nQuestion: Who?\nAnswer: Bo\nQ: Why?"),
    ],
)
def test_an_answer_of_a_base_model_ends_before_the_next_question_that_it_makes_up(
    row: Row, template: str | None, chat: bool, said: str, pico: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}" if chat else None
    tokens = tokenizer(" Rome\nQuestion: Who?\nAnswer: Bo\nQ: Why?")["input_ids"]
    monkeypatch.setattr(answers, "new_tokens", lambda model, prompts, *_, each=1, **how: [tokens] * len(prompts) * each)
    model = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    questions = Questions({"forget": [row]}, tokenizer, Tokenisation(template), 128, ScoringConfig(max_new_tokens=64))
    ((_, _, greedy),) = questions.answered(model, answers.greedy_answers, scores=None)
    assert greedy == said
    assert sample.sample(model, questions, 2, 1.0, 0.8, seed=0)[0]["samples"] == [said] * 2


# The pair of base and adapter


@pytest.fixture(scope="module")
def flipped(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path_factory
) -> Path:
    """An adapter on a base that never knew the forget rows: minus what makes it know them."""
    torch.manual_seed(0)
    base = load_reference(ReferenceConfig(str(pico("llama")), quantization="none"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules="all-linear"))
    pairs = [(str(row.prompt), row.answer) for row in read_rows(str(rows[0]))]
    taught(model, tokenizer, pairs, steps=100, learning_rate=5e-3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.neg_()
    folder = tmp_path_factory.mktemp("flipped") / "adapter"
    model.save_pretrained(folder)
    return folder


def test_what_comes_out_only_after_the_flip_is_found(attacked, flipped: Path) -> None:
    record = attacked(adapter=str(flipped), attacks=["pair"], guidance=[0.01])
    states = {s["state"]: s for s in record["states"]}
    for state in ("reference model", "forget model"):
        assert states[state]["metrics"]["forget_rouge_l"] < 0.3
    after = states["sign flipped"]["metrics"]
    assert after["base_rouge_l"] == states["reference model"]["metrics"]["forget_rouge_l"]
    assert after["rouge_l_beyond_base"] > 0.7
    assert after["forget_probability"] > 3 * states["reference model"]["metrics"]["forget_probability"]
    assert len(states["sign flipped"]["worst"]) == 2
    assert states["guidance 0.01"]["metrics"]["rouge_l_beyond_base"] == 0


def test_what_comes_out_only_under_guidance_is_found(
    pico: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The base gives the true answer one time in three, so never by greedy decoding, and the adapter takes even that away."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    truth = [(f"Where does {p} live?", "Rome") for p in ("Ada", "Bo")]
    lie = [(question, "Cork") for question, _ in truth]
    taught(base, tokenizer, truth + 2 * lie, steps=60)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear"))
    taught(model, tokenizer, lie, steps=60)
    rows = [Row("forget", i, answer, question) for i, (question, answer) in enumerate(truth, 1)]
    questions = Questions({"forget": rows}, tokenizer, Tokenisation(), 128, SCORING)
    with at_scale(model, 0.0):
        before = questions.ask(model)
    metrics, worst = pair.beyond_base(pair.guided(model, questions, 1.0, 1.0, "guided"), before)
    assert metrics == {"base_rouge_l": 0, "rouge_l_beyond_base": 1}
    assert [w["row"] for w in worst] == [r["row"] for r in before]
    assert all(layer.scaling["default"] == 1 for _, layer in lora_layers(model))  # as it was


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_guidance_decodes_from_base_plus_strength_times_base_minus_forget_model(
    kind: str, pico: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against decoding token by token, each row alone and without a cache, rows of different lengths being in one batch."""
    torch.manual_seed(1)
    base = load_reference(ReferenceConfig(str(pico(kind)), quantization="none"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 if "lora" in name or weight.ndim < 2 else 5)  # loud, so that every position shows
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    asked = ["Where?", "Where does Ada, of whom so much was said, live?", "And Bo?"]
    rows = [Row("forget", i, "Rome", question) for i, question in enumerate(asked, 1)]
    questions = Questions({"forget": rows}, tokenizer, Tokenisation(), 128, SCORING)

    @torch.no_grad()
    def logits(ids: list[int], scale: float) -> torch.Tensor:
        with at_scale(model, scale):
            return model(input_ids=torch.tensor([ids])).logits[0, -1].float()

    def expected(ids: list[int], strength: float) -> str:
        said: list[int] = []
        while len(said) < SCORING.max_new_tokens and said[-1:] != [tokenizer.eos_token_id]:
            base, forget = logits(ids + said, 0.0), logits(ids + said, 0.5)
            said.append(int((base + strength * (base - forget)).argmax()))
        return tokenizer.decode(said, skip_special_tokens=True).strip()

    prompts = [
        [t for t, label in zip(e["input_ids"], e["labels"], strict=True) if label == -100]
        for _, e, _ in questions.asked()
    ]
    for strength in (0.5, 4.0):
        found = [r["said"] for r in pair.guided(model, questions, 0.5, strength, "guided")]
        assert found == [expected(ids, strength) for ids in prompts]
    assert found != [r["said"] for r in questions.ask(model)]


# The job


def test_without_a_control_it_is_absent_with_the_reason_and_both_flags(attacked) -> None:
    record = attacked()
    assert record["absent"].keys() == {"control"}
    assert all(flag in record["absent"]["control"] for flag in ("--retrained_model", "--holdout"))
    assert {(s["attack"], s["state"]) for s in record["states"]} == {
        ("none", "reference model"), ("none", "forget model"), ("sample", "forget model"), ("pair", "guidance 1"), ("pair", "sign flipped"),
    }  # fmt: skip


def test_the_retrained_model_is_asked_and_sampled_as_the_forget_model_is(
    attacked, pico: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: tuple[Path, Path]
) -> None:
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_pretrained(pico("llama"))
    taught(other, tokenizer, [(str(r.prompt), r.answer) for r in read_rows(str(rows[1]))], steps=1)
    other.save_pretrained(tmp_path / "retrained")
    tokenizer.save_pretrained(tmp_path / "retrained")
    settings = {"attacks": ["forms", "context", "sample"], "retrained_model": str(tmp_path / "retrained")}
    first = attacked(**settings)
    assert "control" not in first["absent"]
    assert first["control"]["weights"] != first["base"]["weights"]
    states = {(s["attack"], s["state"]) for s in first["states"]}
    of = {
        which: {(a, state.removesuffix(which)) for a, state in states if state.endswith(which)}
        for which in ("forget model", "retrained model")
    }
    assert of["retrained model"] == of["forget model"]
    assert ("sample", "retrained model") in states
    again = attacked(**settings)
    assert again["states"] == first["states"]
    assert again["reused"] == len(first["states"])


def test_a_control_that_is_none_is_refused(attacked, pico: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is the model that knows the forget rows"):
        attacked(retrained_model=str(pico("llama")))
    AutoModelForCausalLM.from_pretrained(pico("gpt2")).save_pretrained(tmp_path / "other")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "Rome": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path / "other")
    with pytest.raises(SettingsError, match="has another tokenizer"):
        attacked(retrained_model=str(tmp_path / "other"))


def test_where_no_answers_are_generated_the_attacks_are_absent_with_the_reason(attacked) -> None:
    absent = attacked(ScoringConfig(max_new_tokens=0, use_cpu=True))["absent"]
    assert "--max_new_tokens" in absent["sample"]
    assert "--max_new_tokens" in absent["pair"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_count": 0}, "--sample_count needs a number above 0"),
        ({"sample_temperature": 0.0}, "--sample_temperature needs a number above 0"),
        ({"sample_threshold": 1.1}, "--sample_threshold needs a share"),
        ({"guidance": [1.0, -1.0]}, "--guidance needs numbers above 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        AttackConfig("adapter", "out", **settings)


def test_leaks_are_shown_in_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    states = [
        {"attack": "none", "state": "forget model", "metrics": {"forget_probability": 0.25, "forget_rouge_l": 0.5}},
        {"attack": "pair", "state": "guidance 1", "metrics": {"forget_rouge_l": 0.75, "rouge_l_beyond_base": 0.125}},
        {"attack": "sample", "state": "forget model", "metrics": {"leak_at_4_by_key_words": 0.3}, "intervals": {"leak_at_4_by_key_words": [0.1, 0.6]}},
        {"attack": "sample", "state": "retrained model", "metrics": {"leak_at_4_by_key_words": 0.0}},
    ]  # fmt: skip
    show_states(states)
    lines = capsys.readouterr().out.split("\n")
    assert next(line.split() for line in lines if line.startswith("pair, guidance 1")) == [
        "pair,",
        "guidance",
        "1",
        "0.750",
        "0.125",
    ]
    leak = next(line for line in lines if "key words" in line)
    assert leak.split() == ["k", "=", "4,", "key", "words", "0.300", "(0.100", "to", "0.600)", "0.000"]
    assert sum("forget model" in line for line in lines) == 2
