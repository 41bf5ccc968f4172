"""Read anybody's config.json as data: the family that computes it, and the widths that it gives to each layer.

Configurations of other tools are translated into settings of a family. No code of a folder is run. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base import flags
from ...runtime.base.errors import EfficientLLMError, ModelError
from ...runtime.base.model_names import source_path
from ...runtime.base.quantities import round_up
from ...runtime.latency.shape import WIDTHS
from .architecture import Architecture, layer_overrides
from .families import FAMILIES
from .folder_files import (
    PICKLE_FILE,
    TensorHeader,
    pickles,
    positive_number,
    read_json,
    tensor_headers,
    weight_files,
    whole_number,
)
from .gguf_source import header_settings, is_foreign_gguf
from .tensors import BUFFERS, EMBEDDING, HEAD, locate, tensor_names, tensor_shape

FAMILY_OF = dict.fromkeys(("deci", "decilm", "nemotron-nas", "darwinlm"), "llama") | {
    "openelm": "qwen3",
    "phi3": "mistral",
}
"""Model types of other tools -> the family with the same mathematics."""

NOT_SETTINGS = (
    *("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype"),
    *("quantization_config", "per_layer_config", "block_configs", "pruned_heads"),
)
"""Settings of a foreign config.json that ours must not have."""


@dataclass(frozen=True)
class ImportOptions:
    """Checkpoints and adapters of other tools."""

    head_dim: int | None = flags.number(None, at_least=1)
    """Channels of an attention head, where config.json and the tensors of a foreign checkpoint do not say it."""
    trust_remote_code: bool = False
    """Run the code of a foreign checkpoint once, to compare its logits with those of the import."""
    adapter: str = ""
    """Folder of a LoRA adapter of the source, as PEFT writes it. It is merged into the weights."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


DEFAULTS = ImportOptions()
Widths = dict[str, int]
"""Widths of a layer as far as a config gives them. 0 heads mean no attention, and a size of 0 means no FFN."""


def is_foreign(folder: Path) -> bool:
    """Tell whether a source's tensors are not those that its config.json, or transformers' of a GGUF, describes to us.

    Raises ModelError for a GGUF of an architecture that nothing here reads.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        return is_foreign_gguf(folder)
    if not folder.is_dir():
        return False
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type", "")).lower()
    if kind.startswith("efficientllm_") or not (kind in FAMILY_OF or kind in FAMILIES):
        return False
    headers = tensor_headers(folder)
    if not headers:
        return bool(weight_files(folder, PICKLE_FILE) or pickles(folder))
    try:
        architecture = Architecture.from_hf_config(config)
    except ModelError:
        return True
    unknown = {name for name in headers if not (BUFFERS.search(name) or name.endswith("inv_freq"))}
    for name in tensor_names(architecture):
        place = locate(architecture, name, headers)
        if place.name not in headers:
            return True
        unknown.discard(place.name)
        rows, *rest = headers[place.name].shape or (0,)
        if place.part is not None:  # one of three parts of a tensor, which are equal in the families that have them
            rows /= 3
        if (rows, *rest) != tensor_shape(architecture, name):
            return True
    head, embedding = (locate(architecture, name, headers).name for name in (HEAD, EMBEDDING))
    if head in unknown and _are_equal(headers, head, embedding):  # a tied head that is stored as well
        unknown.remove(head)
    return bool(unknown)


def known_shape(source: str) -> tuple[Architecture, int | None] | None:
    """Return (shape, context) of a local folder or GGUF file without reading its weights.

    None for other sources, for those that `load_source` refuses, and where only the weights tell the shape.
    """
    try:
        path = source_path(source)
        if is_foreign(path):
            return None
        config = header_settings(path) if path.suffix == ".gguf" else read_json(path / "config.json")
        return Architecture.from_hf_config(config), config.get("max_position_embeddings")
    except (EfficientLLMError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _are_equal(headers: Mapping[str, TensorHeader], first: str, second: str) -> bool:
    """Tell whether two stored tensors hold the same numbers."""
    import torch
    from safetensors import safe_open

    found = []
    for name in (first, second):
        with safe_open(headers[name].file, framework="pt") as stream:
            found.append(stream.get_tensor(name).float())
    return torch.equal(*found)


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the model type and the settings of the family that computes the model."""
    values = dict(config)
    kind = str(config.get("model_type", "")).lower()
    values["model_type"] = FAMILY_OF.get(kind, config.get("model_type"))
    if kind == "openelm":
        values |= {
            "hidden_size": config.get("model_dim"),
            "num_hidden_layers": config.get("num_transformer_layers"),
            "num_attention_heads": max(_numbers(config, "num_query_heads"), default=0),
            "num_key_value_heads": max(_numbers(config, "num_kv_heads"), default=0),
            "intermediate_size": 1,
            "max_position_embeddings": config.get("max_context_length"),
            "rope_theta": config.get("rope_freq_constant", 10000),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "tie_word_embeddings": bool(config.get("share_input_output_layers", True)),
            "hidden_act": config.get("activation_fn_name", "swish").replace("swish", "silu"),
        }
    if kind == "phi3":
        values.setdefault("sliding_window", None)  # Mistral's default is another
    return values


def stated_widths(config: Mapping[str, Any]) -> dict[int, Widths]:
    """Return {layer: widths} as config.json gives them per layer; empty if it only has global ones."""
    if config.get("block_configs"):
        return dict(enumerate(_of_block(config, block) for block in _objects(config, "block_configs")))
    if config.get("per_layer_config"):
        return {index: _of_overrides(values) for index, values in layer_overrides(config).items()}
    heads, groups, ffn = WIDTHS
    lists = {"layer_head_num": heads, "layer_head_num_kv": groups, "layer_inter_size": ffn}
    lists |= {"num_query_heads": heads, "num_kv_heads": groups, heads: heads, groups: groups, ffn: ffn}
    found: dict[int, Widths] = {}
    for name, width in lists.items():
        for index, number in enumerate(_numbers(config, name)):
            found.setdefault(index, {})[width] = number
    return found


def kept_queries(config: Mapping[str, Any], layer: int) -> list[int] | None:
    """Return the original query heads of a layer that `pruned_heads` of config.json leaves; None without it."""
    removed = config.get("pruned_heads") or {}
    if not isinstance(removed, Mapping):
        raise ModelError(f"config.json: pruned_heads is {removed!r}, but must be an object of layer numbers")
    of_layer = removed.get(str(layer))
    if of_layer is None:
        return None
    if not isinstance(of_layer, list):
        raise ModelError(f"config.json: pruned_heads of layer {layer} is {of_layer!r}, but must be a list of heads")
    return [head for head in range(whole_number(config, "num_attention_heads")) if head not in of_layer]


def _of_overrides(values: Mapping[str, Any]) -> Widths:
    """Return the widths of transformers' per_layer_config, in which `skip` names absent blocks."""
    found = {name: whole_number(values, name) for name in WIDTHS if name in values}
    skipped = values.get("skip") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise ModelError(f"config.json: skip is {skipped!r}, but must be a list of names")
    for name in skipped:
        if "attention" in name or "attn" in name:
            found |= {WIDTHS[0]: 0, WIDTHS[1]: 0}
        elif "mlp" in name or "ffn" in name:
            found[WIDTHS[2]] = 0
        else:
            raise ModelError(f"config.json: per_layer_config skips {name!r}; only an attention or an mlp can be absent")
    return found


def _of_block(config: Mapping[str, Any], block: Mapping[str, Any]) -> Widths:
    """Return the widths of one entry of block_configs (DeciLM, Llama-Nemotron, Puzzletron)."""
    attention, ffn = block.get("attention") or {}, block.get("ffn") or {}
    for values in (block, attention, ffn):
        if not isinstance(values, Mapping):
            raise ModelError(f"config.json: block_configs has {values!r} where an object should be")
        for name in ("replace_with_linear", "parallel_blocks", "moe", "mamba", "llama4", "window_length", "sparsify"):
            if values.get(name):
                raise ModelError(f"config.json: {name} in block_configs is not supported: no family describes it")
    found: Widths = {}
    heads = whole_number(config, "num_attention_heads")
    if attention.get("no_op"):
        found |= {WIDTHS[0]: 0, WIDTHS[1]: 0}
    elif attention.get("n_heads_in_group"):
        found |= {WIDTHS[0]: heads, WIDTHS[1]: heads // whole_number(attention, "n_heads_in_group", least=1)}
    elif attention.get("num_key_value_heads"):
        found |= {WIDTHS[0]: heads, WIDTHS[1]: whole_number(attention, "num_key_value_heads")}
    if ffn.get("no_op"):
        found[WIDTHS[2]] = 0
    elif ffn.get("intermediate_size"):
        found[WIDTHS[2]] = whole_number(ffn, "intermediate_size")
    elif ffn.get("ffn_mult"):
        # as DeciLM's own code computes it
        width = int(2 * positive_number(ffn, "ffn_mult") * whole_number(config, "hidden_size") / 3)
        found[WIDTHS[2]] = round_up(width, 256)
    return found


def _numbers(config: Mapping[str, Any], name: str) -> list[int]:
    values = config.get(name)
    if values is None or isinstance(values, int):
        return []
    if not isinstance(values, list) or not all(isinstance(value, int) and value >= 0 for value in values):
        raise ModelError(f"config.json: {name} is {values!r}, but must be a list of whole numbers")
    return values


def _objects(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    values = config[name]
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise ModelError(f"config.json: {name} is not a list of objects")
    return values
