"""`efficientllm-bench --profile`: measure the stacks, take them apart, check the table on models it has not seen."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..runtime.base import flags
from ..runtime.base.errors import DeviceError
from ..runtime.latency.profile import DeviceProfile, MeasuredOn, Saving
from ..runtime.latency.shape import DecoderShape
from .bench import bench
from .device import Device
from .profiling.artefacts import DEFAULT_TYPES, make_artefacts
from .profiling.held_out import error_of, irregular_shapes, removals
from .profiling.regression import assemble
from .profiling.stacks import Design, Widths
from .results import BenchOptions, Result, Run

DECODED = 32
"""Tokens decoded per measurement."""
DEPTH = 512
"""Tokens in the cache when the decode is measured again."""
SHORT_PROMPT, LONG_PROMPT = 32, 512
DEPTHS = (DECODED // 2, DEPTH + DECODED // 2)
"""Where the middle of each decode lies: the table's depths."""
DESIGNS = {"llama.cpp": Design.full, "onnxruntime": Design.full, "executorch": Design.thin}
"""Engine -> which stacks are measured."""
CALIBRATION = 10
"""Irregular random models that the table is made to agree with; none of them is held out."""
CALIBRATION_SEED = 1_000
CONTEXT = 2048
"""Tokens that the random models are made for."""


@dataclass(frozen=True)
class ProfileOptions:
    """device profile (--profile)"""

    profile_engine: Literal["llama.cpp", "onnxruntime", "executorch"] = "llama.cpp"
    """Engine to measure."""
    profile_type: str = ""
    """Weight type, as efficientllm-export --quantize; default: q4_0, int4 and 8da4w by engine."""
    profile_like: str = ""
    """Model folder whose pruned shapes are to be priced; default: the widths of SmolLM2-135M."""
    profile_held_out: int = flags.number(6, at_least=2)
    """Irregular random models that the table is checked on, by which its error is said."""
    profile_savings: bool = False
    """Also measure what single removals from the source save, beside what the table says."""
    profile_name: str = ""
    """What to call the device in the profile; default: its --device."""
    profile_work: str = ""
    """Folder that keeps the random models for the next profile; default: none is kept."""

    def __post_init__(self) -> None:
        flags.check_fields(self)

    @property
    def weight_type(self) -> str:
        return self.profile_type or DEFAULT_TYPES[self.profile_engine]


def profile(
    device: Device, options: BenchOptions, settings: ProfileOptions, path: Path, say: Callable[[str], None]
) -> DeviceProfile:
    """Measure the table of `device` and write it to `path`; MissingExtraError and DeviceError say what is missing."""
    widths = Widths.of_model(settings.profile_like) if settings.profile_like else Widths()
    design = DESIGNS[settings.profile_engine](widths)
    stacks, unseen = design.stacks(), irregular_shapes(widths, settings.profile_held_out)
    whole = [*irregular_shapes(widths, CALIBRATION, CALIBRATION_SEED), *design.neighbours]
    single = removals(widths) if settings.profile_savings else {}
    timed = dataclasses.replace(
        options,
        prompt_tokens=(SHORT_PROMPT, LONG_PROMPT),
        decode_tokens=(DECODED,),
        depths=(DEPTH,),
        repetitions=1,
        # one for all: with "auto", each model would be tried for seconds, and might end with another than the last
        kv_cache="q8_0" if settings.profile_engine == "llama.cpp" and options.kv_cache == "auto" else options.kv_cache,
    )
    with _work_folder(settings) as folder:
        shapes = list(dict.fromkeys([*stacks, *whole, *unseen, *single.values()]))
        artefacts = make_artefacts(shapes, settings.profile_engine, settings.weight_type, CONTEXT, Path(folder), say)
        run = bench(device, artefacts, timed, say, path.with_suffix(".bench.json"))
    found = dict(zip(shapes, run.results, strict=True))
    measured_on = _measured_on(run, timed, settings)
    prompts = (1, SHORT_PROMPT, LONG_PROMPT)
    times = {shape: _milliseconds(result, measured_on.clock) for shape, result in found.items()}
    table = assemble(design, DEPTHS, prompts, {shape: times[shape] for shape in [*stacks, *whole]})
    made = _checked(DeviceProfile(measured_on, table), {shape: times[shape] for shape in unseen})
    made = dataclasses.replace(
        made, savings=_savings(made, {name: (shape, times[shape]) for name, shape in single.items()})
    )
    made.save(path)
    return made


def _work_folder(settings: ProfileOptions) -> AbstractContextManager[str]:
    if not settings.profile_work:
        return tempfile.TemporaryDirectory(prefix="efficientllm-profile-")
    Path(settings.profile_work).mkdir(parents=True, exist_ok=True)
    return nullcontext(settings.profile_work)


def _measured_on(run: Run, options: BenchOptions, settings: ProfileOptions) -> MeasuredOn:
    """CPU time is the clock of one thread, where the device tells it; several threads wait for each other."""
    first, threads = run.results[0], options.threads or run.device.cores
    chosen = {result.engine_settings for result in run.results}
    if len(chosen) > 1:
        raise DeviceError(f"models ran with different settings: {'; '.join(sorted(chosen))}; give --kv-cache q8_0")
    return MeasuredOn(
        device=settings.profile_name or run.device.name,
        cpu=run.device.cpu,
        engine=settings.profile_engine,
        engine_version=first.engine_version,
        quantization=settings.weight_type,
        threads=threads,
        clock="cpu" if threads == 1 and first.cpu_ms_per_token else "wall",
        measured_at=run.measured_at,
        engine_settings=first.engine_settings,
        efficientllm_version=run.efficientllm_version,
        emulated=run.device.emulated,
    )


def _milliseconds(result: Result, clock: str) -> np.ndarray:
    """Milliseconds [conditions] of a model; DeviceError where a test is missing."""

    def per_token(test: str) -> float:
        if test not in result.speeds:
            raise DeviceError(f"the device measured no {test}: {result.skipped.get(test, 'see the messages above')}")
        return result.quiet_ms(test, clock)

    first, deep = per_token(f"tg{DECODED}"), per_token(f"tg{DECODED}@d{DEPTH}")
    return np.array(
        [first, deep, first, *(length * per_token(f"pp{length}") for length in (SHORT_PROMPT, LONG_PROMPT))]
    )


def _checked(profile: DeviceProfile, measured_ms: dict[DecoderShape, np.ndarray]) -> DeviceProfile:
    """The profile with its error on models that took no part in it."""
    predicted = {shape: [profile.decode_ms(shape, depth) for depth in DEPTHS] for shape in measured_ms}
    errors = tuple(
        error_of(depth, [ms[index] for ms in measured_ms.values()], [ms[index] for ms in predicted.values()])
        for index, depth in enumerate((0, DEPTH))
    )
    models = tuple(
        asdict(shape) | {"measured_ms": ms[: len(DEPTHS)].tolist(), "predicted_ms": predicted[shape]}
        for shape, ms in measured_ms.items()
    )
    return dataclasses.replace(profile, errors=errors, held_out=models)


def _savings(profile: DeviceProfile, models: dict[str, tuple[DecoderShape, np.ndarray]]) -> tuple[Saving, ...]:
    """What each model saves against the first."""
    found = []
    for index, (named, depth) in enumerate(zip((0, DEPTH), DEPTHS, strict=True)):
        pairs = {name: (ms[index], profile.decode_ms(shape, depth)) for name, (shape, ms) in models.items()}
        whole = next(iter(pairs.values()), (0.0, 0.0))
        found += [
            Saving(name, named, float(whole[0] - measured), float(whole[1] - predicted))
            for name, (measured, predicted) in list(pairs.items())[1:]
        ]
    return tuple(found)


def summary(profile: DeviceProfile) -> str:
    """The profile's error for the terminal."""
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
    lines += [
        f"without {saving.removed}, at depth {saving.depth}: {saving.measured_ms:.3f} ms saved, predicted "
        f"{saving.predicted_ms:.3f} ({100 * (saving.predicted_ms / saving.measured_ms - 1):+.0f} %)"
        for saving in profile.savings
    ]
    return "\n".join(lines)
