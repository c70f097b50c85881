"""Settings from recipes and flags → dataclasses, on one path, so that both are checked alike."""

import dataclasses
import difflib
import json
import math
import os
from argparse import Action, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramox.errors import SettingsError

# What settings are called elsewhere, where another here is spelt more alike.
CALLED = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "rank": "r",
}

# Settings of loramox 0.1 that are refused, with what replaces each.
_STRENGTH = (
    "unlearn, train, extrapolate, plan and requests add take --alpha, as in θ_for = θ_ref − alpha·ΔW; evaluate, attack and ship merge "
    "take --scale, a multiple of the shipped adapter (1 = as shipped); sweep takes --alphas, or --scales for a method without alpha"
)
REPLACED = {
    "strength": _STRENGTH,
    "strengths": _STRENGTH,
    "memorization": "loramox sweep takes --trained instead, the folder 'trained' of a run",
    "objective": "--objective npo is now --method npo_mean, and --objective cross_entropy is --method mox_static",
}


def setting(help: str, default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, **more: Any) -> Any:
    """A field of a dataclass of settings, with the help of its flag. One without a default has to be given.

    Args:
        factory: makes the default, where that is a list.
        more: what else argparse gets to know of the flag: its `choices` or `aliases`.
    """
    return dataclasses.field(default=default, default_factory=factory, metadata={"help": help, **more})


def refuse_replaced(name: str, given: str) -> None:
    """Raises `SettingsError` for a setting of loramox 0.1 that was replaced; the message quotes it as `given`."""
    if name in REPLACED:
        raise SettingsError(f"{given} is no longer a setting: {REPLACED[name]}")


def check_choices(config: Any) -> None:
    """Refuse a field whose value is not among the choices it declares. Raises `SettingsError` naming field and flag."""
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices and value is not None and value not in choices:
            raise SettingsError(f"{field.name} is '{value}'; --{field.name} takes {', '.join(choices)}")


def refuse(name: str, value: Any, fine: bool, expected: str) -> None:
    """Raises `SettingsError` naming field and flag, unless `value` is fine and finite."""
    if not fine or (isinstance(value, float) and not math.isfinite(value)):
        raise SettingsError(f"{name} is {value}; --{name} needs {expected}")


def recipe_as_flags(path: str, parser: ArgumentParser) -> list[str]:
    """A YAML recipe as the flags it stands for; put before the command line's own, those win. Raises `SettingsError`."""
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"recipe {path} cannot be read: {error}. Expected a YAML file of 'setting: value' lines"
        ) from error
    if not isinstance(recipe, dict):
        raise SettingsError(f"recipe {path} is not a YAML file of 'setting: value' lines")
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    flags: list[str] = []
    for key, value in recipe.items():
        refuse_replaced(str(key), f"recipe {path}: {key}")
        if key not in actions:
            near = meant(str(key), sorted(actions))
            raise SettingsError(f"recipe {path}: unknown setting '{key}'{f'; did you mean {near!r}?' if near else ''}")
        if isinstance(value, list):
            flags += [f"--{key}", *(at_home(str(each)) for each in value)]
        elif value is None:
            flags += _null(f"recipe {path}", key, actions[key])
        else:
            # One word, so that a value that begins with a dash is not taken for a flag.
            flags.append(at_home(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"))
    return flags


def _null(recipe: str, key: str, action: Action) -> list[str]:
    """What null in a recipe stands for: 'none' where that is a choice, else nothing, which must be the default."""
    if "none" in (action.choices or ()):
        return [f"--{key}=none"]
    if action.default is not None:
        raise SettingsError(
            f"{recipe}: {key} is null. Give it a value, or leave it out for its default, {action.default}"
        )
    return []


def meant(name: str, known: Sequence[str]) -> str | None:
    """The setting that a name may stand for: the one that `CALLED` has for it, or the one spelt most alike."""
    plain = name.removeprefix("--").partition("=")[0].replace("-", "_")
    dashes = "--" if name.startswith("--") else ""
    called = f"{dashes}{CALLED.get(plain)}"
    return next(iter([called] if called in known else difflib.get_close_matches(name, known, n=1)), None)


def at_home(value: str) -> str:
    """A value, or a flag with its value, with a leading ~ as the home folder: no shell expands it in --flag=~/x or a recipe."""
    flag, equals, path = value.partition("=")
    if value.startswith("--") and equals:
        return f"{flag}={os.path.expanduser(path)}"
    return os.path.expanduser(value)


def of_record(kind: type, settings: dict[str, Any]) -> Any:
    """The dataclass `kind` as a run's record or provenance has it, which holds several of them side by side."""
    return kind(
        **{each.name: settings[each.name] for each in dataclasses.fields(kind) if each.init and each.name in settings}
    )
