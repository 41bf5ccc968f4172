"""Import a checkpoint of another tool as an irregular model, and compare it with its original.

The original is the stock class with the file's tensors in its modules, as pruning tools leave it in memory. With the
user's consent it is the folder's own code. Otherwise the import says that nothing was compared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ...runtime.base.errors import ModelError, first_line
from . import modeling_efficientllm as modeling
from .families import FAMILIES
from .folder_files import read_json
from .foreign import LISTS, ForeignModel, read_foreign
from .foreign_configs import NOT_SETTINGS, ImportOptions, kept_queries
from .irregular import config_of, make_buffers
from .stored_tensors import our_names, read_stored
from .tensors import EMBEDDING, HEAD, block_norms

MOST_DIFFERENCE = 1e-3
"""Largest |logit difference| between the original and the imported model, both fp32 in torch."""
PROBE_TOKENS = 48
NOT_COMPARED = "converted, not compared with its original"
STOCK_TYPES = (*FAMILIES, "phi3")
"""Model types of which transformers has a class."""
ABSENT = (modeling.NoAttention, modeling.NoFeedForward, nn.Identity)


@dataclass(frozen=True)
class Imported:
    """An imported model and the report about it."""

    model: Any
    table: list[str]
    comparison: str
    is_compared: bool
    notes: tuple[str, ...]
    """Readings that the shapes allow and do not prove."""

    @property
    def doubts(self) -> tuple[str, ...]:
        """Return the reasons why the model may be another one than the original."""
        return self.notes if self.is_compared else (NOT_COMPARED, *self.notes)


def import_folder(folder: Path, called: str, options: ImportOptions) -> Imported:
    """Read a foreign folder as its irregular class in fp32 and compare it with its original.

    Raises ModelError if no family computes it, or if its logits differ from the original's.
    """
    found = read_foreign(folder, called, options.head_dim)
    tokens = torch.randint(
        0, found.architecture.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    # first, so that the memory holds one of the two models at a time
    original, expected = _original_logits(folder, found, tokens, options)
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
    model.eval()
    if expected is None:
        return Imported(model, found.table(), original, False, found.doubts)
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits
    if not logits.isfinite().all():
        broken = (f"tensor {name} holds" for name, tensor in state.items() if not tensor.isfinite().all())
        found_in = next(broken, "its logits are")
        raise ModelError(f"{called}: {found_in} NaN or infinite numbers; no file can compute with it")
    difference = float((logits - expected).abs().max())
    if not difference <= MOST_DIFFERENCE * max(1.0, float(expected.abs().max()) / 32):
        raise ModelError(
            f"{folder}: the imported logits differ from {original} by {difference:.1e}; please report this model"
        )
    comparison = f"compared with {original}: largest logit difference {difference:.1e} over {PROBE_TOKENS} tokens"
    return Imported(model, found.table(), comparison, True, found.doubts)


def _original_logits(
    folder: Path, found: ForeignModel, tokens: torch.Tensor, options: ImportOptions
) -> tuple[str, torch.Tensor | None]:
    """Return (name of the original, its logits of `tokens`), or (a line that says why not, None)."""
    try:
        if options.trust_remote_code and "auto_map" in read_json(folder / "config.json"):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
            name = f"{type(model).__name__} of the folder"
        elif folder.suffix == ".gguf" or found.model_type not in STOCK_TYPES:
            return NOT_COMPARED, None
        else:
            model = stock_model(folder, found)
            name = f"{type(model).__name__} with these tensors"
        with torch.inference_mode():
            return name, model.eval()(tokens, use_cache=False).logits
    except Exception as error:  # transformers and remote code raise what they like
        return f"{NOT_COMPARED}, which does not run here: {first_line(error)}", None


def stock_model(folder: Path, found: ForeignModel) -> Any:
    """Return the stock class of config.json with the tensors of the files in its modules, and without absent blocks.

    Names, fused matrices, heads and settings are read by the stock class. `found` gives only which blocks exist.
    """
    settings, shape = read_json(folder / "config.json"), found.architecture
    tensors = {name: each.read().float() for name, each in our_names(read_stored(folder), None).items()}
    heads = shape.hidden_size // shape.head_dim if shape.parts.heads_fill_hidden else 1
    sizes = {"hidden_size": shape.hidden_size, "head_dim": shape.head_dim, "intermediate_size": 1}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": shape.vocab_size}
    # the lists and the number of layers are those of the layers in the file
    kept = {name: found.settings[name] for name in (*LISTS, "num_hidden_layers") if name in found.settings}
    others = {name: value for name, value in settings.items() if name not in (*NOT_SETTINGS, *LISTS)}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(found.model_type, **{**others, **sizes, **kept})
        )
    for index, (layer, widths) in enumerate(zip(model.base_model.layers, shape.layers, strict=True)):
        attention = "attention" if hasattr(layer, "attention") else "self_attn"
        absent = () if widths.num_attention_heads else block_norms(shape.parts, "attention")
        if absent:
            setattr(layer, attention, modeling.NoAttention(index))
        if not widths.intermediate_size:
            layer.mlp = modeling.NoFeedForward()
            absent += block_norms(shape.parts, "ffn")
        for norm in absent:
            setattr(layer, norm, nn.Identity())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name, tensor in tensors.items():
        *path, attribute = name.split(".")
        if attribute == "inv_freq" or not tensor.numel():
            continue
        module = head if path == ["embed_out"] else model  # GPT-NeoX's head in files
        for part in () if module is head else path:
            module = module if isinstance(module, ABSENT) else getattr(module, part)
        if not isinstance(module, ABSENT):
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
    if head.weight.is_meta:
        head.weight = embedding.weight
    for module in model.modules():  # a bias that is all of a block
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape), requires_grad=False))
    for index, layer in enumerate(model.base_model.layers):
        if shape.layers[index].num_attention_heads and hasattr(layer, "self_attn"):
            _set_heads(layer.self_attn, shape.head_dim, settings, index)
    make_buffers(model)
    return model


def _set_heads(attention: Any, head_dim: int, settings: Mapping[str, Any], index: int) -> None:
    """Give a stock attention the heads of its matrices, and zeros for heads that `pruned_heads` has removed."""
    heads = attention.o_proj.weight.shape[1] // head_dim
    fused = getattr(attention, "qkv_proj", None)
    groups = (fused.weight.shape[0] // head_dim - heads) // 2 if fused else attention.k_proj.weight.shape[0] // head_dim
    left = kept_queries(settings, index)
    before = settings.get("num_attention_heads", heads)
    if left is not None and groups == settings.get("num_key_value_heads", before):
        rows = torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in left])
        query, output = attention.q_proj, attention.o_proj
        for module, name, axis in ((query, "weight", 0), (query, "bias", 0), (output, "weight", 1)):
            if (narrow := getattr(module, name)) is not None:
                shape = list(narrow.shape)
                shape[axis] = before * head_dim
                whole = torch.zeros(shape).index_copy(axis, rows, narrow)
                setattr(module, name, nn.Parameter(whole, requires_grad=False))
        heads = before
    attention.num_key_value_groups, attention.num_key_value_heads = heads // groups, groups
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = heads
