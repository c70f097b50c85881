"""Split the frozen layers of θ_ref over the processes, for a model that one device cannot hold.

What does not train has no gradients to add up and no optimiser: each process holds its part of every layer's weights, has a layer
whole while it computes with it (torch's `fully_shard`), and that is all. The adapter, embeddings and output head are whole in
every process, so that strengths, momentum, checkpoints and what ships are as in one.

All processes must go through the layers equally often and in the same order, or they wait for each other for ever or compute
with another layer's weights: hence whatever asks `is_sharded`.
"""

import torch
from peft import PeftModel
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from loramox.errors import ModelError
from loramox.model.head import backbone


def shard(model: PreTrainedModel | PeftModel, device: torch.device) -> None:
    """Cut the frozen layers of a model on the CPU over the processes, one layer after the other, each part to its `device`.

    The adapters must be on it already: they stay whole. Raises `ModelError` for a model whose layers cannot be told.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = layers_of(causal_lm)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    of_adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    for layer in layers:
        layer.to(device)
        _plain_4bit_weights(layer)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=set(of_adapter))
    model.to(device)
    for p in of_adapter:  # which begins as the first process's in all
        torch.distributed.broadcast(p.data, 0)
    # The layers' common root, which has no weights to cut: the next layer's come while this one computes.
    whole = {p for p in model.parameters() if not isinstance(p, DTensor)}
    fully_shard(backbone(causal_lm), mesh=mesh, ignored_params=whole)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def layers_of(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, first to last. Raises `ModelError` when it has no list of them."""
    depth = causal_lm.config.get_text_config().num_hidden_layers
    for module in backbone(causal_lm).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(
        f"{type(causal_lm).__name__} has no list of its {depth} layers, which --shard cuts and --depth reads. Say --shard false, leave out --depth"
    )


def _plain_4bit_weights(layer: nn.Module) -> None:
    """torch's own parameters in place of bitsandbytes', which cannot be cut; the layer keeps what they mean, and looks there."""
    for module in layer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if hasattr(weight, "quant_state"):
                module.quant_state = weight.quant_state
                setattr(module, name, nn.Parameter(weight.data.as_subclass(torch.Tensor), requires_grad=False))
