"""The card: what it is, and whether it can do what training and evaluation need besides plain products."""

import contextlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from loramox.model.config import ModelConfig
from loramox.model.head import multiplies_into_fp32
from loramox.run import versions

from .steps import machine


def environment(device: str) -> Iterator[str]:
    """The machine and the versions, a line each."""
    yield f"{time.strftime('%Y-%m-%d')}, {machine(device)}, {platform.platform()}"
    if device != "cpu":
        free, total = (f"{size / 2**30:.2f}" for size in torch.cuda.mem_get_info())
        card = torch.cuda.get_device_properties(0)
        yield f"memory: {total} GB, {free} free; compute capability {card.major}.{card.minor}; driver {driver()}"
        yield f"CUDA of torch: {built_for()}; bf16: {torch.cuda.is_bf16_supported(including_emulation=False)}"
    yield ", ".join(f"{name} {version}" for name, version in versions().items())


def built_for() -> str:
    return torch.version.cuda or torch.version.hip or "none"


def driver() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown (no nvidia-smi)"


def kernels(device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """What a job needs, by name. Called, each gives numbers, which are finite on a card that can do it."""
    from bitsandbytes.functional import (
        dequantize_4bit,
        quantize_4bit,
    )  # here, so that the caller can report its absence
    from bitsandbytes.nn import Linear4bit

    dtype = ModelConfig("").torch_dtype(torch.device(device))
    x = torch.randn(256, 256, device=device, dtype=dtype)
    mask = torch.ones(2, 1, 128, 128, dtype=torch.bool, device=device).tril()

    def four_bits() -> Linear4bit:
        return Linear4bit(256, 256, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)

    def attention(some: torch.Tensor) -> torch.Tensor:
        heads = some.view(2, 4, 128, 64)
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)

    def gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf).float().mean(), leaf)[0]

    into_fp32 = {"torch.mm into fp32": lambda: torch.mm(x, x.T, out_dtype=torch.float32)}
    return (into_fp32 if multiplies_into_fp32(x) else {}) | {
        "quantize_4bit and dequantize_4bit": lambda: dequantize_4bit(*quantize_4bit(x, quant_type="nf4")),
        "Linear4bit": lambda: gradient(four_bits()),
        "Linear4bit of one token": lambda: four_bits()(x[:1]),
        "scaled_dot_product_attention with a mask": lambda: gradient(attention),
        "torch.linalg.qr": lambda: torch.linalg.qr(x.float()).R,
        "torch.linalg.svd": lambda: torch.linalg.svd(x.float()).S,
    }
