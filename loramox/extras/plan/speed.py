"""The speed of a device in matrix products and memory traffic: measured on this one, or given for another."""

from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from loramox.extras.plan.recorder import Speed

# FLOPs of 16-bit matrix products for each byte that memory moves: 76 on an RTX 3090, 153 on an A100 and an RTX 4060 Ti, 164 on an
# RTX 4090, 295 on an H100 (dense, by their data sheets).
BALANCE = 150

SECONDS = 0.2  # for each of both measurements


def given_speed(tflops: float, bandwidth: float | None) -> Speed:
    """Of a card, from its dense 16-bit TFLOPS and its memory's GB a second (`BALANCE`, when that is not given)."""
    per_second = bandwidth * 1e9 if bandwidth else tflops * 1e12 / BALANCE
    how = "given" if bandwidth else f"assumed, 1 for {BALANCE} FLOPs"
    return Speed(tflops * 1e12, per_second, f"{tflops:g} TFLOPS (given) and {per_second / 1e9:,.0f} GB/s ({how})")


def measured_speed(device: torch.device, dtype: torch.dtype, tokens: int, hidden: int, between: int) -> Speed:
    """Of `device`, from products of [tokens, hidden] and [hidden, between] matrices and copies of 64 MB, half a second in all."""
    left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((tokens, hidden), (hidden, between)))
    source = torch.ones(1 << 24, device=device)
    copy = torch.empty_like(source)
    flops = 2 * tokens * hidden * between * _rate(lambda: left @ right)
    moved = 2 * source.nbytes * _rate(lambda: copy.copy_(source))
    return Speed(flops, moved, f"{flops / 1e12:.3g} TFLOPS and {moved / 1e9:.3g} GB/s, measured on this {device.type}")


def _rate(run: Callable[[], object]) -> float:
    """How often it runs in a second at its fastest: other work only slows it down."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1 / min(timer.blocked_autorange(min_run_time=SECONDS).times)
