"""The forms and context attacks on a model in one state: score every form, and keep the worst for each row."""

from collections.abc import Sequence
from dataclasses import replace

from loramox.data.encode import served_otherwise
from loramox.data.row import Row
from loramox.errors import RowsError
from loramox.evaluate.attacks import forms, leaks
from loramox.evaluate.attacks.attacked import AttackedRows
from loramox.evaluate.attacks.bench import Asking, Bench
from loramox.evaluate.attacks.context import contexts_of
from loramox.evaluate.attacks.forms import Form
from loramox.evaluate.measure import Questions
from loramox.files import read_json, remove, write_json

REWRITTEN = "rewritten{}.json"  # in the folder of the attacks: row → its question in the reference's own words
WORST = "worst of all"


def prepare(bench: Bench, rows: AttackedRows) -> None:
    """Make every way of asking; those that cannot be are named as absent. The reference writes its own words, once.

    Rows in the place of the forget rows are asked in no more ways than those, since the worst of more ways is worse.
    """
    for attack, forms_for in (("forms", _forms), ("context", _contexts)):
        questions = bench.to_answer(attack, rows)
        if questions is None:
            continue
        has = {form.name for form, _ in bench.forget.ways.get(attack, ())}
        for form in forms_for(bench, rows, _rows_of(questions)):
            if rows.label and form.name not in has:
                continue
            try:
                if not form.rows:
                    raise RowsError(f"needs {form.needs}")
                asked = _questions(bench, form.rows)
            except RowsError as error:  # also of rows that are too long in this form, or that a chat template refuses
                bench.absent[f"{attack}: {rows.named(form.name)}"] = str(error)
            else:
                rows.ways.setdefault(attack, []).append((form, asked))


def ask_all(bench: Bench, rows: AttackedRows, state: str, model: Asking) -> None:
    """Ask the model the rows as they are and in every way; then of each attack the worst way of each row."""
    plain = [r for r in bench.ask("none", state, model, rows) if r["part"] == "forget" and "said" in r]
    threshold = bench.config.sample_threshold
    for attack, ways in rows.ways.items():
        found = {leaks.PLAIN: leaks.judged(plain, _rows_of(rows.open_questions), leaks.leaks_of, threshold)}
        for form, questions in ways:
            name = f"{form.name}, {state}"
            records = bench.measured(attack, name, questions)
            if records is None:
                with model() as asked:
                    records = questions.ask(asked, f"{attack}, {name}: ")
                records = leaks.judged(records, _rows_of(questions), form.judge, threshold)
            bench.keep(attack, name, records, leaks.summary(records), rows=len(records))
            if form.in_worst:
                found[form.name] = records
        name = f"{WORST}, {state}"
        records = leaks.worst_of(found)
        if bench.measured(attack, name, rows.open_questions) != records:  # none yet, or the worst of other ways
            remove(bench.folder(attack, name))
        bench.keep(attack, name, records, leaks.summary(records), rows=len(records), worst=leaks.worst_rows(records))


def _rows_of(questions: Questions) -> list[Row]:
    return [row for _, _, row in questions.asked()]


def _forms(bench: Bench, rows: AttackedRows, asked: Sequence[Row]) -> list[Form]:
    served = served_otherwise(asked, rows.questions.tokenizer, bench.tokenisation) is not None
    return [*forms.forms_of(asked, served), forms.in_own_words(asked, _rewritten(bench, asked, rows.label))]


def _rewritten(bench: Bench, asked: Sequence[Row], label: str) -> dict[str, str]:
    path = bench.out / REWRITTEN.format(label and f"-{label.replace(' ', '-')}")
    if not path.exists():
        try:
            questions = _questions(bench, forms.to_rewrite(asked))
        except RowsError:  # no question fits into the context
            return {}
        with bench.adapted(bench.model, 0.0) as reference:
            write_json(path, forms.rewritten(reference, questions), private=True)
    return dict(read_json(path, dict))


def _contexts(bench: Bench, rows: AttackedRows, asked: Sequence[Row]) -> list[Form]:
    tokenised = [part for questions in (rows.questions, *rows.training.values()) for part in questions.parts]
    lengths = {example["row"]: len(example["input_ids"]) for part in tokenised for example in part.answers}
    return contexts_of(
        asked,
        [*rows.asked, *rows.known],
        bench.retain,
        lengths,
        bench.tokenisation.max_length or bench.context,
        rows.questions.tokenizer,
        bench.tokenisation,
        bench.config.seed,
    )


def _questions(bench: Bench, rows: Sequence[Row]) -> Questions:
    """The rows, tokenised; those that are too long in this form alone are left out of it."""
    how = bench.tokenisation
    how = replace(how, long_rows="drop") if how.long_rows == "refuse" else how
    return Questions({"forget": rows}, bench.forget.questions.tokenizer, how, bench.context, bench.scoring)
