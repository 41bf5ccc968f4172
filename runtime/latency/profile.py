"""Device profile: measured milliseconds of every part of a decoder, and the conditions of the measurement."""

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
    """Attention of each layer."""
    ffn_ms: tuple[float, ...]
    """FFN of each layer."""
    head_ms: float
    """LM head."""
    token_ms: float
    """Cost of a token outside layers and head: embedding, last norm and the engine's own work."""

    @property
    def total_ms(self) -> float:
        return sum(self.attention_ms) + sum(self.ffn_ms) + self.head_ms + self.token_ms


SCHEMA_VERSION = 1
KIND = "device_profile"


@dataclass(frozen=True)
class MeasuredOn:
    """Conditions of the measurement."""

    device: str
    """Value of --device, or a name that the user gave."""
    cpu: str
    engine: str
    """Runtime engine: llama.cpp, onnxruntime or executorch."""
    engine_version: str
    quantization: str
    """Weight type: q4_0, int4, 8da4w, ..."""
    threads: int
    clock: str
    """ "cpu" for CPU time of all threads of the process, "wall" for elapsed time. CPU time excludes other processes."""
    measured_at: str
    """UTC time in ISO 8601."""
    engine_settings: str = ""
    """Settings of the engine, such as the attention kernel and the cache type."""
    kv_cache: str = "auto"
    """Value of --kv-cache."""
    efficientllm_version: str = ""
    emulated: bool = False
    """Whether instructions were translated. Figures then say nothing about the device."""


@dataclass(frozen=True)
class HeldOutError:
    """Prediction error for irregular random models outside the table, at one depth."""

    depth: int
    models: int
    median: float
    """Median of |predicted / measured - 1|."""
    worst: float
    r2: float
    """Share of the variance of the measured milliseconds that is predicted."""


@dataclass(frozen=True)
class DeviceProfile:
    """Predict times of decoders on the measured device, engine, weight type and threads."""

    measured_on: MeasuredOn
    table: LatencyTable
    errors: tuple[HeldOutError, ...] = ()
    """Prediction errors by depth."""
    held_out: tuple[dict[str, Any], ...] = ()
    """Models behind `errors`: widths, measured and predicted milliseconds by depth."""
    _prices: dict[tuple[object, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def decode_ms(self, shape: DecoderShape, depth: int) -> float:
        """Return the milliseconds of one decoded token after `depth` others."""
        return self.workload_ms(shape, Workload.at_depth(depth))

    def prefill_ms(self, shape: DecoderShape, tokens: int) -> float:
        """Return the milliseconds of a prompt of `tokens` until its last logits."""
        return self.workload_ms(shape, Workload(prompt_tokens=tokens))

    def workload_ms(self, shape: DecoderShape, workload: Workload) -> float:
        """Return the milliseconds of the whole workload. Raises UsageError for another head size."""
        return self.breakdown(shape, workload).total_ms

    def breakdown(self, shape: DecoderShape, workload: Workload) -> Breakdown:
        """Return the milliseconds of a workload by part. An empty layer costs nothing."""
        self._check_head_dim(shape)
        hidden = shape.hidden_size
        surcharge = self._surcharge(shape, workload)
        attention_ms, ffn_ms = [], []
        for layer in shape.layers:
            attention_weights = layer.attention_weights(hidden, shape.head_dim)
            more = surcharge(attention_weights, attention_odd_rows(layer, shape))
            attention_ms.append(self.attention_ms(layer, hidden, workload) + more)
            more = surcharge(layer.ffn_weights(hidden), ffn_odd_rows(layer, shape))
            ffn_ms.append(self.ffn_ms(layer, hidden, workload) + more)
        head_ms = self._price("head", hidden, (shape.vocab_size,), workload)
        head_ms += surcharge(shape.head_weights, head_odd_rows(shape))
        token_ms = self._price("token", hidden, (), workload)
        return Breakdown(tuple(attention_ms), tuple(ffn_ms), head_ms, token_ms)

    def _surcharge(self, shape: DecoderShape, workload: Workload) -> Callable[[int, int], float]:
        """Return a function of (weights, odd rows) that gives the surcharge of a part in milliseconds."""
        surcharge, weights = self.table.surcharge, self.table.weights(workload)
        if surcharge is None:
            return lambda num_weights, odd_rows: 0.0
        # of the whole model's size: how much of a part is cached depends on all the others
        per_weight = float(np.dot(weights, surcharge.per_weight(shape.num_weights)))
        per_row = 1e-3 * float(np.dot(weights, surcharge.odd_ms))
        return lambda num_weights, odd_rows: per_weight * num_weights + per_row * odd_rows

    def attention_ms(self, layer: LayerShape, hidden_size: int, workload: Workload) -> float:
        """Return the milliseconds of a layer's attention without the surcharge.

        An absent one still has a small cost.
        """
        if layer.is_absent:
            return 0.0
        if not layer.num_attention_heads:
            return self._price("no_attention", hidden_size, (), workload)
        groups = layer.num_key_value_heads
        return self._price("attention", hidden_size, (groups, layer.num_attention_heads / groups), workload)

    def ffn_ms(self, layer: LayerShape, hidden_size: int, workload: Workload) -> float:
        """Return the milliseconds of a layer's FFN without the surcharge. An absent one still has a small cost."""
        if layer.is_absent:
            return 0.0
        if not layer.intermediate_size:
            return self._price("no_ffn", hidden_size, (), workload)
        return self._price("ffn", hidden_size, (layer.intermediate_size,), workload)

    def check(self, *, engine: str | None = None, quantization: str | None = None, threads: int | None = None) -> None:
        """Raise UsageError if the profile was measured on another engine, weight type or number of threads."""
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
        """Return a cached price."""
        # a ranking asks for the same widths many times
        key = (part, hidden_size, *widths, workload)
        found = self._prices.get(key)
        if found is None:
            figures = self.table.figures(part, hidden_size, *widths)
            found = float(np.dot(self.table.weights(workload), figures))
            self._prices[key] = found
        return found

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically."""
        write_json_atomically(
            path,
            {
                "kind": KIND,
                "schema_version": SCHEMA_VERSION,
                "measured_on": asdict(self.measured_on),
                "errors": [asdict(error) for error in self.errors],
                "table": self.table.to_json(),
                "held_out": {str(index): model for index, model in enumerate(self.held_out)},
            },
        )

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Read the file of `save`. Raises UsageError if it is missing, damaged or of another kind."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{path} does not exist; measure one with efficientllm-bench --profile {path}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as JSON: {error}") from error
        head = (values.get("kind"), values.get("schema_version")) if isinstance(values, dict) else None
        if head != (KIND, SCHEMA_VERSION):
            raise UsageError(f"{path} is not a device profile of schema {SCHEMA_VERSION}; measure it again")
        try:
            return cls(
                MeasuredOn(**_known(MeasuredOn, values["measured_on"])),
                LatencyTable.from_json(values["table"]),
                tuple(HeldOutError(**_known(HeldOutError, error)) for error in values["errors"]),
                tuple(values["held_out"].values()),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({error}); measure it again") from error


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    # without the fields that a later release may add
    names = {item.name for item in fields(cls)}
    return {name: value for name, value in values.items() if name in names}
