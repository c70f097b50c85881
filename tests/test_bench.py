"""recipes/bench: the commands for a GPU, on a pico model on the CPU."""

import argparse
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes are not installed

from recipes.bench import choices, evaluation_memory, plan, shapes, step
from recipes.bench.steps import CONTENDERS, MICRO_BATCHES, ours

PICO = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


class Flops(TorchDispatchMode):
    """FLOPs of what runs within it. torch's `FlopCounterMode` follows modules too, and fails in a backward in a forward."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(autouse=True)
def pico_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "pico", PICO)
    monkeypatch.setattr(shapes, "SMALL", (*shapes.SMALL, "pico"))


def given(**more) -> argparse.Namespace:
    usual = {"rows": 2, "rounds": 2, "device": "cpu", "checkpointing": False, "cap": None, "openunlearning": None}
    return argparse.Namespace(**usual | more)


@pytest.mark.parametrize("lengths", ["40", "TOFU's lengths"])
def test_no_contender_does_less_arithmetic_than_the_floor_and_loramox_little_more(lengths: str) -> None:
    with shapes.folder_of("pico", "cpu") as model:
        # Eager attention's products are counted; it computes the masked half as well.
        eager = replace(model, attn_implementation="eager")
        case = step.case_of(given(rows=4), "pico", lengths, eager)
        floor = step.floor_flops(case, shapes.config_of("pico"))
        counted = {}
        names = [name for name in step.contenders(given(rows=4), "pico") if name != "TRL"]
        made = {name: CONTENDERS[name] for name in names}
        made["npo_mean, in micro-batches"] = lambda case: ours(case, "npo_mean", micro_batches=MICRO_BATCHES)
        for name, contender in made.items():
            _, whole = contender(case)
            whole()  # the reference's states are worked out
            with Flops() as counter:
                whole()
            counted[name] = counter.total / floor
    assert 1 < counted["npo_mean"] < (1.1 if lengths == "40" else 1.35)
    # One more forward pass over the forget rows, a quarter of all: an eighth, if it were without padding.
    assert counted["npo_mean"] < counted["mox"] < counted["npo_mean"] + 0.25
    assert counted["mox, reference not cached"] > counted["mox"] + 0.2
    assert counted["npo_mean, in micro-batches"] == pytest.approx(counted["npo_mean"], rel=0.1)
    # A micro-batch's three retain rows are alone in their passes, so that more of them is padding where lengths differ.
    padding = 1.001 if lengths == "40" else 1.15
    assert counted["mox"] * 0.999 < counted["mox, in micro-batches"] < counted["mox"] * padding
    assert counted["plain PEFT"] > 1


def test_times_are_of_every_contender_and_the_parts_of_a_step_are_all_of_it() -> None:
    found = step.times(given(), "pico", "40")
    assert {len(seconds) for seconds in found["seconds"].values()} == {2}
    assert {"mox", "npo_mean", "plain PEFT", "floor", "momentum"} <= found["seconds"].keys()
    assert {"forward", "loss", "backward", "optimiser"} <= found["parts"].keys()
    assert all(seconds > 0 for seconds in found["parts"].values())
    assert step.memory(given(), "pico", "40", "mox")["peak"] > 0


def test_a_request_asks_the_reference_in_the_epochs_in_which_retain_rows_are_new() -> None:
    # 400 forget rows are 50 steps an epoch; 1,200 of 3,600 retain rows an epoch are new in three of 24.
    assert step.request(1.0, 2.0, rows=8) == 50 * (3 * 2 + 21)


def test_the_whole_report_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "in_its_own_process", lambda given, *words: {"before": 1, "peak": 3_000_001})
    said = step.report(given(shapes=["pico"], lengths=["40"], checkpointing=True))
    for who in ("mox", "mox, reference not cached", "npo_mean", "plain PEFT"):
        assert f"| pico | 40 | {who} | " in said
    assert "activation checkpointing on" in said
    tables = [
        list(lines) for is_table, lines in groupby(said.splitlines(), lambda line: line.startswith("|")) if is_table
    ]
    assert len(tables) == 3
    for lines in tables:  # none is shorter or longer than its head
        assert len({line.count("|") for line in lines}) == 1


def test_a_choice_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [choices.DEFAULT, "--attn_implementation flash_attention_2", "--optim adafactor"]
    monkeypatch.setattr(choices, "CHOICES", {name: choices.CHOICES[name] for name in names})
    found = choices.compare(given(shape="pico", lengths="40"))
    assert "ModelError: --attn_implementation" in found[names[1]]["why"]
    assert all(len(found[name]["seconds"]) == 2 for name in (names[0], names[2]))


def test_the_memory_of_evaluating_and_attacking_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.SHAPES, "pico", PICO)
    for name, small in (("ROWS", 4), ("LENGTH", 16), ("ANSWER", 4)):
        monkeypatch.setattr(evaluation_memory, name, small)
    found = evaluation_memory.measure("pico")
    assert found.keys() == {"sweep, predicted", "training, predicted", "evaluate", "sample", "pair", "relearn"}
    assert all(size > 0 for size in found.values())
