"""plan: memory and time of a run, before anything is loaded; and --fit for the verbs that train."""

import shlex
from collections.abc import Sequence
from typing import Any

from loramox.cli.arguments import given_settings, say, settings_of


def plan(words: list[str]) -> None:
    from loramox.data.encode import Tokenisation
    from loramox.data.rows import Columns
    from loramox.extras.plan.config import PlanConfig
    from loramox.extras.plan.job import plan
    from loramox.extras.plan.show import show_plan
    from loramox.model.lora import ReferenceConfig
    from loramox.train.config import UnlearnConfig

    kinds = (PlanConfig, ReferenceConfig, UnlearnConfig, Columns, Tokenisation)
    show_plan(plan(*settings_of("plan", words, *kinds), given=given_settings("plan", words, *kinds)))  # type: ignore[misc]


def fitted(verb: str, words: list[str], kinds: Sequence[type]) -> tuple[Any, ...]:
    """The settings of a verb that trains; with --fit, those not given are the fastest that are predicted to fit."""
    from loramox.extras.plan.config import FitConfig

    kinds = (*kinds, FitConfig)
    *settings, wanted = settings_of(verb, words, *kinds)
    if wanted.fit is None:
        return tuple(settings)
    from loramox.extras.plan.job import fit

    choice, estimate = fit(wanted.fit, *settings[:6], given=given_settings(verb, words, *kinds))  # type: ignore[misc]
    flags = choice.flags()
    predicted = (
        f", with a predicted peak of {estimate.peak / 2**30:.2f} GB" if estimate else ", as this run was started"
    )
    say(f"--fit {wanted.fit} takes [bold]{shlex.join(flags)}[/]{predicted}")
    *settings, _ = settings_of(verb, words, *kinds, first=flags)
    return tuple(settings)
