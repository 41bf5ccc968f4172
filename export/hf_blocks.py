"""`--target hf`: an irregular Llama in the format of Llama-Nemotron (model type nemotron-nas, `block_configs`).

vLLM and TensorRT-LLM read it as DeciLMForCausalLM. A layer has its own key/value heads and FFN width, and may lack
either block. All layers have the same number of query heads, so zero heads fill the others (exact).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import ModelError
from ..train.model.architecture import Architecture, LayerShape
from .checkpoint import Checkpoint
from .hf_uniform import uniform_config, write_model
from .padding import padding_notes
from .request import ExportRequest, VerifyOptions
from .targets import Exporter

FFN_MULTIPLE = 256
"""Readers round the width that `ffn_mult` gives up to this multiple. TensorRT-LLM reads no other width."""

CONFIGURATION = Path(__file__).with_name("configuration_nemotron_nas.py")
"""Code of the configuration, which imports transformers."""


@dataclass(frozen=True)
class HfOptions(VerifyOptions):
    """--target hf."""


def export_hf(checkpoint: Checkpoint, request: ExportRequest[HfOptions], folder: Path) -> None:
    """Write the model into `folder`, read it back by the import and compare logits (within 1e-4)."""
    before = checkpoint.architecture
    if before.family != "llama":
        raise ModelError(f"--target hf writes the family llama, not {before.family}; use --target hf-uniform")
    after = block_architecture(before)
    for note in padding_notes(before, after):
        request.say(note)
    odd = sum(layer.intermediate_size % FFN_MULTIPLE != 0 for layer in after.layers)
    if odd:
        request.say(
            f"{odd} of {len(after.layers)} FFN widths are no multiple of {FFN_MULTIPLE}: vLLM reads them, TensorRT-LLM "
            f"does not (train with --width-multiple {FFN_MULTIPLE})"
        )
    shutil.copy(CONFIGURATION, folder)
    config = uniform_config(checkpoint, after) | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CONFIGURATION.stem}.NemotronNasConfig"},
        "num_key_value_heads": max(layer.num_key_value_heads for layer in after.layers),
        "intermediate_size": max(layer.intermediate_size for layer in after.layers),
        "block_configs": [_block(layer, after.hidden_size) for layer in after.layers],
    }
    write_model(checkpoint, request, folder, after, config, _imported_logits)


EXPORTER = Exporter(HfOptions, export_hf)


def block_architecture(architecture: Architecture) -> Architecture:
    """Return the smallest shape with the same number of query heads in every attention.

    A first layer without attention gets one, because vLLM begins the residual stream there.
    """
    groups = max(1, *(layer.num_key_value_heads for layer in architecture.layers))
    ratio = max(1, *(layer.queries_per_group for layer in architecture.layers))
    least = max(1, *(layer.num_attention_heads for layer in architecture.layers))
    shapes = (_with_heads(architecture, heads) for heads in range(least, groups * ratio + 1))
    return min((shape for shape in shapes if shape), key=lambda shape: shape.num_parameters)


def _with_heads(architecture: Architecture, heads: int) -> Architecture | None:
    """Return the shape with `heads` query heads in every attention; None if a layer's groups do not divide them."""
    layers = []
    for index, layer in enumerate(architecture.layers):
        if layer.num_attention_heads or not index:
            least, ratio = max(layer.num_key_value_heads, 1), layer.queries_per_group
            fitting = (n for n in range(least, heads + 1) if heads % n == 0 and heads // n >= ratio)
            groups = next(fitting, 0)
            if not groups:
                return None
            layer = replace(layer, num_attention_heads=heads, num_key_value_heads=groups)
        layers.append(layer)
    return replace(architecture, layers=tuple(layers))


def _block(layer: LayerShape, hidden_size: int) -> dict[str, Any]:
    """Return the entry of block_configs of a layer."""
    groups, width = layer.num_key_value_heads, layer.intermediate_size
    attention = {"no_op": not groups, "n_heads_in_group": layer.queries_per_group or None, "replace_with_linear": False}
    ffn: dict[str, Any] = {"no_op": not width, "replace_with_linear": False}
    if width and width % FFN_MULTIPLE == 0:
        # readers truncate 2 * ffn_mult * hidden_size / 3 and round up, so the middle of the last 256 is safe
        ffn["ffn_mult"] = 3 * (width - FFN_MULTIPLE / 2) / (2 * hidden_size)
    elif width:
        ffn["intermediate_size"] = width
    return {"attention": attention, "ffn": ffn}


def _imported_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """Return the logits [S, V] of a folder as --source of efficientllm-train reads it."""
    import torch

    from ..train.model.foreign_configs import DEFAULTS
    from ..train.model.importing import import_folder

    model = import_folder(folder, str(folder), DEFAULTS).model
    model.set_attn_implementation("eager")  # as torch_logits
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
