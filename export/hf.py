"""`--target hf-uniform` and `--target hf`: the model in one file of safetensors that stock readers load.

hf-uniform is a plain, zero-padded model of the same function and family, for servers without support for irregular
shapes. hf is an irregular Llama in the format of Llama-Nemotron (model type nemotron-nas, `block_configs`), which vLLM
and TensorRT-LLM read as DeciLMForCausalLM. There, a layer has its own key/value heads and FFN width, and may lack
either block. All layers have the same number of query heads, so zero heads fill the others (exact).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import ArtefactError, ModelError
from ..runtime.base.files import require_room
from ..train.model.architecture import Architecture, LayerShape
from ..train.model.folder_files import mend_tokenizer_config, write_config
from ..train.model.tensors import to_stock
from .checkpoint import Checkpoint
from .manifest import Contents, copy_tokenizer, write_manifest
from .padding import padded_tensors, padding_notes, stock_architecture, stock_scales
from .request import ExportRequest, VerifyOptions
from .targets import Exporter
from .verification import MAX_LOGIT_DIFFERENCE, compare_logits, torch_logits, torch_sample

MODEL_FILE = "model.safetensors"

OWN_SETTINGS = ("per_layer_config", "auto_map", "model_file", "qk_norm_eps", "norm_scale", "embedding_scale")
"""Settings of config.json for our modeling files."""


@dataclass(frozen=True)
class HfUniformOptions(VerifyOptions):
    """--target hf-uniform."""


def export_hf_uniform(checkpoint: Checkpoint, request: ExportRequest[HfUniformOptions], folder: Path) -> None:
    """Write the padded model into `folder` and compare its logits with the checkpoint's (within 1e-4)."""
    before, after = checkpoint.architecture, stock_architecture(checkpoint)
    layer = after.layers[0]
    request.say(
        f"padded to {layer.num_attention_heads} query heads, {layer.num_key_value_heads} key/value heads, "
        f"FFN {layer.intermediate_size}, hidden {after.hidden_size} in every layer: "
        f"{before.num_parameters:,} -> {after.num_parameters:,} parameters"
    )
    write_model(checkpoint, request, folder, after, uniform_config(checkpoint, after), torch_logits)


def write_model(
    checkpoint: Checkpoint,
    request: ExportRequest[Any],
    folder: Path,
    after: Architecture,
    config: dict[str, Any],
    read_logits: Callable[[Path, list[int]], np.ndarray],
) -> None:
    """Write the checkpoint's function in shape `after` under the stock names, with `config` as config.json.

    `read_logits(folder, tokens)` gives the logits of the written model, which are compared with the checkpoint's.
    """
    from safetensors.numpy import save_file

    request.clock.begin("writing")
    tensors = to_stock(_stored_gains(checkpoint, after), after, np.stack)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    require_room(folder / MODEL_FILE, sum(tensor.nbytes for tensor in tensors.values()))
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    write_config(config, folder)
    files = [MODEL_FILE, "config.json", *copy_tokenizer(checkpoint, folder)]
    mend_tokenizer_config(folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        shutil.copy(checkpoint.folder / "generation_config.json", folder)
        files.append("generation_config.json")
    verification = _verify(checkpoint, request, folder, read_logits) if request.options.verify else {}
    contents = Contents(
        engine="transformers",  # no engine of ours: chat, server and bench say so
        files=files + [path.name for path in folder.glob("*.py")],
        quantization="f32",
        weight_bytes=sum(array.nbytes for array in tensors.values()),
        layout=f"transformers {config['architectures'][0]}",
        verification=verification,
    )
    write_manifest(checkpoint, request, folder, contents)


UNIFORM = Exporter(HfUniformOptions, export_hf_uniform)


def _stored_gains(checkpoint: Checkpoint, after: Architecture) -> dict[str, np.ndarray]:
    """Return the tensors in shape `after`, with the family's offset subtracted from gains."""
    offset = after.parts.norm.gain_offset
    stored = {}
    for name, array in padded_tensors(checkpoint, after, stock_scales(checkpoint, after)):
        is_offset_gain = offset and name.endswith("norm.weight")
        stored[name] = array - offset if is_offset_gain else array
    return stored


def uniform_config(checkpoint: Checkpoint, after: Architecture) -> dict[str, Any]:
    """Return config.json of the stock class in shape `after`."""
    dropped = (*OWN_SETTINGS, "model_type", "architectures", "dtype", "torch_dtype")
    config = {name: value for name, value in checkpoint.config.items() if name not in dropped}
    layer = after.layers[0]
    norm = after.parts.norm
    eps = {norm.eps_setting: stock_scales(checkpoint, after).stem_eps} if norm.stock_eps is None else {}
    return {
        "architectures": [after.parts.stock_class],
        "model_type": after.model_type,
        "dtype": "float32",
        **config,
        "hidden_size": after.hidden_size,
        "head_dim": after.head_dim,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "intermediate_size": layer.intermediate_size,
        "tie_word_embeddings": after.tie_word_embeddings,
        **eps,
    }


def _verify(
    checkpoint: Checkpoint,
    request: ExportRequest[Any],
    folder: Path,
    read_logits: Callable[[Path, list[int]], np.ndarray],
) -> dict[str, dict[str, object]]:
    """Compare the written model with the checkpoint, both in torch."""
    request.clock.begin("verifying")
    sample = torch_sample(checkpoint)
    agreement = compare_logits(sample.logits, read_logits(folder, sample.tokens), sample.tokens)
    difference = agreement.max_logit_difference
    request.say(f"verified: logits differ by at most {difference:.1e} over {agreement.tokens} tokens")
    if not difference <= MAX_LOGIT_DIFFERENCE:  # NaN is no agreement
        raise ArtefactError(
            f"the written model: logits differ by {difference:.1e}, more than {MAX_LOGIT_DIFFERENCE:.0e}"
        )
    return {"exact": agreement.to_dict()}


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
        "num_key_value_heads": after.widest.num_key_value_heads,
        "intermediate_size": after.widest.intermediate_size,
        "block_configs": [_block(layer, after.hidden_size) for layer in after.layers],
    }
    write_model(checkpoint, request, folder, after, config, _imported_logits)


BLOCKS = Exporter(HfOptions, export_hf)


def block_architecture(architecture: Architecture) -> Architecture:
    """Return the smallest shape with the same number of query heads in every attention."""
    ratio = max(1, *(layer.queries_per_group for layer in architecture.layers))
    least, groups = architecture.widest.num_attention_heads, architecture.widest.num_key_value_heads
    shapes = (_with_heads(architecture, heads) for heads in range(least, groups * ratio + 1))
    return min((shape for shape in shapes if shape), key=lambda shape: shape.num_parameters)


def _with_heads(architecture: Architecture, heads: int) -> Architecture | None:
    """Return the shape with `heads` query heads in every attention; None if a layer's groups do not divide them."""
    layers = []
    for index, layer in enumerate(architecture.layers):
        # a first layer without attention gets one, because vLLM begins the residual stream there
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
