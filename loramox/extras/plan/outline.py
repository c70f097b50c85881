"""A few layers of the reference with its adapter, as tensors without data: each has its type, shape and purpose."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from loramox.extras.plan.recorder import Recorder, Speed
from loramox.model.algebra import Factors
from loramox.model.config import skeleton
from loramox.model.load import keep_4bit_weights_in_place, quantization
from loramox.model.lora import ReferenceConfig, add_lora, lora_layers
from loramox.train.config import UnlearnConfig
from loramox.train.earlier import TUNED, put_on


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
def adapted(setting: Setting, depth: int) -> Iterator[tuple[Recorder, PeftModel]]:
    """The reference with its adapter, `depth` layers of it, without contents."""
    config = copy.deepcopy(setting.config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    reference = setting.reference
    model = skeleton(config, reference).requires_grad_(False)
    if reference.quantization == "nf4":
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization("nf4", setting.dtype))
        model.is_loaded_in_4bit = True
    model = add_lora(model, reference)
    if setting.tuned:
        put_on(model, setting.tuned, TUNED)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), fake, Recorder(setting.speed) as recorder:
        warnings.simplefilter("ignore")  # what libraries make of tensors without contents
        recorder.purpose = "weights"
        _empty(model, setting.args.device, setting.dtype)
        _quantize(model)
        keep_4bit_weights_in_place(model)
        recorder.belongs(
            "adapter",
            *(p for _, layer in lora_layers(model) for part in (layer.lora_A, layer.lora_B) for p in part.parameters()),
        )
        recorder.purpose = "activations"
        model.to = lambda *args, **kwargs: model  # it lies there already, and torch cannot move what has no contents
        yield recorder, model


def _empty(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on torch's meta device fake weights on `device`: adapters in their own type, the rest in `dtype`.

    To be called within `FakeTensorMode`.
    """
    adapters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    made: dict[int, nn.Parameter] = {}  # by the tensor that it replaces: tied weights stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                kind = old.dtype if id(old) in adapters else dtype
                new = nn.Parameter(torch.empty(old.shape, dtype=kind, device=device), old.requires_grad)
                module._parameters[name] = made.setdefault(id(old), new)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)


def _quantize(model: nn.Module) -> None:
    """Give every 4-bit layer the tensors that bitsandbytes makes of its weight."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            packed, state = quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
            layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.weight.quant_state = state
