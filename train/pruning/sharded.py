"""Physical removal under FSDP2: gather every tensor, slice it, and shard it again in a smaller model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from ..compute.distributed import Parallel
from ..compute.gather import full, scatter
from ..compute.loss import TrainingLoss
from ..model.irregular import build, share_buffers
from ..model.rescaling import rescaled, width_factor
from .selection import Removal
from .surgery import slice_state, slice_tensor, update_config


@torch.no_grad()
def rebuild_sharded(
    loss: TrainingLoss, removal: Removal, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[TrainingLoss, nn.Module]:
    """Gather one tensor at a time, slice it, and shard it again in a new, smaller model.

    Returns the new loss and the callable of a step. The optimizer's parameters and state are replaced in place.
    """
    model = loss.model
    config = copy.deepcopy(model.config)
    update_config(config, removal)
    with torch.device("meta"):
        smaller: Any = build(config, removal.after)
    new_loss = loss.around(smaller)
    wrapped = parallel.wrap(new_loss)
    smaller.to_empty(device=parallel.storage_device)
    smaller.tie_weights()
    share_buffers(smaller, model)
    smaller.generation_config = model.generation_config
    renamed: dict[Tensor, Any] = {}
    new_parameters = dict(smaller.named_parameters())
    for name, old in model.named_parameters():
        new: Any = new_parameters.get(name)
        if new is None:  # of a block that is gone
            optimizer.state.pop(old, None)
            continue
        factor = width_factor(name, removal.before, removal.after)
        value = slice_tensor(name, full(old.detach()), removal)
        scatter(new, value if factor == 1.0 else rescaled(name, value, factor, removal.before))
        renamed[old] = new
        if old in optimizer.state:
            gathered = {key: full(item) for key, item in optimizer.state.pop(old).items()}
            sliced = slice_state(name, gathered, removal, factor)
            optimizer.state[new] = {
                key: distribute_tensor(item, new.device_mesh, new.placements) if item.dim() else item
                for key, item in sliced.items()
            }
    for group in optimizer.param_groups:
        group["params"] = [renamed[parameter] for parameter in group["params"] if parameter in renamed]
    return new_loss, wrapped
