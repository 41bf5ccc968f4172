"""Read the tensors of anybody's checkpoint under our names: prefixes removed, fused matrices apart, on use.

A name that no decoder of ours has is refused with the method that writes it. Pickles are read by torch's reader for
tensors only, which runs no code.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...runtime.base.errors import ModelError, first_line
from .architecture import Architecture
from .families import StockNames
from .folder_files import PICKLE_FILE, TensorHeader, pickles, tensor_headers, weight_files
from .tensors import BUFFERS, locate, tensor_names

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names from DataParallel, torch.compile, FSDP and gradient checkpointing."""
HEADLESS = re.compile(r"(layers|embed_tokens|norm)\.")
"""Beginnings of names in a file of the base model without head."""

REFUSED = {
    r"shortcut_Q": (
        "SliceGPT's rotations between blocks, so each block has a residual stream in another basis",
        "train the unsliced model here (efficientllm-train --prune stem,ffn)",
    ),
    r"lora_[AB]\b|lora_embedding|\.base_layer\.": (
        "LoRA adapters that are not merged",
        "merge them in PEFT with merge_and_unload() and save the model, or give its base and the adapter's --adapter",
    ),
    r"_[uv]_proj\.|\.[AB]Linear\.|\.(U|V|VT|w1|w2|lora_down|lora_up)(\.weight)?$": (
        "the low-rank factors of a matrix",
        "multiply them and save the product as the matrix",
    ),
    r"_orig$|_mask$|\.mask$|parametrizations\.|\.original\d$": (
        "masks beside the weights (2:4 or unstructured sparsity)",
        "multiply them in with their tool: torch.nn.utils.prune.remove, export of ModelOpt, squash_mask of torchao",
    ),
    r"\.(bitmask|compressed|row_offsets|meta)$": ("packed 2:4 sparse weights", "save the dense weights"),
    r"(qweight|qzeros|weight_packed|weight_scale(_inv|_2)?|input_scale|absmax|quant_map|_scales|SCB)$|_quantizer\.": (
        "quantised weights",
        "give the model that they were made from",
    ),
    r"\.experts\.|\.router\.": ("a mixture of experts", "no part of a family describes it"),
}
"""Pattern of a name -> (what it shows, what to do)."""

OPENELM = StockNames(
    renamed={
        "model.embed_tokens": "transformer.token_embeddings",
        "model.norm": "transformer.norm",
        "self_attn.qkv_proj": "attn.qkv_proj",
        "self_attn.q_norm": "attn.q_norm",
        "self_attn.k_norm": "attn.k_norm",
        "self_attn.o_proj": "attn.out_proj",
        "mlp.gate_up_proj": "ffn.proj_1",
        "mlp.down_proj": "ffn.proj_2",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    layers="transformer.layers",
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read on use."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def rows(self, start: int, stop: int) -> Stored:
        """Return rows `start` to `stop`."""
        return Stored((stop - start, *self.shape[1:]), lambda: self.read()[start:stop])

    def changed(self, shape: tuple[int, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> Stored:
        """Return `change` of the tensor, which has `shape`."""
        return Stored(shape, lambda: change(self.read()))


def zeros(*shape: int) -> Stored:
    return Stored(shape, lambda: torch.zeros(shape))


def read_stored(folder: Path) -> dict[str, Stored]:
    """Return all tensors of a folder under the names in its files."""
    headers = tensor_headers(folder)
    # a folder with both has the same weights twice, and reading a pickle is the riskier way
    if headers:
        for name in headers:
            refuse_method(name, folder)
        return {name: _stored(name, header) for name, header in headers.items() if not BUFFERS.search(name)}
    files = weight_files(folder, PICKLE_FILE)
    if not files:
        files = pickles(folder)
        if len(files) > 1:
            rule = f"it is one of {len(files)}, and transformers' weights are named {PICKLE_FILE}"
            raise _refused_pickle(files[0], rule)
    found: dict[str, Stored] = {}
    for file in files:
        for name, tensor in _unpickled(file).items():
            refuse_method(name, folder)
            if not BUFFERS.search(name):
                if not tensor.is_floating_point():
                    raise ModelError(f"{file}: tensor {name} is stored as {tensor.dtype}; give the model in bfloat16")
                found[name] = Stored(tuple(tensor.shape), lambda tensor=tensor: tensor)
    return found


def parameters_of(folder: Path, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (our name, tensor) of each parameter of a folder of .safetensors, mapped into memory and not copied."""
    from safetensors import safe_open

    headers = tensor_headers(folder)
    for name in tensor_names(architecture):
        place = locate(architecture, name, headers)
        with safe_open(headers[place.name].file, framework="pt") as stream:
            yield name, place.take(stream.get_tensor(place.name), architecture.head_dim)


def refuse_method(name: str, folder: Path) -> None:
    """Raise ModelError if a tensor's name shows a method whose models no decoder of ours computes."""
    for pattern, (shows, remedy) in REFUSED.items():
        if re.search(pattern, name):
            raise ModelError(f"{folder}: tensor {name} belongs to {shows}; {remedy}")


def _stored(name: str, header: TensorHeader) -> Stored:
    header.check_type(name)

    def read() -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(header.file, framework="pt") as stream:
            return stream.get_tensor(name)

    return Stored(header.shape, read)


def _unpickled(file: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a pickle, from one level below if they stand there (state_dict, model)."""
    try:
        try:
            value: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 1.6 cannot be mapped into memory
            value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused_pickle(file, "it holds objects, and reading them would run code") from error
    except Exception as error:  # torch raises what it likes for a damaged file
        raise ModelError(f"{file} is damaged: {first_line(error)}; copy or download it again") from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(name), Mapping):
            value = value[name]
    is_of_tensors = isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(each, torch.Tensor) for key, each in value.items()
    )
    if not is_of_tensors:
        raise _refused_pickle(file, "it holds other things than tensors")
    return value


def _refused_pickle(file: Path, reason: str) -> ModelError:
    return ModelError(
        f"{file} is not read: {reason}; where you trust it, load the model with its tool and write it with "
        "model.save_pretrained(FOLDER)"
    )


def our_names(stored: Mapping[str, Stored], names: StockNames | None) -> dict[str, Stored]:
    """Return the tensors under our names, without wrappers' prefixes. `names` are those of the stock class."""
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        ours = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        ours = _renamed(f"model.{ours}" if HEADLESS.match(ours) else ours, names)
        if ours in found:
            raise ModelError(f"tensor {ours} is stored twice, once as {name}; save the model without its wrapper")
        found[ours] = tensor
    return found


def _renamed(name: str, names: StockNames | None) -> str:
    if names is None:
        return name
    module, _, part = name.rpartition(".")
    layer = re.match(rf"{re.escape(names.layers)}\.(\d+)\.", name)
    prefix = ""
    if layer:
        prefix, module = f"model.layers.{layer.group(1)}.", module[layer.end() :]
    back = {stock: ours for ours, stock in names.renamed.items()} | {names.fused: "self_attn.query_key_value"}
    return f"{prefix}{back.get(module, module)}.{part}"


FUSED = re.compile(r"(.+)\.(qkv_proj|W_pack|query_key_value|gate_up_proj)\.(weight|bias)")


def unfused(tensors: Mapping[str, Stored], head_dim: int) -> dict[str, Stored]:
    """Return the tensors with fused q, k, v and fused gate, up apart."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = FUSED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        block, kind, part = match.groups()
        pieces = _gate_up(tensor) if kind == "gate_up_proj" else _qkv(tensors, block, kind, tensor, head_dim)
        found |= {f"{block}.{each}_proj.{part}": piece for each, piece in pieces}
    return found


def _gate_up(tensor: Stored) -> Iterator[tuple[str, Stored]]:
    half = tensor.shape[0] // 2
    yield from (("gate", tensor.rows(0, half)), ("up", tensor.rows(half, 2 * half)))


def _qkv(
    tensors: Mapping[str, Stored], block: str, kind: str, tensor: Stored, head_dim: int
) -> Iterator[tuple[str, Stored]]:
    """Yield q, k and v of rows [heads, 3, head_dim] (query_key_value), or of q's, k's and v's rows after each other."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    if kind == "query_key_value":
        for index, part in enumerate("qkv"):

            def take(whole: torch.Tensor, index: int = index) -> torch.Tensor:
                return whole.reshape(-1, 3, head_dim, *rest)[:, index].reshape(-1, *rest)

            yield part, tensor.changed((rows // 3, *rest), take)
        return
    # q has as many rows as o_proj has inputs, and k and v share the rest: this holds for grouped queries, too
    output = tensors.get(f"{block}.o_proj.weight")
    if output is None or (rows - output.shape[1]) % 2 or rows < output.shape[1]:
        raise ModelError(f"{block}.{kind} has {rows} rows, which o_proj does not divide into q, k and v")
    queries, keys = output.shape[1], (rows - output.shape[1]) // 2
    yield "q", tensor.rows(0, queries)
    yield "k", tensor.rows(queries, queries + keys)
    yield "v", tensor.rows(queries + keys, rows)
