"""The campaign of kills and damage is not part of CI; what it tries, and in which order, is."""

from campaign.__main__ import KINDS, planned
from campaign.mutations import TARGETS, WAYS, way_of


def ways(rounds: int) -> set[tuple[str, str]]:
    """(target, way of damage) of the attempts of so many rounds."""
    return {(KINDS[kind][1], way_of(KINDS[kind][1], number)) for _, kind, number in planned(rounds, "damage: ")}


def test_the_first_round_has_every_kind_and_every_way_of_damage() -> None:
    assert {kind for _, kind, _ in planned(1, "")} == KINDS.keys()
    assert {way for _, way in ways(1)} == set(WAYS)


def test_three_rounds_damage_files_of_every_target_in_every_way() -> None:
    assert ways(3) == {(target, way) for target in TARGETS for way in WAYS}


def test_no_attempt_is_made_twice() -> None:
    attempts = [(kind, number) for _, kind, number in planned(5, "")]
    assert len(attempts) == len(set(attempts))
