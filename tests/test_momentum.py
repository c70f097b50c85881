"""Momentum against the recursion M ← η·ΔW + (1 − η)·M on dense matrices."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramox.errors import AdapterError
from loramox.model.algebra import Factors
from loramox.model.lora import ReferenceConfig
from loramox.train.config import UnlearnConfig
from loramox.train.momentum import FILE, Momentum, momentum_rank

SHAPES = {"up": (12, 8), "down": (8, 12)}
RANK = 2


def deltas(count: int) -> list[dict[str, Factors]]:
    """`count` states of a small adapter on two layers, as training would pass them."""
    random = torch.Generator().manual_seed(0)
    return [
        {
            name: Factors(torch.randn(RANK, inner, generator=random), torch.randn(out, RANK, generator=random))
            for name, (out, inner) in SHAPES.items()
        }
        for _ in range(count)
    ]


def dense(states: list[dict[str, Factors]], eta: float) -> dict[str, torch.Tensor]:
    """It starts at the first ΔW."""
    average = {name: B.double() @ A.double() for name, (A, B) in states[0].items()}
    for state in states[1:]:
        for name, (A, B) in state.items():
            average[name] = eta * (B.double() @ A.double()) + (1 - eta) * average[name]
    return average


def after(states: list[dict[str, Factors]], eta: float, max_rank: int) -> Momentum:
    momentum = Momentum(eta, max_rank)
    for state in states:
        momentum.tick(state)
    return momentum


def test_before_the_first_tick_the_average_is_nothing() -> None:
    momentum = Momentum(0.675, 8)
    assert momentum.average == {}
    assert momentum.relative_error() == 0.0


@pytest.mark.parametrize("eta", [0.2, 0.675, 1.0])
@pytest.mark.parametrize("ticks", [1, 2, 4])
def test_while_the_rank_allows_the_recursion_is_exact(eta: float, ticks: int) -> None:
    states = deltas(ticks)
    momentum = after(states, eta, max_rank=4 * RANK)
    for name, expected in dense(states, eta).items():
        assert torch.allclose(momentum.average[name].delta().double(), expected, atol=1e-5)
        assert momentum.error[name] == 0.0
    assert momentum.ticks == ticks
    assert momentum.relative_error() == 0.0


def test_two_ticks_by_hand() -> None:
    ones = {"w": Factors(torch.ones(1, 2), torch.ones(2, 1))}
    tens = {"w": Factors(torch.ones(1, 2), torch.full((2, 1), 10.0))}
    momentum = after([ones, tens], 0.75, 8)
    # 0.75·10 + 0.25·1
    assert torch.allclose(momentum.average["w"].delta(), torch.full((2, 2), 7.75))


def test_after_one_tick_the_average_is_what_was_trained_and_weights_always_sum_to_one() -> None:
    """A run of one epoch ships its ΔW, not η of it."""
    one = {"w": Factors(torch.ones(1, 2), torch.ones(2, 1))}
    for ticks in (1, 2, 5):
        assert torch.allclose(after([one] * ticks, 0.675, 8).average["w"].delta(), torch.ones(2, 2), atol=1e-6)


@pytest.mark.parametrize("max_rank", [1, 2, 3, 5])
def test_beyond_the_rank_the_true_error_is_within_the_bound(max_rank: int) -> None:
    states, momentum = deltas(8), Momentum(0.4, max_rank)
    for ticks, state in enumerate(states, 1):
        momentum.tick(state)
        for name, expected in dense(states[:ticks], 0.4).items():
            kept = momentum.average[name]
            assert kept.rank <= max_rank
            true = (kept.delta().double() - expected).norm().item()
            assert true <= momentum.error[name] + 1e-5
    assert momentum.relative_error() > 0


def test_the_error_of_one_truncation_is_the_true_one_and_shrinks_with_each_further_tick() -> None:
    states = deltas(1)
    momentum = after(states, 0.5, max_rank=1)
    true = (momentum.average["up"].delta().double() - dense(states, 0.5)["up"]).norm().item()
    assert momentum.error["up"] == pytest.approx(true, rel=1e-4)
    nothing = {name: Factors(torch.zeros_like(A), torch.zeros_like(B)) for name, (A, B) in states[0].items()}
    before = momentum.error["up"]
    momentum.tick(nothing)
    assert momentum.error["up"] == pytest.approx(before / 2, abs=1e-5)


def test_the_relative_error_is_a_share_of_the_norm_over_all_layers() -> None:
    states = deltas(3)
    momentum = after(states, 0.4, max_rank=2)
    norm = sum(f.delta().double().norm() ** 2 for f in momentum.average.values()) ** 0.5
    bound = sum(e**2 for e in momentum.error.values()) ** 0.5
    assert momentum.relative_error() == pytest.approx(bound / norm.item(), rel=1e-5)


def test_eta_one_keeps_only_the_newest_at_its_own_rank() -> None:
    states = deltas(5)
    momentum = after(states, 1.0, max_rank=4 * RANK)
    for name, newest in states[-1].items():
        assert momentum.average[name].rank == RANK
        assert torch.equal(momentum.average[name].delta(), newest.delta())


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 1.0}, {"momentum_rank": 3}, {"momentum": 1.0, "momentum_rank": 1}]
)
@pytest.mark.parametrize("shared", [False, True])
def test_the_rank_that_memory_and_disk_are_counted_at_is_the_one_that_it_comes_to(settings: dict, shared: bool) -> None:
    args = UnlearnConfig("made up", use_cpu=True, report_to="none", **settings)
    states = deltas(8)
    if shared:  # A is frozen
        states = [{n: Factors(states[0][n].A, B) for n, (_, B) in state.items()} for state in states]
    momentum = after(states, args.momentum, args.momentum_rank or 4 * RANK)
    expected = momentum_rank(ReferenceConfig("made up", r=RANK, shared_subspace=shared), args)
    assert {each.rank for each in momentum.average.values()} == {expected}


@pytest.fixture
def tf32() -> Iterator[tuple]:
    """The backends that multiply matrices, with TF32 on."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [each.fp32_precision for each in backends]
    for each in backends:
        each.fp32_precision = "tf32"
    yield backends
    for each, precision in zip(backends, before, strict=True):
        each.fp32_precision = precision


@pytest.mark.parametrize("fails", [False, True])
def test_a_tick_computes_in_full_fp32_where_tf32_is_on_and_leaves_it_on(fails: bool, tf32, monkeypatch) -> None:
    """`--tf32` and `--torch_compile` turn it on. `relative_error` would not count it."""
    seen, svd = [], torch.linalg.svd

    def looked(*args, **kwargs):
        seen.append([each.fp32_precision for each in tf32])
        if fails:
            raise RuntimeError("no convergence")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", looked)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        after(deltas(2), 0.4, max_rank=RANK)
    assert seen[0] == ["ieee", "ieee"]
    assert [each.fp32_precision for each in tf32] == ["tf32", "tf32"]


def test_a_tick_takes_a_copy_so_that_training_on_does_not_move_the_average() -> None:
    (state,) = deltas(1)
    momentum = after([state], 1.0, max_rank=8)
    before = momentum.average["up"].delta().clone()
    state["up"].A.zero_()
    state["up"].B.zero_()
    assert torch.equal(momentum.average["up"].delta(), before)


@pytest.mark.parametrize("ticks", [0, 1, 6])
def test_saving_and_loading_is_exact(tmp_path: Path, ticks: int) -> None:
    momentum = after(deltas(ticks), 0.3, max_rank=3)
    momentum.save(tmp_path)
    loaded = Momentum.load(tmp_path)
    assert (loaded.eta, loaded.max_rank, loaded.ticks) == (0.3, 3, ticks)
    assert loaded.error == momentum.error
    assert loaded.average.keys() == momentum.average.keys()
    for name, (A, B) in momentum.average.items():
        assert torch.equal(loaded.average[name].A, A)
        assert torch.equal(loaded.average[name].B, B)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_going_on_after_loading_is_the_same_as_never_stopping(tmp_path: Path) -> None:
    states = deltas(6)
    whole = after(states, 0.3, max_rank=3)
    after(states[:4], 0.3, max_rank=3).save(tmp_path)
    resumed = Momentum.load(tmp_path)
    for state in states[4:]:
        resumed.tick(state)
    assert resumed.error == whole.error
    assert all(torch.equal(resumed.average[n].delta(), whole.average[n].delta()) for n in SHAPES)


def test_going_on_after_loading_is_where_the_adapter_is(tmp_path: Path) -> None:
    """What is loaded is on the CPU, and the adapter on a GPU; here on torch's device without contents."""
    after(deltas(2), 0.5, 64).save(tmp_path)
    momentum = Momentum.load(tmp_path)
    momentum.tick({name: Factors(each.A.to("meta"), each.B.to("meta")) for name, each in deltas(1)[0].items()})
    assert {t.device.type for factors in momentum.average.values() for t in factors} == {"meta"}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def without_a_factor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["up.B"]
    save_file(tensors, path, metadata={"eta": "0.3", "max_rank": "3", "ticks": "2"})


def without_its_state(path: Path) -> None:
    save_file(load_file(path), path)


def with_an_unreadable_number(path: Path) -> None:
    save_file(load_file(path), path, metadata={"eta": "much", "max_rank": "3", "ticks": "2"})


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, cut_short, without_a_factor, without_its_state, with_an_unreadable_number],
    ids=lambda f: f.__name__,
)
def test_a_missing_or_damaged_file_is_refused_by_name_with_the_remedy(tmp_path: Path, damage) -> None:
    after(deltas(2), 0.3, max_rank=3).save(tmp_path)
    damage(tmp_path / FILE)
    with pytest.raises(AdapterError, match=rf"{FILE} is missing or damaged.*train again"):
        Momentum.load(tmp_path)
