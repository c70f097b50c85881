"""A few layers of the reference with its adapter, without contents: each tensor has its type, shape and purpose."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from loramox.extras.plan.ledger import Ledger, Speed, without_contents
from loramox.model.algebra import Factors
from loramox.model.config import skeleton
from loramox.model.load import keep_4bit_weights_in_place
from loramox.model.lora import ReferenceConfig, add_lora, lora_layers
from loramox.train.config import UnlearnConfig
from loramox.train.earlier import TUNED, put_on

BLOCK = 64  # weights that share a constant in bitsandbytes' 4 bits, and below
NESTED_BLOCK = 256  # constants that share one


class Setting(NamedTuple):
    """What is traced: the settings of the job, its model's config and tokenizer."""

    reference: ReferenceConfig
    args: UnlearnConfig
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    speed: Speed
    momentum_rank: int
    tuned: dict[str, Factors] | None = None  # ΔW of --tuned_adapter


@contextmanager
def adapted(setting: Setting, depth: int) -> Iterator[tuple[Ledger, PeftModel]]:
    """The reference with its adapter, `depth` layers of it, without contents."""
    config = copy.deepcopy(setting.config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    reference, device = setting.reference, setting.args.device
    model = skeleton(config, reference).requires_grad_(False)
    if reference.quantization == "nf4":
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=setting.dtype,
        )
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), how)
        model.is_loaded_in_4bit = True
    model = add_lora(model, reference)
    if setting.tuned:
        put_on(model, setting.tuned, TUNED)
    with warnings.catch_warnings(), without_contents(setting.speed) as ledger:
        warnings.simplefilter("ignore")  # what libraries make of tensors without contents
        ledger.purpose = "weights"
        _empty(model, device, setting.dtype)
        if reference.quantization == "nf4":
            _quantize(model, device, setting.dtype)
            keep_4bit_weights_in_place(model)
        ledger.belongs(
            "adapter",
            *(p for _, layer in lora_layers(model) for part in (layer.lora_A, layer.lora_B) for p in part.parameters()),
        )
        ledger.purpose = "activations"
        model.to = lambda *args, **kwargs: model  # it lies there already, and torch cannot move what has no contents
        yield ledger, model


def _quantize(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every 4-bit layer the tensors of bitsandbytes: weights in halves of a byte, constants in 8 bits, theirs in fp32."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    def empty(shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            shape = torch.Size((layer.out_features, layer.in_features))
            blocks = -(-shape.numel() // BLOCK)
            nested = QuantState(
                absmax=empty((-(-blocks // NESTED_BLOCK),)),
                code=empty((256,)),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
            layer.weight = nn.Parameter(empty((shape.numel() // 2, 1), dtype=torch.uint8), requires_grad=False)
            layer.weight.quant_state = QuantState(
                absmax=empty((blocks,), dtype=torch.uint8), shape=shape, code=empty((16,)), blocksize=BLOCK,
                quant_type="nf4", dtype=dtype, offset=empty(()), state2=nested,
            )  # fmt: skip


def _empty(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on torch's meta device fake weights on `device`: adapters in their own type, the rest in `dtype`.

    To be called within `without_contents`.
    """
    tied: dict[int, nn.Parameter] = {}
    adapters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                kind = old.dtype if id(old) in adapters else dtype
                new = tied.get(id(old))
                if new is None:
                    new = nn.Parameter(
                        torch.empty(old.shape, dtype=kind, device=device), requires_grad=old.requires_grad
                    )
                tied[id(old)] = module._parameters[name] = new
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)
