"""Records, one per row, → metrics: each with its value, direction, number of rows, reference and source."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from loramox.evaluate import membership
from loramox.evaluate.ability import NOT_RETAINED, TaskScores, add_ability
from loramox.evaluate.equivalence import add_equivalence
from loramox.evaluate.metric import REFERENCE, RETRAINED, Metric, Record, Summary, by_part, values
from loramox.evaluate.row_metrics import ROW_METRICS
from loramox.evaluate.truth_ratio import forget_quality, model_utility, truth_balanced, truth_preferred

HOLDOUT = "holdout rows"
UTILITY = ("retain", "real_authors", "world_facts")  # parts of model utility
ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")

# Fields of which the mean over a part's rows is a metric, and their sources; those of `ROW_METRICS` are others.
MEANS = {
    "probability": "TOFU, arXiv 2401.06121",
    "rouge_l": "ROUGE-L recall with stemming; TOFU, arXiv 2401.06121",
    "rouge_l_f1": "ROUGE-L F1 with stemming; OpenUnlearning's MUSE",
    "fluent": "share of generated answers that are neither empty nor have three words in a row three times",
}

# What is better for the means of a part; for every other, more.
BETTER = dict.fromkeys(NOT_RETAINED, "lower") | {"holdout": "none: rows never seen, to compare with"}


def summarise(
    records: Sequence[Record],
    retrained: Sequence[Record] = (),
    others: Sequence[Sequence[Record]] = (),
    share: float = 0.1,
    tasks: Mapping[str, TaskScores] | None = None,
) -> Summary:
    """The metrics of one model's records. `others` are of further retrained models: how much two of them differ by chance.

    `share` is the bound of the equivalence test, of the distance between the reference and the retrained model.
    """
    parts = by_part(records)
    into = Summary({}, {})
    for part, rows in parts.items():
        _means(part, rows, into)
    if "forget" in parts:
        theirs = by_part(retrained)
        _forget_quality(parts["forget"], theirs.get("forget"), into)
        each = [found["forget"] for found in (theirs, *map(by_part, others)) if "forget" in found]
        add_equivalence(parts["forget"], each, share, into)
        _membership(parts, theirs, into)
    _utility(parts, into)
    add_ability(parts, tasks or {}, into)
    return into


def _means(part: str, rows: list[Record], into: Summary) -> None:
    better = BETTER.get(part, "higher")
    for name, source in (MEANS | {name: metric.source for name, metric in ROW_METRICS.items()}).items():
        found = values(rows, name)
        if len(found):
            direction = "higher" if name == "fluent" else better
            into.metrics[f"{part}_{name}"] = Metric(float(found.mean()), direction, len(found), None, source)
        else:
            why = (r["absent"][name] for r in rows if name in r.get("absent", {}))
            needed = "needs questions, and answers generated to them (max_new_tokens above 0)"
            into.absent[f"{part}_{name}"] = next(why, needed)
    if part == "retain" and len(kl := values(rows, "kl")):
        source = "mean over rows of KL(p_ref ‖ p) per answer token, nats"
        into.metrics["retain_kl"] = Metric(float(kl.mean()), "lower", len(kl), REFERENCE, source)
    elif part == "retain":
        into.absent["retain_kl"] = "needs an adapter (--adapter): the reference is the model without it"
    text = [r for r in rows if r["plain_text"]]
    if text:
        tokens = np.array([r["tokens"] for r in text])
        perplexity = float(np.exp(-(values(text, "log_p") * tokens).sum() / tokens.sum()))
        into.metrics[f"{part}_perplexity"] = Metric(
            perplexity, {"higher": "lower", "lower": "higher"}.get(better, better), len(text), None, "per token"
        )
    _truth_ratio(part, rows, better, into)


def _truth_ratio(part: str, rows: list[Record], better: str, into: Summary) -> None:
    ratios = values(rows, "truth_ratio")
    if not len(ratios):
        into.absent[f"{part}_truth_ratio"] = "needs wrong answers (column perturbed_answer)"
        return
    if part == "forget":
        mean, better = truth_balanced(ratios), "nearer to the retrained model's"
        source = "mean of min(R, 1/R), OpenUnlearning; R: TOFU, arXiv 2401.06121"
    else:
        mean, source = truth_preferred(ratios), "mean of max(0, 1 − R); TOFU, arXiv 2401.06121"
    into.metrics[f"{part}_truth_ratio"] = Metric(mean, better, len(ratios), None, source)
    if part in ("real_authors", "world_facts"):
        chosen = values(rows, "chosen_probability")
        source = "p / Σ p over options; TOFU, arXiv 2401.06121"
        into.metrics[f"{part}_probability"] = Metric(float(chosen.mean()), better, len(chosen), "wrong answers", source)


def _forget_quality(forget: list[Record], retrained: list[Record] | None, into: Summary) -> None:
    ratios = values(forget, "truth_ratio")
    wanting = [] if len(ratios) else ["wrong answers to the forget rows (column perturbed_answer)"]
    wanting += [f"{RETRAINED} (--retrained)"] if retrained is None else []
    if wanting:
        into.absent["forget_quality"] = f"needs {' and '.join(wanting)}"
    elif not len(theirs := values(retrained, "truth_ratio")):
        into.absent["forget_quality"] = f"needs wrong answers in the {RETRAINED} as well (column perturbed_answer)"
    else:
        source = "two-sided two-sample KS test on truth ratios, p-value; TOFU, arXiv 2401.06121"
        about = ("higher", len(ratios), RETRAINED, source)
        _compare("forget_quality", forget_quality, (ratios, theirs), about, into)
    if retrained is None:
        into.absent["forget_probability_quality"] = f"needs {RETRAINED} (--retrained)"
        return
    log_p = (values(forget, "log_p"), values(retrained, "log_p"))
    source = "two-sided two-sample KS test on answers' mean log-probability per token, p-value"
    about = ("higher", len(log_p[0]), RETRAINED, source)
    _compare("forget_probability_quality", forget_quality, log_p, about, into)


def _compare(
    name: str,
    function: Callable[..., float],
    samples: Sequence[np.ndarray],
    about: tuple[str, int, str, str],
    into: Summary,
) -> None:
    """The metric, or that scores are not finite (as at an alpha at which a model overflows), and how many."""
    try:
        into.metrics[name] = Metric(function(*samples), *about)
    except ValueError as error:
        into.absent[name] = str(error)


def _membership(parts: dict[str, list[Record]], retrained: dict[str, list[Record]], into: Summary) -> None:
    lacking = []
    if "holdout" in parts:
        samples = parts["forget"], parts["holdout"]
        n = sum(map(len, samples))
        about = ("nearer to 0.5", n, HOLDOUT, "AUC, forget against holdout; 1: forget more likely")
        for name in ATTACKS:
            _compare(name, membership.auc, [values(rows, name) for rows in samples], about, into)
    else:
        lacking.append(f"{HOLDOUT} (--holdout)")
        into.absent.update(dict.fromkeys(ATTACKS, f"needs {lacking[0]}"))
    if not all(part in retrained for part in ("forget", "holdout") if part in parts):
        lacking.append(f"{RETRAINED} on forget and holdout (--retrained)")
    if lacking:
        into.absent.update(dict.fromkeys(("mia_reference", "priv_leak"), f"needs {' and '.join(lacking)}"))
        return
    theirs = retrained["forget"], retrained["holdout"]
    less = [values(o, "mia_loss") - values(t, "mia_loss") for o, t in zip(samples, theirs, strict=True)]
    source = "AUC of the loss minus the retrained model's (arXiv 2012.07805)"
    _compare("mia_reference", membership.auc, less, ("nearer to 0.5", n, RETRAINED, source), into)

    def priv_leak(*samples: np.ndarray) -> float:
        return membership.priv_leak(membership.auc(*samples[:2]), membership.auc(*samples[2:]))

    scores = [values(rows, "mia_min_k") for rows in (*samples, *theirs)]
    source = "percent, of Min-K% AUC, k = 40 %; MUSE, arXiv 2407.06460"
    _compare("priv_leak", priv_leak, scores, ("nearer to 0", n, RETRAINED, source), into)


def _utility(parts: dict[str, list[Record]], into: Summary) -> None:
    nine = [f"{part}_{what}" for part in UTILITY for what in ("probability", "rouge_l", "truth_ratio")]
    gone = [part for part in UTILITY if part not in parts]
    wanting = [f"rows of {' and '.join(gone)}"] if gone else []
    wanting += [name for name in nine if name not in into.metrics and not name.startswith(tuple(gone))]
    if wanting:
        into.absent["model_utility"] = f"needs {', '.join(wanting)} (all of them are in --suite tofu)"
        return
    n = sum(len(parts[part]) for part in UTILITY)
    source = "harmonic mean of nine numbers; TOFU, arXiv 2401.06121"
    into.metrics["model_utility"] = Metric(
        model_utility([into.metrics[m].value for m in nine]), "higher", n, None, source
    )
