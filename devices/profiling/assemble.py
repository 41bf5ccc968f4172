"""From the milliseconds of stacks to the table of parts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...runtime.latency.grid import Grid
from ...runtime.latency.shape import DecoderShape, LayerShape
from ...runtime.latency.table import LatencyTable
from .stacks import FEW_ROWS, Design


class Assembler:
    """Takes stacks apart by difference; milliseconds are arrays [conditions].

    Attention and FFN of a layer share what the layer costs by itself: a layer without attention is priced as its FFN
    alone, and what a layer without FFN costs beyond its attention is `no_ffn`.
    """

    def __init__(self, design: Design, measured_ms: Mapping[DecoderShape, np.ndarray]) -> None:
        self._design, self._measured = design, measured_ms

    def parts(self) -> dict[str, Grid]:
        """The grid of every part."""
        design = self._design
        hidden, groups, ratios = design.hidden_sizes, design.groups, design.ratios
        token = np.array([self._token(size) for size in hidden])
        rows = np.array([self._rows(size) for size in hidden])
        none = np.zeros_like(token)
        attention = [[[self._attention(size, g, r) for r in ratios] for g in groups] for size in hidden]
        ffn = [[self._ffn(size, width) for width in design.ffn_widths] for size in hidden]
        head_nodes = (1, design.widths.vocab_size)
        return {
            "token": Grid((hidden,), token),
            "head": Grid((hidden, head_nodes), np.stack([rows * count for count in head_nodes], axis=1)),
            "attention": Grid((hidden, groups, ratios), np.array(attention)),
            "no_attention": Grid((hidden,), none),
            "ffn": Grid((hidden, design.ffn_widths), np.array(ffn)),
            "no_ffn": Grid((hidden,), none + self._no_ffn()),
        }

    def _ballast(self, hidden: int) -> np.ndarray:
        return self._measured[self._design.stack(hidden, None)]

    def _layer(self, hidden: int, layer: LayerShape) -> np.ndarray:
        """One layer, by difference."""
        return (self._measured[self._design.stack(hidden, layer)] - self._ballast(hidden)) / self._design.num_on_top

    def _rows(self, hidden: int) -> np.ndarray:
        """One row of the LM head."""
        vocab = self._design.widths.vocab_size
        few, all_rows = (self._measured[self._design.stack(hidden, None, rows)] for rows in (FEW_ROWS, vocab))
        return np.maximum(all_rows - few, 0.0) / (vocab - FEW_ROWS)

    def _token(self, hidden: int) -> np.ndarray:
        """What is left of the ballast without its layers and its rows of the head."""
        design = self._design
        layers = design.num_ballast * self._layer(hidden, design.widths.whole)
        return np.maximum(self._ballast(hidden) - layers - design.num_rows * self._rows(hidden), 0.0)

    def _whole_ffn(self, hidden: int) -> np.ndarray:
        return self._layer(hidden, self._design.without_attention)

    def _whole_attention(self, hidden: int) -> np.ndarray:
        return self._layer(hidden, self._design.widths.whole) - self._whole_ffn(hidden)

    def _no_ffn(self) -> np.ndarray:
        hidden = self._design.widths.hidden_size
        return np.maximum(self._layer(hidden, self._design.ffn(0)) - self._whole_attention(hidden), 0.0)

    def _attention(self, hidden: int, groups: int, ratio: int) -> np.ndarray:
        """Measured at the source's hidden size; what another saves goes with the weights of the projections.

        They are proportional to groups * (ratio + 1), and the smallest and the whole attention are measured there, too.
        """
        design = self._design
        source = design.widths.hidden_size

        def at(size: int, layer: LayerShape) -> np.ndarray:
            return self._layer(size, layer) - self._whole_ffn(size)

        here = at(source, design.attention(groups, ratio))
        if hidden == source:
            return here
        small, whole = design.smallest_attention, design.widths.whole
        most, least = (layer.num_key_value_heads + layer.num_attention_heads for layer in (whole, small))
        share = (groups * (ratio + 1) - least) / max(most - least, 1)
        at_small, at_whole = (at(source, layer) - at(hidden, layer) for layer in (small, whole))
        return here - (1 - share) * at_small - share * at_whole

    def _ffn(self, hidden: int, width: int) -> np.ndarray:
        """Measured at the source's hidden size; what another saves goes with the width.

        The narrowest and the whole FFN are measured there, too.
        """
        design = self._design
        source = design.widths.hidden_size

        def at(size: int, layer: LayerShape) -> np.ndarray:
            return self._layer(size, layer) - self._whole_attention(size)

        here = at(source, design.ffn(width))
        if hidden == source:
            return here
        least, most = design.ffn_widths[0], design.ffn_widths[-1]
        share = (width - least) / max(most - least, 1)
        at_least, at_most = (
            at(source, layer) - at(hidden, layer) for layer in (design.smallest_ffn, design.widths.whole)
        )
        return here - (1 - share) * at_least - share * at_most


def assemble(
    design: Design, depths: tuple[int, ...], prompts: tuple[int, ...], measured_ms: Mapping[DecoderShape, np.ndarray]
) -> LatencyTable:
    """The table of a device of the milliseconds [depths and prompts] of the design's stacks."""
    return LatencyTable(design.widths.head_dim, depths, prompts, Assembler(design, measured_ms).parts())
