"""Build irregular models, convert them from and to stock classes, and save them in a loadable form.

A decoder adds one block after the other to the residual stream, attention and FFN in turn, each with its own norms. A
layer without both is therefore removed. The attention of a layer without FFN and the FFN of a later layer without
attention, with nothing between them, form one layer. Parallel blocks are excluded, because the FFN would no longer read
the output of the attention. The function stays exactly the same.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ...runtime.base.files import require_room
from . import modeling_efficientllm as modeling
from .architecture import Architecture
from .folder_files import mend_tokenizer_config, write_config
from .rescaling import Scales, rescaled, scale_factor, untied
from .tensors import EMBEDDING, HEAD, Packed, from_stock, packed, to_stock

modeling.register()

MLX_FILE = Path(modeling.__file__).with_name("modeling_mlx.py")
"""Modeling file for mlx-lm."""
FOLDER_SETTINGS = ("per_layer_config", "auto_map", "model_file")
"""Settings of config.json that only irregular folders have."""


def architecture_of(config: Any) -> Architecture:
    """Return the shape that a configuration of transformers describes."""
    return Architecture.from_hf_config(config.to_dict())


def apply_architecture(config: Any, architecture: Architecture) -> None:
    """Set an irregular config's widths in place. The global values become those of the widest layer."""
    config.per_layer_config = None
    config.hidden_size, config.vocab_size = architecture.hidden_size, architecture.vocab_size
    config.head_dim = architecture.head_dim
    for width, value in asdict(architecture.widest).items():
        setattr(config, width, value)
    if any(layer != architecture.widest for layer in architecture.layers):
        config.per_layer_config = {index: asdict(layer) for index, layer in enumerate(architecture.layers)}


def irregular_config(config: Any, architecture: Architecture) -> Any:
    """Return the efficientllm config of `architecture` with the other settings of `config`."""
    return config_of(config.to_dict(), architecture, getattr(config, "_attn_implementation", None))


def config_of(settings: Mapping[str, Any], architecture: Architecture, attention: str | None = None) -> Any:
    """Return the efficientllm config of `architecture` with other `settings` and an implementation of attention."""
    values = dict(settings)
    for name in ("model_type", "architectures", *FOLDER_SETTINGS, "quantization_config"):
        values.pop(name, None)
    values["head_dim"] = architecture.head_dim
    values["num_attention_heads"] = values["num_key_value_heads"] = 1  # the widest layers' need not fit each other
    new = modeling.CAUSAL_LM_CLASSES[architecture.family].config_class(**values)
    apply_architecture(new, architecture)
    new._attn_implementation = attention or "sdpa"
    return new


def build(config: Any, architecture: Architecture) -> torch.nn.Module:
    """Return a randomly initialised irregular model of `architecture` with the other settings of `config`."""
    return modeling.CAUSAL_LM_CLASSES[architecture.family](irregular_config(config, architecture))


def to_irregular(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model as an irregular class with the same function. Weights are shared, not copied."""
    config: Any = model.config
    if config.model_type.startswith("efficientllm_"):
        return model
    with torch.device("meta"):  # without memory, as every tensor is assigned from `model`
        architecture = architecture_of(config)
        irregular = build(config, architecture)
    state = from_stock(model.state_dict(), architecture)
    if architecture.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    irregular.load_state_dict(state, assign=True, strict=True)
    share_buffers(irregular, model)
    # `assign` makes two parameters of a tied matrix
    irregular.tie_weights()  # type: ignore[operator]
    irregular.generation_config = copy.deepcopy(model.generation_config)  # type: ignore[union-attr]
    return irregular


def share_buffers(model: Any, source: Any) -> None:
    """Copy the unstored buffers of `source` to a model that was built without memory."""
    theirs = source.base_model
    model.model.rotary_emb = theirs.rotary_emb
    for name, buffer in theirs.get_input_embeddings().named_buffers():
        setattr(model.model.embed_tokens, name, buffer)


def make_buffers(model: Any) -> None:
    """Compute the unstored buffers of a model that was built without memory."""
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(modeling.stem_config(model.config))
    embedding = base.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)


def plain_config(config: Any, architecture: Architecture) -> Any | None:
    """Return the stock family's config of a uniform architecture.

    Returns None if stock transformers refuses the widths, or could store a tied head only as a second matrix.
    """
    layer, parts = architecture.layers[0], architecture.parts
    if not architecture.is_uniform or not layer.num_attention_heads or not layer.intermediate_size:
        return None
    if parts.heads_fill_hidden and layer.num_attention_heads * architecture.head_dim != architecture.hidden_size:
        return None
    values = config.to_dict()
    scales = Scales.of(values, architecture)
    if untied(architecture, scales) != architecture:
        return None
    for name in ("model_type", "architectures", *FOLDER_SETTINGS, *scales.settings(architecture)):
        values.pop(name, None)
    if parts.norm.stock_eps is None:
        values[parts.norm.eps_setting] = scales.stem_eps
    try:
        return AutoConfig.for_model(architecture.model_type, **values)
    except (StrictDataclassError, ValueError):
        return None


def stock_state(state: dict[str, torch.Tensor], config: Any, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return the tensors of an irregular model as its stock class stores them."""
    have = Scales.of(config.to_dict(), architecture)
    found = {}
    for name, tensor in state.items():
        factor = scale_factor(name, have, have.stock(architecture), architecture)
        found[name] = tensor if factor == 1.0 else rescaled(name, tensor, factor, architecture)
    return {name: tensor.contiguous() for name, tensor in to_stock(found, architecture, torch.stack).items()}


def packed_config(config: Any, closed: Packed) -> Any:
    """Return the irregular config of a compacted model."""
    new = copy.deepcopy(config)
    for name in ("layer_types", "no_rope_layers"):  # one for each layer, and a matter of its attention
        if getattr(new, name, None):
            setattr(new, name, [getattr(config, name)[index] for index, _ in closed.origins])
    new.per_layer_config = None  # of as many layers as there were
    new.num_hidden_layers = len(closed.origins)
    apply_architecture(new, closed.architecture)
    return new


BESIDE_TENSORS = 64_000
"""Bytes of the header of the weights and of the small files beside them. The writer of safetensors does not tell a full
disk from other errors."""


def save_checkpoint(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a Hugging Face folder: plain if stock transformers can load it, with its own modeling files otherwise.

    `state` replaces the model's own state dict (whole tensors of a sharded model). Layers without blocks are merged
    (see `packed`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    closed = packed(architecture_of(model.config))
    architecture, irregular = closed.architecture, packed_config(model.config, closed)
    config = plain_config(irregular, architecture)
    whole = state or model.state_dict()
    state = {name: whole[before].detach().contiguous() for name, before in closed.names.items()}
    if config is None:
        config = irregular
        module = Path(modeling.__file__).stem
        causal_lm = type(model)
        config.architectures = [causal_lm.__name__]
        config.auto_map = {
            "AutoConfig": f"{module}.{causal_lm.config_class.__name__}",
            "AutoModel": f"{module}.{causal_lm.base_class.__name__}",
            "AutoModelForCausalLM": f"{module}.{causal_lm.__name__}",
        }
        config.model_file = MLX_FILE.name
        shutil.copy(modeling.__file__, folder / f"{module}.py")
        shutil.copy(MLX_FILE, folder)
    else:
        state = stock_state(state, irregular, architecture)
        config.architectures = [architecture.parts.stock_class]
    config.dtype = next(iter(state.values())).dtype
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    require_room(folder / "model.safetensors", num_bytes + BESIDE_TENSORS)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # with the defaults, which the exporters and other readers of config.json do not know
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # a path of the machine that trained the model
    write_config(values, folder)
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mend_tokenizer_config(folder)
