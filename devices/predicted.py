"""What a latency table says of artefacts, beside what was measured of them."""

from __future__ import annotations

import math

from ..runtime.base.errors import UsageError
from ..runtime.latency.profile import DeviceProfile
from ..runtime.latency.shape import DecoderShape
from .results import Result, Run, mean_context


def rows(run: Run, profile: DeviceProfile) -> list[list[str]]:
    """Header, then a row for each test of each artefact; milliseconds per token by the profile's clock.

    UsageError where the profile is of another engine, weight type or number of threads, or of other engine settings.
    """
    table = [["artefact", "test", f"predicted ms ({profile.measured_on.clock})", "measured ms", "measured / predicted"]]
    for name, result in zip(run.labels, run.results, strict=True):
        _check(profile, result, name)
        shape = DecoderShape.from_dict(result.manifest["architecture"])
        for test in result.speeds:
            measured, predicted = result.quiet_ms(test, profile.measured_on.clock), _predicted(profile, shape, test)
            row = (f"{predicted:.3f}", f"{measured:.3f}", f"{measured / predicted:.3f}")
            table.append([name, test, *row])
    return table


def _check(profile: DeviceProfile, result: Result, name: str) -> None:
    if not result.manifest.get("architecture"):
        raise UsageError(
            f"--predict: {name} has no manifest that tells its widths; give a folder of efficientllm-export"
        )
    profile.check(engine=result.engine, quantization=result.quantization, threads=result.threads or None)
    on = profile.measured_on
    if on.engine_settings and result.engine_settings and on.engine_settings != result.engine_settings:
        raise UsageError(
            f"--predict: the profile was measured with {on.engine_settings}, {name} ran with {result.engine_settings}; "
            "give the same --kv-cache"
        )


def _predicted(profile: DeviceProfile, shape: DecoderShape, test: str) -> float:
    """Milliseconds per token: of a decode at the middle of its depths."""
    context = mean_context(test)
    if context is not None:
        return profile.decode_ms(shape, math.ceil(context))
    tokens = int(test.removeprefix("pp"))
    return profile.prefill_ms(shape, tokens) / tokens
