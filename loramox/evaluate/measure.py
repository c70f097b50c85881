"""Score a model: rows in, one record per row out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from loramox.data.chat import end_tokens
from loramox.data.encode import IGNORED, Example, Tokenisation, encode
from loramox.data.row import Row
from loramox.errors import NonFiniteLossError, RowsError, SettingsError
from loramox.evaluate import row_record
from loramox.evaluate.ability import TEXT
from loramox.evaluate.answers import Answering, greedy_answers
from loramox.evaluate.fitting import FittingBatch
from loramox.evaluate.metric import Record
from loramox.evaluate.scores import AnswerScores, score_answers

T = TypeVar("T")


@dataclass
class ScoringConfig:
    """How answers are scored."""

    batch_size: int = field(default=32, metadata={"help": "Answers scored, or generated, at a time."})
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
    others: dict[str, list[Example]]  # further right answers, by where the row came from
    variants: dict[str, list[Example]]  # by where the row came from; the paraphrase's first, if there is one

    def all_answers(self) -> list[Example]:
        """The answers, then the further right ones, in the order of the answers."""
        return [*self.answers, *(e for answer in self.answers for e in self.others.get(answer["row"], ()))]

    def all_variants(self) -> list[Example]:
        """The variants of all answers, in the order of the answers."""
        return [e for answer in self.answers for e in self.variants.get(answer["row"], ())]


class _Scores(NamedTuple):
    """Scores of all a part's right answers under one model, and of all its variants."""

    answers: list[AnswerScores]
    variants: list[AnswerScores]

    def by_answer(self, part: _Part) -> list[tuple[AnswerScores, list[AnswerScores]]]:
        """Each answer's scores and those of its variants; of several right answers the most probable one's."""
        others, rest = iter(self.answers[len(part.answers) :]), iter(self.variants)
        found = []
        for answer, own in zip(part.answers, self.answers, strict=False):
            right = [own, *(next(others) for _ in part.others.get(answer["row"], ()))]
            best = max(right, key=lambda scores: scores.log_p.mean())
            found.append((best, [next(rest) for _ in part.variants.get(answer["row"], ())]))
        return found


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
        self.ends = end_tokens(tokenizer)
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
        self._reference: dict[str, _Scores] = {}

    def identities(self) -> list[Record]:
        """part, row and id of every record that `ask` gives, and what its truth ratio is of, known before any model is."""
        return [
            {"part": part.name, "row": e["row"], "id": row_record.identity(part.rows[e["row"]], block)}
            | row_record.variants_of(part.rows[e["row"]])
            for part in self.parts
            for e, block in zip(part.answers, _blocks(part.answers), strict=True)
        ]

    def asked(self) -> list[tuple[Record, Example, Row]]:
        """Each row that has a question: its record without scores, its tokens and the row itself."""
        rows = (part.rows[example["row"]] for part in self.parts for example in part.answers)
        examples = (example for part in self.parts for example in part.answers)
        return [
            (identity | {"plain_text": False} | row_record.answered(row, None), example, row)
            for identity, example, row in zip(self.identities(), examples, rows, strict=True)
            if row.prompt is not None
        ]

    def answered(
        self, model: nn.Module, answering: Callable[..., list[T]], most_tokens: int | None = None, **how: Any
    ) -> list[tuple[Record, Row, T]]:
        """Each row that has a question: its record without scores, the row, and what `answering` has the model say.

        Args:
            model: which model.
            answering: `greedy_answers` or `sampled_answers`.
            most_tokens: the longest answer; as in scoring by default.
            how: what else that takes.
        """
        asked, limit = self.asked(), Answering(most_tokens or self.scoring.max_new_tokens)
        examples = [example for _, example, _ in asked]
        said = self.batch.ask(
            lambda size: answering(model, self.tokenizer, examples, how=limit, batch_size=size, **how)
        )
        return [(record, row, each) for (record, _, row), each in zip(asked, said, strict=True)]

    def remember_reference(self, model: nn.Module) -> None:
        """Keep the scores of all answers under `model` as it is now, and their hidden states, from which KL(p_ref ‖ p) is taken.

        A row of n answer tokens takes n · hidden size numbers of the model's type, in main memory. A long text takes none: it has
        no KL.
        """
        for part in self.parts:
            variants = part.all_variants()
            self._reference[part.name] = _Scores(
                self._score(model, part.all_answers(), f"reference, {part.name}", keep_hidden=part.name != TEXT),
                self._score(model, variants, f"reference, {part.name}, variants", log_p_only=len(variants)),
            )

    def ask(self, model: nn.Module, describe: str = "") -> list[Record]:
        """One record for each answer of each part, in order, under `model` as it is now."""
        return [record for part in self.parts for record in self._ask(model, part, f"{describe}{part.name}")]

    def _ask(self, model: nn.Module, part: _Part, describe: str) -> list[Record]:
        # With the answers, so that they share a question's pass; the KL is that of the answers alone.
        right, variants = part.all_answers(), part.all_variants()
        before = self._reference.get(part.name)
        if before:
            hidden = [s.hidden for s in before.answers] if part.name != TEXT else None
            answers = self._score(model, right, describe, reference=hidden)
            others = self._score(model, variants, f"{describe}, variants", log_p_only=len(variants))
        else:
            both = self._score(model, [*right, *variants], describe, log_p_only=len(variants))
            answers, others = both[: len(right)], both[len(right) :]
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
        records = []
        scored = _Scores(answers, others).by_answer(part)
        for example, block, each, answer in zip(part.answers, _blocks(part.answers), scored, said, strict=True):
            row = part.rows[example["row"]]
            record = row_record.scored(part.name, row, block, example, each[0], self.tokenizer, self.ends)
            records.append(record | row_record.truth(row, *each) | row_record.answered(row, answer))
        if before:
            for record, each in zip(records, before.by_answer(part), strict=True):
                record["reference_log_p"] = float(each[0].log_p.mean())
                if "truth_ratio" in record:
                    record["reference_truth_ratio"] = row_record.truth(part.rows[record["row"]], *each)["truth_ratio"]
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
    name: str,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    tokenisation: Tokenisation,
    context: int,
    scored: int | None = None,
) -> _Part:
    def tokens(some: list[Row]) -> list[Example]:
        return encode(some, tokenizer, tokenisation, context) if some else []

    def with_answers(answers: Callable[[Row], Iterable[str]]) -> list[Example]:
        # The reasoning before a true answer leads to no other one, and would count in both.
        some = [r for r in rows if not r.reasoning]
        return tokens([replace(r, answer=answer, other_answers=()) for r in some for answer in answers(r)])

    paraphrases = with_answers(lambda r: [r.paraphrase] if r.paraphrase else [])
    wrong = with_answers(lambda r: r.wrong_answers)
    by_place = {f"{r.source}, row {r.number}": r for r in rows}
    answers, others, seen = [], [], set()
    for example in tokens(list(rows)):
        again = example["row"] in seen and by_place[example["row"]].other_answers
        (others if again else answers).append(_cut(example, scored))
        seen.add(example["row"])
    return _Part(name, by_place, answers, _by_row(others), _by_row([*paraphrases, *wrong]))


def _by_row(examples: Sequence[Example]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example["row"], []).append(example)
    return found


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
