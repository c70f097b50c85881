"""Several requests as one adapter: the sum of their ΔW, layer by layer, exact or truncated, with the error of each.

    T = Σ ΔW_i        exact: A stacked by rows, B by columns (rank Σ r_i), or (Σ B_i)·A where all share A (rank r)
    T_k = U_k S_k V_kᵀ        the best of rank k (Eckart-Young). What it makes of request i is U_k U_kᵀ ΔW_i V_k V_kᵀ:
                              these add up to T_k, so each request's own error can be stated

Terms are summed in the order in which they are given, in float64.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from loramox.adapter.factors import read_stored
from loramox.adapter.folder import SERVED_RANKS, WEIGHTS, served_rank
from loramox.errors import AdapterError, SettingsError
from loramox.model.algebra import Factors, add, padded, scaled, truncate


class Composed(NamedTuple):
    """The one adapter, and what is lost in it."""

    factors: dict[str, Factors]  # of every layer, all at `rank`, in fp32
    rank: int
    error: float  # ‖T − T_k‖_F / ‖T‖_F over all layers; 0 when nothing was truncated
    errors: dict[str, float]  # of each request: ‖ΔW_i − U_kU_kᵀ ΔW_i V_kV_kᵀ‖_F / ‖ΔW_i‖_F over all layers


def compose(layers: Iterable[str], terms: Callable[[str], dict[str, Factors]], rank: int | None = None) -> Composed:
    """Σ ΔW_i at `rank`, or exactly at the smallest rank that servers take, or `SettingsError` if it is higher than those.

    `terms(layer)` has each request's ΔW_i of that layer by the request's id; one layer's are in memory at a time.
    """
    factors: dict[str, Factors] = {}
    lost, norm = 0.0, 0.0  # squared, as those of each request
    lost_of: dict[str, float] = defaultdict(float)
    norm_of: dict[str, float] = defaultdict(float)
    for layer in layers:
        given = terms(layer)
        whole = add(*map(_double, given.values()))
        width = _width(whole)
        exact = min(whole.rank, width)
        if rank is None and exact > SERVED_RANKS[-1]:
            raise SettingsError(
                f"the exact sum of {len(given)} requests has rank {exact}, and servers load adapters up to rank "
                f"{SERVED_RANKS[-1]}. Give --rank {SERVED_RANKS[-1]} or less; the error that it causes each request is then stated"
            )
        kept, error = truncate(whole, min(rank or width, width))
        lost, norm = lost + error**2, norm + whole.norm() ** 2
        sides = _sides(kept) if kept.rank < exact else None
        for name, term in given.items():
            norm_of[name] += term.norm() ** 2
            lost_of[name] += left_out(_double(term), *sides) if sides else 0.0
        factors[layer] = Factors(kept.A.float(), kept.B.float())
    shipped = rank or served_rank(max(each.rank for each in factors.values()))
    return Composed(
        {layer: padded(each, shipped) for layer, each in factors.items()},
        shipped,
        _share(lost, norm),
        {name: _share(lost_of[name], norm_of[name]) for name in norm_of},
    )


def terms_of(requests: dict[str, tuple[Path, float]]) -> Callable[[str], dict[str, Factors]]:
    """−alpha_i·ΔW_i of one layer, by the layer's name, from each request's folder and alpha_i.

    Their own scale is 1: `write_adapter` folded it into B. Raises `AdapterError` unless all requests change the same layers.
    """
    outlines = {name: _outline(folder) for name, (folder, _) in requests.items()}
    first = next(iter(outlines), "")
    if odd := next((name for name, outline in outlines.items() if outline != outlines[first]), None):
        raise AdapterError(
            f"{requests[odd][0]} changes other layers than request {first}, and a ledger is of one model. Restore the ledger from a copy"
        )

    def terms(layer: str) -> dict[str, Factors]:
        found = {}
        for name, (folder, alpha) in requests.items():
            with safe_open(folder / WEIGHTS, "pt") as file:
                # Copied, as a tensor keeps its whole file mapped.
                A, B = (file.get_tensor(f"base_model.model.{layer}.lora_{part}.weight").clone() for part in "AB")
            found[name] = scaled(Factors(A, B), -alpha)
        return found

    return terms


def _outline(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter, each with its side that is the layer's."""
    return {key: each.shape[1:] if ".lora_A." in key else each.shape[:1] for key, each in read_stored(folder).items()}


def total_within(terms: Iterable[Factors], rank: int) -> Factors:
    """Σ ΔW_i of one layer in fp32: exact up to `rank`, the best approximation of that rank beyond it."""
    whole = add(*map(_double, terms))
    A, B = truncate(whole, min(rank, _width(whole)))[0]
    return Factors(A.float(), B.float())


def _width(factors: Factors) -> int:
    """The highest rank that any ΔW of a layer has."""
    return min(factors.B.shape[0], factors.A.shape[1])


def left_out(term: Factors, U: Tensor, V: Tensor) -> float:
    """‖ΔW − UUᵀ ΔW VVᵀ‖_F² for U [out, k], V [in, k] with orthonormal columns, without forming ΔW.

    Of its two parts, (1 − UUᵀ)ΔW and UUᵀΔW(1 − VVᵀ), each has one factor that is small when the error is: nothing cancels.
    """
    A, B = term
    inside = U @ (U.T @ B)
    return Factors(A, B - inside).norm() ** 2 + Factors(A - (A @ V) @ V.T, inside).norm() ** 2


def _sides(kept: Factors) -> tuple[Tensor, Tensor]:
    """U and V of what `truncate` kept, B = U√S and A = √S·Vᵀ; directions in which the sum is zero are not among them."""
    root = kept.A.norm(dim=1)
    real = root > 1e-6 * root.max()
    return kept.B[:, real] / root[real], (kept.A[real] / root[real, None]).T


def _double(term: Factors) -> Factors:
    return Factors(term.A.double(), term.B.double())


def _share(squared_error: float, squared_norm: float) -> float:
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
