"""evaluate, attack, sweep, report: is it forgotten, is the rest intact, and how far should the adapter go."""

import shlex

from loramox.cli.arguments import plain_parser, say, settings_of, speaks


def evaluate(words: list[str]) -> None:
    from loramox.data.encode import Tokenisation
    from loramox.data.rows import Columns
    from loramox.evaluate.asked import Asked
    from loramox.evaluate.depth import DepthConfig
    from loramox.evaluate.evaluate import evaluate
    from loramox.evaluate.harness import HarnessConfig
    from loramox.evaluate.measure import ScoringConfig
    from loramox.evaluate.show import show
    from loramox.evaluate.subject import Subject
    from loramox.model.config import ModelConfig

    kinds = (Subject, ModelConfig, Asked, ScoringConfig, Tokenisation, Columns, DepthConfig, HarnessConfig)
    subject, *settings = settings_of("evaluate", words, *kinds)
    summary = evaluate(subject, *settings)
    if speaks():
        show(summary)
    say(
        f"[bold]{subject.out}[/] has summary.json, and records.jsonl with every row",
        f"If this model never saw the forget rows, compare others to it: loramox evaluate … --retrained {shlex.quote(subject.out)}"
        if subject.adapter is None
        else "To score many alphas of a run: loramox sweep --trained DIR/trained, with the same rows",
    )


def attack(words: list[str]) -> None:
    from loramox.data.encode import Tokenisation
    from loramox.data.rows import Columns, Data
    from loramox.evaluate.attacks.attack import RECORD, AttackConfig, attack
    from loramox.evaluate.measure import ScoringConfig
    from loramox.evaluate.show import show_absent, show_states
    from loramox.model.config import ModelConfig

    kinds = (AttackConfig, ModelConfig, Data, ScoringConfig, Tokenisation, Columns)
    config, *settings = settings_of("attack", words, *kinds)
    record = attack(config, *settings)
    show_states(record["states"])
    show_absent(record["absent"])
    if record["reused"]:
        say(
            f"{record['reused']} of these {len(record['states'])} states were in {config.out} already, and were not scored again"
        )
    say(f"[bold]{config.out}/{RECORD}[/] has these numbers; the records of every state are beside it")


def sweep(words: list[str]) -> None:
    from loramox.evaluate.asked import Asked
    from loramox.evaluate.measure import ScoringConfig
    from loramox.sweep.config import SweepConfig
    from loramox.sweep.show import show_frontier
    from loramox.sweep.sweep import FRONTIER, PICTURE, moved_base, sweep

    config, *settings = settings_of("sweep", words, SweepConfig, Asked, ScoringConfig)
    frontier = sweep(config, *settings)
    if speaks():
        show_frontier(frontier["points"], frontier["unit"])
    for choice in frontier["choices"]:
        chosen = (
            f"{frontier['unit']} = {choice['at']:g} ({choice['low']:g} to {choice['high']:g} on resampled rows)"
            if choice["at"]
            else "none"
        )
        say(f"rule [bold]{choice['rule']}[/]: {chosen}: {choice['reason']}")
    if frontier["warning"]:
        say(f"[bold]Warning:[/] {frontier['warning']}")
    say(
        f"[bold]{config.out}/{FRONTIER}[/] is the frontier, with its picture {PICTURE}; the records of each point are beside it"
    )
    if frontier["chosen"] is None:
        say(f"Rule {config.rule} chooses no {frontier['unit']}: nothing is shipped")
    elif config.ship:
        say(f"[bold]{config.ship}[/] is the forget adapter at {frontier['unit']} = {frontier['chosen']:g}")
    else:
        base = moved_base(config)
        given = [config.trained, f"--{frontier['unit']}", f"{frontier['chosen']:g}"]
        given += ["--base", base] if base else []
        say(f"To ship it: loramox extrapolate {shlex.join(given)} --out NEW_FOLDER")


def report(words: list[str]) -> None:
    parser = plain_parser("report")
    parser.add_argument(
        "run", metavar="RUN_DIR", help="Folder of a run. sweep/, attack/ and evaluation/ in it are read if they exist."
    )
    given = parser.parse_args(words)
    from loramox.extras.report import report

    made = report(given.run)
    say(
        made["verdict"],
        *([made["attacked"]] if made["attacked"] else []),
        f"[bold]{made['page']}[/] is the page, [bold]{made['summary']}[/] its summary, [bold]{made['facts']}[/] the same for programs",
        *(f"Missing: {what}" for what in made["missing"]),
    )
