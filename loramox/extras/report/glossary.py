"""Terms and abbreviations on the page, one sentence each, and links to them."""

import re
from typing import NamedTuple

from markupsafe import Markup, escape

from loramox.extras.report.answers import fit


class Term(NamedTuple):
    anchor: str
    heading: str
    names: tuple[str, ...]  # that are linked to it where they stand on the page
    means: str


GLOSSARY = (
    Term("axis", "alpha, scale", ("alpha", "scale"), "How far the adapter goes, 0 being the reference: the model is θ_ref − alpha·ΔW where alpha is free after training, and θ_ref + scale·ΔW where it is not, at scale 1 as it was trained."),
    Term("reference", "reference", (), "The model before forgetting, with the adapter off."),
    Term("forget-rows", "forget rows", (), "The rows to forget."),
    Term("retain-rows", "retain rows", (), "Rows that the model has to keep, which stand for everything else that it knows."),
    Term("holdout-rows", "holdout rows", ("holdout rows", "rows never seen", "rows never known"), "Rows like the forget rows that no model was trained on, to compare with; as a control, the forget model is attacked with them as with the forget rows, and what comes back is guessing."),
    Term("retrained", "retrained model", ("retrained model", "model that never saw the rows"), "A model that was trained on everything but the forget rows, the better control of attacks: what a model that never knew them looks like."),
    Term("probability", "probability", ("probability of the true answers", "probability of forget answers", "probability of retain answers"), "The geometric mean, over the tokens of the true answer, of the probability that the model gives to each, between 0 and 1."),
    Term("rouge-l", "ROUGE-L", ("ROUGE-L",), "The share of the true answer's words, reduced to their stems, that the model's own answer has in the same order: 1 is all of them; a few common words get some by chance."),
    Term("exact-memorization", "exact memorization", ("Exact memorization",), "The share of the true answer's tokens that are the model's first choice when it is given the true ones before."),
    Term("late-probability", "late probability", ("Late probability",), "The probability of the second half of the true answer, when the model is given the first half: what a refused beginning hides."),
    Term("extraction-strength", "extraction strength", ("extraction strength",), "The share of the true answer that the model completes by itself once its beginning is given: 1 if it needs no beginning, 0 if not even the last token is right."),
    Term("nats", "nats", ("nats",), "The unit of a loss or a KL that is taken with the natural logarithm; 0.69 nats are one bit."),
    Term("kl", "KL", ("KL",), "Kullback-Leibler divergence: how far the model's predictions are from the reference's, 0 where they are the same."),
    Term("truth-ratio", "truth ratio", ("truth ratios", "truth ratio", "truth-ratio test"), "How probable wrong answers to a question are, divided by how probable a paraphrase of the true one is: the higher, the less the model prefers the truth."),
    Term("ks", "KS", ("KS",), "Kolmogorov-Smirnov test: whether two sets of numbers, here the truth ratios or the probabilities of two models, are distributed alike."),
    Term("p-value", "p-value", ("p-value",), "The chance of a difference at least this large if the two models were in truth alike; below 0.05 they count as different, above it nothing is proven."),
    Term("forget-quality", "forget quality", ("forget quality",), "The p-value of the KS test on truth ratios between the forget model and the retrained one: the higher, the more alike."),
    Term("leak", "leak, leak@k", ("rows that leak",), "A row leaks if an answer has most of the true one (80 % by default), by ROUGE-L or by the words that the question does not have; leak@k is how often at least one of k sampled answers leaks."),
    Term("membership", "membership inference", ("membership inference", "membership"), "The attack that guesses from a model's scores whether it was trained on a row."),
    Term("auc", "AUC", ("AUC",), "Area under the curve: how often a forget row looks more like a training row than a holdout row does; 0.5 is guessing, 1 always, 0 never."),
    Term("min-k", "Min-K%", ("Min-K%",), "A membership score: the mean log-probability of the least probable 40 % of an answer's tokens."),
    Term("priv-leak", "PrivLeak", ("PrivLeak",), "How far the membership AUC is from the retrained model's, in percent: 0 is ideal, below 0 the rows are not forgotten, above 0 they are forgotten too much."),
    Term("utility", "model utility", ("model utility",), "One number for what the model kept: the harmonic mean of probability, ROUGE-L and truth ratio on retain rows, real authors and world facts."),
    Term("ability", "general ability", ("general ability",), "What is left of the reference's scores on rows, texts and tasks that training did not get: the mean of ratios to the reference, 1 where nothing was lost."),
    Term("depth", "unlearning depth", ("unlearning depth", "UDS"), "At which layers the knowledge is gone: 0 if every layer still has it, 1 if every layer lacks it as the retrained model's do."),
    Term("quantized", "NF4, int8", ("NF4", "int8"), "Storing weights in 4 or 8 bits; forgetting that sits in small differences of weights can be lost by it."),
)  # fmt: skip

_ANCHOR = {name.lower(): term.anchor for term in GLOSSARY for name in term.names}
_NAMES = sorted(_ANCHOR, key=len, reverse=True)
# Outside tags, so that what is marked up already may be given.
_FOUND = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, _NAMES))})(?![\w-])(?![^<]*>)", re.IGNORECASE)


def linked(text: str | Markup, only_first: bool = True) -> Markup:
    """`text`, escaped unless it is markup, with each term linked to the glossary: where it stands first, or everywhere."""
    there: set[str] = set()

    def link(match: re.Match[str]) -> str:
        anchor = _ANCHOR[match[0].lower()]
        if only_first and anchor in there:
            return match[0]
        there.add(anchor)
        return f'<a class="term" href="#term-{anchor}">{match[0]}</a>'

    safe = text if isinstance(text, Markup) else escape(fit(text, 100_000)["text"])
    return Markup(_FOUND.sub(link, str(safe)))
