"""Our names of tensors and those of stock checkpoints, where a family has others. Works on torch and numpy alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture
from .tensors import split_name, tensor_names

_FUSED = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class StockTensor:
    """Where a stock checkpoint has one of our tensors."""

    name: str
    part: int | None = None
    """0, 1, 2: q, k or v of a fused matrix; None: it is the tensor."""

    def take(self, tensor: Any, head_dim: int) -> Any:
        """Our tensor of what is stored."""
        if self.part is None:
            return tensor
        rows = tensor.reshape(-1, 3, head_dim, *tensor.shape[1:])[:, self.part]
        return rows.reshape(-1, *tensor.shape[1:])


def stock_tensor(architecture: Architecture, name: str) -> StockTensor:
    """Of our tensor `name`."""
    names = architecture.parts.stock_names
    if names is None:
        return StockTensor(name)
    layer, suffix = split_name(name)
    prefix = "" if layer is None else f"{names.layers}.{layer}."
    if names.fused and (match := _FUSED.fullmatch(suffix)):
        return StockTensor(f"{prefix}{names.fused}.{match.group(2)}", "qkv".index(match.group(1)))
    module, _, part = suffix.rpartition(".")
    return StockTensor(f"{prefix}{names.renamed.get(module, module)}.{part}")


def locate(architecture: Architecture, name: str, known: Container[str]) -> StockTensor:
    """Where our tensor `name` is among names that are `known`, some of which may be ours."""
    stock = stock_tensor(architecture, name)
    return StockTensor(name) if stock.name not in known and name in known else stock


def from_stock(state: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The tensors of a stock checkpoint by our names."""
    found = {name: locate(architecture, name, state) for name in tensor_names(architecture)}
    return {name: each.take(state[each.name], architecture.head_dim) for name, each in found.items()}


def to_stock(
    state: Mapping[str, Any], architecture: Architecture, stack: Callable[[list[Any], int], Any]
) -> dict[str, Any]:
    """The inverse; `stack(parts, dim)` is torch.stack or numpy.stack."""
    found: dict[str, Any] = {}
    fused: dict[str, list[Any]] = {}
    for name, tensor in state.items():
        there = stock_tensor(architecture, name)
        if there.part is None:
            found[there.name] = tensor
            continue
        parts = fused.setdefault(there.name, [])  # q, k and v come in file order
        parts.append(tensor.reshape(-1, architecture.head_dim, *tensor.shape[1:]))
        if len(parts) == 3:
            found[there.name] = stack(fused.pop(there.name), 1).reshape(-1, *tensor.shape[1:])
    return found
