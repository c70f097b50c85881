"""provenance.json of an adapter or a merged model: its origin, with every value checked on reading."""

import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loramox.adapter.folder import CARD, CONFIG, PROVENANCE, WEIGHTS
from loramox.adapter.streaming.checkpoint import BESIDE, INDEX
from loramox.adapter.untrusted import Refused, read_object, shown
from loramox.errors import AdapterError, RunError
from loramox.files import has_files, is_passing, put_back

GIVE = {
    "trained": "Give the folder 'trained' in the run's folder",
    "forget": "Give the folder 'forget-adapter' in the run's folder, or what `loramox extrapolate` wrote",
    "merged": "Give a folder that `loramox ship merge` wrote",
}

# What readers of a provenance take for granted, where it is there: types of values, by their names. A dict in it has all of them.
NUMBER = (int, float)
NAME, MAYBE = str, (str, type(None))
BASE = {"model": NAME, "revision": MAYBE, "shape": MAYBE, "weights": MAYBE, "dtype": MAYBE}
GENERATED = {"rows": int, "sha256": NAME}
ROWS = {"source": NAME, **GENERATED}
TYPES: dict[str, Any] = {
    "kind": NAME, "method": NAME, "command": MAYBE, "training_command": MAYBE, "sha256": NAME, "dtype": MAYBE,
    "alpha": (*NUMBER, type(None)), "scale": NUMBER, "rank": int, "truncation_error": NUMBER,
    "momentum": (dict, type(None)), "settings": dict, "data": dict, "base": BASE, "requests": list,
    "generated": dict, "chosen_by": NAME, "checkpoint": NAME,
    "tuned_adapter": {"path": NAME, "sha256": NAME}, "negated": {"adapter": NAME, "sha256": NAME},
    "memorize_at": {"model": NAME, "weights": MAYBE}, "combined_adapter": {"path": NAME},
}  # fmt: skip
# The files that are written to a folder of each kind that may be replaced.
FILES = {
    "forget": (CONFIG, WEIGHTS, PROVENANCE, CARD),
    "merged": ("config.json", INDEX, "*.safetensors", *BESIDE, PROVENANCE, CARD),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
NEEDED = {"base", "command", "data", "momentum", "settings"}
BY_KIND = {"trained": {"alpha", "method"}, "forget": {"alpha"}, "merged": {"adapter"}}


def read_provenance(folder: Path, kind: str) -> dict[str, Any]:
    """The provenance of an adapter that loramox wrote. Raises `AdapterError` when there is none, or it is of another kind."""
    try:
        provenance = read_any(folder)
    except Refused as error:
        raise AdapterError(
            f"{folder} has no readable {PROVENANCE} ({error.what}), so it is no {kind} adapter of loramox, or what makes it did not finish. "
            f"{GIVE[kind]}; an interrupted run goes on with --resume"
        ) from error
    if provenance.get("kind") != kind:
        finished = "It is finished: load it as it is. " if provenance.get("kind") == "forget" else ""
        raise AdapterError(
            f"{folder} is a {provenance.get('kind')} adapter, not a {kind} adapter. {finished}{GIVE[kind]}. "
            f"This one came from: {shown(provenance.get('command'), 500)}"
        )
    if missing := (NEEDED | BY_KIND[kind]) - provenance.keys():
        raise _damaged(folder, f"it lacks {', '.join(sorted(missing))}")
    if kind == "trained":
        _check(folder, "settings.r", provenance["settings"].get("r"), int)
        _check(folder, "momentum.eta", (provenance["momentum"] or {}).get("eta"), NUMBER)
        if provenance["base"]["dtype"] not in DTYPES:
            raise _damaged(folder, f"base.dtype is {shown(provenance['base']['dtype'], 40)}")
    return provenance


def read_any(folder: Path) -> dict[str, Any]:
    """The provenance in a folder, of whatever kind, as this version of loramox writes it.

    Raises:
        Refused: it is missing, or cannot be read.
        AdapterError: a value in it is of a type that loramox does not write.
    """
    provenance = read_object(folder / PROVENANCE)
    try:
        provenance = as_now(provenance)
    except TypeError as error:
        raise _damaged(folder, "settings is no object, or strength no number") from error
    for name, types in TYPES.items():
        if name in provenance:
            _check(folder, name, provenance[name], types)
    for name, types in (("data", ROWS), ("generated", GENERATED)):
        for part, rows in provenance.get(name, {}).items():
            _check(folder, f"{name}.{part}", rows, types)
    if "base" not in provenance:
        raise _damaged(folder, "it lacks base")
    return provenance | {"base": dict.fromkeys(BASE) | provenance["base"]}


def _check(folder: Path, name: str, value: Any, types: Any) -> None:
    parts = types if isinstance(types, dict) else {}
    if not isinstance(value, dict if parts else types) or isinstance(value, bool):
        raise _damaged(folder, f"{name} is {shown(value, 40)}")
    for key, each in parts.items():
        _check(folder, f"{name}.{key}", value.get(key), each)


def _damaged(folder: Path, what: str) -> AdapterError:
    return AdapterError(
        f"{folder / PROVENANCE} is damaged, or of another version of loramox: {what}. Restore it, or train again"
    )


def as_now(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance or run record that loramox 0.1 wrote, as this version writes it; a newer one as it is.

    0.1 called alpha `strength`, with −1 for methods that have none, and had one method `mox` with two objectives.
    """
    settings = provenance.get("settings") or {}
    if "strength" not in settings:
        return provenance
    strength, objective = settings["strength"], settings.get("objective")
    alpha = strength if strength > 0 else None
    method = settings.get("method", "mox")
    if method == "mox":
        method = "npo_mean" if objective == "npo" else "mox_static"
    now = provenance | {"settings": settings | {"alpha": alpha, "method": method}, "alpha": alpha}
    if provenance.get("kind") == "memorization":
        return now | {"kind": "trained"}
    if "strength" in provenance:  # a forget adapter's own
        now["alpha"] = provenance["strength"] if provenance["strength"] > 0 else None
    return now


def check_alone(provenance: dict[str, Any], folder: Path) -> None:
    """Raises `AdapterError` for an adapter that means nothing without the user's own, beside which it was trained."""
    if "tuned_adapter" in provenance and not provenance.get("combined"):
        raise AdapterError(
            f"{folder} was trained beside the adapter {provenance['tuned_adapter']['path']}, and does nothing useful without it. Give the folder "
            "combined-adapter of the run, which holds both"
        )


def check_out(out: Path, kind: str, overwrite: bool) -> None:
    """Nothing but a `kind` of loramox (forget, merged) is ever overwritten: no trained adapter, nor anyone's own files.

    Raises `RunError` when `out` is taken.
    """
    put_back(out)
    if not (out.is_file() or has_files(out)):
        return
    try:
        read_provenance(out, kind)
    except AdapterError as error:
        raise RunError(f"--out {out} holds other files. Choose another folder") from error
    what = {"forget": "an adapter", "merged": "a merged model"}[kind]
    if not overwrite:
        raise RunError(f"--out {out} holds {what} already. Replace it with --overwrite, or choose another folder")
    # A link is no loss: what it leads to stays.
    for path in sorted(out.iterdir()):
        ours = path.is_file() and any(fnmatch(path.name, name) for name in FILES[kind])
        if not (ours or path.is_symlink() or is_passing(path)):
            raise RunError(
                f"--out {out} holds {what}, and {path}, which is not of it. Move that, or choose another folder"
            )


def check_base(provenance: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    """Raises `AdapterError` when `base` is not the model that the adapter in `folder` was made for."""
    made_for = provenance["base"]
    found = {"shape": "has another architecture or size", "weights": "has other weights"}
    if made_for["weights"] is None and base["weights"] is None:  # of the hub, where a commit tells weights apart
        found["revision"] = f"is at revision {base['revision']}, not at its {made_for.get('revision')} (--revision)"
    for part, what in found.items():
        if None not in (made_for.get(part), base[part]) and made_for[part] != base[part]:
            raise AdapterError(
                f"{folder} was made for the base {made_for['model']}, and {base['model']} {what}. A forget adapter works on the "
                "model that it was trained on, and on no other: train again on this one"
            )


def check_asked_base(provenance: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    """`check_base`, and a warning where one model is a folder and the other on the hub, whose files are not compared."""
    check_base(provenance, base, folder)
    made_for = provenance["base"]
    one_is_unknown = (made_for["weights"] is None) != (base["weights"] is None)
    if one_is_unknown and made_for["model"] != base["model"]:
        warnings.warn(
            f"{folder} was made for {made_for['model']}, and this is {base['model']}. One of them is on the hub, so their weights are not compared "
            "here: make sure that they are the same model",
            stacklevel=3,
        )
