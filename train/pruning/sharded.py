"""Physical removal under FSDP2: every tensor is gathered, sliced, and sharded again in a smaller model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from ..compute.distributed import Parallel
from ..compute.gather import full, scatter
from ..compute.loss import TrainingLoss
from ..model.irregular import build
from ..model.tensors import STEM_NORMS
from .selection import Removal
from .surgery import norm_scale, slice_state, slice_tensor, update_config


@torch.no_grad()
def rebuild_sharded(
    loss: TrainingLoss, removal: Removal, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> tuple[TrainingLoss, nn.Module]:
    """Physical removal under FSDP2: gather one tensor at a time, slice it, and shard it again in a new, smaller model.

    Returns the new loss and what to call; the optimizer's parameters and state are replaced in place.
    """
    model, scale = loss.model, norm_scale(removal)
    config = copy.deepcopy(model.config)
    update_config(config, removal)
    with torch.device("meta"):
        smaller: Any = build(config, removal.after)
    new_loss = loss.around(smaller)
    wrapped = parallel.wrap(new_loss)
    smaller.to_empty(device=parallel.storage_device)
    smaller.tie_weights()
    smaller.model.rotary_emb = model.model.rotary_emb  # its buffers are not stored
    smaller.generation_config = model.generation_config
    renamed: dict[Tensor, Any] = {}
    new_parameters = dict(smaller.named_parameters())
    for name, old in model.named_parameters():
        new: Any = new_parameters.get(name)
        if new is None:  # of a block that is gone
            optimizer.state.pop(old, None)
            continue
        is_rescaled = scale != 1.0 and name.endswith(STEM_NORMS)
        value = slice_tensor(name, full(old.detach()), removal)
        scatter(new, value * scale if is_rescaled else value)
        renamed[old] = new
        if old in optimizer.state:
            gathered = {key: full(item) for key, item in optimizer.state.pop(old).items()}
            sliced = slice_state(name, gathered, removal, is_rescaled, scale)
            optimizer.state[new] = {
                key: distribute_tensor(item, new.device_mesh, new.placements) if item.dim() else item
                for key, item in sliced.items()
            }
    for group in optimizer.param_groups:
        group["params"] = [renamed[parameter] for parameter in group["params"] if parameter in renamed]
    return new_loss, wrapped
