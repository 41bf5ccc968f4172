"""Measures of a model's size: parameters, bytes of the exported file, milliseconds on a device.

Budget and schedule of a run share one measure. Groups compete by expected loss per unit of it, or of another one with
`--rank-by` or `--ranking-profile`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from ...runtime.base.quantities import format_bytes, format_count
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import DecoderShape, Workload
from ..model.architecture import Architecture, LayerShape
from ..model.file_types import SETTINGS_BYTES, depends_on_place, gguf_bytes
from ..model.tensors import packed

RUN_UNITS = 8
"""Most steps of a kind in one layer whose cost is computed together: 8 steps of 32 FFN channels reach the 256 of
K-quants and of the widest kernels."""


NO_LAYERS = (LayerShape(0, 0, 0),)
"""Layers of a model without blocks, which has at least one layer."""


@dataclass(frozen=True)
class Measure:
    """A size of an architecture and its text form."""

    unit: str
    """parameters, bytes or ms"""
    of: Callable[[Architecture], float]
    longest_run: int = 1
    """Most steps of one kind in one layer whose cost the ranking computes together; 1 if all steps cost the same."""

    def show(self, amount: float) -> str:
        """Return an amount with all significant digits."""
        if self.unit == "parameters":
            return f"{amount:,.0f} parameters"
        return format_bytes(amount) if self.unit == "bytes" else f"{amount:.3f} ms"

    def describe(self, amount: float) -> str:
        """Return an amount in short."""
        return f"{format_count(amount)} parameters" if self.unit == "parameters" else self.show(amount)


PARAMETERS = Measure("parameters", lambda architecture: architecture.num_parameters)
"""Stored parameters. A tied head counts once."""


def bytes_of_file(quantize: str, vocabulary_bytes: int, num_rows: int | None = None, head_type: str = "") -> Measure:
    """Return the measure of bytes of a GGUF in type `quantize`.

    Rows are padded to blocks, so single channels may save nothing. `vocabulary_bytes` is the bytes of the tokenizer in
    an exported file, of `num_rows` tokens if rows may be removed. Each counts alike. Removed tokens are longer than
    average, so the file is slightly smaller. `head_type` is the type of embedding and LM head if it is not the
    exporter's default.
    """

    @lru_cache(maxsize=65_536)  # a ranking asks for the same shapes again and again
    def of_tensors(shape: Architecture) -> int:
        return gguf_bytes(shape, quantize, 0, head_type, head_type)

    # A candidate changes one layer, so the sum is taken over single layers: their shapes repeat and are cached, and
    # without the rows they are the same for every vocabulary. The types of some files depend on a layer's place.
    def of_layers(architecture: Architecture) -> int:
        if depends_on_place(quantize):
            return of_tensors(architecture)
        narrow = replace(architecture, vocab_size=1)
        without_layers = of_tensors(replace(narrow, layers=NO_LAYERS))
        total = of_tensors(replace(architecture, layers=NO_LAYERS))
        for layer in architecture.layers:
            total += of_tensors(replace(narrow, layers=(layer,))) - without_layers
        return total

    def size(architecture: Architecture) -> int:
        share = 1.0 if num_rows is None else architecture.vocab_size / num_rows
        return of_layers(architecture) + round(share * vocabulary_bytes) + SETTINGS_BYTES

    return Measure("bytes", size, RUN_UNITS)


def decoder_shape(architecture: Architecture) -> DecoderShape:
    """Return the shape as exported, with absent blocks merged."""
    closed = packed(architecture).architecture
    return DecoderShape(closed.hidden_size, closed.head_dim, closed.vocab_size, closed.layers)


@dataclass(frozen=True)
class DeviceTime:
    """A profiled device and a workload: the meaning of --target-latency."""

    profile: DeviceProfile
    workload: Workload

    @property
    def measure(self) -> Measure:
        """Return the measure of predicted milliseconds."""

        @lru_cache(maxsize=65_536)  # a ranking asks for the same shapes again and again
        def predicted(architecture: Architecture) -> float:
            return self.profile.workload_ms(decoder_shape(architecture), self.workload)

        return Measure("ms", predicted, RUN_UNITS)

    def describe(self) -> str:
        """Return the device and the workload in words."""
        on = self.profile.measured_on
        threads = "1 thread" if on.threads == 1 else f"{on.threads} threads"
        return f"{self.workload} on {on.device} ({on.cpu}, {on.engine} {on.quantization}, {threads})"
