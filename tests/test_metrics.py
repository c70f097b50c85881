"""Every metric against one computed by hand, and the summary, records and reasons that they end up in."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from scipy.stats import hmean, ks_2samp

from loramox.data.fluency import is_fluent, leaked
from loramox.data.words import words as plain_words
from loramox.errors import RunError
from loramox.evaluate import membership
from loramox.evaluate.records import RECORDS, SUMMARY, read_records, write_records
from loramox.evaluate.rouge import NO_WORDS, rouge_l, words
from loramox.evaluate.row_metrics import ROW_METRICS, exact_memorization, extraction_strength, late_probability
from loramox.evaluate.row_record import rouge_of
from loramox.evaluate.summary import MEANS, Metric, Summary, summarise
from loramox.evaluate.truth_ratio import (
    chosen_probability,
    forget_quality,
    model_utility,
    truth_balanced,
    truth_preferred,
    truth_ratio,
)

Record = dict[str, Any]


# By heart


@pytest.mark.parametrize(
    ("said", "true", "exact", "strength"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8], 1, 1),  # unprompted
        ([0, 0, 0, 0], [5, 6, 7, 8], 0, 0),  # nothing matches
        ([0, 6, 7, 8], [5, 6, 7, 8], 0.75, 0.75),  # after one token
        ([5, 6, 7, 0], [5, 6, 7, 8], 0.75, 0),  # not even the last token
        ([5, 0, 7, 8], [5, 6, 7, 8], 0.75, 0.5),  # what is right before the last mistake does not count
        ([5], [5], 1, 1),
        ([0], [5], 0, 0),
    ],
)
def test_memorization_and_extraction_of_hand_made_answers(
    said: list[int], true: list[int], exact: float, strength: float
) -> None:
    assert exact_memorization(np.array(said), np.array(true)) == exact
    assert extraction_strength(np.array(said), np.array(true)) == strength


def test_late_probability_is_of_the_second_half_alone() -> None:
    assert late_probability(np.log([1e-9, 1e-9, 0.5, 0.5])) == pytest.approx(0.5)  # a refused beginning hides nothing
    assert late_probability(np.log([1e-9, 0.2, 0.2])) == pytest.approx(0.2)
    assert late_probability(np.log([0.3])) == pytest.approx(0.3)


def test_extraction_strength_is_that_of_the_shortest_prefix_tried_one_by_one() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        n = random.integers(1, 8)
        said, true = random.integers(0, 2, n), random.integers(0, 2, n)
        k = next(k for k in range(n + 1) if (said[k:] == true[k:]).all())
        assert extraction_strength(said, true) == 1 - k / n


# ROUGE-L


@pytest.mark.parametrize(
    ("said", "true", "recall", "f1"),
    [
        ("Ada lives in Rome.", "Ada lives in Rome", 1, 1),
        ("", "Ada lives in Rome", 0, 0),
        ("Oslo", "Ada lives in Rome", 0, 0),
        ("Rome in lives Ada", "Ada lives in Rome", 0.25, 0.25),  # in order
        ("Ada has been living in the city of Rome", "Ada lives in Rome", 1, 2 * 4 / 13),  # living ~ lives: stemmed
        ("Ada", "Ada lives in Rome", 0.25, 0.4),
    ],
)
def test_rouge_l_of_hand_made_answers(said: str, true: str, recall: float, f1: float) -> None:
    assert rouge_l(said, true) == pytest.approx({"recall": recall, "f1": f1})


LATIN = st.text(st.one_of(st.characters(codec="ascii"), st.sampled_from("éÉßøłİ’“–…²½ª©🎉\u0301\u02bc")), max_size=40)


@example("<b>ran</b> 🎉 running", "He was running, ran_4.")
@example("élan vital à l'Øre", "the vital e\u0301lan")
@given(LATIN, LATIN)
def test_rouge_l_of_latin_text_is_rouge_scores_own_with_the_stemmer(said: str, true: str) -> None:
    tokenizer = DefaultTokenizer(use_stemmer=True)
    assert words(true) == tokenizer.tokenize(true)
    score = RougeScorer(["rougeL"], tokenizer=tokenizer).score(true, said)["rougeL"]
    assert rouge_l(said, true) == ({"recall": score.recall, "f1": score.fmeasure} if words(true) else None)


@pytest.mark.parametrize(
    ("text", "count", "other", "recall"),
    [
        ("日本の首都です。", 7, "日本の空です", 5 / 7),  # characters
        ("東京tower 1964年", 5, "京都 Tower, 1964", 3 / 5),
        ("コーヒーが", 5, "コーヒー", 4 / 5),
        ("が", 1, "か\u3099", 1),  # decomposed
        ("กรุงเทพ", 6, "กรุง", 3 / 6),  # marks stay with their letters
        ("ភ្នំពេញ", 4, "", 0),
        ("ရန်ကုန်", 4, "ရန်", 2 / 4),
        ("Москва — столица России", 3, "москва, Россия", 1 / 3),  # words, without stemming
        ("القاهرة هي عاصمة مصر", 4, "مصر", 1 / 4),
        ("तीन ३", 2, "३", 1 / 2),
        ("ΟΔΟΣ οδός", 2, "οδος", 1 / 2),
        ("서울은 한국의 수도", 3, "수도", 1 / 3),
    ],
)
def test_rouge_l_of_a_text_with_itself_is_1_in_each_script(text: str, count: int, other: str, recall: float) -> None:
    assert len(words(text)) == count
    assert rouge_l(text, text) == {"recall": 1, "f1": 1}
    assert rouge_l(other, text)["recall"] == pytest.approx(recall)


@given(st.text(max_size=30))
def test_rouge_l_of_any_text_with_itself_is_1_or_absent(text: str) -> None:
    assert rouge_l(text, text) in ({"recall": 1, "f1": 1}, None)
    assert (rouge_l(text, text) is None) == (not words(text))


# Fluency, and key words


@pytest.mark.parametrize(
    ("text", "fluent"),
    [
        ("私は東京で生まれました。大阪で育ちました。京都で学びました。今は札幌に住んで、本を書きました。", True),
        ("การเดินทางและการอ่านเป็นการพักผ่อน", True),
        ("Pythonで書き、Pythonで試し、Pythonで直した", True),
        ("東京です。東京です。東京です。", False),
        ("彼は東京で生まれました、そして彼は東京で生まれましたので、彼は東京で生まれました", False),
        ("東京 tower 東京 tower 東京 tower", False),
        ("in the town and in the town or in the town", False),
        ("no no no no no", False),
        ("no no no no", True),
    ],
)
def test_where_words_have_no_spaces_a_usual_ending_may_come_often(text: str, fluent: bool) -> None:
    assert is_fluent(text) is fluent


@pytest.mark.parametrize(
    ("answer", "true", "question", "share"),
    [
        ("他在东京工作，后来搬到北海道", "他出生在北京", "他出生在哪里？", 0),
        ("北京。", "他出生在北京", "他出生在哪里？", 1),
        ("東京です", "彼は東京で生まれました。", "彼はどこで生まれましたか", 1),
        ("彼は京都で生まれました。", "彼は東京で生まれました。", "彼はどこで生まれましたか", 0),
        ("三", "他有三个孩子", "他有几个孩子？", 1),  # one character alone
        ("他生于1964年", "1964年", "他是哪年出生的？", 1),
        ("北京", "北京", "他住在北京还是东京？", 1),  # all count where the question has all
        ("東", "", "", 0),
    ],
)
def test_where_words_have_no_spaces_key_words_are_pairs_of_characters(
    answer: str, true: str, question: str, share: float
) -> None:
    assert leaked(answer, true, question) == share


@given(LATIN, LATIN, LATIN)
def test_key_words_of_latin_text_are_the_words_that_the_question_does_not_have(
    answer: str, true: str, question: str
) -> None:
    every = set(plain_words(true))
    keys = every - set(plain_words(question)) or every
    assert leaked(answer, true, question) == (len(keys & set(plain_words(answer))) / len(keys) if keys else 0)


def test_a_row_that_rouge_l_cannot_judge_has_the_reason_and_does_not_count() -> None:
    judged, not_judged = record("forget", 0, rouge_l=0.5), record("forget", 1, **rouge_of("!", "?!"))
    not_judged.pop("rouge_l")
    assert not_judged["absent"] == {"rouge_l": NO_WORDS, "rouge_l_f1": NO_WORDS}
    assert summarise([judged, not_judged]).metrics["forget_rouge_l"][:3] == (0.5, "lower", 1)
    assert summarise([not_judged]).absent["forget_rouge_l"] == NO_WORDS


# Truth ratio and what is made of it


def test_the_truth_ratio_is_the_geometric_mean_of_wrong_answers_over_the_true_one_whatever_their_number() -> None:
    true = np.array([0.5, 0.2, 0.4])
    wrong = np.array([[0.1, 0.4, np.nan], [0.2, np.nan, np.nan], [0.1, 0.2, 0.4]])
    by_hand = [math.sqrt(0.1 * 0.4) / 0.5, 0.2 / 0.2, (0.1 * 0.2 * 0.4) ** (1 / 3) / 0.4]
    np.testing.assert_allclose(truth_ratio(np.log(true), np.log(wrong)), by_hand)


def test_the_chosen_probability_is_the_true_answers_share_whatever_the_number_of_options() -> None:
    true, wrong = np.array([0.5, 0.2]), np.array([[0.1, 0.4], [0.2, np.nan]])
    np.testing.assert_allclose(chosen_probability(np.log(true), np.log(wrong)), [0.5, 0.5])
    np.testing.assert_allclose(chosen_probability(np.log([0.3]), np.log([[0.3, 0.3]])), [1 / 3])


def test_truth_preferred_and_truth_balanced_of_hand_made_ratios() -> None:
    ratios = np.array([0.25, 1.0, 4.0])
    assert truth_preferred(ratios) == pytest.approx((0.75 + 0 + 0) / 3)
    assert truth_balanced(ratios) == pytest.approx((0.25 + 1 + 0.25) / 3)
    assert truth_balanced(np.ones(3)) == 1


def test_forget_quality_is_scipys_p_value_and_two_sided() -> None:
    random = np.random.default_rng(0)
    retrained = random.lognormal(0, 0.3, 60)
    less, more = retrained * 0.5, retrained * 2
    for ratios in (retrained, less, more, random.lognormal(0, 0.3, 40)):
        assert forget_quality(ratios, retrained) == ks_2samp(ratios, retrained).pvalue
    assert forget_quality(retrained, retrained) == 1
    assert forget_quality(less, retrained) < 1e-3 > forget_quality(more, retrained)


def test_the_test_on_probabilities_sees_what_a_quotient_does_not_and_is_of_ranks_alone() -> None:
    random = np.random.default_rng(1)
    true, wrong = -random.gamma(4, 1, 60), -random.gamma(4, 1, (60, 3))
    least = 2.0  # nats a token, from the true answer and from the wrong ones: the truth ratio stays
    ratios = [truth_ratio(true - less, wrong - less) for less in (0, least)]
    assert forget_quality(*ratios) == pytest.approx(1)
    assert forget_quality(true - least, true) < 1e-3 > forget_quality(true, true - least)
    assert forget_quality(true, true) == 1
    other = -random.gamma(4, 1.2, 40)
    assert forget_quality(np.exp(other), np.exp(true)) == forget_quality(other, true) < 1
    with pytest.raises(ValueError, match="1 of the model's 2 values are not finite"):
        forget_quality(np.array([-1, -math.inf]), true)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_forget_quality_and_auc_refuse_what_is_not_finite_saying_which(bad: float) -> None:
    good, spoilt = np.array([0.5, 0.6]), np.array([0.5, bad])
    with pytest.raises(ValueError, match="1 of the model's 2 values are not finite"):
        forget_quality(spoilt, good)
    with pytest.raises(ValueError, match="1 of the retrained model's 2 values are not finite"):
        forget_quality(good, spoilt)
    with pytest.raises(ValueError, match="1 of 2 scores of forget rows are not finite"):
        membership.auc(spoilt, good)
    with pytest.raises(ValueError, match="1 of 2 scores of holdout rows are not finite"):
        membership.auc(good, spoilt)


def test_model_utility_is_the_harmonic_mean_0_when_a_part_is_0_and_nan_when_one_is() -> None:
    nine = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert model_utility(nine) == pytest.approx(9 / sum(1 / v for v in nine))
    assert model_utility([*nine[:8], 0]) == 0
    for where in (0, 4, 8):
        assert math.isnan(model_utility([*nine[:where], math.nan, *nine[where + 1 :]]))


# Membership


def test_the_scores_of_a_hand_made_answer() -> None:
    log_p = np.log([0.5, 0.1, 0.25, 0.8, 0.9])
    assert membership.loss(log_p) == pytest.approx(-math.log(0.5 * 0.1 * 0.25 * 0.8 * 0.9) / 5)
    assert membership.min_k(log_p) == pytest.approx(-math.log(0.1 * 0.25) / 2)  # 40 % of five tokens
    assert membership.min_k(log_p, 1.0) == pytest.approx(membership.loss(log_p))
    assert membership.zlib(2.0, "héé" * 9) == 2.0 / len(zlib.compress(("héé" * 9).encode()))
    mean, spread = np.full(5, -2.0), np.array([1.0, 2.0, 4.0, 1.0, 0.0])
    by_hand = sorted((p + 2) / max(s, 1e-3) for p, s in zip(log_p, spread, strict=True))
    assert membership.min_k_plus_plus(log_p, mean, spread) == pytest.approx(-np.mean(by_hand[:2]))


@pytest.mark.parametrize("n", [1, 2])
def test_min_k_of_one_or_two_tokens_is_that_of_the_least_likely(n: int) -> None:
    assert membership.min_k(np.array([-3.0, -1.0][:n])) == 3


def test_an_auc_is_that_of_counting_pairs_ties_counting_half() -> None:
    random = np.random.default_rng(0)
    for n, m in [(1, 1), (1, 7), (6, 2), (20, 31)]:
        for levels in (2, 5, 1000):
            forget, holdout = random.integers(0, levels, n) / 7, random.integers(0, levels, m) / 7
            pairs = [(f < h) + 0.5 * (f == h) for f in forget for h in holdout]
            assert membership.auc(forget, holdout) == pytest.approx(np.mean(pairs))
    assert membership.auc(np.zeros(3), np.ones(4)) == 1
    assert membership.auc(np.ones(3), np.zeros(4)) == 0
    assert membership.auc(np.ones(3), np.ones(4)) == 0.5


def test_priv_leak_is_below_0_while_rows_are_known_above_it_when_overdone_and_nan_without_room() -> None:
    assert membership.priv_leak(0.5, 0.5) == 0
    assert membership.priv_leak(1.0, 0.5) == -100
    assert membership.priv_leak(0.2, 0.4) == pytest.approx(100 * (0.8 - 0.6) / 0.6)
    assert math.isnan(membership.priv_leak(0.9, 1.0))


# The summary


def record(part: str, i: int, **fields: Any) -> Record:
    """A record as `Questions.ask` makes them, every value by a formula of i."""
    scale = {"forget": 0.1, "holdout": 0.12}.get(part, 0.15)
    p = min(1.0, scale * (i + 1))
    return {
        "part": part, "row": f"{part}.jsonl, row {i + 1}", "id": f"{part}-{i}", "tokens": 4 + i, "plain_text": False,
        "log_p": math.log(p), "probability": p, "exact_memorization": p, "late_probability": p, "extraction_strength": p / 2,
        "mia_loss": -math.log(p), "mia_zlib": p, "mia_min_k": 1 / p, "mia_min_k_plus_plus": 2 / p,
        "rouge_l": p, "rouge_l_f1": p, "fluent": p, "prompt": "?", "answer": "!", "said": "!",
        "truth_ratio": 0.3 + i / 10, "chosen_probability": 1 - p, "wrong_log_p": [-1.0], **fields,
    }  # fmt: skip


def part_of(name: str, n: int = 4, **fields: Any) -> list[Record]:
    return [record(name, i, **fields) for i in range(n)]


def test_every_metric_is_there_or_has_a_reason_and_none_is_assumed() -> None:
    summary = summarise(part_of("forget") + part_of("retain"))
    assert not summary.metrics.keys() & summary.absent.keys()
    needs = {
        "forget_quality": "--retrained", "forget_probability_quality": "--retrained", "mia_min_k": "--holdout", "mia_loss": "--holdout", "mia_zlib": "--holdout",
        "mia_min_k_plus_plus": "--holdout", "mia_reference": "--holdout", "priv_leak": "--holdout",
        "retain_kl": "--adapter", "model_utility": "--suite tofu", "general_ability": "--retain_test",
        "forget_probability_equivalence": "--retrained", "forget_truth_ratio_equivalence": "--retrained",
    }  # fmt: skip
    assert summary.absent.keys() == needs.keys()
    for name, flag in needs.items():
        assert flag in summary.absent[name]

    summary = summarise(part_of("forget") + part_of("retain", kl=0.5) + part_of("holdout"))
    assert {"mia_min_k", "mia_loss", "mia_zlib", "mia_min_k_plus_plus", "retain_kl"} <= summary.metrics.keys()
    for name in ("mia_reference", "priv_leak"):  # no AUC of 0.5 is assumed
        assert "--retrained" in summary.absent[name]

    bare = [
        {k: v for k, v in r.items() if k not in ("truth_ratio", "rouge_l", "rouge_l_f1", "fluent")}
        for r in part_of("forget")
    ]
    absent = summarise(bare).absent
    assert "perturbed_answer" in absent["forget_truth_ratio"]
    assert "perturbed_answer" in absent["forget_quality"]
    assert "max_new_tokens" in absent["forget_rouge_l"]
    assert "max_new_tokens" in absent["forget_rouge_l_f1"]


def test_metrics_have_the_values_of_their_definitions_over_the_records() -> None:
    forget, retain, holdout = part_of("forget"), part_of("retain", kl=0.25), part_of("holdout", 5)
    retrained = [
        r | {"truth_ratio": r["truth_ratio"] * 2, "log_p": r["log_p"] - 1, "mia_loss": 1.0, "mia_min_k": 0.1}
        for r in forget
    ]
    retrained += [r | {"mia_loss": 1.0, "mia_min_k": 0.1 + 0.01 * (i - 1)} for i, r in enumerate(holdout)]
    found = summarise(forget + retain + holdout, retrained).metrics
    value = {name: metric.value for name, metric in found.items()}

    def column(rows: list[Record], name: str) -> np.ndarray:
        return np.array([r[name] for r in rows])

    for part, rows in (("forget", forget), ("retain", retain), ("holdout", holdout)):
        for field in [*MEANS, *ROW_METRICS]:
            assert value[f"{part}_{field}"] == pytest.approx(column(rows, field).mean())
            assert found[f"{part}_{field}"].n == len(rows)
    assert value["retain_kl"] == 0.25
    assert value["forget_truth_ratio"] == pytest.approx(truth_balanced(column(forget, "truth_ratio")))
    assert value["retain_truth_ratio"] == pytest.approx(truth_preferred(column(retain, "truth_ratio")))
    ratios = column(forget, "truth_ratio")
    assert value["forget_quality"] == forget_quality(ratios, 2 * ratios)
    log_p = column(forget, "log_p")
    assert value["forget_probability_quality"] == forget_quality(log_p, log_p - 1)
    for name in ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"):
        assert value[name] == membership.auc(column(forget, name), column(holdout, name))
    assert value["mia_reference"] == value["mia_loss"]  # less 1 everywhere
    # Holdout rows of the retrained model: one below the forget rows, one like them, three above.
    assert value["priv_leak"] == pytest.approx(membership.priv_leak(value["mia_min_k"], 3.5 / 5))


def test_directions_say_which_way_is_better() -> None:
    summary = summarise(
        part_of("forget", plain_text=True) + part_of("retain", plain_text=True, kl=0.1) + part_of("holdout"),
        part_of("forget") + part_of("holdout"),
    )
    direction = {name: metric.direction for name, metric in summary.metrics.items()}
    assert direction["forget_probability"] == direction["forget_rouge_l"] == "lower"
    assert direction["retain_probability"] == direction["retain_rouge_l"] == "higher"
    assert direction["forget_fluent"] == direction["retain_fluent"] == "higher"  # a forget model has to speak as well
    assert direction["retain_kl"] == direction["retain_perplexity"] == "lower"
    assert direction["forget_quality"] == direction["forget_perplexity"] == "higher"
    assert direction["mia_loss"] == "nearer to 0.5"
    assert direction["priv_leak"] == "nearer to 0"
    assert direction["holdout_probability"].startswith("none")
    assert "retrained" in direction["forget_truth_ratio"]
    for name, metric in summary.metrics.items():
        assert metric.n > 0, name
        assert metric.source, name
    for name in ("forget_quality", "priv_leak", "mia_reference"):
        assert "retrained" in summary.metrics[name].reference


def test_perplexity_is_over_tokens_and_of_plain_text_alone() -> None:
    rows = part_of("retain", 3, plain_text=True)
    total = sum(r["log_p"] * r["tokens"] for r in rows)
    summary = summarise(rows + part_of("retain", 2))
    assert summary.metrics["retain_perplexity"].value == pytest.approx(
        math.exp(-total / sum(r["tokens"] for r in rows))
    )
    assert summary.metrics["retain_perplexity"].n == 3
    assert "retain_perplexity" not in summarise(part_of("retain")).metrics


def test_model_utility_is_of_nine_numbers_with_the_chosen_probability_where_there_are_options() -> None:
    parts = [part_of("retain"), part_of("real_authors", 3), part_of("world_facts", 5)]
    found = summarise(part_of("forget") + [r for part in parts for r in part])
    nine = [
        *(np.mean([r["probability"] for r in parts[0]]), *(np.mean([r["chosen_probability"] for r in p]) for p in parts[1:])),
        *(np.mean([r["rouge_l"] for r in p]) for p in parts),
        *(np.mean([max(0, 1 - r["truth_ratio"]) for r in p]) for p in parts),
    ]  # fmt: skip
    assert found.metrics["model_utility"].value == pytest.approx(float(hmean(nine)))
    assert found.metrics["model_utility"].n == 12
    without = summarise(parts[0] + parts[1])
    assert "needs rows of world_facts (" in without.absent["model_utility"]


def test_a_retrained_model_without_truth_ratios_is_a_reason_and_no_crash() -> None:
    """The same rows, evaluated from a file without perturbed_answer."""
    bare = [{k: v for k, v in r.items() if k != "truth_ratio"} for r in part_of("forget")]
    summary = summarise(part_of("forget"), bare)
    assert "forget_quality" not in summary.metrics
    assert "perturbed_answer" in summary.absent["forget_quality"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_leave_a_metric_absent_with_the_count_and_the_rest_as_it_is(bad: float) -> None:
    """An alpha far too high may overflow; what was measured is still written."""
    forget, holdout = part_of("forget"), part_of("holdout")
    forget[1] |= {"truth_ratio": bad, "mia_min_k": bad, "mia_loss": bad}
    summary = summarise(forget + holdout, part_of("forget") + part_of("holdout"))
    assert "1 of the model's 4 values are not finite" in summary.absent["forget_quality"]
    assert summary.metrics["forget_probability_quality"].value == 1
    for name in ("mia_min_k", "mia_loss", "mia_reference", "priv_leak"):
        assert name not in summary.metrics
        assert "1 of 4 scores of forget rows are not finite" in summary.absent[name]
    assert "mia_zlib" in summary.metrics
    assert "forget_probability" in summary.metrics


# Records on disk

HOSTILE = [
    "<script>alert('x')</script>",
    "emoji 🎉👩‍👩‍👧 and \U0010ffff",
    "\u202eright to left \u05d0\u05d1\u05d2\u202c",
    "line\u2028separator\u2029, \x85next\x0b\x0c\x1c and \r\n ends",
    '"quotes", \\backslashes\\ and \x00 nothing',
    "a" * 100_000,
    "",
]


def test_records_survive_writing_and_reading_whatever_text_is_in_them(tmp_path: Path) -> None:
    records = [record("forget", i, answer=text, said=text[::-1], prompt=text) for i, text in enumerate(HOSTILE)]
    records[0] |= {"truth_ratio": math.inf, "log_p": -1e-300}
    write_records(tmp_path / "e", records, Summary({"m": Metric(0.1, "lower", 1, None, "α")}, {}), {"command": HOSTILE})
    records[0]["truth_ratio"] = None  # JSON has no word for infinity
    assert read_records(tmp_path / "e") == records
    assert read_records(tmp_path / "e" / RECORDS) == records
    assert (tmp_path / "e" / RECORDS).read_text(encoding="utf-8").count("\n") == len(records)
    summary = json.loads((tmp_path / "e" / SUMMARY).read_text(encoding="utf-8"))
    assert summary["command"] == HOSTILE
    assert summary["metrics"]["m"]["value"] == 0.1
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [RECORDS, SUMMARY]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[list[Record]], Path]:
    def write(records: list[Record]) -> Path:
        write_records(tmp_path / "retrained", records, Summary({}, {}), {})
        return tmp_path / "retrained"

    return write


def test_retrained_records_come_back_row_by_row_in_the_order_asked_for(
    written: Callable[[list[Record]], Path],
) -> None:
    theirs = part_of("holdout") + part_of("forget")[::-1] + part_of("retain")
    folder = written(theirs)
    like = part_of("forget", 3) + part_of("real_authors")  # a part that they lack is not compared
    assert [(r["part"], r["id"]) for r in read_records(folder, like)] == [("forget", f"forget-{i}") for i in range(3)]


def test_retrained_records_of_other_rows_are_refused_with_the_file_the_first_row_and_the_remedy(
    written: Callable[[list[Record]], Path],
) -> None:
    folder = written(part_of("forget", 2) + part_of("retain"))
    with pytest.raises(
        RunError, match=r"2 rows are not in it \(first: forget.jsonl, row 3\).*evaluate the retrained"
    ) as e:
        read_records(folder, part_of("forget", 4))
    assert str(folder / RECORDS) in str(e.value)
    folder = written(part_of("retain"))
    with pytest.raises(RunError, match=r"no forget rows.*evaluate the retrained model on the same files"):
        read_records(folder, part_of("forget"))


@pytest.mark.parametrize(
    "damaged", [b'{"part": "forget"', b'{"part": "forget"}\n', b"[1]\n", b"7\n", b"null\n", b"\xff\n", b""]
)
def test_damaged_records_are_refused_with_the_file_and_how_to_make_them(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / RECORDS).write_bytes(damaged)
    with pytest.raises(RunError, match=rf"{tmp_path / RECORDS}.*evaluate"):
        read_records(tmp_path, part_of("forget"))
    with pytest.raises(RunError, match=r"gone has no records.*loramox evaluate"):
        read_records(tmp_path / "gone")


def test_records_that_were_changed_after_they_were_written_are_refused(tmp_path: Path) -> None:
    write_records(tmp_path, part_of("forget"), Summary({}, {}), {})
    path = tmp_path / RECORDS
    path.write_text(path.read_text().replace("forget-1", "forget-9"))
    with pytest.raises(RunError, match=r"records.jsonl was changed after it was written.*Delete"):
        read_records(tmp_path)
