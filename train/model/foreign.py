"""Read checkpoints of other pruning tools, whose layers differ from config.json or from each other.

Widths, head counts and absent blocks are those of the tensors. config.json gives the family, head_dim and all other
settings. Where it gives widths per layer as well, they must agree. What no family computes is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ...runtime.base.errors import ModelError
from .architecture import Architecture, LayerShape, layer_count
from .attention import layer_attention
from .families import BIASES, FAMILIES, Family, family_of
from .folder_files import read_json, refuse_quantized, whole_number
from .foreign_configs import NOT_SETTINGS, Widths, kept_queries, stated_widths, translated
from .gguf_source import read_gguf
from .stored_tensors import OPENELM, Stored, our_names, read_stored, unfused, zeros
from .tensors import EMBEDDING, HEAD, block_norms, layer_tensors, split_name, tensor_names, tensor_shape

MAY_GAIN_BIASES = ("llama", "mistral", "qwen2")
"""Families whose layers are those of llama_bias with some biases zero."""
WINDOW_SETTINGS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
LISTS = ("layer_types", "no_rope_layers")
"""Settings with a value for each layer."""

COMPUTED = "hidden_size / heads of config.json"
"""Source of a head_dim that nothing states."""

Tensors = dict[str, Stored]


@dataclass(frozen=True)
class ForeignModel:
    """A checkpoint of another tool with its tensors under our names."""

    model_type: str
    """Model type in its config.json."""
    settings: Mapping[str, Any]
    """Settings for a class of the family."""
    architecture: Architecture
    tensors: Mapping[str, Stored]
    """All tensors of `architecture`."""
    head_dim_source: str
    doubts: tuple[str, ...] = ()
    """Readings that the shapes allow and do not prove, for the user."""
    added_heads: int = 0
    """Query heads of zeros that give groups the same size."""

    def table(self) -> list[str]:
        """Return lines with the shape: the stem, then layers, with equal neighbours together."""
        shape, head = self.architecture, "tied" if self.architecture.tie_word_embeddings else "untied"
        lines = [
            f"read by shape: {shape.family}, hidden {shape.hidden_size}, head_dim {shape.head_dim} "
            f"({self.head_dim_source}), vocabulary {shape.vocab_size} ({head}), {shape.num_parameters:,} parameters"
        ]
        for layer, group in groupby(enumerate(shape.layers), key=lambda each: each[1]):
            indices = [index for index, _ in group]
            number = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
            heads = (
                f"{layer.num_attention_heads} over {layer.num_key_value_heads}" if layer.num_attention_heads else "-"
            )
            lines.append(f"  layer {number:>7}   heads {heads:>8}   FFN {layer.intermediate_size or '-':>6}")
        if self.added_heads:
            lines.append(f"  {self.added_heads} query heads of zeros give unequal groups one size (the same function)")
        return lines


def read_foreign(folder: Path, called: str, given_head_dim: int | None = None) -> ForeignModel:
    """Read the shape of a folder or GGUF file and find its tensors. Raises ModelError for what no family computes."""
    original, tensors = read_gguf(folder) if folder.suffix == ".gguf" else _read_folder(folder, called)
    config, stated = translated(original), stated_widths(original)
    kind = str(original["model_type"]).lower()
    family = _family(config)
    head_dim, source = _head_dim(config, tensors, FAMILIES[family], given_head_dim)
    tensors = _present(unfused(tensors, head_dim), stated)
    # a tool may leave the mean output of what it removed as a bias, which the family's own layers lack
    biases = [name for name in tensors if name.endswith("_proj.bias")]
    foreign_biases = [name for name in biases if split_name(name)[1] not in layer_tensors(family)]
    if foreign_biases:
        if family not in MAY_GAIN_BIASES:
            raise ModelError(f"{called}: {family} has no bias {foreign_biases[0]}, and no other family has its parts")
        has_window = family == "mistral" or config.get("use_sliding_window")
        config = _without_window(config) if has_window else _without(config, WINDOW_SETTINGS)
        family, tensors = "llama_bias", _with_biases(tensors, head_dim)
    config |= {name: FAMILIES[family].described.get(name, value) for name, value in BIASES.items()}
    FAMILIES[family].check(config)
    layers = _layers(tensors, head_dim, called)
    _check_stated(stated, layers)
    tensors, grouped, added = _with_equal_groups(tensors, layers, original, head_dim)
    doubts = _doubts(layers, stated, original)
    if source == COMPUTED:
        doubt = f"head_dim {head_dim} is only computed ({source}); if the tool changed one of the two, give --head-dim"
        doubts += (doubt,)
    vocab_size, hidden_size = _matrix(tensors, EMBEDDING)
    is_tied = bool(config.get("tie_word_embeddings", FAMILIES[family].ties_by_default))
    if is_tied and HEAD in tensors and not torch.equal(*(tensors[each].read().float() for each in (HEAD, EMBEDDING))):
        # as transformers does
        is_tied, doubts = False, (*doubts, "config.json ties the head, but another one is stored, and is used")
    architecture = Architecture(
        family=family,
        hidden_size=hidden_size,
        head_dim=head_dim,
        vocab_size=vocab_size,
        tie_word_embeddings=is_tied,
        layers=grouped,
    )
    tensors = _checked(tensors, architecture, called)
    return ForeignModel(kind, _settings(config, architecture), architecture, tensors, source, doubts, added)


def _present(tensors: Tensors, stated: Mapping[int, Widths]) -> Tensors:
    """Return the tensors of present blocks. Tools mark an absent block in config.json, or save it with a width of 0."""
    found = {}
    for name, tensor in tensors.items():
        is_table = name.endswith("inv_freq")  # of the rotary embedding, which config.json describes
        is_empty = not math.prod(tensor.shape)
        if not (is_table or is_empty or _is_off(name, stated)):
            found[name] = tensor
    return found


def _family(config: Mapping[str, Any]) -> str:
    """Return the family without regard to biases of projections, which the tensors show."""
    return family_of({**config, "attention_bias": False})


def _read_folder(folder: Path, called: str) -> tuple[dict[str, Any], Tensors]:
    """Return (config.json, tensors under our names)."""
    config = read_json(folder / "config.json")
    refuse_quantized(config, called)
    names = FAMILIES[_family(translated(config))].stock_names
    if str(config["model_type"]).lower() == "openelm":
        names = OPENELM
    return config, our_names(read_stored(folder), names)


def _without(config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _without_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with a context that ends at the window, over which both families agree."""
    positions = whole_number(config, "max_position_embeddings")
    window = whole_number(config, "sliding_window", positions) or positions
    return {**_without(config, WINDOW_SETTINGS), "max_position_embeddings": min(positions, window)}


def _matrix(tensors: Mapping[str, Stored], name: str) -> tuple[int, int]:
    """Return (rows, columns) of a matrix; zeros if it is absent."""
    shape = tensors[name].shape if name in tensors else (0, 0)
    if len(shape) != 2:
        raise ModelError(f"tensor {name} has shape {shape}, but must be a matrix")
    return shape[0], shape[1]


def _head_dim(config: Mapping[str, Any], tensors: Tensors, parts: Family, given: int | None) -> tuple[int, str]:
    """Return (channels of a head, their source)."""
    queries = {_matrix(tensors, name)[1] for name in tensors if name.endswith("o_proj.weight")}
    rows = queries | {_matrix(tensors, name)[0] for name in tensors if name.endswith("k_proj.weight")}
    norms = _lengths(tensors, "q_norm.weight") if parts.qk_norm == "head" else []
    tables = [] if parts.has_partial_rotary else _lengths(tensors, "rotary_emb.inv_freq")
    stated = {
        "--head-dim": given,
        "config.json": config.get("head_dim"),
        "q_norm": norms[0] if norms else None,
        "rotary table": 2 * tables[0] if tables else None,
    }
    for source, value in stated.items():
        if value is not None:
            size = whole_number({"head_dim": value}, "head_dim", least=1)
            if any(row % size for row in rows):
                raise ModelError(f"head_dim {size} ({source}) does not divide the {sorted(rows)} rows of q and k")
            return size, source
    heads = whole_number(config, "num_attention_heads", least=1)
    # A config without head_dim means hidden_size / heads. Some tools change these two numbers and others do not. So a
    # model with equal layers, or with more heads than config.json has, may have a second reading.
    computed = whole_number(config, "hidden_size") // heads
    is_doubtful = len(queries) == 1 or max(queries, default=0) > computed * heads
    readings = {computed, *(row // heads for row in queries if is_doubtful and row % heads == 0)}
    fitting = sorted(size for size in readings if size and not any(row % size for row in rows))
    if len(fitting) != 1:
        which = f"may be {' or '.join(map(str, fitting))}" if fitting else f"divides no {sorted(rows)} rows of q and k"
        raise ModelError(f"head_dim is not in config.json and {which}; give --head-dim, or add it to config.json")
    return fitting[0], COMPUTED


def _lengths(tensors: Tensors, ending: str) -> list[int]:
    return [each.shape[0] for name, each in tensors.items() if name.endswith(ending) and each.shape]


def _is_off(name: str, stated: Mapping[int, Widths]) -> bool:
    """Tell whether config.json removes the block of a tensor."""
    layer, suffix = split_name(name)
    widths = stated.get(layer, {}) if layer is not None else {}
    block = "num_attention_heads" if suffix.startswith("self_attn.") else "intermediate_size"
    return suffix.startswith(("self_attn.", "mlp.")) and widths.get(block) == 0


BLOCKS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def _with_biases(tensors: Tensors, head_dim: int) -> Tensors:
    """Return the tensors with a bias in every projection.

    A bias that is all of a block needs one head or one channel of zeros.
    """
    found, hidden = dict(tensors), _matrix(tensors, EMBEDDING)[1]
    for name in tensors:
        stem, _, output = name.removesuffix(".bias").rpartition(".")
        block = stem.rpartition(".")[2]
        if not name.endswith("_proj.bias") or block not in BLOCKS or output != BLOCKS[block][-1]:
            continue
        if f"{stem}.{output}.weight" in tensors:
            continue
        # such a bias needs a block to belong to, and zeros before it add nothing
        if tensors[name].read().any():
            width = head_dim if block == "self_attn" else 1
            found |= {f"{stem}.{each}.weight": zeros(width, hidden) for each in BLOCKS[block][:-1]}
            found[f"{stem}.{output}.weight"] = zeros(hidden, width)
        else:
            del found[name]
    projections = tuple(f"{block}.{each}.weight" for block, names in BLOCKS.items() for each in names)
    for name in [name for name in found if name.endswith(projections)]:
        found.setdefault(name.removesuffix("weight") + "bias", zeros(found[name].shape[0]))
    return found


def _layers(tensors: Tensors, head_dim: int, called: str) -> tuple[LayerShape, ...]:
    """Return the widths of every layer up to the last number. Numbers without tensors are empty layers."""
    numbers = {layer for layer, _ in map(split_name, tensors) if layer is not None}
    if not numbers or EMBEDDING not in tensors:
        lacking = f"layers (model.layers.N) in {len(tensors)} tensors" if not numbers else EMBEDDING
        raise ModelError(f"{called}: the weights have no {lacking}; give the whole model")
    # damaged names could otherwise ask for a list of millions of empty layers
    if max(numbers) > 4 * len(numbers) + 64:
        raise ModelError(f"{called}: layer {max(numbers)} of {len(numbers)} layers; the names of tensors are damaged")

    def width(layer: int, matrix: str) -> int:
        return _matrix(tensors, f"model.layers.{layer}.{matrix}.weight")[0]

    return tuple(
        LayerShape(
            width(layer, "self_attn.q_proj") // head_dim,
            width(layer, "self_attn.k_proj") // head_dim,
            width(layer, "mlp.up_proj"),
        )
        for layer in range(max(numbers) + 1)
    )


def _check_stated(stated: Mapping[int, Widths], layers: tuple[LayerShape, ...]) -> None:
    """Raise ModelError if config.json gives a layer other widths than its tensors have."""
    for layer, widths in stated.items():
        shape = layers[layer] if layer < len(layers) else LayerShape(0, 0, 0)
        for name, width in widths.items():
            if getattr(shape, name) != width:
                raise ModelError(
                    f"config.json gives layer {layer} a {name} of {width}, but its tensors have {getattr(shape, name)}"
                )


def _doubts(layers: tuple[LayerShape, ...], stated: Mapping[int, Widths], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a line about layers with other heads in a group than config.json says, if nothing says which were removed.

    Shapes do not tell whether every group lost as many.
    """
    heads, groups = (config.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(heads, int) or not isinstance(groups, int) or not groups:
        return ()
    changed = {
        f"{layer.num_attention_heads} over {layer.num_key_value_heads}"
        for index, layer in enumerate(layers)
        if layer.num_attention_heads and layer.queries_per_group * groups != heads
        if "num_attention_heads" not in stated.get(index, {}) and kept_queries(config, index) is None
    }
    if not changed:
        return ()
    return (
        f"query over key/value heads are read as {', '.join(sorted(changed))} instead of {heads} over {groups}, which "
        "is right only if every group lost as many",
    )


def _with_equal_groups(
    tensors: Tensors, layers: tuple[LayerShape, ...], config: Mapping[str, Any], head_dim: int
) -> tuple[Tensors, tuple[LayerShape, ...], int]:
    """Return (tensors, layers, added heads) with as many query heads over each key/value head of a layer.

    config.json's `pruned_heads` says which query heads are left. Smaller groups are filled with heads of zeros, and
    key/value heads that no query reads are left out.
    """
    found, shapes, added = dict(tensors), list(layers), 0
    for index, layer in enumerate(layers):
        heads, groups, kept = layer.num_attention_heads, layer.num_key_value_heads, kept_queries(config, index)
        if not groups or (kept is None and heads % groups == 0):
            continue
        before = whole_number(config, "num_attention_heads")
        groups_before = whole_number(config, "num_key_value_heads", before)
        per_group, rest = divmod(before, groups)
        if kept is not None and len(kept) == heads == groups and before == groups_before:
            continue  # every query head has its own keys and values, which were removed with it
        if kept is None or len(kept) != heads or rest or groups != groups_before:
            raise ModelError(
                f"layer {index} has {heads} query heads over {groups} key/value heads, and nothing says which head "
                'reads which; list the removed heads in config.json as "pruned_heads": {"' + str(index) + '": [...]}'
            )
        # `kept` numbers the heads before the removal, when each group had `per_group` of them
        members: list[list[int]] = [[] for _ in range(groups)]
        for at, head in enumerate(kept):
            if head // per_group < groups:
                members[head // per_group].append(at)
        size = max(map(len, members))
        used = [group for group in range(groups) if members[group]]
        # the place `heads` after the last head is a head of zeros
        queries: list[int] = []
        for group in used:
            queries += members[group] + [heads] * (size - len(members[group]))
        prefix = f"model.layers.{index}.self_attn."
        for name in [name for name in found if name.startswith(prefix) and "_norm" not in name]:
            positions = used if name.startswith((f"{prefix}k_", f"{prefix}v_")) else queries
            if name != f"{prefix}o_proj.bias":
                found[name] = _picked(found[name], positions, head_dim, int(name == f"{prefix}o_proj.weight"))
        shapes[index] = replace(layer, num_attention_heads=len(queries), num_key_value_heads=len(used))
        added += len(queries) - heads
    return found, tuple(shapes), added


def _picked(tensor: Stored, positions: list[int], head_dim: int, axis: int) -> Stored:
    """Return the heads at `positions` along an axis. The position after the last one is a head of zeros."""

    def pick(whole: torch.Tensor) -> torch.Tensor:
        heads = whole.unflatten(axis, (-1, head_dim))
        with_zeros = torch.cat([heads, torch.zeros_like(heads.narrow(axis, 0, 1))], axis)
        return with_zeros.index_select(axis, torch.tensor(positions)).flatten(axis, axis + 1)

    shape = list(tensor.shape)
    shape[axis] = len(positions) * head_dim
    return tensor.changed(tuple(shape), pick)


def _settings(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the settings for a class of the family, with the lists of layers as long as the model."""
    values, count = _without(config, NOT_SETTINGS), len(architecture.layers)
    before = max(layer_count(config, count), count)
    for name in LISTS:
        listed = values.pop(name, None)
        if isinstance(listed, list) and listed:
            values[name] = listed if len(set(map(str, listed))) > 1 else listed[:1] * before
    whole = replace(architecture, layers=architecture.layers[:1] * before)
    attention = {(layer.rotary_key, layer.window) for layer in layer_attention(values, whole)}
    values |= {name: values[name][:count] for name in LISTS if name in values}
    if count < before and len(attention) > 1:
        raise ModelError(
            f"config.json has {before} layers of unequal attention and the file {count}: nothing says which were "
            "removed; set num_hidden_layers and layer_types (no_rope_layers) to those of the remaining ones"
        )
    # the global widths of the file may contradict each other
    counts = {"num_hidden_layers": count, "tie_word_embeddings": architecture.tie_word_embeddings}
    return {**values, **asdict(architecture.widest), **counts}


def _checked(tensors: Tensors, architecture: Architecture, called: str) -> Tensors:
    """Return the tensors of the architecture. Raises ModelError for a missing, unknown or misshapen one."""
    names, parts = tensor_names(architecture), architecture.parts
    norms = block_norms(parts, "attention") + block_norms(parts, "ffn") + ("self_attn.q_norm", "self_attn.k_norm")
    for name in sorted(set(tensors) - set(names)):
        is_tied_head, suffix = name == HEAD and architecture.tie_word_embeddings, split_name(name)[1]
        # an absent block may leave its norms
        is_norm = suffix in layer_tensors(architecture.family) and suffix.rpartition(".")[0] in norms
        if not is_tied_head and not is_norm:
            raise ModelError(f"{called}: tensor {name} belongs to no part of {architecture.family}")
    for name in names:
        if name not in tensors:
            raise ModelError(f"{called}: the weights lack tensor {name}; is the checkpoint complete?")
        expected = tensor_shape(architecture, name)
        if tensors[name].shape != expected:
            raise ModelError(f"{called}: tensor {name} has shape {tensors[name].shape}, the others imply {expected}")
    return {name: tensors[name] for name in names}
