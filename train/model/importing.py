"""Import a checkpoint of another tool as an irregular model, and compare it with its original.

The original is the stock class with the file's tensors in its modules, as pruning tools leave it in memory. With the
user's consent it is the folder's own code. Otherwise the import says that nothing was compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ...runtime.base.errors import ModelError, first_line
from . import modeling_efficientllm as modeling
from .folder_files import read_json
from .foreign import MAY_GAIN_BIASES, ForeignModel, read_foreign
from .foreign_configs import ImportOptions
from .irregular import config_of, make_buffers
from .tensors import EMBEDDING, HEAD, block_norms, to_stock

MOST_DIFFERENCE = 1e-3
"""Largest |logit difference| between the original and the imported model, both fp32 in torch."""
PROBE_TOKENS = 48
NOT_COMPARED = "converted, not compared with its original"


@dataclass(frozen=True)
class Imported:
    """An imported model and the report about it."""

    model: Any
    table: list[str]
    comparison: str


def import_folder(folder: Path, called: str, options: ImportOptions) -> Imported:
    """Read a foreign folder as its irregular class in fp32 and compare it with its original.

    Raises ModelError if no family computes it, or if its logits differ from the original's.
    """
    found = read_foreign(folder, called, options.head_dim)
    state = {name: tensor.read().float().contiguous() for name, tensor in found.tensors.items()}
    if found.architecture.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    config = config_of(found.settings, found.architecture)
    with torch.device("meta"):
        model: Any = modeling.CAUSAL_LM_CLASSES[found.architecture.family](config)
    model.load_state_dict(state, assign=True, strict=True)
    make_buffers(model)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return Imported(model.eval(), found.table(), _comparison(folder, found, model, state, options))


def _comparison(
    folder: Path, found: ForeignModel, model: Any, state: dict[str, torch.Tensor], options: ImportOptions
) -> str:
    """Return a line about the largest logit difference from the original, if it can be run."""
    try:
        if options.trust_remote_code and "auto_map" in read_json(folder / "config.json"):
            original: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
            name = f"{type(original).__name__} of the folder"
        elif found.added_heads or found.model_type not in (found.architecture.family, *MAY_GAIN_BIASES):
            return NOT_COMPARED
        else:
            original = stock_model(found, state)
            name = f"{type(original).__name__} with these tensors"
        tokens = torch.randint(
            0, found.architecture.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)
        )
        with torch.inference_mode():
            ours, theirs = (each(tokens, use_cache=False).logits for each in (model, original.eval()))
    except Exception as error:  # transformers and remote code raise what they like
        return f"{NOT_COMPARED}, which does not run here: {first_line(error)}"
    difference = float((ours - theirs).abs().max())
    if not difference <= MOST_DIFFERENCE * max(1.0, float(theirs.abs().max()) / 32):
        raise ModelError(
            f"{folder}: the imported logits differ from {name} by {difference:.1e}; please report this model"
        )
    return f"compared with {name}: largest logit difference {difference:.1e} over {PROBE_TOKENS} tokens"


def stock_model(found: ForeignModel, state: dict[str, torch.Tensor]) -> Any:
    """Return the stock class of the original with the tensors `state` in its modules and without absent blocks."""
    architecture, parts = found.architecture, found.architecture.parts
    heads = architecture.hidden_size // architecture.head_dim if parts.heads_fill_hidden else 1
    sizes = {"hidden_size": architecture.hidden_size, "head_dim": architecture.head_dim, "intermediate_size": 1}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": architecture.vocab_size}
    config = AutoConfig.for_model(found.model_type, **{**found.settings, **sizes})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    # the modules have the widths of the config, but a product takes those of the weight that it is given
    model.get_output_embeddings().weight = nn.Parameter(state[HEAD], requires_grad=False)
    without_head = {name: each for name, each in state.items() if name != HEAD}
    for name, tensor in to_stock(without_head, architecture, torch.stack).items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
    for index, (shape, layer) in enumerate(zip(architecture.layers, model.base_model.layers, strict=True)):
        attention = "attention" if hasattr(layer, "attention") else "self_attn"
        getattr(layer, attention).num_key_value_groups = shape.queries_per_group
        absent_norms: list[str] = []
        if not shape.num_attention_heads:
            setattr(layer, attention, modeling.NoAttention(index))
            absent_norms += block_norms(parts, "attention")
        if not shape.intermediate_size:
            layer.mlp = modeling.NoFeedForward()
            absent_norms += block_norms(parts, "ffn")
        for norm in absent_norms:
            setattr(layer, norm, nn.Identity())
    make_buffers(model)
    return model
