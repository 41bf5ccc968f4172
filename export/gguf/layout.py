"""Choose the llama.cpp architecture and shape of a model.

Irregular layers fit `deci` (heads and FFN widths per layer, RMS norms before gated SiLU blocks) and `openelm` (the same
with a norm over each head of q and k, tied heads only). A LayerNorm without bias is an RMS norm if the stem has no
mean, which centring its writers achieves (train/model/rescaling.py). OLMo therefore fits `deci`. Other families use
their own architecture, with every layer zero-padded to the widest: the same function, but each layer costs as much as
the widest. An architecture with other mathematics is never used.

Two shapes that `deci` cannot store are written as exact equivalents. A layer without FFN gets zero channels, because
`deci` would silently drop the layer's attention. A first layer without attention gets zero heads, because the file
would not load. Their rows have the LEAST_ROW weights that llama.cpp needs. All of this was measured with
llama-cpp-python 0.3.36. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...train.model.architecture import Architecture
from ...train.model.file_types import LEAST_ROW, irregular_gguf, padded_architecture
from ...train.model.gguf_source import INTERLEAVED
from ...train.model.rescaling import Scales
from ...train.model.target_rules import GGUF_FREQUENCIES, GGUF_WINDOWS, check_gguf
from ..checkpoint import Checkpoint
from ..padding import padded_scales, padding_notes, stock_scales, uniform_architecture, widened

FUSED_QKV = ("openelm", "gptneox")
PER_LAYER_WIDTHS = ("deci", "openelm")
SQUARE_ATTENTION = ("qwen2", "gptneox", "olmo", "olmo2")
"""Architectures whose query heads times head_dim equal the hidden size."""
UNTIED_HEAD = ("gptneox", "olmo2")
"""Architectures that need an untied head."""


@dataclass(frozen=True)
class GgufPlan:
    """Layout of a checkpoint in GGUF."""

    name: str
    """llama.cpp architecture."""
    architecture: Architecture
    """Shape in the file, after padding; of family llama if LayerNorms became RMS norms."""
    scales: Scales
    """Scales of the architecture."""
    notes: tuple[str, ...] = ()

    @property
    def permutes_rope(self) -> bool:
        """Tell whether q and k rows change from half-split to interleaved order (llama.cpp's NORM rope)."""
        return self.name in INTERLEAVED

    @property
    def fuses_qkv(self) -> bool:
        return self.name in FUSED_QKV

    def window(self, checkpoint: Checkpoint) -> int:
        """Return the smallest window that the file cannot store, at which its context ends; 0 without one."""
        windows = [settings.window for settings in checkpoint.attention if settings.window]
        return 0 if self.name in GGUF_WINDOWS else min(windows, default=0)


def plan_layout(checkpoint: Checkpoint, row_multiple: int) -> GgufPlan:
    """Choose llama.cpp architecture and padding.

    Quantised rows must be multiples of `row_multiple` (1: no padding). Raises ModelError if no stock llama.cpp
    architecture fits the model.
    """
    plan = _plan_layout(checkpoint, row_multiple)
    check_gguf(plan.name, checkpoint.attention, checkpoint.architecture)
    return plan


def _plan_layout(checkpoint: Checkpoint, row_multiple: int) -> GgufPlan:
    original = checkpoint.architecture
    padded = _padded(original, row_multiple)
    notes = padding_notes(original, padded)
    has_gaps = any(not (layer.num_attention_heads and layer.intermediate_size) for layer in original.layers)
    if padded.is_uniform and not has_gaps and _holds(original.parts.gguf, checkpoint, padded):
        return _stock_plan(checkpoint, padded, notes)
    irregular = irregular_gguf(original)
    if not irregular:
        plain, whole = (uniform_architecture(padded, multiple) for multiple in (1, row_multiple))
        # rows that are not whole blocks become f16, with 1.9 times the bytes of q8_0
        uniform = _padded(whole if whole.num_parameters < 1.8 * plain.num_parameters else plain, 1)
        return _stock_plan(checkpoint, uniform, (*notes, _uniform_note(original, uniform)))
    shape = _fill_gaps(padded, attention_everywhere=irregular == "openelm")
    have = padded_scales(checkpoint, shape)
    if original.parts.norm.takes_mean:
        shape = replace(shape, family="llama")
        notes = (*notes, "LayerNorm written as RMS norm of a centred residual stream (the same function)")
    # a file has one eps, also for the norms of q and k
    return GgufPlan(irregular, shape, replace(have, qk_eps=have.stem_eps), notes)


def _padded(architecture: Architecture, row_multiple: int) -> Architecture:
    """Return the shape with whole blocks in its rows, at least two, and a head of its own where that needs one."""
    shape = padded_architecture(architecture, row_multiple)
    return widened(architecture, shape.hidden_size, shape.layers)


def _stock_plan(checkpoint: Checkpoint, shape: Architecture, notes: tuple[str, ...]) -> GgufPlan:
    """Return the plan of the family's own architecture, which has a setting for eps."""
    name, have = shape.parts.gguf, padded_scales(checkpoint, shape)
    if name in UNTIED_HEAD:
        shape = replace(shape, tie_word_embeddings=False)
    want = replace(stock_scales(checkpoint, shape), stem_eps=have.stem_eps, qk_eps=have.stem_eps)
    return GgufPlan(name, shape, want, notes)


def _holds(name: str, checkpoint: Checkpoint, shape: Architecture) -> bool:
    """Tell whether a family's own architecture fits a uniform shape unchanged."""
    width = shape.layers[0].num_attention_heads * shape.head_dim
    has_frequencies = checkpoint.rope["rope_type"] == "llama3" and bool(irregular_gguf(shape))
    return (
        (name not in SQUARE_ATTENTION or width == shape.hidden_size)
        and (shape.parts.norm.has_gain or padded_scales(checkpoint, shape).stem_gain == 1.0)
        and (name in GGUF_FREQUENCIES or not has_frequencies)
    )


def _uniform_note(before: Architecture, after: Architecture) -> str:
    head = " with an untied head" if before.parts.qk_norm == "head" and not before.tie_word_embeddings else ""
    return (
        f"no stock llama.cpp architecture holds irregular layers of {before.family}{head}: zero-padded (exactly) to "
        f"uniform {before.parts.gguf}, {before.num_parameters:,} -> {after.num_parameters:,} parameters, as fast as "
        "its widest layer everywhere (--layout uniform in training avoids that)"
    )


def _fill_gaps(architecture: Architecture, attention_everywhere: bool) -> Architecture:
    """Give zero channels (heads) to layers whose missing FFN (attention) the file format cannot express."""
    layers, heads = [], -(-LEAST_ROW // architecture.head_dim)
    for index, layer in enumerate(architecture.layers):
        layer = replace(layer, intermediate_size=layer.intermediate_size or LEAST_ROW)
        needs_heads = not layer.num_attention_heads and (attention_everywhere or index == 0)
        if needs_heads:
            layer = replace(layer, num_attention_heads=heads, num_key_value_heads=heads)
        layers.append(layer)
    return replace(architecture, layers=tuple(layers))
