"""Several requests as one adapter, against dense matrices in float64."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch

from loramox.errors import SettingsError
from loramox.extras.ledger.compose import compose, left_out, total_within
from loramox.model.algebra import Factors, add, scaled
from loramox.train.momentum import Momentum

SHAPES = {"square": (24, 24), "wide": (24, 40), "tall": (40, 24)}


def requests(count: int, rank: int, shared: bool = False, seed: int = 0) -> dict[str, dict[str, Factors]]:
    """{layer: {request: ΔW}} in fp32, as adapters hold it."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    made = {}
    for layer, (out, inner) in SHAPES.items():
        A = draw(rank, inner)
        made[layer] = {f"r{i}": Factors(A if shared else draw(rank, inner), draw(out, rank)) for i in range(count)}
    return made


def terms_of(made: dict[str, dict[str, Factors]], names: tuple[str, ...]) -> Callable[[str], dict[str, Factors]]:
    return lambda layer: {name: made[layer][name] for name in names}


def dense(factors: Factors) -> torch.Tensor:
    return factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_without_a_rank_the_sum_is_exact_and_at_a_served_rank(count: int, shared: bool) -> None:
    """20 requests of rank 2 have rank 40, above the 24 of the layers: then those of the layers do."""
    made = requests(count, 2, shared)
    names = tuple(made["square"])
    composed = compose(SHAPES, terms_of(made, names))
    assert composed.error == 0
    assert set(composed.errors.values()) == {0}
    assert composed.rank == (8 if shared or count < 20 else 32)
    for layer, shipped in composed.factors.items():
        assert shipped.rank == composed.rank
        assert torch.allclose(dense(shipped), sum(dense(t) for t in made[layer].values()), atol=1e-4, rtol=1e-5)


def test_concatenated_factors_are_bit_for_bit_those_of_the_requests() -> None:
    made = requests(2, 3)
    composed = compose(SHAPES, terms_of(made, ("r0", "r1")))
    for layer, shipped in composed.factors.items():
        for i, name in enumerate(("r0", "r1")):
            assert torch.equal(shipped.A[3 * i : 3 * i + 3], made[layer][name].A)
            assert torch.equal(shipped.B[:, 3 * i : 3 * i + 3], made[layer][name].B)


@pytest.mark.parametrize("rank", [None, 8])
def test_composition_commutes(rank: int | None) -> None:
    made = requests(6, 2)
    sums = [
        {layer: dense(f) for layer, f in compose(SHAPES, terms_of(made, order), rank).factors.items()}
        for order in list(permutations(("r0", "r1", "r2", "r3", "r4", "r5")))[::143]
    ]
    for other in sums[1:]:
        for layer, delta in sums[0].items():
            assert torch.allclose(other[layer], delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [None, 8])
def test_taking_a_request_out_is_the_inverse_of_adding_it(rank: int | None) -> None:
    """In real numbers; that the ledger's bytes come back is held in test_requests.py."""
    made = requests(4, 3)
    three = compose(SHAPES, terms_of(made, ("r0", "r1", "r2")))
    with_a_fourth = compose(SHAPES, terms_of(made, ("r0", "r1", "r2", "r3")))
    back = {layer: {"all": with_a_fourth.factors[layer], "out": scaled(made[layer]["r3"], -1)} for layer in SHAPES}
    undone = compose(SHAPES, lambda layer: back[layer], rank)
    expected = compose(SHAPES, terms_of(made, ("r0", "r1", "r2")), rank) if rank else three
    for layer in SHAPES:
        assert torch.allclose(dense(undone.factors[layer]), dense(expected.factors[layer]), atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [1, 8])
def test_the_errors_that_are_reported_are_the_true_ones(rank: int, shared: bool) -> None:
    made = requests(5, 12, shared)
    names = tuple(made["square"])
    composed = compose(SHAPES, terms_of(made, names), rank)
    sums = {layer: sum(dense(t) for t in made[layer].values()) for layer in SHAPES}
    sides = {layer: torch.linalg.svd(T, full_matrices=False) for layer, T in sums.items()}

    def norm(matrices: list[torch.Tensor]) -> float:
        return torch.stack([m.norm() for m in matrices]).norm().item()

    lost = norm([sums[layer] - dense(composed.factors[layer]) for layer in SHAPES])
    assert composed.error == pytest.approx(lost / norm(list(sums.values())), rel=1e-5)
    # Eckart-Young: the best of this rank.
    optimum = norm([S[rank:] for _, S, _ in sides.values()])
    assert lost == pytest.approx(optimum, rel=1e-5)
    for name in names:
        left, whole = [], []
        for layer, (U, _, Vh) in sides.items():
            delta = dense(made[layer][name])
            U, Vh = U[:, :rank], Vh[:rank]
            left.append(delta - U @ U.T @ delta @ Vh.T @ Vh)
            whole.append(delta)
        assert composed.errors[name] == pytest.approx(norm(left) / norm(whole), rel=1e-9)


def test_what_truncation_makes_of_each_request_adds_up_to_the_truncated_sum() -> None:
    made = requests(5, 4)
    composed = compose(SHAPES, terms_of(made, tuple(made["square"])), 8)
    for layer, shipped in composed.factors.items():
        U, S, Vh = torch.linalg.svd(dense(shipped), full_matrices=False)
        U, Vh = U[:, :8], Vh[:8]
        assert S[8:].max() < 1e-4
        parts = sum(U @ U.T @ dense(t) @ Vh.T @ Vh for t in made[layer].values())
        assert torch.allclose(parts, dense(shipped), atol=1e-4)


def test_requests_that_cancel_leave_nothing_and_each_is_told_that_all_of_it_is_lost() -> None:
    made = {layer: {"a": t["r0"], "b": scaled(t["r0"], -1)} for layer, t in requests(1, 4).items()}
    composed = compose(SHAPES, lambda layer: made[layer], 1)
    # Shared A, so that B − B is 0 to the bit.
    assert all(f.norm() == 0 for f in composed.factors.values())
    assert composed.errors == pytest.approx({"a": 1.0, "b": 1.0})


def test_a_small_error_is_told_exactly_where_squares_would_cancel() -> None:
    U, V = (torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64))[0] for _ in range(2))
    outside = torch.linalg.qr(torch.cat([U, torch.randn(20, 1, dtype=torch.float64)], 1))[0][:, 4:]
    term = Factors(A=torch.cat([V.T, V[:, :1].T]), B=torch.cat([U, 1e-9 * outside], 1))
    assert left_out(term, U, V) ** 0.5 == pytest.approx(1e-9, rel=1e-5)


def test_without_a_rank_a_sum_above_what_servers_take_is_refused() -> None:
    big = {"layer": {f"r{i}": Factors(torch.randn(300, 700), torch.randn(700, 300)) for i in range(2)}}
    with pytest.raises(SettingsError, match=r"2 requests has rank 600.*--rank 512 or less"):
        compose(big, lambda layer: big[layer])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_total_never_has_a_rank_above_the_layers_own(shape: tuple[int, int]) -> None:
    terms = [Factors(torch.randn(4, shape[1], dtype=torch.float64), torch.randn(shape[0], 4, dtype=torch.float64)) for _ in range(3)]  # fmt: skip
    whole = total_within(terms, 512)
    assert whole.rank == 6
    assert torch.allclose(whole.delta(), sum(t.delta() for t in terms).float(), atol=1e-5)


def test_terms_that_share_a_add_up_at_the_rank_of_one_and_others_do_not() -> None:
    shared = list(requests(3, 4, shared=True)["wide"].values())
    whole = add(*shared)
    assert whole.rank == 4
    assert torch.equal(whole.A, shared[0].A)
    assert torch.allclose(whole.delta(), sum(t.delta() for t in shared), atol=1e-5)
    assert add(*requests(3, 4)["wide"].values()).rank == 12


def test_momentum_with_a_shared_a_is_exact_at_the_rank_of_one() -> None:
    steps = list(requests(6, 4, shared=True)["wide"].values())
    momentum, exact = Momentum(eta=0.675, max_rank=4), dense(steps[0])  # the average begins at the first
    momentum.tick({"wide": steps[0]})
    for step in steps[1:]:
        momentum.tick({"wide": step})
        exact = 0.675 * dense(step) + 0.325 * exact
    assert momentum.average["wide"].rank == 4
    assert momentum.relative_error() == 0
    assert torch.allclose(dense(momentum.average["wide"]), exact, atol=1e-5)
    other = Momentum(eta=0.675, max_rank=4)
    for step in requests(6, 4)["wide"].values():
        other.tick({"wide": step})
    assert other.relative_error() > 0.1
