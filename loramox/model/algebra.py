"""LoRA arithmetic on tensors only.

A LoRA adapter changes a weight W [out, in] to W + ΔW with ΔW = B·A, where A is [r, in] and B is [out, r].
Everywhere in this module the adapter's own scale (lora_alpha / r) is already folded into B.

MOX (arXiv 2602.06441) is linear in ΔW: θ_for = θ_ref − α·ΔW, and its momentum is an average of such ΔW.
Averaging the factors instead, (mean B)·(mean A), is not the average of the products (it has cross terms),
so averages here are made by concatenating factors, which is exact, and made small again by a truncated SVD,
whose error is returned.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The two factors of one layer's ΔW = B·A, scale folded into B."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """ΔW = B·A, [out, in]."""
        return self.B @ self.A

    def norm(self) -> float:
        """‖B·A‖_F without forming the product: sqrt(tr((BᵀB)(AAᵀ))), in float64."""
        A, B = self.A.cpu().double(), self.B.cpu().double()  # Apple's GPUs have no float64
        # Both Gram matrices are positive semi-definite, so a negative trace can only be rounding of a zero.
        return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt().item()


def scaled(factors: Factors, factor: float) -> Factors:
    """factor·ΔW. Exact up to the rounding of one multiplication: only B is touched."""
    return Factors(factors.A, factors.B * factor)


def concatenate(*terms: Factors) -> Factors:
    """ΔW₁ + ΔW₂ + …, exactly, at the sum of their ranks: A stacked by rows, B by columns."""
    return Factors(torch.cat([t.A for t in terms]), torch.cat([t.B for t in terms], dim=1))


def add(*terms: Factors) -> Factors:
    """ΔW₁ + ΔW₂ + …, exactly: (B₁ + B₂ + …)·A at the rank of one term where all share A, else concatenated."""
    first = terms[0].A
    if all(t.A.shape == first.shape and torch.equal(t.A, first) for t in terms[1:]):
        return Factors(terms[0].A.clone(), sum(t.B for t in terms))
    return concatenate(*terms)


@contextmanager
def ieee() -> Iterator[None]:
    """Within it, products of fp32 matrices are computed in fp32, also where TF32 is on (--tf32, --torch_compile)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [each.fp32_precision for each in backends]
    try:
        for each in backends:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(backends, before, strict=True):
            each.fp32_precision = precision


@ieee()
def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of ΔW at `rank` or less, and its error ‖ΔW − result‖_F.

    Thin QR of both factors and an SVD of the [R, R] core, so that ΔW itself is never formed
    (Eckart-Young: the error is the root of the sum of the squared singular values left out).
    Singular values are shared evenly between the factors, which keeps both well inside a 16-bit range.
    """
    if factors.rank <= rank:
        return factors, 0.0
    Qb, Rb = torch.linalg.qr(factors.B)
    Qa, Ra = torch.linalg.qr(factors.A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    root = S[:rank].sqrt()
    kept = Factors(A=root[:, None] * (Vh[:rank] @ Qa.T), B=(Qb @ U[:, :rank]) * root)
    return kept, S[rank:].cpu().double().norm().item()


def padded(factors: Factors, rank: int) -> Factors:
    """The same ΔW at a larger rank, exactly: rows of zeros below A, columns of zeros beside B."""
    A, B = factors
    more = rank - factors.rank
    return Factors(torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1))
