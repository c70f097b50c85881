"""LoRA arithmetic against dense matrices in float64."""

import math

import pytest
import torch

from loramox.model.algebra import Factors, concatenate, padded, scaled, truncate


def make(out: int, inner: int, rank: int, seed: int = 0) -> Factors:
    random = torch.Generator().manual_seed(seed)
    return Factors(
        A=torch.randn(rank, inner, generator=random, dtype=torch.float64),
        B=torch.randn(out, rank, generator=random, dtype=torch.float64),
    )


@pytest.mark.parametrize("shape", [(9, 7, 3), (7, 9, 3), (4, 5, 12), (1, 6, 2)])
def test_norm_is_the_frobenius_norm_of_the_product(shape: tuple[int, int, int]) -> None:
    factors = make(*shape)
    assert factors.norm() == pytest.approx(factors.delta().norm().item(), rel=1e-12)


def test_norm_of_factors_that_cancel_is_zero_and_never_nan() -> None:
    factors = make(9, 7, 3)
    nothing = concatenate(factors, scaled(factors, -1.0))
    assert nothing.norm() == pytest.approx(0.0, abs=1e-6)
    assert Factors(torch.zeros(2, 5), torch.zeros(4, 2)).norm() == 0.0


def test_norm_does_not_overflow_where_float32_would() -> None:
    huge = Factors(torch.full((1, 2), 1e15), torch.full((2, 1), 1e15))
    assert huge.norm() == pytest.approx(2e30, rel=1e-6)


@pytest.mark.parametrize("factor", [-8.0, 0.0, 1.0, 1e-3])
def test_scaling_multiplies_the_product_and_leaves_a_alone(factor: float) -> None:
    factors = make(9, 7, 3)
    result = scaled(factors, factor)
    assert torch.equal(result.A, factors.A)
    assert torch.allclose(result.delta(), factor * factors.delta(), rtol=1e-11, atol=0)


def test_concatenation_is_exactly_the_sum_of_the_products() -> None:
    # Small whole numbers, so that no sum is rounded whatever its order.
    terms = [
        Factors(
            A=torch.randint(-8, 9, (r, 7), generator=torch.Generator().manual_seed(r)).float(),
            B=torch.randint(-8, 9, (9, r), generator=torch.Generator().manual_seed(r + 9)).float(),
        )
        for r in (3, 2, 5)
    ]
    whole = concatenate(*terms)
    assert whole.rank == 3 + 2 + 5
    assert torch.equal(whole.delta(), sum(term.delta() for term in terms))


def test_the_average_of_adapters_is_the_average_of_their_products_and_not_the_product_of_averages() -> None:
    one, two = make(9, 7, 3, seed=1), make(9, 7, 3, seed=2)
    average = concatenate(scaled(one, 0.25), scaled(two, 0.75))
    expected = 0.25 * one.delta() + 0.75 * two.delta()
    assert torch.allclose(average.delta(), expected, rtol=1e-11)
    of_factors = Factors(0.25 * one.A + 0.75 * two.A, 0.25 * one.B + 0.75 * two.B).delta()
    assert (of_factors - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("shape", [(9, 7, 5), (7, 9, 5), (4, 10, 8), (10, 4, 8), (3, 3, 20)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncation_is_optimal_and_its_error_is_the_true_one(shape: tuple[int, int, int], rank: int) -> None:
    factors = make(*shape)
    kept, error = truncate(factors, rank)
    assert kept.rank == rank
    assert (factors.delta() - kept.delta()).norm().item() == pytest.approx(error, rel=1e-9, abs=1e-12)
    # Eckart-Young: nothing of that rank is nearer than the root of the squared singular values left out.
    optimum = torch.linalg.svdvals(factors.delta())[rank:].norm().item()
    assert error == pytest.approx(optimum, rel=1e-9, abs=1e-12)


def test_truncation_in_float32_has_the_true_error_too() -> None:
    factors = Factors(*(t.float() for t in make(40, 30, 12)))
    kept, error = truncate(factors, 4)
    assert kept.A.dtype == kept.B.dtype == torch.float32
    exact = factors.B.double() @ factors.A.double() - kept.B.double() @ kept.A.double()
    assert exact.norm().item() == pytest.approx(error, rel=1e-4)


def test_truncation_within_the_rank_changes_nothing() -> None:
    factors = make(9, 7, 3)
    for rank in (3, 4, 100):
        kept, error = truncate(factors, rank)
        assert error == 0.0
        assert torch.equal(kept.A, factors.A)
        assert torch.equal(kept.B, factors.B)


def test_a_rank_above_a_side_of_the_matrix_is_cut_to_that_side_without_loss() -> None:
    factors = make(3, 8, 20)
    kept, error = truncate(factors, 10)
    assert kept.rank == 3
    assert error == 0.0
    assert torch.allclose(kept.delta(), factors.delta(), atol=1e-12)


def test_redundant_factors_are_cut_to_their_true_rank_without_loss() -> None:
    factors = make(9, 7, 3)
    kept, error = truncate(concatenate(scaled(factors, 0.5), scaled(factors, 0.5)), 3)
    assert error == pytest.approx(0.0, abs=1e-12)
    assert torch.allclose(kept.delta(), factors.delta(), atol=1e-12)


def test_truncated_factors_have_equal_sizes_on_both_sides() -> None:
    factors = make(40, 30, 12)
    kept, _ = truncate(Factors(factors.A * 1e4, factors.B * 1e-4), 4)
    assert torch.allclose(kept.A.norm(dim=1), kept.B.norm(dim=0), rtol=1e-9)


def test_truncating_zeros_gives_zeros() -> None:
    kept, error = truncate(Factors(torch.zeros(6, 5), torch.zeros(4, 6)), 2)
    assert error == 0.0
    assert torch.equal(kept.delta(), torch.zeros(4, 5))


def test_a_fresh_adapter_times_anything_is_still_the_reference() -> None:
    fresh = Factors(make(4, 5, 6).A, torch.zeros(4, 6, dtype=torch.float64))
    kept, error = truncate(scaled(concatenate(fresh, fresh), -8.0), 2)
    assert math.isclose(error, 0.0, abs_tol=1e-12)
    assert kept.norm() == 0.0


@pytest.mark.parametrize("rank", [3, 4, 16])
def test_padding_raises_the_rank_and_keeps_the_product_exactly(rank: int) -> None:
    factors = make(9, 7, 3)
    result = padded(factors, rank)
    assert result.A.shape == (rank, 7)
    assert result.B.shape == (9, rank)
    assert result.A.dtype == torch.float64
    assert torch.equal(result.A[3:], torch.zeros(rank - 3, 7, dtype=torch.float64))
    assert torch.allclose(result.delta(), factors.delta(), rtol=1e-11)
