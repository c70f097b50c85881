"""The 16-bit type that a device computes in, and a warning if it only emulates one."""

import warnings

import torch

CPU_BF16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16")  # the last on ARM


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 itself. GPUs before Ampere (sm_80) take it and emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(name) for name in CPU_BF16)
    return True


def half_precision(device: torch.device) -> torch.dtype:
    """The 16-bit type that a GPU computes in fast: bfloat16, or float16 where it has none, with a warning."""
    if has_bf16(device):
        return torch.bfloat16
    warnings.warn(
        "this GPU has no bfloat16 arithmetic (it is older than Ampere, sm_80): computing in float16", stacklevel=3
    )
    return torch.float16


def warn_of_emulation(device: torch.device, flag: str) -> None:
    """Warn when bfloat16 was asked for by `flag` on a device that emulates it."""
    if not has_bf16(device):
        other = "float16" if device.type == "cuda" else "float32"
        warnings.warn(
            f"{flag}: this {'GPU' if device.type == 'cuda' else 'CPU'} has no bfloat16 arithmetic and emulates it, which is slow. {other} is "
            "faster here",
            stacklevel=3,
        )
