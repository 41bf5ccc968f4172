"""Compare a run with the predictions of a device profile."""

from __future__ import annotations

import math

from ..runtime.base.errors import UsageError
from ..runtime.latency.profile import DeviceProfile
from ..runtime.latency.shape import DecoderShape
from .results import Result, Run, mean_context


def prediction_rows(run: Run, profile: DeviceProfile) -> list[list[str]]:
    """Return the header and one row per test of each artefact, in milliseconds per token by the profile's clock.

    Raises UsageError if the profile has another engine, weight type, number of threads or engine settings.
    """
    clock = profile.measured_on.clock
    table = [["artefact", "test", f"predicted ms ({clock})", "measured ms", "measured / predicted"]]
    for name, result in run.labelled:
        _check_profile(profile, result, name)
        shape = DecoderShape.from_dict(result.manifest["architecture"])
        for test in result.speeds:
            measured = result.quiet_ms(test, clock)
            predicted = _predicted_ms(profile, shape, test)
            table.append([name, test, f"{predicted:.3f}", f"{measured:.3f}", f"{measured / predicted:.3f}"])
    return table


def _check_profile(profile: DeviceProfile, result: Result, name: str) -> None:
    if not result.manifest.get("architecture"):
        raise UsageError(f"--predict: {name} has no manifest with its widths; give a folder of efficientllm-export")
    profile.check(engine=result.engine, quantization=result.quantization, threads=result.threads or None)
    measured_with = profile.measured_on.engine_settings
    if measured_with and result.engine_settings and measured_with != result.engine_settings:
        raise UsageError(
            f"--predict: the profile was measured with {measured_with}, {name} ran with {result.engine_settings}; "
            "give the same --kv-cache"
        )


def _predicted_ms(profile: DeviceProfile, shape: DecoderShape, test: str) -> float:
    """Return the predicted milliseconds per token, for a decode at its mean context."""
    context = mean_context(test)
    if context is not None:
        return profile.decode_ms(shape, math.ceil(context))
    tokens = int(test.removeprefix("pp"))
    return profile.prefill_ms(shape, tokens) / tokens
