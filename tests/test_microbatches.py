"""Rows of like length go through the model together: every row once, less padding, the same objective and gradient."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramox.data.microbatches import cut, microbatches, microbatches_of_pairs, padded_tokens, rows_of
from loramox.data.pairs import Collator
from loramox.model.head import answer_states, states_of_parts


def drawn(seed: int, most: int, longest: int) -> tuple[list[int], int]:
    """Lengths of up to `most` rows, and what a pass costs."""
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(draw.randint(1, most))], draw.randint(0, longest)


def tokens(groups: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + overhead for group in groups)


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_pass_and_no_more_tokens_are_paid_than_in_one(seed: int) -> None:
    lengths, overhead = drawn(seed, most=24, longest=400)
    groups = cut(lengths, overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert tokens(groups, lengths, overhead) <= tokens([list(range(len(lengths)))], lengths, overhead)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_grouping_is_cheaper(seed: int) -> None:
    lengths, overhead = drawn(seed, most=6, longest=9)

    def groupings(rows: list[int]):
        if not rows:
            yield []
            return
        first, *others = rows
        for rest in groupings(others):
            yield [[first], *rest]
            for at in range(len(rest)):
                yield [*rest[:at], [first, *rest[at]], *rest[at + 1 :]]

    cheapest = min(tokens(groups, lengths, overhead) for groups in groupings(list(range(len(lengths)))))
    assert tokens(cut(lengths, overhead), lengths, overhead) == cheapest


@pytest.mark.parametrize("seed", range(20))
def test_no_pass_of_several_rows_has_more_tokens_than_are_allowed(seed: int) -> None:
    lengths, overhead = drawn(seed, most=24, longest=400)
    most = 600
    groups = cut(lengths, overhead, most)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or tokens([group], lengths, 0) <= most for group in groups)
    assert [len(group) for group in cut(lengths, overhead, 0)] == [1] * len(lengths)


def test_a_share_of_a_share_is_of_the_whole() -> None:
    batch = batch_of(3, 5, 5, 9)
    half = rows_of(batch, [1, 3])
    passes = list(microbatches({"forget": half}, 10**6, most=9))
    assert [each["forget"]["share"] for each in passes] == [0.25, 0.25]
    assert padded_tokens({"forget": batch, "retain": batch_of(10)}) == 50


def test_rows_of_one_length_stay_one_pass() -> None:
    assert len(cut([60] * 24, 1)) == 1


def test_a_pass_has_its_own_rows_whole_and_unpadded_and_their_share() -> None:
    rows = [{"input_ids": [i + 1] * n, "labels": [i + 1] * n, "row": f"row {i}"} for i, n in enumerate((3, 90, 4, 88))]
    batch = Collator(0)(rows)
    made = [some["retain"] for some in microbatches({"retain": batch}, 10)]
    assert [some["rows"] for some in made] == [["row 1", "row 3"], ["row 2", "row 0"]]
    assert [some["input_ids"].shape for some in made] == [(2, 90), (2, 4)]
    assert [some["share"] for some in made] == [0.5, 0.5]
    assert made[1]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert torch.equal(made[1]["labels"][1], torch.tensor([1, 1, 1, -100]))


def batch_of(*lengths: int) -> dict:
    rows = [
        {"input_ids": [i + 1] * n, "labels": [-100] + [i + 1] * (n - 1), "row": f"row {i}"}
        for i, n in enumerate(lengths)
    ]
    return Collator(0)(rows)


def test_rows_of_like_length_go_together_whichever_part_they_are_of() -> None:
    parts = {"forget": batch_of(90, 3), "retain": batch_of(4, 88, 91)}
    made = [{part: (of["rows"], of["share"]) for part, of in some.items()} for some in microbatches(parts, 10)]
    assert made == [
        {"forget": (["row 0"], 1 / 2), "retain": (["row 2", "row 1"], 2 / 3)},
        {"forget": (["row 1"], 1 / 2), "retain": (["row 0"], 1 / 3)},
    ]
    assert [list(some) for some in microbatches({"forget": batch_of(90), "retain": batch_of(4)}, 0)] == [
        ["forget"],
        ["retain"],
    ]


def test_pairs_of_rows_stay_together() -> None:
    forget, wanted = batch_of(2, 50, 2), batch_of(3, 60, 100)
    for some in microbatches_of_pairs({"forget": forget, "wanted": wanted}, 0):
        assert some["forget"]["rows"] == some["wanted"]["rows"]


def test_one_forward_pass_gives_each_part_the_states_of_its_own(pico) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    parts = {"forget": batch_of(5, 9), "retain": batch_of(12, 3, 7)}
    calls = []
    counted = model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        together = states_of_parts(model, model, parts)
        assert len(calls) == 1
        alone = {part: answer_states(model, model, batch) for part, batch in parts.items()}
    counted.remove()
    for part, states in alone.items():
        torch.testing.assert_close(together[part].hidden, states.hidden, rtol=1e-5, atol=1e-5)
        assert torch.equal(together[part].targets, states.targets)
        assert torch.equal(together[part].row_of, states.row_of)
        assert together[part].rows == states.rows
