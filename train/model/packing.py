"""Closing up a model whose layers lost blocks: what is left moves together into as few layers as hold it.

A decoder adds one block after the other to the residual stream, attention and FFN in turn, each with its own norms.
So a layer that lost both disappears, and the attention of a layer without FFN and the FFN of a later layer without
attention, with nothing between them, are one layer (not where attention and FFN are parallel: there the FFN would no
longer read what the attention wrote). The function stays exactly the same. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .architecture import Architecture, LayerShape
from .tensors import is_of_attention, tensor_names


@dataclass(frozen=True)
class Packed:
    """A closed-up shape and where its layers come from."""

    architecture: Architecture
    origins: tuple[tuple[int, int], ...]
    """(layer that the attention comes from, layer that the FFN comes from) of every layer; the same where one of them
    is absent."""

    @property
    def names(self) -> dict[str, str]:
        """{tensor of the packed model: the same tensor of the model before}"""
        found, parts = {}, self.architecture.parts
        for name in tensor_names(self.architecture):
            head, _, rest = name.removeprefix("model.layers.").partition(".")
            found[name] = name
            if name.startswith("model.layers."):
                attention, ffn = self.origins[int(head)]
                found[name] = f"model.layers.{attention if is_of_attention(rest, parts) else ffn}.{rest}"
        return found


def packed(architecture: Architecture) -> Packed:
    """The same blocks in the same order in as few layers as hold them; a model of nothing keeps one empty layer."""
    layers: list[LayerShape] = []
    origins: list[tuple[int, int]] = []
    for index, layer in enumerate(architecture.layers):
        if not layer.num_attention_heads and not layer.intermediate_size:
            continue
        may_join = not layer.num_attention_heads and layers and not layers[-1].intermediate_size
        if may_join and not architecture.parts.is_parallel:
            layers[-1] = replace(layers[-1], intermediate_size=layer.intermediate_size)
            origins[-1] = (origins[-1][0], index)
        else:
            layers.append(layer)
            origins.append((index, index))
    if not layers:
        return Packed(replace(architecture, layers=architecture.layers[:1]), ((0, 0),))
    return Packed(replace(architecture, layers=tuple(layers)), tuple(origins))
