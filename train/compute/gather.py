"""Convert between whole tensors and shards. Unsharded tensors pass through."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a shard (a collective call). A plain tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in its own memory. A plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scatter(parameter: Any, value: Tensor) -> None:
    """Fill a parameter, or this rank's shard of it, from the whole tensor."""
    if isinstance(parameter, DTensor):
        sharded: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        local(parameter).copy_(local(sharded))
    else:
        parameter.copy_(value)


def shard_again(module: nn.Module) -> None:
    """Free the whole weights that a forward pass without a backward one leaves in FSDP's root."""
    if isinstance(module, FSDPModule):
        module.reshard()
