"""The attacks forms and context on a model in one state: every way of asking, and of each row the worst."""

import functools
from collections.abc import Sequence
from dataclasses import replace

from loramox.data.encode import served_otherwise
from loramox.data.rows import Row
from loramox.errors import RowsError
from loramox.evaluate.attacks import forms, leaks
from loramox.evaluate.attacks.bench import NO_QUESTIONS, Asking, Bench
from loramox.evaluate.attacks.context import contexts_of
from loramox.evaluate.attacks.forms import Form
from loramox.evaluate.measure import Questions, Record
from loramox.files import read_json, write_json

REWRITTEN = "rewritten.json"  # in the folder of the attacks: row → its question in the reference's own words
WORST = "worst of all"


def prepare(bench: Bench) -> None:
    """Make every way of asking; those that cannot be are named as absent. The reference writes its own words, once."""
    for attack in ("forms", "context"):
        if attack not in bench.config.attacks:
            continue
        if bench.open_questions is None:
            bench.absent[attack] = NO_QUESTIONS
            continue
        asked = [row for _, _, row in bench.open_questions.asked()]
        for form in _forms(bench, asked) if attack == "forms" else _contexts(bench, asked):
            try:
                if not form.rows:
                    raise RowsError(f"needs {form.needs}")
                questions = _questions(bench, form.rows)
            except RowsError as error:  # also of rows that are too long in this form, or that a chat template refuses
                bench.absent[f"{attack}: {form.name}"] = str(error)
            else:
                bench.ways.setdefault(attack, []).append((form, questions))


def ask_all(bench: Bench, state: str, model: Asking) -> None:
    """Ask the model its questions as they are and in every way; then of each attack the worst way of each row."""
    plain = [r for r in bench.ask("none", state, model) if r["part"] == "forget" and "said" in r]
    threshold = bench.config.sample_threshold

    def asking(attack: str, form: Form, questions: Questions) -> list[Record]:
        with model() as asked:
            records = questions.ask(asked, f"{attack}, {form.name}, {state}: ")
        return leaks.judged(records, [row for _, _, row in questions.asked()], form.judge, threshold)

    for attack, ways in bench.ways.items():
        assert bench.open_questions is not None
        rows = [row for _, _, row in bench.open_questions.asked()]
        found = {leaks.PLAIN: leaks.judged(plain, rows, leaks.leaks_of, threshold)}
        for form, questions in ways:
            ask = functools.partial(asking, attack, form, questions)
            records = bench.keep(attack, f"{form.name}, {state}", questions, ask, leaks.summary)
            bench.states[-1]["rows"] = len(records)
            if form.in_worst:
                found[form.name] = records
        worst = functools.partial(leaks.worst_of, found)
        records = bench.keep(attack, f"{WORST}, {state}", bench.open_questions, worst, leaks.summary)
        bench.states[-1] |= {"rows": len(records), "worst": leaks.worst_rows(records)}


def _forms(bench: Bench, asked: Sequence[Row]) -> list[Form]:
    served = served_otherwise(asked, bench.questions.tokenizer, bench.tokenisation) is not None
    return [*forms.forms_of(asked, served), forms.in_own_words(asked, _rewritten(bench, asked))]


def _rewritten(bench: Bench, asked: Sequence[Row]) -> dict[str, str]:
    path = bench.out / REWRITTEN
    if not path.exists():
        try:
            questions = _questions(bench, forms.to_rewrite(asked))
        except RowsError:  # no question fits into the context
            return {}
        with bench.adapted(bench.model, 0.0) as reference:
            write_json(path, forms.rewritten(reference, questions), private=True)
    return dict(read_json(path, dict))


def _contexts(bench: Bench, asked: Sequence[Row]) -> list[Form]:
    tokenised = [part for questions in (bench.questions, *bench.training.values()) for part in questions.parts]
    lengths = {example["row"]: len(example["input_ids"]) for part in tokenised for example in part.answers}
    return contexts_of(
        asked,
        [*bench.asked, *bench.known],
        bench.retain,
        lengths,
        bench.tokenisation.max_length or bench.context,
        bench.questions.tokenizer,
        bench.tokenisation,
        bench.config.seed,
    )


def _questions(bench: Bench, rows: Sequence[Row]) -> Questions:
    """The rows, tokenised; those that are too long in this form alone are left out of it."""
    how = bench.tokenisation
    how = replace(how, long_rows="drop") if how.long_rows == "refuse" else how
    return Questions({"forget": rows}, bench.questions.tokenizer, how, bench.context, bench.scoring)
