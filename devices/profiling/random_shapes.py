"""Shapes of the random models that a profile measures: stacks of layers, neighbours of the source, irregular models.

A model of a few small layers would fit the core's own cache, which no real model does. Its layers would seem up to a
third cheaper: with llama.cpp, Q4_0 and SmolLM2-135M's widths, a layer takes 0.14 ms in a model of 4 layers, and 0.21 ms
in one of 30. So each stack starts with the same layers of the source. The cost of the layers on top is a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...runtime.base.errors import UsageError
from ...runtime.latency.shape import DecoderShape, LayerShape

FEW_ROWS = 512
"""Rows of an LM head of negligible cost."""
MULTIPLE = 32
"""Exporters pad widths to multiples of this, so other widths are not measured."""
ABSENT_SHARE = 0.1
"""Share of irregular layers without attention, and of those without FFN."""


SMOLLM2_135M = DecoderShape(576, 64, 49152, (LayerShape(9, 3, 1536),) * 30)
"""Source of a profile for no model in particular."""


def source_shape(folder: str) -> DecoderShape:
    """Return equal layers of the largest widths in FOLDER/config.json or FOLDER/model/config.json.

    Raises UsageError without such a file.
    """
    paths = (Path(folder) / "config.json", Path(folder) / "model" / "config.json")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UsageError(f"--profile-like {folder} contains no config.json; give a run or a Hugging Face folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        layer = LayerShape(heads, config.get("num_key_value_heads") or heads, config["intermediate_size"])
        head_dim = config.get("head_dim") or hidden // heads
        return DecoderShape(hidden, head_dim, config["vocab_size"], (layer,) * config["num_hidden_layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--profile-like {folder}: config.json cannot be read: {error!r}") from error


@dataclass(frozen=True)
class Design:
    """The nodes of a latency table, and the stacks that measure them."""

    source: DecoderShape
    """Source model of equal layers, which have the largest widths of its pruned shapes."""
    hidden_sizes: tuple[int, ...]
    """Hidden sizes, ascending. The last one is the source's."""
    groups: tuple[int, ...]
    """Numbers of key/value heads."""
    ratios: tuple[int, ...]
    """Query heads per key/value head."""
    ffn_widths: tuple[int, ...]
    num_base_layers: int = 6
    """Layers of the source at the bottom of each stack."""
    num_top_layers: int = 6
    """Equal layers on top of them."""
    num_rows: int = FEW_ROWS
    """Rows of the LM head of the stacks."""
    neighbours: tuple[DecoderShape, ...] = ()
    """Models of full depth around the source, to which the table is also fitted."""

    @property
    def source_layer(self) -> LayerShape:
        return self.source.layers[0]

    @classmethod
    def full(cls, source: DecoderShape) -> Design:
        """Return a design for formats that are exported in a second."""
        layer = source.layers[0]
        return cls(
            source,
            _rounded(source.hidden_size, 1 / 2, 3 / 4, 1),
            _spread(layer.num_key_value_heads),
            _spread(layer.queries_per_group),
            _rounded(layer.intermediate_size, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 3 / 4, 1),
            neighbours=neighbours(source),
        )

    @classmethod
    def thin(cls, source: DecoderShape) -> Design:
        """Return a design with fewer nodes and layers, for formats that need 15 seconds per layer.

        The full LM head replaces most of the base layers.
        """
        layer = source.layers[0]
        return cls(
            source,
            _rounded(source.hidden_size, 1 / 2, 1),
            tuple(sorted({1, layer.num_key_value_heads})),
            tuple(sorted({1, layer.queries_per_group})),
            _rounded(layer.intermediate_size, 1 / 12, 1 / 3, 1),
            num_base_layers=1,
            num_top_layers=2,
            num_rows=source.vocab_size,
        )

    def stack(self, hidden_size: int, layer: LayerShape | None, vocab_size: int = 0) -> DecoderShape:
        """Return the base layers with copies of `layer` on top. A `vocab_size` of 0 means `num_rows`."""
        base = (self.source_layer,) * self.num_base_layers
        top = () if layer is None else (layer,) * self.num_top_layers
        return DecoderShape(hidden_size, self.source.head_dim, vocab_size or self.num_rows, base + top)

    def attention(self, groups: int, ratio: int) -> LayerShape:
        """Return a layer of the source with another attention."""
        return LayerShape(groups * ratio, groups, self.source_layer.intermediate_size)

    def ffn(self, width: int) -> LayerShape:
        """Return a layer of the source with another FFN."""
        return replace(self.source_layer, intermediate_size=width)

    def stacks(self) -> list[DecoderShape]:
        """Return all stacks without duplicates."""
        return list(dict.fromkeys(self._stacks()))

    def _stacks(self) -> Iterator[DecoderShape]:
        layers = (
            self.source_layer,
            LayerShape(0, 0, self.source_layer.intermediate_size),
            self.attention(self.groups[0], self.ratios[0]),
            self.ffn(self.ffn_widths[0]),
        )
        for hidden in self.hidden_sizes:
            yield self.stack(hidden, None, FEW_ROWS)
            yield self.stack(hidden, None, self.source.vocab_size)
            for layer in layers:
                yield self.stack(hidden, layer)
        hidden = self.source.hidden_size
        for groups in self.groups:
            for ratio in self.ratios:
                yield self.stack(hidden, self.attention(groups, ratio))
        for width in (0, *self.ffn_widths):
            yield self.stack(hidden, self.ffn(width))


def _rounded(size: int, *shares: float) -> tuple[int, ...]:
    """Return shares of a width, ascending, as multiples of MULTIPLE. The full width stays exact."""
    below = {max(MULTIPLE, round(size * share / MULTIPLE) * MULTIPLE) for share in shares if share < 1}
    return (*sorted(width for width in below if width < size), size)


def _spread(largest: int) -> tuple[int, ...]:
    """Return up to three numbers from 1 to `largest`."""
    return tuple(sorted({1, (largest + 1) // 2, largest}))


def neighbours(source: DecoderShape) -> tuple[DecoderShape, ...]:
    """Return the source, and models of it with one part cut far. Predictions are needed in between."""
    layer, count = source.layers[0], len(source.layers)
    ffn = layer.intermediate_size
    half_ffn = max(MULTIPLE, ffn // 2 // MULTIPLE * MULTIPLE)
    narrow = max(MULTIPLE, source.hidden_size * 2 // 3 // MULTIPLE * MULTIPLE)
    everywhere = [LayerShape(layer.queries_per_group, 1, ffn), replace(layer, intermediate_size=half_ffn)]
    # In every other layer only, because a model has at least one attention and one FFN.
    every_other = [LayerShape(0, 0, ffn), replace(layer, intermediate_size=0)]
    shapes = [
        source,
        *(replace(source, layers=(changed,) * count) for changed in everywhere),
        *(replace(source, layers=((layer, changed) * count)[:count]) for changed in every_other),
        replace(source, layers=(layer,) * max(1, count // 2)),
        replace(source, hidden_size=narrow),
    ]
    return tuple(dict.fromkeys(shapes))


def irregular_shapes(source: DecoderShape, count: int, seed: int = 0) -> list[DecoderShape]:
    """Return random pruned shapes of a source, with different widths in each layer."""
    random = np.random.default_rng(seed)
    return [_irregular_shape(source, random) for _ in range(count)]


def _irregular_shape(source: DecoderShape, random: np.random.Generator) -> DecoderShape:
    hidden = _random_multiple(random, source.hidden_size // 2, source.hidden_size)
    vocab = _random_multiple(random, source.vocab_size // 8, source.vocab_size)
    most = len(source.layers)
    count = int(random.integers(min(most, max(2, most // 3)), most + 1))
    layers = tuple(_irregular_layer(source.layers[0], random) for _ in range(count))
    return DecoderShape(hidden, source.head_dim, vocab, layers)


def _random_multiple(random: np.random.Generator, least: int, most: int) -> int:
    return MULTIPLE * int(random.integers(max(1, least // MULTIPLE), most // MULTIPLE + 1))


def _irregular_layer(source: LayerShape, random: np.random.Generator) -> LayerShape:
    groups = int(random.integers(1, source.num_key_value_heads + 1))
    ratio = int(random.integers(1, source.queries_per_group + 1))
    width = _random_multiple(random, MULTIPLE, source.intermediate_size)
    draw = random.random()
    if draw < ABSENT_SHARE:
        return LayerShape(0, 0, width)
    return LayerShape(groups * ratio, groups, 0 if draw > 1 - ABSENT_SHARE else width)
