"""Words of loramox 0.1: each is refused with the one that replaced it, in flags and in recipes, before anything is read."""

from pathlib import Path

import pytest

from loramox.cli import VERBS, main
from loramox.cli.arguments import refuse_replaced_flags

ALPHA = "unlearn, train, extrapolate, plan and requests add take --alpha, as in θ_for = θ_ref − alpha·ΔW"
SCALE = "evaluate, attack and ship merge take --scale, a multiple of the shipped adapter (1 = as shipped)"
SWEEP = "sweep takes --alphas, or --scales for a method without alpha"
TRAINED = "loramox sweep takes --trained instead"
METHOD = "--objective npo is now --method npo_mean, and --objective cross_entropy is --method mox_static"
STEPS = [*VERBS, "requests add", "requests build", "ship check", "ship merge"]


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("flag", ["--strength", "--strengths"])
@pytest.mark.parametrize("verb", STEPS)
def test_a_strength_is_refused_with_the_flag_of_each_verb(verb: str, flag: str, capsys: pytest.CaptureFixture) -> None:
    said = refused([*verb.split(), "--out", "o", flag, "8"], capsys)
    assert f"{flag} is no longer a setting: {ALPHA}; {SCALE}; {SWEEP}" in said
    assert refused([*verb.split(), f"{flag}=8"], capsys) == said


@pytest.mark.parametrize(("flag", "now"), [("--memorization", TRAINED), ("--objective", METHOD)])
@pytest.mark.parametrize("verb", STEPS)
def test_other_flags_of_0_1_are_refused_with_their_new_names(
    verb: str, flag: str, now: str, capsys: pytest.CaptureFixture
) -> None:
    assert f"{flag} is no longer a setting: {now}" in refused([*verb.split(), flag, "x"], capsys)


@pytest.mark.parametrize(
    ("verb", "key", "now"),
    [
        ("unlearn", "strength", ALPHA),
        ("train", "objective", METHOD),
        ("requests add LEDGER", "strength", ALPHA),
        ("evaluate", "strength", SCALE),
        ("ship merge", "strength", SCALE),
        ("sweep", "strengths", SWEEP),
        ("sweep", "memorization", TRAINED),
    ],
)
def test_a_recipe_of_0_1_is_refused_by_file_and_key(
    verb: str, key: str, now: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{key}: 8\nout: o\n")
    words = [str(tmp_path / "ledger") if word == "LEDGER" else word for word in verb.split()]
    said = refused([*words, str(recipe)], capsys)
    assert f"recipe {recipe}: {key} is no longer a setting: " in said
    assert now in said


def test_a_flag_that_only_ends_like_one_of_them_is_taken() -> None:
    refuse_replaced_flags(["unlearn", "--whp_strength", "5", "--out", "strength"])


def test_memorize_is_train_with_a_line_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("loramox.cli.training.train", given.append)
    main(["memorize", "--out", "o"])
    main(["train", "--out", "o"])
    out, err = capsys.readouterr()
    assert given == [["--out", "o"], ["--out", "o"]]
    assert (out, err) == ("", "loramox memorize is deprecated: it is now loramox train\n")
    assert "memorize" not in VERBS
