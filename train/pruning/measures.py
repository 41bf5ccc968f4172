"""What a model's size is measured in: parameters, bytes of the exported file, milliseconds on a device.

Budget, schedule and ranking of a run share one measure: groups compete on expected loss per unit of it. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from ...runtime.base.quantities import format_bytes, format_count
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import DecoderShape, Workload
from ...runtime.latency.shape import LayerShape as DecoderLayer
from ..model.architecture import Architecture, LayerShape
from ..model.file_types import depends_on_place, gguf_bytes
from ..model.irregular import packed

RUN_UNITS = 8
"""Steps of a kind in one layer that are priced together at most, where the measure has steps of its own: of 32 FFN
channels each, up to the 256 that K-quants and the widest kernels work in."""


NO_LAYERS = (LayerShape(0, 0, 0),)
"""Of a model without any: it has at least one."""


@dataclass(frozen=True)
class Measure:
    """A size of an architecture, and how people read it."""

    unit: str
    """parameters, bytes or ms"""
    of: Callable[[Architecture], float]
    longest_run: int = 1
    """Steps of one kind in one layer that the ranking prices together at most; 1 where a step's price is always the
    same, so that longer runs never are the better bargain."""

    def show(self, amount: float) -> str:
        """An amount, to the last digit that matters."""
        if self.unit == "parameters":
            return f"{amount:,.0f} parameters"
        return format_bytes(amount) if self.unit == "bytes" else f"{amount:.3f} ms"

    def describe(self, amount: float) -> str:
        """An amount in short."""
        return f"{format_count(amount)} parameters" if self.unit == "parameters" else self.show(amount)


def _count(architecture: Architecture) -> float:
    return architecture.num_parameters


PARAMETERS = Measure("parameters", _count)
"""Stored parameters, tied heads counted once."""


def bytes_of_file(quantize: str, vocabulary_bytes: int, num_rows: int | None = None, head_type: str = "") -> Measure:
    """Bytes of the GGUF in type `quantize`; rows are padded to blocks, so single channels may save nothing.

    `vocabulary_bytes`: bytes of the tokenizer in an exported file, of `num_rows` tokens where some may go: each then
    counts alike (those that go are longer than the mean: the file is a little smaller than said). `head_type`: of
    embedding and LM head, where it is not the exporter's default.
    """

    @lru_cache(maxsize=65_536)  # a ranking asks for the same shapes again and again
    def of_tensors(shape: Architecture) -> int:
        return gguf_bytes(shape, quantize, 0, head_type, head_type)

    def of_layers(architecture: Architecture) -> int:
        if depends_on_place(quantize):
            return of_tensors(architecture)
        narrow = replace(architecture, vocab_size=1)
        none = of_tensors(replace(narrow, layers=NO_LAYERS))
        layers = sum(of_tensors(replace(narrow, layers=(layer,))) - none for layer in architecture.layers)
        return of_tensors(replace(architecture, layers=NO_LAYERS)) + layers

    def size(architecture: Architecture) -> int:
        share = 1.0 if num_rows is None else architecture.vocab_size / num_rows
        return of_layers(architecture) + round(share * vocabulary_bytes)

    return Measure("bytes", size, RUN_UNITS)


def decoder_shape(architecture: Architecture) -> DecoderShape:
    """The shape as it is exported: blocks that are gone are closed up."""
    closed = packed(architecture).architecture
    layers = tuple(
        DecoderLayer(layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size)
        for layer in closed.layers
    )
    return DecoderShape(closed.hidden_size, closed.head_dim, closed.vocab_size, layers)


@dataclass(frozen=True)
class DeviceTime:
    """A profiled device and what it is asked to do: what --target-latency means."""

    profile: DeviceProfile
    workload: Workload

    @property
    def measure(self) -> Measure:
        """Predicted milliseconds of the workload."""

        @lru_cache(maxsize=65_536)  # a ranking asks for the same shapes again and again
        def predicted(architecture: Architecture) -> float:
            return self.profile.workload_ms(decoder_shape(architecture), self.workload)

        return Measure("ms", predicted, RUN_UNITS)

    def describe(self) -> str:
        """The device and the workload as people read them."""
        on = self.profile.measured_on
        threads = "1 thread" if on.threads == 1 else f"{on.threads} threads"
        return f"{self.workload} on {on.device} ({on.cpu}, {on.engine} {on.quantization}, {threads})"
