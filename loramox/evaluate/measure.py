"""Everything that is asked of a model: rows in, one record for each row out."""

import hashlib
import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from loramox.data.chat import end_tokens
from loramox.data.encode import IGNORED, Example, Tokenisation, encode
from loramox.data.fluency import is_fluent
from loramox.data.rows import Row
from loramox.errors import NonFiniteLossError, RowsError, SettingsError
from loramox.evaluate import membership, memorization  # noqa: F401 (importing memorization registers its metrics)
from loramox.evaluate.answers import Answering, greedy_answers
from loramox.evaluate.fitting import FittingBatch
from loramox.evaluate.rouge import NO_WORDS, rouge_l
from loramox.evaluate.row_metrics import row_metrics
from loramox.evaluate.scores import AnswerScores, score_answers
from loramox.evaluate.truth_ratio import chosen_probability, truth_ratio

Record = dict[str, Any]  # a row of records.jsonl


@dataclass
class ScoringConfig:
    """How answers are scored."""

    batch_size: int = field(default=32, metadata={"help": "Answers a forward pass, and answers generated at a time."})
    max_new_tokens: int = field(
        default=200, metadata={"help": "Longest generated answer in tokens, for ROUGE-L. 0: generate nothing."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even where there is a GPU."})

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_new_tokens", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)}; --{name} needs {least} or more")


@dataclass
class _Part:
    """The rows of one part, tokenised: their answers, and what else may be said to the same questions."""

    name: str
    rows: dict[str, Row]  # by where they came from
    answers: list[Example]
    variants: dict[str, list[Example]]  # by where the row came from; the paraphrase's first, if there is one


class Questions:
    """The rows of some parts, tokenised once, to be asked of any number of models (or of one at many alphas).

    `parts` names them: forget, retain, holdout, real_authors, world_facts, or what one likes. `answering` says of a part how
    long its answers may be, where that is not `scoring`'s length, and how much of the true ones is scored. Raises what `encode`
    raises.
    """

    def __init__(
        self,
        parts: dict[str, Sequence[Row]],
        tokenizer: PreTrainedTokenizerBase,
        tokenisation: Tokenisation,
        context: int,
        scoring: ScoringConfig | None = None,
        answering: dict[str, Answering] | None = None,
    ) -> None:
        self.tokenizer, self.scoring, self.answering = tokenizer, scoring or ScoringConfig(), answering or {}
        self._ends = end_tokens(tokenizer)
        self.batch = FittingBatch(self.scoring.batch_size)
        self.parts, wrong = [], []
        for name, rows in parts.items():
            try:
                scored = self.answering[name].scored if name in self.answering else None
                self.parts.append(_tokenised(name, rows, tokenizer, tokenisation, context, scored))
            except RowsError as error:  # all files at fault in one message, not one after the other
                wrong.append(str(error))
        if wrong:
            raise RowsError(". ".join(wrong))
        self._reference: dict[str, list[Tensor]] = {}

    def identities(self) -> list[Record]:
        """part, row and id of every record that `ask` gives, and what its truth ratio is of, known before any model is."""
        return [
            {"part": part.name, "row": e["row"], "id": _identity(part.rows[e["row"]], block)}
            | _variants(part.rows[e["row"]])
            for part in self.parts
            for e, block in zip(part.answers, _blocks(part.answers), strict=True)
        ]

    def asked(self) -> list[tuple[Record, Example, Row]]:
        """Each row that has a question: its record without scores, its tokens and the row itself."""
        rows = (part.rows[example["row"]] for part in self.parts for example in part.answers)
        examples = (example for part in self.parts for example in part.answers)
        return [
            (identity | {"plain_text": False} | _said(row, None), example, row)
            for identity, example, row in zip(self.identities(), examples, rows, strict=True)
            if row.prompt is not None
        ]

    def remember_reference(self, model: nn.Module) -> None:
        """Keep the hidden states of all answers under `model` as it is now, from which KL(p_ref ‖ p) is taken later.

        A row of n answer tokens takes n · hidden size numbers of the model's type, in main memory.
        """
        for part in self.parts:
            scores = self._score(model, part.answers, f"reference, {part.name}", keep_hidden=True)
            self._reference[part.name] = [s.hidden for s in scores]

    def ask(self, model: nn.Module, describe: str = "") -> list[Record]:
        """One record for each answer of each part, in order, under `model` as it is now."""
        return [record for part in self.parts for record in self._ask(model, part, f"{describe}{part.name}")]

    def _ask(self, model: nn.Module, part: _Part, describe: str) -> list[Record]:
        # With the answers, so that they share a question's pass; the KL is that of the answers alone.
        variants = [e for answer in part.answers for e in part.variants.get(answer["row"], ())]
        if part.name in self._reference:
            answers = self._score(model, part.answers, describe, reference=self._reference[part.name])
            others = self._score(model, variants, f"{describe}, variants", log_p_only=len(variants))
        else:
            both = self._score(model, [*part.answers, *variants], describe, log_p_only=len(variants))
            answers, others = both[: len(part.answers)], both[len(part.answers) :]
        said: list[str | None] = [None] * len(part.answers)
        asked = [i for i, e in enumerate(part.answers) if part.rows[e["row"]].prompt is not None]
        how = self.answering.get(part.name, Answering(self.scoring.max_new_tokens))
        if asked and how.max_new_tokens and self.scoring.max_new_tokens:
            examples, known = [part.answers[i] for i in asked], [answers[i] for i in asked]
            generated = self.batch.ask(
                lambda size: greedy_answers(model, self.tokenizer, examples, known, how, size, f"{describe}, answering")
            )
            for i, answer in zip(asked, generated, strict=True):
                said[i] = answer
        records, rest = [], iter(others)
        for example, block, scores, answer in zip(part.answers, _blocks(part.answers), answers, said, strict=True):
            where = example["row"]
            of_variants = [next(rest) for _ in part.variants.get(where, ())]
            record = _record(part.name, part.rows[where], block, example, scores, self.tokenizer, self._ends)
            records.append(record | _truth(part.rows[where], scores, of_variants) | _said(part.rows[where], answer))
        return records

    def _score(self, model: nn.Module, examples: list[Example], describe: str, **more: Any) -> list[AnswerScores]:
        pad = self.tokenizer.pad_token_id
        if not examples:
            return []
        return self.batch.ask(lambda size: score_answers(model, examples, pad or 0, size, describe, **more))


def check_numbers(records: Sequence[Record]) -> None:
    """Raises `NonFiniteLossError` when an answer's score is not a number: neither would be any figure made of it."""
    broken = [record["row"] for record in records if np.isnan(record["log_p"])]
    if broken:
        raise NonFiniteLossError(
            f"the model's score of {broken[0]} is not a number, as of {len(broken)} of {len(records)} rows. Its weights or those of its "
            "adapter are not finite, or its arithmetic overflows: try --dtype bfloat16, or an adapter with a lower alpha"
        )


def _tokenised(
    name: str, rows: Sequence[Row], tokenizer, tokenisation: Tokenisation, context: int, scored: int | None = None
) -> _Part:
    def tokens(some: list[Row]) -> list[Example]:
        return encode(some, tokenizer, tokenisation, context) if some else []

    paraphrases = tokens([replace(r, answer=r.paraphrase) for r in rows if r.paraphrase])
    wrong = tokens([replace(r, answer=w) for r in rows for w in r.wrong_answers])
    variants: dict[str, list[Example]] = {}
    for example in [*paraphrases, *wrong]:
        variants.setdefault(example["row"], []).append(example)
    return _Part(
        name,
        rows={f"{r.source}, row {r.number}": r for r in rows},
        answers=[_cut(example, scored) for example in tokens(list(rows))],
        variants=variants,
    )


def _cut(example: Example, scored: int | None) -> Example:
    """The example without what follows the first `scored` tokens of its answer."""
    if scored is None:
        return example
    end = scored + next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    return example | {part: example[part][:end] for part in ("input_ids", "labels")}


def _blocks(examples: Sequence[Example]) -> list[int]:
    """Of each example, which of its row's blocks it is, counted from 0: plain text is cut into several."""
    seen: dict[str, int] = {}
    counts = []
    for example in examples:
        counts.append(seen.get(example["row"], 0))
        seen[example["row"]] = counts[-1] + 1
    return counts


def _identity(row: Row, block: int) -> str:
    """Tells rows apart, and finds the same one in another model's records, wherever its file lies."""
    return hashlib.sha256(f"{row.identity()}\x1f{block}".encode()).hexdigest()[:16]


def _variants(row: Row) -> Record:
    """Tells the paraphrase and wrong answers of a row from others, where it has some."""
    texts = "\x1f".join([row.paraphrase or "", *row.wrong_answers])
    return {"variants": hashlib.sha256(texts.encode()).hexdigest()[:16]} if row.wrong_answers else {}


def _record(
    part: str, row: Row, block: int, example: Example, scores: AnswerScores, tokenizer, ends: Set[int]
) -> Record:
    # OpenUnlearning's token-wise scores leave the last token out: the end of the answer, or in a text without one its last.
    last = len(scores.targets) and (scores.targets[-1] in ends or not row.ends)
    body = slice(0, len(scores.targets) - bool(last))
    log_p, choice, targets = scores.log_p[body], scores.first_choice[body], scores.targets[body]
    mean, spread = scores.mean[body], scores.spread[body]
    text = tokenizer.decode(scores.targets, skip_special_tokens=True)
    per_token = membership.loss(scores.log_p)
    record = {
        "part": part,
        "row": example["row"],
        "id": _identity(row, block),
        "tokens": len(scores.targets),
        "log_p": float(scores.log_p.mean()),
        "probability": float(np.exp(scores.log_p.mean())),
        "plain_text": row.prompt is None,
    }
    if len(targets):
        record |= {
            **row_metrics(targets=targets, log_p=log_p, first_choice=choice, mean=mean, spread=spread),
            "mia_loss": per_token,
            "mia_zlib": membership.zlib(per_token, text),
            "mia_min_k": membership.min_k(log_p),
            "mia_min_k_plus_plus": membership.min_k_plus_plus(log_p, mean, spread),
        }
    return record | ({"kl": float(scores.kl.mean())} if scores.kl is not None else {})


def _truth(row: Row, answer: AnswerScores, variants: list[AnswerScores]) -> Record:
    # A truth ratio over some of a row's answers is another number: --long_rows drop may have left some out.
    spelled = bool(row.paraphrase)
    if not row.wrong_answers or len(variants) < spelled + len(row.wrong_answers):
        return {}
    means = np.array([s.log_p.mean() for s in variants])
    answer_log_p = answer.log_p.mean()
    # TOFU's real authors and world facts have no paraphrase.
    true, wrong = (means[0], means[1:]) if spelled else (answer_log_p, means)
    return (
        _variants(row)
        | {
            "truth_ratio": float(truth_ratio(np.array([true]), wrong[None])[0]),
            "chosen_probability": float(chosen_probability(np.array([answer_log_p]), wrong[None])[0]),
            "wrong_log_p": wrong.tolist(),
        }
        | ({"paraphrase_log_p": float(true)} if spelled else {})
    )


def _said(row: Row, answer: str | None) -> Record:
    asked = {"prompt": row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, ensure_ascii=False)}
    if row.prompt is None or answer is None:
        return (asked | {"answer": row.answer}) if row.prompt is not None else {}
    rest = " ".join(row.answer.split()[row.given_words :]) if row.given_words else row.answer
    return asked | {"answer": row.answer, "said": answer, "fluent": float(is_fluent(answer))} | rouge_of(answer, rest)


def rouge_of(said: str, true: str) -> Record:
    """ROUGE-L of an answer as a record has it, or why it is absent."""
    score = rouge_l(said, true)
    if score is None:
        return {"absent": dict.fromkeys(("rouge_l", "rouge_l_f1"), NO_WORDS)}
    return {"rouge_l": score["recall"], "rouge_l_f1": score["f1"]}
