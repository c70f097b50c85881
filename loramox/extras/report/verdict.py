"""The run in a few sentences: is it forgotten, is the rest intact, what did attacks recover, and what was not tested."""

import math
from datetime import datetime, timezone
from typing import Any, NamedTuple

from loramox.extras.report.answers import fit, lost, named, worst
from loramox.extras.report.facts import (
    LEVEL,
    PARTS,
    adapter_at,
    evaluated_metric,
    mean,
    of_part,
    shown,
)
from loramox.extras.report.read import EVALUATION, FORGET, REFERENCE, RETRAINED, Inputs, number, quoted, same_value
from loramox.extras.report.recovery import not_attacked, recovered
from loramox.run import RECORD

# Where the headline's words change. They are on the page too, under the verdict.
NOT_FORGOTTEN = 0.5  # share of the probability left above which nothing counts as forgotten
LIKE_RETRAINED = 2.0  # times the retrained model's probability, up and down
INTACT, HARMED = 0.98, 0.9  # share of retain probability left; the first is the sweep's default budget
# Tests of the forget rows beside a retrained model: the p-value's metric, and their names in a sentence.
BESIDE_RETRAINED = (
    ("forget_quality", "The truth-ratio test"),
    ("forget_probability_quality", "The test on probabilities"),
)
NOT_COMPARED = (
    "Not tested: the truth-ratio test needs a retrained model's records (--retrained) and wrong answers (column perturbed_answer); "
    "membership inference needs holdout rows (--holdout)."
)
OTHER_ROWS = ("same rows", "same attacked rows")  # the parts of what is missing that are warnings
THRESHOLDS = (
    f"Terms in the headline. “Not forgotten”: more than {100 * NOT_FORGOTTEN:.0f} % of the probability is left. “Forgotten on average”: at most "
    f"{LIKE_RETRAINED:g} times the retrained model's probability. “Partly forgotten”: between the two. “Intact”: {100 * INTACT:.0f} % or more of the "
    f"retain probability is left. “Slightly harmed”: {100 * HARMED:.0f} % or more. A test can tell two models apart if p < {LEVEL}."
)


class Verdict(NamedTuple):
    """The first page, and the two answers of `DETAILS` that follow it."""

    headline: str
    parts: dict[str, str]  # sentences, by what they answer
    warnings: list[str]
    not_tested: list[str]

    @property
    def line(self) -> str:
        """What was measured without attacks, on one line."""
        return " ".join(
            [self.headline, *(text for name, text in self.parts.items() if name not in (REQUEST, ATTACKED))]
        )


REQUEST, FORGOTTEN, REST, ATTACKED = "The request", "What is forgotten?", "What is intact?", "How hard to recover?"
LEAK, TOLD = DETAILS = "Worst leak", "Like a model that never knew?"


def verdict(inputs: Inputs) -> Verdict:
    parts, headline = {REQUEST: _request(inputs)}, _unmeasured(inputs)
    if inputs.point(inputs.at):
        (one, parts[FORGOTTEN]), (two, parts[REST]) = _forgotten(inputs), _rest(inputs)
        headline = f"{one}; {two}."
    parts[ATTACKED] = recovered(inputs)
    if inputs.point(inputs.at):
        parts |= {LEAK: _leak(inputs), TOLD: _told_apart(inputs)}
    parts = {name: text for name, text in parts.items() if text}
    return Verdict(headline, parts, _warnings(inputs), _not_tested(inputs, parts.get(TOLD, "")))


def request(inputs: Inputs) -> dict[str, Any]:
    """What was to be forgotten, by which model, how and when."""
    run, data = inputs.run, inputs.run["data"]
    return {
        "run": inputs.folder.resolve().name,
        "model": run["base"].get("model"),
        "method": run.get("method"),
        "rows": {part: {name: data.get(part, {}).get(name) for name in ("rows", "source", "sha256")} for part in PARTS},
        # A run keeps no date of its own: when its record was last written.
        "date": datetime.fromtimestamp((inputs.folder / RECORD).stat().st_mtime, timezone.utc).date().isoformat(),
    }


def _request(inputs: Inputs) -> str:
    asked = request(inputs)
    forget, retain = (
        f"{rows['rows'] or 'an unknown number of'} rows ({fit(rows['source'] or 'source not known', 80)['text']})"
        for rows in asked["rows"].values()
    )
    by = f", by {fit(asked['method'], 80)['text']}" if asked["method"] else ""
    return f"The model {fit(asked['model'], 120)['text']} was to forget {forget} and keep {retain}{by}. Run of {asked['date']}."


def _not_tested(inputs: Inputs, told: str) -> list[str]:
    found = [missing.what for part, missing in inputs.missing.items() if part not in (*OTHER_ROWS, "forget model")]
    found += not_attacked(inputs)
    if told == NOT_COMPARED:
        found.append(f"Whether a test can tell the model from one that never knew: {told.removeprefix('Not tested: ')}")
    if math.isnan(inputs.score(inputs.at, "model_utility")) and not _ability(inputs):
        found.append(
            "General ability: no rows of other subjects were scored; the retain rows stand for them. It needs loramox evaluate with "
            f"--retain_test, --text or --lm_eval, and --out {quoted(inputs.folder / EVALUATION)}."
        )
    return found


def _forgotten(inputs: Inputs) -> tuple[str, str]:
    """In two words, and in a sentence."""
    before, after = (inputs.score(at, "forget_probability") for at in (0.0, inputs.at))
    theirs = mean(inputs.records.get(RETRAINED, ()), "forget")
    says = f"At {inputs.unit} = {inputs.at:g} the mean probability of the true answers to {_rows(inputs, 'forget')} {_went(before, after)}."
    if math.isnan(after):
        return "Whether the rows are forgotten is not known", says
    factor = after / theirs if theirs > 0 else math.nan
    if math.isnan(factor):
        says += (
            " No retrained model was measured, so nothing here says what a model that never saw the rows would give."
        )
    elif factor >= 1 / LIKE_RETRAINED:
        still = "still " if factor > LIKE_RETRAINED else ""
        says += f" The true answers are {still}{_times(factor)} as probable as in a model that never saw the rows ({shown(theirs)})."
    else:
        says += (
            f" A model that never saw the rows finds the true answers {_times(1 / factor)} as probable ({shown(theirs)}). To know even "
            "less than such a model also shows which rows were removed."
        )
    # Where the reference itself hardly knows the rows, little is left of nothing; the retrained model says more.
    if factor <= LIKE_RETRAINED:
        return "Forgotten on average" + (", and beyond" if factor < 1 / LIKE_RETRAINED else ""), says
    if after > NOT_FORGOTTEN * before:
        return "Not forgotten", says
    return ("Answers much less probable than before" if math.isnan(factor) else "Partly forgotten"), says


def _rest(inputs: Inputs) -> tuple[str, str]:
    before, after = (inputs.score(at, "retain_probability") for at in (0.0, inputs.at))
    says = f"The mean probability of the true answers to {_rows(inputs, 'retain')} {_went(before, after)}"
    if not before > 0 or math.isnan(after):
        return "whether the rest is intact is not known", f"{says}."
    left = after / before
    word = "intact" if left >= INTACT else "slightly harmed" if left >= HARMED else "harmed"
    says += f": {100 * left:.1f} % of it is left."
    if row := lost(inputs.records.get(FORGET, ()), inputs.records.get(REFERENCE, ())):
        now, then = (number(r["probability"]) for r in row)
        says += f" The row that lost most, {named(row[0])}, went from {shown(then)} to {shown(now)}."
    if ability := _ability(inputs):
        says += f" General ability: {ability}."
    return f"the rest is {word}", says


def _ability(inputs: Inputs) -> str:
    """General ability and what it is of; empty where it was not measured."""
    found = evaluated_metric(inputs, "general_ability")
    value = number(found.get("value", inputs.point(inputs.at).get("general_ability")))
    if math.isnan(value):
        return ""
    ends = found.get("interval")
    between = f" ({' to '.join(map(shown, ends))})" if isinstance(ends, list) else ""
    source = f", the {fit(found['source'], 300)['text']}" if "source" in found else ""
    return f"{shown(value)}{between} of the reference's{source}"


def _rows(inputs: Inputs, part: str) -> str:
    """The rows that a mean of the verdict is over: all that the sweep scored."""
    n: float = len(of_part(inputs.records.get(FORGET, ()), part))
    n = n or number(inputs.frontier.get("data", {}).get(part, {}).get("rows"))
    return f"all {'' if math.isnan(n) else f'{n:,.0f} '}{part} rows"


def _went(before: float, after: float) -> str:
    if math.isnan(before) or math.isnan(after):
        return "is not known"
    if abs(after - before) < 0.005 * max(before, 1e-12):
        return f"hardly moved, {shown(before)} to {shown(after)}"
    return f"{'fell' if after < before else 'rose'} from {shown(before)} to {shown(after)}"


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.1f} times"


def _leak(inputs: Inputs) -> str:
    """The forget rows that still give most away, by answer and by probability, beside the retrained model's there."""
    records, theirs = inputs.records.get(FORGET, ()), inputs.records.get(RETRAINED, ())
    there = {r["id"]: r for r in theirs if r["part"] == "forget"}
    says = []
    for by, words in (
        ("rouge_l", "Worst leak by the answer, {}: ROUGE-L"),
        ("probability", "By probability, {}: its true answer still has"),
    ):
        if rows := worst(records, by):
            other = number(there.get(rows[0]["id"], {}).get(by))
            beside = "" if math.isnan(other) else f" (the retrained model {shown(other)})"
            tied = f", as for {len(rows) - 1:,} other row{'s' if len(rows) > 2 else ''}" if len(rows) > 1 else ""
            says.append(f"{words.format(named(rows[0]))} {shown(rows[0][by])}{beside}{tied}.")
    return " ".join(says)


def _told_apart(inputs: Inputs) -> str:
    """The result of each test in a sentence."""
    says = []
    for name, test in BESIDE_RETRAINED:
        p = inputs.score(inputs.at, name)
        if not math.isnan(p):
            can = "can" if p < LEVEL else "cannot"
            blind = p >= LEVEL and inputs.score(0.0, name) >= LEVEL
            little = ": it cannot tell even the reference, which knows them all" if blind else ""
            says.append(f"{test} {can} tell it from a model that never saw the rows (p = {p:.2g}){little}.")
    area = inputs.score(inputs.at, "mia_min_k")
    if not math.isnan(area):
        scored = [record["part"] for record in inputs.records.get(FORGET, ()) if "mia_min_k" in record]
        n, m = map(scored.count, ("forget", "holdout"))
        error = 1.96 * math.sqrt((n + m + 1) / (12 * n * m)) if n * m > 0 else math.nan  # of two samples that are alike
        alike = "" if math.isnan(error) else f", and 0.5 ± {error:.2f} is within chance for {n} and {m} rows"
        says.append(f"Membership inference: AUC {area:.3f}; 0.5 is guessing{alike}.")
    return " ".join(says) or NOT_COMPARED


def _unmeasured(inputs: Inputs) -> str:
    if not inputs.frontier:
        return "Not measured: nothing is known yet about what the adapter forgets."
    rule = inputs.frontier.get("rule")
    refused = next((c["reason"] for c in inputs.frontier["choices"] if c["rule"] == rule), None)
    return f"No {inputs.unit} was chosen{f': {refused}' if refused else ''}."


def _warnings(inputs: Inputs) -> list[str]:
    frontier, unit = inputs.frontier, inputs.unit
    found = [f"Training warns: {each}." for each in inputs.run.get("advice", ())]
    if frontier.get("warning"):
        found.append(f"The sweep warns: {frontier['warning']}.")
    found += [inputs.missing[part].what for part in OTHER_ROWS if part in inputs.missing]
    if frontier and frontier["chosen"] is None and inputs.at is not None:
        found.append(f"The rule chose no {unit}; shown is the one that was shipped, {unit} = {inputs.at:g}.")
    elif inputs.shipped is not None and inputs.at is not None and inputs.shipped != inputs.at:
        there = inputs.point(inputs.shipped)
        at = ", ".join(f"{part} {shown(there.get(f'{part}_probability'))}" for part in PARTS)
        found.append(
            f"The forget adapter in this run's folder is at {unit} = {inputs.shipped:g}, not at the chosen {unit} = {inputs.at:g} that "
            f"is shown here{f'; at {unit} = {inputs.shipped:g} the probabilities are {at}' if there else ''}."
        )
    for what, record in (("attacks were", inputs.attacks), ("evaluation was", inputs.evaluation)):
        made_at = adapter_at(inputs, record)
        if inputs.at is not None and not math.isnan(made_at) and not same_value(made_at, inputs.at):
            found.append(
                f"The {what} made at {unit} = {made_at:g}, not at the {unit} = {inputs.at:g} that is shown here."
            )
    return found
