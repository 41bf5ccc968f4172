"""`--target hf-uniform`: a plain, zero-padded model of the same function and family in one file of safetensors.

It is for servers without support for irregular shapes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import ArtefactError
from ..runtime.base.files import require_room
from ..train.model.architecture import Architecture
from ..train.model.folder_files import mend_tokenizer_config, write_config
from ..train.model.tensors import to_stock
from .checkpoint import Checkpoint
from .manifest import Contents, copy_tokenizer, write_manifest
from .padding import padded_tensors, stock_architecture, stock_scales
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
    from safetensors.numpy import save_file

    before, after = checkpoint.architecture, stock_architecture(checkpoint)
    layer = after.layers[0]
    request.say(
        f"padded to {layer.num_attention_heads} query heads, {layer.num_key_value_heads} key/value heads, "
        f"FFN {layer.intermediate_size}, hidden {after.hidden_size} in every layer: "
        f"{before.num_parameters:,} -> {after.num_parameters:,} parameters"
    )
    request.clock.begin("writing")
    tensors = to_stock(_stored_gains(checkpoint, after), after, np.stack)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    require_room(folder / MODEL_FILE, sum(tensor.nbytes for tensor in tensors.values()))
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    config = uniform_config(checkpoint, after)
    write_config(config, folder)
    files = [MODEL_FILE, "config.json", *copy_tokenizer(checkpoint, folder)]
    mend_tokenizer_config(folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        shutil.copy(checkpoint.folder / "generation_config.json", folder)
        files.append("generation_config.json")
    verification = _verify(checkpoint, request, folder) if request.options.verify else {}
    contents = Contents(
        engine="transformers",  # no engine of ours: chat, server and bench say so
        files=files,
        quantization="f32",
        weight_bytes=sum(array.nbytes for array in tensors.values()),
        layout=f"transformers {config['architectures'][0]}",
        verification=verification,
    )
    write_manifest(checkpoint, request, folder, contents)


EXPORTER = Exporter(HfUniformOptions, export_hf_uniform)


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
    checkpoint: Checkpoint, request: ExportRequest[HfUniformOptions], folder: Path
) -> dict[str, dict[str, object]]:
    """Compare the written model with the checkpoint, both in torch."""
    request.clock.begin("verifying")
    sample = torch_sample(checkpoint)
    agreement = compare_logits(sample.logits, torch_logits(folder, sample.tokens), sample.tokens)
    difference = agreement.max_logit_difference
    request.say(f"verified: logits differ by at most {difference:.1e} over {agreement.tokens} tokens")
    if not difference <= MAX_LOGIT_DIFFERENCE:  # NaN is no agreement
        raise ArtefactError(
            f"the written model: logits differ by {difference:.1e}, more than {MAX_LOGIT_DIFFERENCE:.0e}"
        )
    return {"exact": agreement.to_dict()}
