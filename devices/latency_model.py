"""The latency model of a device: how long a layer takes to decode one token, by its widths.

    ms per token = token_ms + sum over layers of
        layer_ms + attention_ms_per_mweight * attention weights / 1e6 + ffn_ms_per_mweight * FFN weights / 1e6

with attention weights = 2 * hidden_size * head_dim * (num_attention_heads + num_key_value_heads) and FFN weights =
3 * hidden_size * intermediate_size. At batch 1 a token reads every weight once, so time follows bytes, and the two
kinds of matrices have their own rate because their shapes differ. Contexts are short (64 tokens), the output layer is
left out. The coefficients are fitted to random models of a handful of shapes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import DeviceError
from ..runtime.base.files import write_json_atomically
from ..runtime.engines.artefact import Artefact
from .bench import bench
from .device import Device
from .results import BenchOptions
from .shapes import HEAD_DIM, SHAPES, Shape, WeightType, write_gguf

SCHEMA_VERSION = 1
COEFFICIENTS = ("token_ms", "layer_ms", "attention_ms_per_mweight", "ffn_ms_per_mweight")
FORMULA = (
    "token_ms + num_layers * (layer_ms"
    " + attention_ms_per_mweight * 2 * hidden_size * head_dim * (num_attention_heads + num_key_value_heads) / 1e6"
    " + ffn_ms_per_mweight * 3 * hidden_size * intermediate_size / 1e6)"
)
DECODED = 64
"""Tokens decoded per measurement."""


@dataclass(frozen=True)
class ProfileOptions:
    """latency model (--profile)"""

    profile_type: WeightType = "q8_0"
    """Weight type of the measured GGUF shapes."""


def features(shape: Shape) -> list[float]:
    """The coefficients' factors."""
    layers = shape.num_layers
    return [1.0, float(layers), layers * shape.attention_weights / 1e6, layers * shape.ffn_weights / 1e6]


def fit(shapes: Sequence[Shape], measured_ms: Sequence[float]) -> np.ndarray:
    """COEFFICIENTS, none negative, for a small squared relative error over the shapes that are not held out.

    Least squares again and again without the most negative coefficient, until none is negative. A coefficient that was
    dropped does not come back, so that this may miss the minimum that non-negative least squares finds.
    """
    rows = [(features(shape), ms) for shape, ms in zip(shapes, measured_ms, strict=True) if not shape.held_out]
    matrix = np.array([[value / ms for value in row] for row, ms in rows])
    active = list(range(len(COEFFICIENTS)))
    while True:
        solution, *_ = np.linalg.lstsq(matrix[:, active], np.ones(len(rows)), rcond=None)
        if solution.min() >= 0 or len(active) == 1:
            break
        del active[int(solution.argmin())]
    coefficients = np.zeros(len(COEFFICIENTS))
    coefficients[active] = np.maximum(solution, 0)
    return coefficients


def predict(coefficients: np.ndarray, shape: Shape) -> float:
    """Milliseconds per token."""
    return float(np.dot(features(shape), coefficients))


def profile(
    device: Device, options: BenchOptions, settings: ProfileOptions, path: Path, say: Callable[[str], None]
) -> str:
    """Measure the shapes on `device`, write the fitted model to `path` and return its summary."""
    short = dataclasses.replace(options, prompt_tokens=(32,), decode_tokens=(DECODED,), depths=())
    with tempfile.TemporaryDirectory() as folder:
        artefacts = []
        for shape in SHAPES:
            file = Path(folder) / f"{shape.name}.gguf"
            say(f"writing {file.name}")
            write_gguf(shape, settings.profile_type, file)
            artefacts.append(Artefact.open(file))
        run = bench(device, artefacts, short, say)
    test = f"tg{DECODED}"
    if any(test not in result.speeds for result in run.results):
        raise DeviceError(f"the device measured no {test}; see the messages above")
    measured = [1000 / result.speeds[test].median for result in run.results]
    coefficients = fit(SHAPES, measured)
    errors = [
        abs(predict(coefficients, shape) / ms - 1) for shape, ms in zip(SHAPES, measured, strict=True) if shape.held_out
    ]
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "latency_model",
        "device": asdict(run.device),
        "engine": run.results[0].engine,
        "engine_version": run.results[0].engine_version,
        "quantization": settings.profile_type,
        "threads": run.results[0].threads,
        "head_dim": HEAD_DIM,
        "formula": FORMULA,
        "coefficients": dict(zip(COEFFICIENTS, coefficients.tolist(), strict=True)),
        "held_out_error": {"median": float(np.median(errors)), "largest": max(errors)},
        "shapes": [
            asdict(shape) | {"measured_ms": ms, "predicted_ms": predict(coefficients, shape)}
            for shape, ms in zip(SHAPES, measured, strict=True)
        ],
    }
    write_json_atomically(path, values)
    return summary(values)


def summary(values: dict[str, Any]) -> str:
    """The fitted model for the terminal."""
    lines = ["EMULATED: no figure here is the device's"] if values["device"]["emulated"] else []
    lines += [f"{name}: {value:.4f}" for name, value in values["coefficients"].items()]
    error = values["held_out_error"]
    lines.append(
        f"error on held-out shapes: median {100 * error['median']:.1f} %, largest {100 * error['largest']:.1f} %"
    )
    return "\n".join(lines)
