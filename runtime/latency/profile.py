"""The profile of a device: milliseconds of every part of a decoder as it runs there, and what they were measured on.

Where the milliseconds of a workload go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import UsageError
from ..base.files import write_json_atomically
from .shape import DecoderShape, LayerShape, Workload
from .table import LatencyTable, attention_odd_rows, ffn_odd_rows, head_odd_rows


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a workload by part."""

    attention_ms: tuple[float, ...]
    """Of each layer."""
    ffn_ms: tuple[float, ...]
    """Of each layer."""
    head_ms: float
    """The LM head."""
    token_ms: float
    """What every token costs beside layers and head: embedding, last norm, the engine's own work."""

    @property
    def total_ms(self) -> float:
        return sum(self.attention_ms) + sum(self.ffn_ms) + self.head_ms + self.token_ms


SCHEMA_VERSION = 1
KIND = "device_profile"


@dataclass(frozen=True)
class MeasuredOn:
    """What the milliseconds are of."""

    device: str
    """As it was given to --device, or the name that its user gave it."""
    cpu: str
    engine: str
    """Runtime engine, as a manifest names it: llama.cpp, onnxruntime or executorch."""
    engine_version: str
    quantization: str
    """Weight type, as a manifest names it: q4_0, int4, 8da4w, ..."""
    threads: int
    clock: str
    """ "cpu": CPU time of all threads of the process, which other processes do not add to; "wall": the clock's."""
    measured_at: str
    """UTC, as ISO 8601."""
    engine_settings: str = ""
    """What the engine ran with, such as the attention kernel and the type of the cache."""
    efficientllm_version: str = ""
    emulated: bool = False
    """Whether instructions were translated: then no figure says anything about the device."""


@dataclass(frozen=True)
class HeldOutError:
    """How well the table predicts irregular random models that took no part in it, at one depth."""

    depth: int
    models: int
    median: float
    """Of |predicted / measured - 1|."""
    worst: float
    r2: float
    """Share of the variance of the measured milliseconds that is predicted."""


@dataclass(frozen=True)
class Saving:
    """Milliseconds of a decoded token that one removal from the source saves."""

    removed: str
    depth: int
    measured_ms: float
    predicted_ms: float


@dataclass(frozen=True)
class DeviceProfile:
    """Prices decoders in milliseconds on the device, engine, weight type and threads that it was measured on."""

    measured_on: MeasuredOn
    table: LatencyTable
    errors: tuple[HeldOutError, ...] = ()
    """Its own, by depth."""
    held_out: tuple[dict[str, Any], ...] = ()
    """The models behind `errors`: widths, measured and predicted milliseconds by depth."""
    savings: tuple[Saving, ...] = ()
    """Single removals from the source, where they were measured."""
    _prices: dict[tuple[object, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def decode_ms(self, shape: DecoderShape, depth: int) -> float:
        """Milliseconds of one decoded token after `depth` others."""
        return self.workload_ms(shape, Workload.at_depth(depth))

    def prefill_ms(self, shape: DecoderShape, tokens: int) -> float:
        """Milliseconds of a prompt of `tokens`, until its last logits are there."""
        return self.workload_ms(shape, Workload(prompt_tokens=tokens))

    def workload_ms(self, shape: DecoderShape, workload: Workload) -> float:
        """Milliseconds of the whole workload; UsageError for heads of another size than were measured."""
        return self.breakdown(shape, workload).total_ms

    def breakdown(self, shape: DecoderShape, workload: Workload) -> Breakdown:
        """Where the milliseconds of a workload go; a layer that lost attention and FFN costs nothing."""
        self._check_head_dim(shape)
        hidden = shape.hidden_size
        more = self._surcharge(shape, workload)
        return Breakdown(
            attention_ms=tuple(
                self.attention_ms(layer, hidden, workload)
                + more(layer.attention_weights(hidden, shape.head_dim), attention_odd_rows(layer, shape))
                for layer in shape.layers
            ),
            ffn_ms=tuple(
                self.ffn_ms(layer, hidden, workload) + more(layer.ffn_weights(hidden), ffn_odd_rows(layer, shape))
                for layer in shape.layers
            ),
            head_ms=self._price("head", hidden, (shape.vocab_size,), workload)
            + more(shape.head_weights, head_odd_rows(shape)),
            token_ms=self._price("token", hidden, (), workload),
        )

    def _surcharge(self, shape: DecoderShape, workload: Workload) -> Callable[[int, int], float]:
        """Milliseconds more in the workload of a part of this model: of its weights, and rows of odd lengths."""
        surcharge, weights = self.table.surcharge, self.table.weights(workload)
        if surcharge is None:
            return lambda num_weights, odd_rows: 0.0
        per_weight = float(np.dot(weights, surcharge.per_weight(shape.num_weights)))
        per_row = 1e-3 * float(np.dot(weights, surcharge.odd_ms))
        return lambda num_weights, odd_rows: per_weight * num_weights + per_row * odd_rows

    def attention_ms(self, layer: LayerShape, hidden_size: int, workload: Workload) -> float:
        """Milliseconds of a layer's attention in the workload, without the surcharge: what an absent one still costs
        where there are none."""
        if layer.is_absent:
            return 0.0
        if not layer.num_attention_heads:
            return self._price("no_attention", hidden_size, (), workload)
        groups = layer.num_key_value_heads
        return self._price("attention", hidden_size, (groups, layer.num_attention_heads / groups), workload)

    def ffn_ms(self, layer: LayerShape, hidden_size: int, workload: Workload) -> float:
        """Milliseconds of a layer's FFN in the workload, without the surcharge: what an absent one still costs where it
        has no channels."""
        if layer.is_absent:
            return 0.0
        if not layer.intermediate_size:
            return self._price("no_ffn", hidden_size, (), workload)
        return self._price("ffn", hidden_size, (layer.intermediate_size,), workload)

    def check(self, *, engine: str | None = None, quantization: str | None = None, threads: int | None = None) -> None:
        """UsageError where the profile was measured on another engine, weight type or number of threads."""
        asked = {"engine": engine, "quantization": quantization, "threads": threads}
        for name, value in asked.items():
            measured = getattr(self.measured_on, name)
            if value is not None and value != measured:
                raise UsageError(
                    f"the device profile was measured with {name} {measured}, not {value}; measure that one with "
                    "efficientllm-bench --profile FILE"
                )

    def _check_head_dim(self, shape: DecoderShape) -> None:
        if shape.head_dim != self.table.head_dim:
            raise UsageError(
                f"the device profile was measured with heads of {self.table.head_dim} channels, the model has "
                f"{shape.head_dim}; measure one with efficientllm-bench --profile FILE --profile-like MODEL"
            )

    def _price(self, part: str, hidden_size: int, widths: Sequence[float], workload: Workload) -> float:
        """Remembered: a ranking asks for the same widths again and again."""
        key = (part, hidden_size, *widths, workload)
        found = self._prices.get(key)
        if found is None:
            found = float(np.dot(self.table.weights(workload), self.table.figures(part, hidden_size, *widths)))
            self._prices[key] = found
        return found

    def save(self, path: Path) -> None:
        """Write the profile as JSON; the file is whole or absent."""
        write_json_atomically(
            path,
            {
                "kind": KIND,
                "schema_version": SCHEMA_VERSION,
                "measured_on": asdict(self.measured_on),
                "errors": [asdict(error) for error in self.errors],
                "table": self.table.to_json(),
                "held_out": {str(index): model for index, model in enumerate(self.held_out)},
                "savings": {str(index): asdict(saving) for index, saving in enumerate(self.savings)},
            },
        )

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Read what `save` wrote; UsageError where the file is missing, damaged or something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{path} does not exist; measure one with efficientllm-bench --profile {path}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict) or values.get("kind") != KIND or values.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{path} is no device profile of schema {SCHEMA_VERSION}; measure it again")
        try:
            return cls(
                MeasuredOn(**_known(MeasuredOn, values["measured_on"])),
                LatencyTable.from_json(values["table"]),
                tuple(HeldOutError(**_known(HeldOutError, error)) for error in values["errors"]),
                tuple(values["held_out"].values()),
                tuple(Saving(**_known(Saving, saving)) for saving in values["savings"].values()),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({error}); measure it again") from error


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(cls)}
    return {name: value for name, value in values.items() if name in names}
