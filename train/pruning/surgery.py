"""Remove groups from a model: physically (smaller weights and optimizer state) or by zeroing.

The weights of a removed group are all zero or all absent, so both give the same function. Zeroed weights stay zero if
their gradients are zeroed as well, because AdamW leaves a weight with zero gradient and moments unchanged. Most of
these gradients vanish anyway, but not those of a query head's o_proj columns: its values belong to the whole group.
Norms over the remaining channels are rescaled to give the same output (model/rescaling.py).

Physical removal under FSDP2: gather every tensor, slice it, and shard it again in a smaller model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..compute.distributed import first_row, full, local, reshard, scatter
from ..compute.loss import TrainingLoss, frozen_copy
from ..compute.trained_model import TrainedModel
from ..model.architecture import Architecture
from ..model.groups import KIND_OF_AXIS, KINDS
from ..model.irregular import apply_architecture, architecture_of, build, share_buffers
from ..model.modeling_efficientllm import NoAttention, NoFeedForward, set_eps
from ..model.rescaling import Scales, rescaled, width_factor
from ..model.tensors import EMBEDDING, axes_of, block_norms, stem_norms, tensor_names
from ..vocabulary.tokenizer_pruning import renumber_settings
from .selection import Kept, Removal


def kept_channels(kept: Kept, architecture: Architecture, layer: int | None, axis: str) -> Tensor | None:
    """Return the surviving positions along an axis of `architecture`, or None if nothing was removed."""
    if axis not in KIND_OF_AXIS:
        return None
    name = KIND_OF_AXIS[axis]
    kind = KINDS[name]
    # a tensor of a layer has axes of the whole model, too: the hidden axis of q_proj belongs to the stem
    row = 0 if layer is None or kind.is_whole_model else layer
    survivors = kept[name][row]
    if len(survivors) == kind.count(architecture, row):
        return None
    if not kind.is_head:
        return survivors
    head_dim = architecture.head_dim
    return (survivors[:, None] * head_dim + torch.arange(head_dim)).flatten()


def removed_positions(kept: Tensor, size: int) -> Tensor:
    """Return the positions below `size` that are not in `kept`, on the CPU."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask.nonzero().flatten()


def slice_tensor(name: str, tensor: Tensor, removal: Removal) -> Tensor:
    """Return the surviving part of a parameter (or of optimizer state of its shape)."""
    layer, axes = axes_of(name, removal.before)
    for dim, axis in enumerate(axes):
        survivors = kept_channels(removal.kept, removal.before, layer, axis)
        if survivors is not None:
            tensor = tensor.index_select(dim, survivors.to(tensor.device))
    return tensor


def _shrunk_parameter(name: str, tensor: Tensor, removal: Removal) -> Tensor:
    """Return the surviving part of a parameter for the new widths, or `tensor` itself if nothing changes."""
    value = slice_tensor(name, tensor, removal)
    factor = width_factor(name, removal.before, removal.after)
    return value if factor == 1.0 else rescaled(name, value, factor, removal.before)


def _shrunk_state(name: str, state: dict[str, Any], removal: Removal) -> dict[str, Any]:
    """Return Adam moments of the surviving weights."""
    # if a weight grew by c, its gradient shrinks by c and the square by c^2
    factor = width_factor(name, removal.before, removal.after)
    new = {}
    for key, value in state.items():
        if _is_per_weight(value):
            value = slice_tensor(name, value, removal)
            if factor != 1.0:
                value = value / (factor if key == "exp_avg" else factor**2)
        new[key] = value
    return new


def _is_per_weight(value: Any) -> bool:
    """Tell whether a value of an optimizer's state has the shape of its parameter; the number of steps has not."""
    return torch.is_tensor(value) and value.dim() > 0


def _parents(model: Any, name: str) -> list[tuple[nn.Module, str]]:
    """Return every (module, attribute) with a parameter. A tied LM head shares the embedding's."""
    path, _, attribute = name.rpartition(".")
    parents = [(model.get_submodule(path), attribute)]
    if name == EMBEDDING and model.lm_head.weight is model.get_parameter(EMBEDDING):
        parents.append((model.lm_head, attribute))
    return parents


@torch.no_grad()
def remove_groups(model: Any, removal: Removal, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Physically remove groups, in place: parameters, optimizer state, norms and config. Gradients are dropped."""
    # whole blocks first: their tensors would otherwise be sliced to a width of 0
    _remove_blocks(model, removal.after, optimizer)
    slots = _slots(optimizer)
    # a list: the loop replaces the parameters that the iterator would read
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        _shrink_in_place(model, name, removal, optimizer, slots)
    _update_modules(model, removal)


def _shrink_in_place(
    model: Any, name: str, removal: Removal, optimizer: torch.optim.Optimizer | None, slots: Slots
) -> None:
    """Replace a parameter and its optimizer state by their surviving parts."""
    # one at a time: the old tensor is freed on return, so the peak of memory is the model and one tensor
    old = model.get_parameter(name)
    whole = old.detach()
    value = _shrunk_parameter(name, whole, removal)
    if value is whole:
        return
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for module, attribute in _parents(model, name):
        setattr(module, attribute, new)
    if optimizer is None or old not in slots:
        return
    # torch keys the state by the parameter object; an entry that stays under `old` keeps its memory alive
    parameters, index = slots.pop(old)
    parameters[index] = new
    if old in optimizer.state:
        optimizer.state[new] = _shrunk_state(name, optimizer.state.pop(old), removal)


def _remove_blocks(model: Any, after: Architecture, optimizer: torch.optim.Optimizer | None) -> None:
    """Replace blocks that `after` lacks by their absent forms, and free their parameters."""
    staying = set(tensor_names(after))
    gone = {parameter for name, parameter in model.named_parameters() if name not in staying}
    for index, (layer, shape) in enumerate(zip(model.model.layers, after.layers, strict=True)):
        removed_norms: list[str] = []
        if not shape.num_attention_heads and not isinstance(layer.self_attn, NoAttention):
            layer.self_attn = NoAttention(index)
            removed_norms += block_norms(after.parts, "attention")
        if not shape.intermediate_size and not isinstance(layer.mlp, NoFeedForward):
            layer.mlp = NoFeedForward()
            removed_norms += block_norms(after.parts, "ffn")
        # transformers' layer still calls its norms, so they stay as modules without a gain
        for name in removed_norms:
            setattr(layer, name, nn.Identity())
    if optimizer is None or not gone:
        return
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


Slots = dict[Tensor, tuple[list[Tensor], int]]
"""{parameter: (parameters of its optimizer group, its index)}"""


def _slots(optimizer: torch.optim.Optimizer | None) -> Slots:
    """Return the place of every parameter in the optimizer."""
    # by identity: `list.index` would compare the elements of tensors
    groups = [group["params"] for group in optimizer.param_groups] if optimizer is not None else []
    return {parameter: (group, index) for group in groups for index, parameter in enumerate(group)}


def _update_modules(model: Any, removal: Removal) -> None:
    """Update module attributes and the config to the new tensor shapes."""
    after = removal.after
    # transformers' attention repeats keys and values by this attribute and does not read the config again
    for layer, shape in zip(model.model.layers, after.layers, strict=True):
        if shape.num_attention_heads:
            layer.self_attn.num_key_value_groups = shape.queries_per_group
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
    if after.vocab_size != removal.before.vocab_size:
        _renumber(model, removal)
    set_survivors(model, None)  # the zeroed channels are gone, so the mean is over all channels again
    update_config(model.config, removal)
    scales = Scales.of(model.config.to_dict(), after)
    for name in stem_norms(after):
        norm: Any = model.get_submodule(name)
        set_eps(norm, scales.stem_eps)
        if not after.parts.norm.has_gain:
            norm.scale = scales.stem_gain


def _renumber(model: Any, removal: Removal) -> None:
    """Renumber the control tokens in the model's settings after the removal of vocabulary rows."""
    kept = removal.kept["vocabulary"][0].tolist()
    renumber_settings(model.config, kept)
    renumber_settings(model.generation_config, kept)
    # torch gives the row of padding_idx no gradient; the old index would freeze another token
    model.model.embed_tokens.padding_idx = model.config.pad_token_id


def update_config(config: Any, removal: Removal) -> None:
    """Update widths, norm eps and other scales of the smaller model, in place."""
    if removal.before.hidden_size != removal.after.hidden_size:
        scales = Scales.of(config.to_dict(), removal.before).at(removal.before, removal.after)
        for name, value in scales.settings(removal.before).items():
            setattr(config, name, value)
    apply_architecture(config, removal.after)


def set_survivors(model: Any, stem: Tensor | None) -> None:
    """Tell norms with a mean over the stem which channels are not zeroed (None: all)."""
    architecture = architecture_of(model.config)
    # RMS norms need no such set: a zero adds nothing to a sum of squares
    if architecture.parts.norm.takes_mean:
        for name in stem_norms(architecture):
            model.get_submodule(name).survivors = None if stem is None else stem.to(model.device)


@torch.no_grad()
def zero_groups(model: Any, removal: Removal, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Remove the same groups by zeroing their weights and optimizer moments. Shapes stay."""
    set_survivors(model, kept_channels(removal.kept, removal.before, None, "hidden"))
    for name, parameter in model.named_parameters():
        tensors = [parameter.data]
        # a moment that is not 0 would move a zeroed weight in the next step, also with a gradient of 0
        if optimizer is not None:
            state = optimizer.state.get(parameter, {})
            tensors += [value for value in state.values() if _is_per_weight(value)]
        for dim, index in _removed_channels(name, parameter, removal):
            for tensor in tensors:
                _fill_zero(tensor, dim, index)


def _fill_zero(tensor: Tensor, dim: int, index: Tensor) -> None:
    """Zero positions `index` along `dim`. Of a tensor that FSDP2 shards by rows, this rank's rows are zeroed."""
    if isinstance(tensor, DTensor):
        own = tensor.to_local()
        if dim == 0:
            index = index - first_row(tensor)
            is_own_row = (index >= 0) & (index < own.shape[0])
            index = index[is_own_row]
        tensor = own
    tensor.index_fill_(dim, index.to(tensor.device), 0.0)


def _removed_channels(name: str, parameter: Tensor, removal: Removal) -> Iterator[tuple[int, Tensor]]:
    """Yield (dimension, removed positions) of a parameter."""
    layer, axes = axes_of(name, removal.before)
    is_bias_of_removed_block = name.endswith("_proj.bias") and name not in tensor_names(removal.after)
    if is_bias_of_removed_block:  # the block would still add it to the stream
        yield 0, torch.arange(parameter.shape[0], device=parameter.device)
        return
    for dim, axis in enumerate(axes):
        survivors = kept_channels(removal.kept, removal.before, layer, axis)
        if survivors is not None:
            removed = removed_positions(survivors, parameter.shape[dim])
            yield dim, removed.to(parameter.device)


def compact_model(trained: TrainedModel, removal: Removal) -> None:
    """Physically remove groups from model, loss and optimizer of a run, in place (a collective call)."""
    trained.wrapped_loss = nn.Identity()  # frees DDP's hooks on the old parameters
    if trained.parallel.mode == "fsdp":
        trained.replace(*_rebuild_sharded(trained, removal))
    else:
        remove_groups(trained.model, removal, trained.optimizer)
        trained.replace(trained.loss, trained.parallel.wrap(trained.loss))


@torch.no_grad()
def _rebuild_sharded(trained: TrainedModel, removal: Removal) -> tuple[TrainingLoss, nn.Module]:
    """Gather one tensor at a time, slice it, and shard it again in a new, smaller model.

    Returns the new loss and the callable of a step. The optimizer's parameters and state are replaced in place.
    """
    model = trained.model
    config = copy.deepcopy(model.config)  # the larger model is read below
    update_config(config, removal)
    smaller, new_loss, wrapped = _empty_shards(trained, config, removal.after, torch.float32)
    smaller.generation_config = model.generation_config
    if removal.after.vocab_size != removal.before.vocab_size:
        _renumber(smaller, removal)
    _move_shards(model, smaller, removal, trained.optimizer)
    return new_loss, wrapped


def _empty_shards(
    trained: TrainedModel, config: Any, architecture: Architecture, dtype: torch.dtype
) -> tuple[Any, TrainingLoss, nn.Module]:
    """Return (a sharded model of this shape without values, its loss, the callable of a step)."""
    parallel = trained.parallel
    # sharded before it has memory: no rank ever holds the whole model
    with torch.device("meta"):
        model: Any = build(config, architecture).to(dtype)
    loss = trained.loss.around(model)
    wrapped = parallel.wrap(loss)
    model.to_empty(device=parallel.storage_device)
    model.tie_weights()  # `to_empty` gives a tied head memory of its own
    share_buffers(model, trained.model)
    return model, loss, wrapped


@torch.no_grad()
def frozen_loss(trained: TrainedModel) -> TrainingLoss:
    """Return the loss of a frozen copy of the model in the type of products, sharded as the model is."""
    loss, model = trained.loss, trained.model
    if trained.parallel.mode != "fsdp":
        return loss.around(frozen_copy(model, loss.dtype, trained.parallel.device))
    reshard(loss)  # the last forward pass may have left whole weights, and the copy below is shard by shard
    config = copy.deepcopy(model.config)
    former, former_loss, _ = _empty_shards(trained, config, architecture_of(config), loss.dtype)
    for parameter, copied in zip(model.parameters(), former.parameters(), strict=True):
        local(copied).copy_(local(parameter))
    former.eval().requires_grad_(False)
    return former_loss


def _move_shards(model: Any, smaller: Any, removal: Removal, optimizer: torch.optim.Optimizer) -> None:
    """Fill the shards of `smaller` with the surviving parts of `model`, and give its parameters to the optimizer."""
    replaced: dict[Tensor, Any] = {}
    new_parameters = dict(smaller.named_parameters())
    # `full` and `distribute_tensor` are collective: every rank visits the same parameters in the same order
    for name, old in model.named_parameters():
        state = optimizer.state.pop(old, None)
        new: Any = new_parameters.get(name)
        if new is None:  # of a removed block
            continue
        replaced[old] = new
        whole = full(old.detach())
        scatter(new, _shrunk_parameter(name, whole, removal))
        if state is not None:
            optimizer.state[new] = _move_state(name, state, new, removal)
    for group in optimizer.param_groups:
        group["params"] = [replaced[parameter] for parameter in group["params"] if parameter in replaced]


def _move_state(name: str, state: dict[str, Tensor], new: Any, removal: Removal) -> dict[str, Tensor]:
    """Return the surviving optimizer state of a parameter, sharded as its smaller successor `new`."""
    whole = {key: full(value) for key, value in state.items()}
    moved = {}
    for key, value in _shrunk_state(name, whole, removal).items():
        if _is_per_weight(value):
            value = distribute_tensor(value, new.device_mesh, new.placements)
        moved[key] = value
    return moved
