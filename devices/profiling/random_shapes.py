"""Shapes of the random models that a profile measures: stacks of layers, neighbours of the source, irregular models.

A model of a few small layers would fit the core's own cache, which no real model does. Its layers would seem up to a
third cheaper: with llama.cpp, Q4_0 and SmolLM2-135M's widths, a layer takes 0.14 ms in a model of 4 layers, and 0.21 ms
in one of 30. So each stack starts with the same layers of the source. The cost of the layers on top is a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Widths:
    """Widths of a source model, which are the largest widths of its pruned shapes."""

    hidden_size: int = 576
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    intermediate_size: int = 1536
    head_dim: int = 64
    vocab_size: int = 49152
    num_layers: int = 30

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def source_layer(self) -> LayerShape:
        return LayerShape(self.num_attention_heads, self.num_key_value_heads, self.intermediate_size)

    def decoder(self, layers: tuple[LayerShape, ...], hidden_size: int = 0) -> DecoderShape:
        """Return a model with the source's head, and with its hidden size if `hidden_size` is 0."""
        return DecoderShape(hidden_size or self.hidden_size, self.head_dim, self.vocab_size, layers)

    @classmethod
    def of_model(cls, folder: str) -> Widths:
        """Read the largest widths from FOLDER/config.json or FOLDER/model/config.json. Raises UsageError without."""
        paths = (Path(folder) / "config.json", Path(folder) / "model" / "config.json")
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UsageError(f"--profile-like {folder} contains no config.json; give a run or a Hugging Face folder")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                hidden_size=hidden,
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                intermediate_size=config["intermediate_size"],
                head_dim=config.get("head_dim") or hidden // heads,
                vocab_size=config["vocab_size"],
                num_layers=config["num_hidden_layers"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--profile-like {folder}: config.json cannot be read: {error!r}") from error


@dataclass(frozen=True)
class Design:
    """The nodes of a latency table, and the stacks that measure them."""

    widths: Widths
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

    @classmethod
    def full(cls, widths: Widths) -> Design:
        """Return a design for formats that are exported in a second."""
        hidden, ffn = widths.hidden_size, widths.intermediate_size
        return cls(
            widths,
            _rounded(hidden, 1 / 2, 3 / 4, 1),
            _spread(widths.num_key_value_heads),
            _spread(widths.queries_per_group),
            _rounded(ffn, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 3 / 4, 1),
            neighbours=neighbours(widths),
        )

    @classmethod
    def thin(cls, widths: Widths) -> Design:
        """Return a design with fewer nodes and layers, for formats that need 15 seconds per layer.

        The full LM head replaces most of the base layers.
        """
        return cls(
            widths,
            _rounded(widths.hidden_size, 1 / 2, 1),
            tuple(sorted({1, widths.num_key_value_heads})),
            tuple(sorted({1, widths.queries_per_group})),
            _rounded(widths.intermediate_size, 1 / 12, 1 / 3, 1),
            num_base_layers=1,
            num_top_layers=2,
            num_rows=widths.vocab_size,
        )

    def stack(self, hidden_size: int, layer: LayerShape | None, vocab_size: int = 0) -> DecoderShape:
        """Return the base layers with copies of `layer` on top. A `vocab_size` of 0 means `num_rows`."""
        base = (self.widths.source_layer,) * self.num_base_layers
        top = () if layer is None else (layer,) * self.num_top_layers
        return DecoderShape(hidden_size, self.widths.head_dim, vocab_size or self.num_rows, base + top)

    def attention(self, groups: int, ratio: int) -> LayerShape:
        """Return a layer of the source with another attention."""
        return LayerShape(groups * ratio, groups, self.widths.intermediate_size)

    def ffn(self, width: int) -> LayerShape:
        """Return a layer of the source with another FFN."""
        return LayerShape(self.widths.num_attention_heads, self.widths.num_key_value_heads, width)

    def stacks(self) -> list[DecoderShape]:
        """Return all stacks without duplicates."""
        return list(dict.fromkeys(self._stacks()))

    def _stacks(self) -> Iterator[DecoderShape]:
        layers = (
            self.widths.source_layer,
            LayerShape(0, 0, self.widths.intermediate_size),
            self.attention(self.groups[0], self.ratios[0]),
            self.ffn(self.ffn_widths[0]),
        )
        for hidden in self.hidden_sizes:
            yield self.stack(hidden, None, FEW_ROWS)
            yield self.stack(hidden, None, self.widths.vocab_size)
            for layer in layers:
                yield self.stack(hidden, layer)
        hidden = self.widths.hidden_size
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


def neighbours(widths: Widths) -> tuple[DecoderShape, ...]:
    """Return the source, and models of it with one part cut far. Predictions are needed in between."""
    layer, count = widths.source_layer, widths.num_layers
    heads, groups, ffn = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
    half_ffn = max(MULTIPLE, ffn // 2 // MULTIPLE * MULTIPLE)
    narrow = max(MULTIPLE, widths.hidden_size * 2 // 3 // MULTIPLE * MULTIPLE)
    everywhere = [layer, LayerShape(widths.queries_per_group, 1, ffn), LayerShape(heads, groups, half_ffn)]
    # In every other layer only, because a model has at least one attention and one FFN.
    every_other = [LayerShape(0, 0, ffn), LayerShape(heads, groups, 0)]
    shapes = [
        *(widths.decoder((changed,) * count) for changed in everywhere),
        *(widths.decoder(((layer, changed) * count)[:count]) for changed in every_other),
        widths.decoder((layer,) * max(1, count // 2)),
        widths.decoder((layer,) * count, narrow),
    ]
    return tuple(dict.fromkeys(shapes))


def irregular_shapes(widths: Widths, count: int, seed: int = 0) -> list[DecoderShape]:
    """Return random pruned shapes of a source of `widths`, with different widths in each layer."""
    random = np.random.default_rng(seed)
    return [_irregular_shape(widths, random) for _ in range(count)]


def _irregular_shape(widths: Widths, random: np.random.Generator) -> DecoderShape:
    hidden = _random_multiple(random, widths.hidden_size // 2, widths.hidden_size)
    vocab = _random_multiple(random, widths.vocab_size // 8, widths.vocab_size)
    count = int(random.integers(max(2, widths.num_layers // 3), widths.num_layers + 1))
    return DecoderShape(hidden, widths.head_dim, vocab, tuple(_irregular_layer(widths, random) for _ in range(count)))


def _random_multiple(random: np.random.Generator, least: int, most: int) -> int:
    return MULTIPLE * int(random.integers(max(1, least // MULTIPLE), most // MULTIPLE + 1))


def _irregular_layer(widths: Widths, random: np.random.Generator) -> LayerShape:
    groups = int(random.integers(1, widths.num_key_value_heads + 1))
    ratio = int(random.integers(1, widths.queries_per_group + 1))
    width = _random_multiple(random, MULTIPLE, widths.intermediate_size)
    draw = random.random()
    if draw < ABSENT_SHARE:
        return LayerShape(0, 0, width)
    return LayerShape(groups * ratio, groups, 0 if draw > 1 - ABSENT_SHARE else width)
