"""`efficientllm-bench --profile`: measure random models, fit the latency table, and check it on held-out models."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..runtime.base import flags
from ..runtime.base.errors import DeviceError
from ..runtime.latency.profile import DeviceProfile, HeldOutError, MeasuredOn
from ..runtime.latency.shape import DecoderShape
from .bench import bench
from .device import Device
from .profiling.random_models import DEFAULT_TYPES, make_artefacts
from .profiling.random_shapes import SMOLLM2_135M, Design, irregular_shapes, source_shape
from .profiling.regression import assemble, nnls_solver
from .results import BenchOptions, Result, Run

DECODED_TOKENS = 32
"""Tokens to decode per measurement."""
DEPTH = 512
"""Tokens in the KV cache of the second decode."""
SHORT_PROMPT, LONG_PROMPT = 32, 512
MEAN_DEPTHS = (DECODED_TOKENS // 2, DEPTH + DECODED_TOKENS // 2)
"""Depth in the middle of each decode, which is the depth in the table."""
DESIGNS = {"llama.cpp": Design.full, "onnxruntime": Design.full, "executorch": Design.thin}
"""Maps an engine to the stacks that are measured."""
NUM_FITTED_IRREGULAR = 10
"""Irregular random models that the table is fitted to. None of them is held out."""
FITTED_SEED = 1_000
CONTEXT = 2048
"""Context of the random models in tokens."""


@dataclass(frozen=True)
class ProfileOptions:
    """Device profile (--profile)."""

    profile_engine: Literal["llama.cpp", "onnxruntime", "executorch"] = "llama.cpp"
    """Engine to measure."""
    profile_type: str = ""
    """Weight type, as in efficientllm-export --quantize; default: q4_0, int4 or 8da4w by engine."""
    profile_like: str = ""
    """Model folder whose pruned shapes the profile must cover; default: the widths of SmolLM2-135M."""
    profile_held_out: int = flags.number(6, at_least=2)
    """Number of irregular random models that measure the error of the profile."""
    profile_name: str = ""
    """Name of the device in the profile; default: the value of --device."""
    profile_work: str = ""
    """Folder that keeps the random models for the next profile; default: they are deleted."""

    def __post_init__(self) -> None:
        flags.check_fields(self)

    @property
    def weight_type(self) -> str:
        return self.profile_type or DEFAULT_TYPES[self.profile_engine]


def profile(
    device: Device, options: BenchOptions, settings: ProfileOptions, path: Path, log: Callable[[str], None]
) -> DeviceProfile:
    """Measure the latency profile of `device` and write it to `path`.

    Raises MissingExtraError for a missing package, and DeviceError for a failed measurement.
    """
    nnls_solver()  # raises before the measurement, which takes minutes
    source = source_shape(settings.profile_like) if settings.profile_like else SMOLLM2_135M
    design = DESIGNS[settings.profile_engine](source)
    fitted = [*design.stacks(), *irregular_shapes(source, NUM_FITTED_IRREGULAR, FITTED_SEED), *design.neighbours]
    held_out = irregular_shapes(source, settings.profile_held_out)
    is_llama_cpp = settings.profile_engine == "llama.cpp"
    bench_options = dataclasses.replace(
        options,
        prompt_tokens=(SHORT_PROMPT, LONG_PROMPT),
        decode_tokens=(DECODED_TOKENS,),
        depths=(DEPTH,),
        repetitions=1,
        # "auto" would take seconds per model, and might choose different types for different models.
        kv_cache="q8_0" if is_llama_cpp and options.kv_cache == "auto" else options.kv_cache,
    )
    with _work_folder(settings) as folder:
        shapes = list(dict.fromkeys([*fitted, *held_out]))
        artefacts = make_artefacts(shapes, settings.profile_engine, settings.weight_type, CONTEXT, Path(folder), log)
        run = bench(device, artefacts, bench_options, log, path.with_suffix(".bench.json"))
    measured_on = _measured_on(run, bench_options, settings)
    results = zip(shapes, run.results, strict=True)
    measured_ms = {shape: _milliseconds(result, measured_on.clock) for shape, result in results}
    prompts = (1, SHORT_PROMPT, LONG_PROMPT)
    table = assemble(design, MEAN_DEPTHS, prompts, {shape: measured_ms[shape] for shape in fitted})
    made = _with_errors(DeviceProfile(measured_on, table), {shape: measured_ms[shape] for shape in held_out})
    made.save(path)
    return made


def _work_folder(settings: ProfileOptions) -> AbstractContextManager[str]:
    if not settings.profile_work:
        return tempfile.TemporaryDirectory(prefix="efficientllm-profile-")
    Path(settings.profile_work).mkdir(parents=True, exist_ok=True)
    return nullcontext(settings.profile_work)


def _measured_on(run: Run, options: BenchOptions, settings: ProfileOptions) -> MeasuredOn:
    """Return the description of the measurement."""
    first, threads = run.results[0], options.threads or run.device.cores
    engine_settings = {result.engine_settings for result in run.results}
    if len(engine_settings) > 1:
        different = "; ".join(sorted(engine_settings))
        raise DeviceError(f"models ran with different settings: {different}; give --kv-cache q8_0")
    return MeasuredOn(
        device=settings.profile_name or run.device.name,
        cpu=run.device.cpu,
        engine=settings.profile_engine,
        engine_version=first.engine_version,
        quantization=settings.weight_type,
        threads=threads,
        # several threads wait for each other, so their clock is wall time
        clock="cpu" if threads == 1 and first.cpu_ms_per_token else "wall",
        measured_at=run.measured_at,
        engine_settings=first.engine_settings,
        kv_cache=options.kv_cache,
        efficientllm_version=run.efficientllm_version,
        emulated=bool(run.device.emulator),
    )


def _milliseconds(result: Result, clock: str) -> np.ndarray:
    """Return the milliseconds [conditions] of a model. Raises DeviceError if a test is missing."""

    def per_token(test: str) -> float:
        if test not in result.speeds:
            reason = result.skipped.get(test, "see the messages above")
            raise DeviceError(f"the device did not measure {test}: {reason}")
        return result.quiet_ms(test, clock)

    decode, deep_decode = per_token(f"tg{DECODED_TOKENS}"), per_token(f"tg{DECODED_TOKENS}@d{DEPTH}")
    prompts = [length * per_token(f"pp{length}") for length in (SHORT_PROMPT, LONG_PROMPT)]
    return np.array([decode, deep_decode, decode, *prompts])  # a prompt of one token is a decode


def _with_errors(profile: DeviceProfile, measured_ms: dict[DecoderShape, np.ndarray]) -> DeviceProfile:
    """Return the profile with its errors on held-out models."""
    predicted_ms = {shape: [profile.decode_ms(shape, depth) for depth in MEAN_DEPTHS] for shape in measured_ms}
    errors = []
    for index, depth in enumerate((0, DEPTH)):
        measured = [ms[index] for ms in measured_ms.values()]
        predicted = [ms[index] for ms in predicted_ms.values()]
        errors.append(error_of(depth, measured, predicted))
    models = []
    for shape, ms in measured_ms.items():
        decodes = ms[: len(MEAN_DEPTHS)].tolist()
        models.append(asdict(shape) | {"measured_ms": decodes, "predicted_ms": predicted_ms[shape]})
    return dataclasses.replace(profile, errors=tuple(errors), held_out=tuple(models))


def error_of(depth: int, measured_ms: Sequence[float], predicted_ms: Sequence[float]) -> HeldOutError:
    """Return the error over several models at one depth."""
    measured, predicted = np.array(measured_ms), np.array(predicted_ms)
    relative = np.abs(predicted / measured - 1)
    variance = float(((measured - measured.mean()) ** 2).sum())
    unexplained = float(((measured - predicted) ** 2).sum())
    r2 = 1 - unexplained / variance if variance else 0.0
    return HeldOutError(depth, len(measured), float(np.median(relative)), float(relative.max()), r2)


def summary(profile: DeviceProfile) -> str:
    """Return the errors of a profile for the terminal."""
    on = profile.measured_on
    lines = ["EMULATED: no figure here is the device's"] if on.emulated else []
    lines.append(
        f"{on.device}: {on.engine} {on.quantization}, {on.threads} thread{'s' * (on.threads > 1)}, {on.clock} time"
    )
    lines += [
        f"error on {error.models} held-out models, decoding at depth {error.depth}: median {100 * error.median:.1f} %, "
        f"worst {100 * error.worst:.1f} %, R2 {error.r2:.3f}"
        for error in profile.errors
    ]
    return "\n".join(lines)
