"""Which random models take a decoder apart: layers of one kind on top of a ballast of whole ones.

A model of a few small layers would live in the core's own cache, where no real one does, and its layers would seem up
to a third cheaper (llama.cpp, Q4_0, 4 against 30 layers of SmolLM2-135M's widths: 0.14 against 0.21 ms a layer). So
every stack begins with the same whole layers, and what lies on top is priced by difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import UsageError
from ...runtime.latency.shape import DecoderShape, LayerShape

FEW_ROWS = 512
"""Of an LM head that hardly counts."""
MULTIPLE = 32
"""Exporters pad widths to it, so that nothing between is measured."""


@dataclass(frozen=True)
class Widths:
    """Widths of a source model: what pruned shapes of it stay within."""

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
    def whole(self) -> LayerShape:
        """A layer of the source."""
        return LayerShape(self.num_attention_heads, self.num_key_value_heads, self.intermediate_size)

    def decoder(self, layers: tuple[LayerShape, ...], hidden_size: int = 0) -> DecoderShape:
        """A model with the source's head; `hidden_size` 0: and its stem."""
        return DecoderShape(hidden_size or self.hidden_size, self.head_dim, self.vocab_size, layers)

    @classmethod
    def of_model(cls, folder: str) -> Widths:
        """The largest widths in FOLDER/config.json or FOLDER/model/config.json; UsageError where there is none."""
        found = [
            path for path in (Path(folder) / "config.json", Path(folder) / "model" / "config.json") if path.is_file()
        ]
        if not found:
            raise UsageError(f"--profile-like {folder}: there is no config.json; give a run or a Hugging Face folder")
        try:
            config = json.loads(found[0].read_text(encoding="utf-8"))
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                hidden,
                heads,
                config.get("num_key_value_heads") or heads,
                config["intermediate_size"],
                config.get("head_dim") or hidden // heads,
                config["vocab_size"],
                config["num_hidden_layers"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--profile-like {folder}: config.json cannot be read: {error!r}") from error


@dataclass(frozen=True)
class Design:
    """The nodes of a table, and the stacks that measure it."""

    widths: Widths
    hidden_sizes: tuple[int, ...]
    """Ascending; the last is the source's."""
    groups: tuple[int, ...]
    ratios: tuple[int, ...]
    """Query heads per key/value group."""
    ffn_widths: tuple[int, ...]
    num_ballast: int = 6
    """Whole layers of the ballast."""
    num_on_top: int = 6
    """Layers of one kind on top of it."""
    num_rows: int = FEW_ROWS
    """Of the LM head of all stacks."""
    neighbours: tuple[DecoderShape, ...] = ()
    """Whole models around the source that the table is to agree with."""

    @classmethod
    def full(cls, widths: Widths) -> Design:
        """Nodes from the source's widths down, for formats that are written in a second."""
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
        """Fewer nodes and layers, for formats whose layers take a quarter of a minute each; the head is the ballast."""
        return cls(
            widths,
            _rounded(widths.hidden_size, 1 / 2, 1),
            tuple(sorted({1, widths.num_key_value_heads})),
            tuple(sorted({1, widths.queries_per_group})),
            _rounded(widths.intermediate_size, 1 / 12, 1 / 3, 1),
            num_ballast=1,
            num_on_top=2,
            num_rows=widths.vocab_size,
        )

    def stack(self, hidden_size: int, layer: LayerShape | None, vocab_size: int = 0) -> DecoderShape:
        """The ballast, and on top of it layers of a kind; `vocab_size` 0: as all stacks."""
        ballast = (self.widths.whole,) * self.num_ballast
        on_top = () if layer is None else (layer,) * self.num_on_top
        return DecoderShape(hidden_size, self.widths.head_dim, vocab_size or self.num_rows, ballast + on_top)

    def attention(self, groups: int, ratio: int) -> LayerShape:
        """A layer of the source with another attention."""
        return LayerShape(groups * ratio, groups, self.widths.intermediate_size)

    def ffn(self, width: int) -> LayerShape:
        """A layer of the source with another FFN."""
        return LayerShape(self.widths.num_attention_heads, self.widths.num_key_value_heads, width)

    @property
    def without_attention(self) -> LayerShape:
        return LayerShape(0, 0, self.widths.intermediate_size)

    @property
    def smallest_attention(self) -> LayerShape:
        return self.attention(self.groups[0], self.ratios[0])

    @property
    def smallest_ffn(self) -> LayerShape:
        return self.ffn(self.ffn_widths[0])

    def stacks(self) -> list[DecoderShape]:
        """All of them, each once."""
        return list(dict.fromkeys(self._stacks()))

    def _stacks(self) -> Iterator[DecoderShape]:
        for hidden in self.hidden_sizes:
            yield self.stack(hidden, None, FEW_ROWS)
            yield self.stack(hidden, None, self.widths.vocab_size)
            for layer in (self.widths.whole, self.without_attention, self.smallest_attention, self.smallest_ffn):
                yield self.stack(hidden, layer)
        hidden = self.widths.hidden_size
        for groups in self.groups:
            for ratio in self.ratios:
                yield self.stack(hidden, self.attention(groups, ratio))
        for width in (0, *self.ffn_widths):
            yield self.stack(hidden, self.ffn(width))


def neighbours(widths: Widths) -> tuple[DecoderShape, ...]:
    """The source, and what is left of it where every part is cut far: prices are asked for in between."""
    whole, count = widths.whole, widths.num_layers
    groups, ffn = (whole.num_attention_heads, whole.num_key_value_heads), whole.intermediate_size
    half = max(MULTIPLE, ffn // 2 // MULTIPLE * MULTIPLE)
    narrow = max(MULTIPLE, widths.hidden_size * 2 // 3 // MULTIPLE * MULTIPLE)
    everywhere = [whole, LayerShape(widths.queries_per_group, 1, ffn), LayerShape(*groups, half)]
    every_other = [LayerShape(0, 0, ffn), LayerShape(*groups, 0)]  # no model is without any attention or FFN
    found = [
        *(widths.decoder((kind,) * count) for kind in everywhere),
        *(widths.decoder(((whole, kind) * count)[:count]) for kind in every_other),
        widths.decoder((whole,) * max(1, count // 2)),
        widths.decoder((whole,) * count, narrow),
    ]
    return tuple(dict.fromkeys(found))


def _rounded(size: int, *shares: float) -> tuple[int, ...]:
    """Shares of a width, in multiples; the whole one as it is."""
    below = {max(MULTIPLE, round(size * share / MULTIPLE) * MULTIPLE) for share in shares if share < 1}
    return (*sorted(width for width in below if width < size), size)


def _spread(most: int) -> tuple[int, ...]:
    """Up to three numbers from 1 to `most`."""
    return tuple(sorted({1, (most + 1) // 2, most}))
