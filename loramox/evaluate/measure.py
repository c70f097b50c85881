"""Score a model: rows in, one record per row out."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from loramox.data.chat import end_tokens
from loramox.data.encode import DEFAULT_TEMPLATE, Example, Tokenisation, encode
from loramox.data.row import Row
from loramox.errors import NonFiniteLossError, RowsError
from loramox.evaluate import row_record
from loramox.evaluate.ability import TEXT
from loramox.evaluate.answers import Answering, greedy_answers
from loramox.evaluate.metric import Record
from loramox.evaluate.scores import AnswerScores, answer_start, piece, score_answers
from loramox.model.fitting import FittingBatch
from loramox.settings import refuse, setting

T = TypeVar("T")


@dataclass
class ScoringConfig:
    """How answers are scored."""

    batch_size: int = setting("Answers scored, or generated, at a time.", 32)
    max_new_tokens: int = setting("Longest generated answer in tokens, for ROUGE-L. 0: generate nothing.", 200)
    use_cpu: bool = setting("Use the CPU even where there is a GPU.", False)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_new_tokens", 0)):
            refuse(name, getattr(self, name), getattr(self, name) >= least, f"{least} or more")


class _Asked(NamedTuple):
    row: Row
    identity: Record  # part, row and id
    answer: Example
    others: list[Example]  # further right answers
    variants: list[Example]  # the paraphrase if there is one, then the wrong answers


class _Part(NamedTuple):
    name: str
    asked: list[_Asked]

    @property
    def answers(self) -> list[Example]:
        return [each.answer for each in self.asked]


class _Scored(NamedTuple):
    """The scores of an `_Asked` under one model."""

    right: list[AnswerScores]  # the answer's first
    variants: list[AnswerScores]

    @property
    def best(self) -> AnswerScores:
        """Of several right answers the most probable one's."""
        return max(self.right, key=lambda scores: scores.log_p.mean())


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
                self.parts.append(self._tokenised(name, rows, tokenisation, context))
            except RowsError as error:  # all files at fault in one message, not one after the other
                wrong.append(str(error))
        if wrong:
            raise RowsError(". ".join(wrong))
        self._reference: dict[str, list[_Scored]] = {}

    def _tokenised(self, name: str, rows: Sequence[Row], tokenisation: Tokenisation, context: int) -> _Part:
        def tokens(some: Sequence[Row]) -> list[Example]:
            return encode(some, self.tokenizer, tokenisation, context) if some else []

        variants: dict[str, list[Example]] = defaultdict(list)  # by where the row came from
        # The reasoning before a true answer leads to no other one, and would count in both.
        for example in tokens([variant for row in rows if not row.reasoning for variant in _variants(row)]):
            variants[example["row"]].append(example)
        by_place = {row.where: row for row in rows}
        scored = self.answering[name].scored if name in self.answering else None
        asked: list[_Asked] = []
        blocks = Counter[str]()  # plain text is cut into several
        for example in tokens(rows):
            place = example["row"]
            row = by_place[place]
            answer = example if scored is None else piece(example, end=answer_start(example) + scored)
            answer = answer | {"stops": self._stops(row, tokenisation)}
            if row.other_answers and blocks[place]:
                asked[-1].others.append(answer)
                continue
            identity = {"part": name, "row": place, "id": row_record.identity(row, blocks[place])}
            asked.append(_Asked(row, identity, answer, [], variants[place]))
            blocks[place] += 1
        return _Part(name, asked)

    def _stops(self, row: Row, how: Tokenisation) -> tuple[str, ...]:
        """Where an answer ends although the model goes on: a base model makes up the next question in the template's form."""
        through_chat = how.prompt_template is None and self.tokenizer.chat_template is not None
        if not isinstance(row.prompt, str) or row.verbatim or through_chat:
            return ()
        before = (how.prompt_template or DEFAULT_TEMPLATE).partition("{prompt}")[0].strip()
        return (f"\n{before}",) if before else ()

    def identities(self) -> list[Record]:
        """part, row, id and number of tokens of every record that `ask` gives, and what its truth ratio is of: known before any
        model is."""
        return [
            each.identity | row_record.tokens_of(each.row, each.answer) | row_record.variants_of(each.row)
            for part in self.parts
            for each in part.asked
        ]

    def asked(self) -> list[tuple[Record, Example, Row]]:
        """Each row that has a question: its record without scores, its tokens and the row itself."""
        every = (each for part in self.parts for each in part.asked)
        return [
            (identity | {"plain_text": False} | row_record.answered(each.row, None), each.answer, each.row)
            for identity, each in zip(self.identities(), every, strict=True)
            if each.row.prompt is not None
        ]

    def answered(
        self, model: nn.Module, answering: Callable[..., list[T]], most_tokens: int | None = None, **how: Any
    ) -> list[tuple[Record, Row, T]]:
        """Each row that has a question: its record without scores, the row, and what `answering` has the model say to it.

        An answer has at most `most_tokens`, by default as many as in scoring; `how` goes to `answering`.
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
            self._reference[part.name] = self._scores(
                model, part, f"reference, {part.name}", keep_hidden=part.name != TEXT
            )

    def ask(self, model: nn.Module, describe: str = "") -> list[Record]:
        """One record for each answer of each part, in order, under `model` as it is now."""
        return [record for part in self.parts for record in self._ask(model, part, f"{describe}{part.name}")]

    def _ask(self, model: nn.Module, part: _Part, describe: str) -> list[Record]:
        before = self._reference.get(part.name)
        known = [each.hidden for scored in before for each in scored.right] if before and part.name != TEXT else None
        now = self._scores(model, part, describe, reference=known)
        said = self._greedy_answers(model, part, [scored.right[0] for scored in now], f"{describe}, answering")
        records = []
        for i, (each, scored) in enumerate(zip(part.asked, now, strict=True)):
            found = row_record.scored(each.row, scored.best, self.tokenizer, self.ends)
            found |= row_record.truth(each.row, scored.best, scored.variants)
            records.append(each.identity | found | row_record.answered(each.row, said.get(i)))
        if before:
            for record, each, scored in zip(records, part.asked, before, strict=True):
                record["reference_log_p"] = float(scored.best.log_p.mean())
                if "truth_ratio" in record:
                    truth = row_record.truth(each.row, scored.best, scored.variants)
                    record["reference_truth_ratio"] = truth["truth_ratio"]
        return records

    def _scores(self, model: nn.Module, part: _Part, describe: str, **more: Any) -> list[_Scored]:
        """The scores of each row of a part; `more` is for those of the right answers: the variants have no KL."""
        right = [example for each in part.asked for example in (each.answer, *each.others)]
        variants = [example for each in part.asked for example in each.variants]
        of_right = iter(self._score(model, right, describe, **more))
        of_variants = iter(self._score(model, variants, f"{describe}, variants", log_p_only=len(variants)))
        return [
            _Scored([*islice(of_right, 1 + len(each.others))], [*islice(of_variants, len(each.variants))])
            for each in part.asked
        ]

    def _greedy_answers(
        self, model: nn.Module, part: _Part, scores: list[AnswerScores], describe: str
    ) -> dict[int, str]:
        """What the model says to each question of a part, by its place there; nothing where no answers are wanted."""
        how = self.answering.get(part.name, Answering(self.scoring.max_new_tokens))
        asked = [i for i, each in enumerate(part.asked) if each.row.prompt is not None]
        if not (asked and how.max_new_tokens and self.scoring.max_new_tokens):
            return {}
        examples, known = [part.asked[i].answer for i in asked], [scores[i] for i in asked]
        said = self.batch.ask(lambda size: greedy_answers(model, self.tokenizer, examples, known, how, size, describe))
        return dict(zip(asked, said, strict=True))

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


def _variants(row: Row) -> list[Row]:
    """The row with its paraphrase, if it has one, and with each wrong answer in the place of its own."""
    texts = ([row.paraphrase] if row.paraphrase else []) + [*row.wrong_answers]
    return [replace(row, answer=text, other_answers=()) for text in texts]
