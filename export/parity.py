"""Compare an engine with torch on the very weights that a file stores.

The reference is transformers' model with the file's dequantised weights. An engine also rounds the inputs of its
products, to 8-bit blocks or to 16 bits. The reference is therefore computed twice, with exact inputs and with inputs
rounded in the same way. The distance between the two is the size of that rounding. It is the limit for the distance of
the engine, so no limit depends on a type. S sample tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from ..runtime.base.errors import ArtefactError
from ..runtime.doctor import cpu
from ..train.model.irregular import irregular_config, make_buffers
from ..train.model.modeling_efficientllm import CAUSAL_LM_CLASSES
from ..train.model.tensors import EMBEDDING, HEAD
from .checkpoint import Checkpoint
from .padding import padded_tensors
from .request import ExportRequest, RoundingOptions
from .verification import (
    MAX_EXACT_DIFFERENCE,
    REPORT,
    Activation,
    EngineRun,
    Sample,
    StoredWeights,
    Written,
    check_stepwise,
    own_limit,
    replace_activation,
    size_of,
)

ROUNDING_FACTOR = 2.0
"""Allowed distance of the engine, in distances of the two references. Another order of sums moves a few inputs to the
other side of a rounding, and a kernel without rounded inputs is one distance away."""
HALF_FACTOR = 4.0
"""The same for files whose activations are fp16. Their attention also rounds inside, which the reference does not."""


WORST, MANY = 2.0, 100
"""Factor of the limit of a single position, and positions of a run that have a limit of their mean."""


def _to_blocks(block: int, stores_half: bool = False) -> Callable[[Tensor], Tensor]:
    """Return the rounding to 127 levels up to the largest magnitude in blocks of `block` inputs.

    `stores_half` tells whether the product uses a scale of fp16.
    """

    def rounded(x: Tensor) -> Tensor:
        """Return x [..., N] rounded. The last block may be shorter."""
        missing = -x.shape[-1] % block
        blocks = torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, block))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        codes = (blocks / scale).round()
        stored_scale = scale.half().float() if stores_half else scale
        return (codes * stored_scale).flatten(-2)[..., : x.shape[-1]]

    return rounded


def _asymmetric(axes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Return the rounding to 256 levels between the smallest and the largest input over `axes`, zero included."""

    def rounded(x: Tensor) -> Tensor:
        """Return x rounded, in its shape."""
        low = x.amin(axes, keepdim=True).clamp(max=0)
        high = x.amax(axes, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-30)
        zero = (-low / scale).round()
        codes = ((x / scale).round() + zero).clamp(0, 255)
        return (codes - zero) * scale

    return rounded


THROUGHOUT = "f16 throughout"
"""Rounding of all values between operations, in files whose activations are fp16."""

ROUNDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "f16": lambda x: x.half().float(),
    THROUGHOUT: lambda x: x.half().float(),
    "bf16": lambda x: x.bfloat16().float(),
    "int8 in blocks of 32": _to_blocks(32),
    "q8_0": _to_blocks(32, stores_half=True),
    "q8_k": _to_blocks(256),
    "int8 per token": _asymmetric((-1,)),
    "int8 per tensor": _asymmetric((-2, -1)),
}
"""Roundings of the inputs of a product in our engines."""


@dataclass(frozen=True)
class Reference:
    """Logits fp32 [S, V] of a file's weights in torch."""

    exact: np.ndarray
    rounded: np.ndarray
    """With inputs of products rounded as the engine does."""
    factor: float = ROUNDING_FACTOR
    own_error: Callable[[], float] = lambda: 0.0
    """Measures the error of `exact`, see `torch_error`."""


def reference_logits(
    checkpoint: Checkpoint, stored: StoredWeights, tokens: list[int], activation: Activation | None = None
) -> Reference:
    """Return the logits of a file's weights. `activation` is that of `torch_sample`."""
    model = _build(checkpoint, stored)
    if activation is not None:
        replace_activation(model, activation)
    with torch.inference_mode():
        exact = model(torch.tensor([tokens])).logits[0].float().numpy()
        tied = stored.architecture.tie_word_embeddings
        for name, module in model.named_modules():
            matrix = EMBEDDING if tied and name == HEAD.removesuffix(".weight") else f"{name}.weight"
            if isinstance(module, torch.nn.Linear) and matrix in stored.roundings:
                module.register_forward_pre_hook(_rounding_hook(ROUNDINGS[stored.roundings[matrix]]))
            if THROUGHOUT in stored.roundings.values():
                module.register_forward_hook(_round_output)
        factor = HALF_FACTOR if THROUGHOUT in stored.roundings.values() else ROUNDING_FACTOR
        return Reference(exact, model(torch.tensor([tokens])).logits[0].float().numpy(), factor)


def _round_output(module: Any, inputs: Any, output: Any) -> Any:
    """Round the output of a module to fp16, the stream between the layers included."""
    return ROUNDINGS[THROUGHOUT](output) if isinstance(output, Tensor) else output


def _rounding_hook(rounding: Callable[[Tensor], Tensor]) -> Callable[[Any, tuple[Any, ...]], tuple[Tensor]]:
    return lambda module, inputs: (rounding(inputs[0]),)


def _build(checkpoint: Checkpoint, stored: StoredWeights) -> Any:
    """Return the irregular model of the file's shape with the file's weights."""
    architecture = stored.architecture
    config = irregular_config(AutoConfig.from_pretrained(checkpoint.folder), architecture)
    config._attn_implementation = "eager"
    for name, value in stored.scales.settings(architecture).items():
        setattr(config, name, value)
    with torch.device("meta"):
        model: Any = CAUSAL_LM_CLASSES[architecture.family](config)
    offset = architecture.parts.norm.gain_offset
    state = {}
    for name, array in stored.tensors.items():
        if name.endswith("norm.weight"):
            array = array - offset
        # torch shares the memory and warns of an array that is read-only
        state[name] = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if architecture.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    make_buffers(model)
    return model.eval()


def check_written(
    checkpoint: Checkpoint,
    request: ExportRequest[RoundingOptions],
    written: Written,
    sample: Sample,
    runs: list[EngineRun],
    stored: StoredWeights | None,
) -> dict[str, dict[str, object]]:
    """Compare runs of a file with torch, on its own weights, or on the checkpoint's without `stored` (f32).

    Returns the results for the manifest. The first run is stepwise. Raises ArtefactError beyond a limit.
    """
    agreement, target = check_stepwise(runs[0], sample, written, request), written.target
    if stored is None:
        source = Reference(sample.logits, sample.logits, own_error=sample.own_error)
        return {"exact": agreement.to_dict(), "codes": check_runs(source, runs, "the checkpoint's", target)}
    weights = check_weights(padded_tensors(checkpoint, stored.architecture), stored, target)
    codes = check_runs(reference_logits(checkpoint, stored, sample.tokens), runs, stored.origin, target)
    name, kind = written.quantize, written.kind
    request.say(f"verified {name} {kind} against torch on its own weights, {len(runs)} runs")
    if agreement.mean_kl > written.doubtful:
        request.say(f"warning: {name} has a mean KL of {agreement.mean_kl:.2f}; int8 is the safe choice")
    return {"weights": weights, "codes": codes, "quantized": agreement.to_dict()}


def check_runs(reference: Reference, runs: list[EngineRun], origin: str, target: str) -> dict[str, object]:
    """Return the distances of the runs from the reference, for the manifest. Raises ArtefactError beyond the limit.

    `origin` says where the weights were read. A distance is the root mean square of differences over the vocabulary.
    """
    floor = MAX_EXACT_DIFFERENCE * size_of(reference.exact)
    worst, mean = (reference.factor * each for each in _distances(reference.exact, reference.rounded))
    # a single position may be further away than many on average, because one rounding can decide an attention
    limits = {"worst": WORST * worst + floor, "mean": mean + floor}
    found: dict[str, dict[str, float]] = {"worst": {}, "mean": {}}
    for run in runs:
        distances = dict(zip(limits, _distances(reference.rounded[run.positions], run.logits), strict=True))
        if len(run.positions) < MANY:  # the limit of the mean holds for many positions only
            del distances["mean"]
        for name, distance in distances.items():
            found[name][run.title] = distance
            if distance > limits[name]:
                limits[name] = max(limits[name], own_limit(reference.exact, reference.own_error))
            if not distance <= limits[name]:  # NaN is no distance
                raise ArtefactError(
                    f"{target}: {run.title}, the engine's logits differ by {distance:.2e} ({name}) from torch's with "
                    f"the file's own weights (limit {limits[name]:.2e}, by the rounding of inputs); {REPORT}"
                )
    this_cpu = cpu()
    features = [name for name, has in this_cpu["features"].items() if has]
    described = {"model": this_cpu["model"], "features": features}  # which select the engine's kernels
    return {"weights": origin, "limits": limits, "distances": found, "cpu": described}


def _distances(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the largest root mean square of a position's differences, and that of all positions."""
    squares = np.square(first - second).mean(-1)
    return float(np.sqrt(squares.max())), float(np.sqrt(squares.mean()))


def check_weights(source: Iterable[tuple[str, np.ndarray]], stored: StoredWeights, target: str) -> dict[str, object]:
    """Return the largest relative error of a matrix, for the manifest.

    Raises ArtefactError for a matrix that is as far from the exact one as zeros are.
    """
    errors = {}
    for name, array in source:
        if array.ndim > 1:
            size = max(float(np.linalg.norm(array)), 1e-30)
            errors[name] = float(np.linalg.norm(stored.tensors[name] - array) / size)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] < 1:  # NaN is no error below 1
        raise ArtefactError(
            f"{target}: the stored {worst} is {errors[worst]:.0%} of its size away from the checkpoint's; {REPORT}"
        )
    return {"matrix": worst, "relative_error": errors[worst]}
