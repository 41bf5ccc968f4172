"""Whole tensors from shards and back; a tensor that is not sharded passes through."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard (a collective call); a plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in its own memory; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scatter(parameter: Any, value: Tensor) -> None:
    """Fill a parameter, or this rank's shard of it, from the whole tensor."""
    if isinstance(parameter, DTensor):
        sharded: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        local(parameter).copy_(local(sharded))
    else:
        parameter.copy_(value)


def shard_again(module: nn.Module) -> None:
    """Drop the whole weights that a forward pass without a backward one leaves in FSDP's root; else nothing."""
    if isinstance(module, FSDPModule):
        module.reshard()
