"""The terms of the objective against torch's own functions and against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from loramox.train.losses import cross_entropy, headroom, kl_divergence, log_prob

TEMPERATURES = [0.5, 1.0, 2.0, 6.0]


@pytest.fixture
def logits() -> torch.Tensor:
    return 4 * torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.tensor([0, 3, 10, 3, 7])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_prob_is_that_of_softmax_at_the_temperature(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> None:
    expected = torch.softmax(logits / temperature, -1)[torch.arange(5), targets].log()
    assert torch.allclose(log_prob(logits, targets, temperature), expected, rtol=1e-12)


def test_cross_entropy_at_temperature_one_is_torchs(logits: torch.Tensor, targets: torch.Tensor) -> None:
    assert torch.equal(cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_cross_entropy_is_temperature_times_that_of_the_divided_logits(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> None:
    expected = temperature * F.cross_entropy(logits / temperature, targets, reduction="none")
    assert torch.allclose(cross_entropy(logits, targets, temperature), expected, rtol=1e-12)


def test_cross_entropy_by_hand() -> None:
    # z = (2 ln 3, 0) at temperature 2: p = (3/4, 1/4).
    logits = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    assert cross_entropy(logits, torch.tensor([0]), 2.0).item() == pytest.approx(-2 * math.log(3 / 4))
    assert cross_entropy(logits, torch.tensor([1]), 2.0).item() == pytest.approx(-2 * math.log(1 / 4))
    assert headroom(logits, torch.tensor([0]), 2.0).item() == pytest.approx(1 / 4)
    assert headroom(logits, torch.tensor([1]), 2.0).item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_headroom_is_the_gradient_of_cross_entropy_in_the_targets_logit(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> None:
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, targets, temperature).sum(), logits)
    room = headroom(logits.detach(), targets, temperature)
    assert torch.allclose(-gradient[torch.arange(5), targets], room, rtol=1e-9)
    assert ((room >= 0) & (room <= 1)).all()


def test_a_row_known_by_heart_has_no_gradient_at_temperature_one_and_has_one_at_six() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 3] = 25.0
    target = torch.tensor([3])

    def gradient(temperature: float) -> float:
        z = logits.clone().requires_grad_()
        cross_entropy(z, target, temperature).sum().backward()
        return z.grad.norm().item()

    assert gradient(1.0) < 1e-6
    assert gradient(6.0) > 0.3
    assert headroom(logits, target, 1.0).item() < 1e-6
    assert headroom(logits, target, 6.0).item() > 0.3


def test_kl_of_equal_logits_is_zero_and_so_is_its_gradient(logits: torch.Tensor) -> None:
    z = logits.float().requires_grad_()
    kl = kl_divergence(logits.float(), z)
    assert torch.equal(kl, torch.zeros(5))
    kl.sum().backward()
    assert z.grad.abs().max() < 1e-6


def test_kl_is_torchs_with_the_reference_first(logits: torch.Tensor) -> None:
    other = logits.roll(1, dims=-1)
    kl = kl_divergence(logits, other)
    assert torch.allclose(kl, torch_kl(Categorical(logits=logits), Categorical(logits=other)), rtol=1e-10)
    assert (kl > 0).all()
    assert not torch.allclose(kl, kl_divergence(other, logits))


def test_kl_by_hand() -> None:
    # KL((1/2, 1/2) ‖ (3/4, 1/4)) = ½ ln(2/3) + ½ ln 2
    kl = kl_divergence(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]))
    assert kl.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-5)


def test_kl_does_not_see_a_constant_added_to_the_logits(logits: torch.Tensor) -> None:
    assert torch.allclose(kl_divergence(logits, logits + 7.0), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_kl_stays_finite_when_the_model_excludes_what_the_reference_is_sure_of() -> None:
    sure = torch.tensor([[300.0, 0.0]])
    assert kl_divergence(sure, -sure).item() == pytest.approx(300.0)
