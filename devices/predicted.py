"""What a latency table says of artefacts, beside what was measured of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..runtime.base.errors import UsageError
from ..runtime.latency.profile import DeviceProfile
from ..runtime.latency.shape import DecoderShape, LayerShape
from .results import Result, Run

TEST = re.compile(r"pp(?P<prompt>\d+)|tg(?P<decoded>\d+)(?:@d(?P<depth>\d+))?")


def rows(run: Run, profile: DeviceProfile) -> list[list[str]]:
    """Header, then a row for each test of each artefact; milliseconds per token by the profile's clock.

    UsageError where the profile is of another engine, weight type or number of threads, or of other engine settings.
    """
    table = [["artefact", "test", f"predicted ms ({profile.measured_on.clock})", "measured ms", "measured / predicted"]]
    for name, result in zip(run.labels, run.results, strict=True):
        _check(profile, result, name)
        shape = _shape(result.manifest["architecture"])
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


def _shape(architecture: dict[str, Any]) -> DecoderShape:
    widths: Sequence[Sequence[int]] = [
        architecture[name] for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    ]
    layers = tuple(LayerShape(*each) for each in zip(*widths, strict=True))
    return DecoderShape(architecture["hidden_size"], architecture["head_dim"], architecture["vocab_size"], layers)


def _predicted(profile: DeviceProfile, shape: DecoderShape, test: str) -> float:
    """Milliseconds per token: of a decode at the middle of its depths."""
    match = TEST.fullmatch(test)
    assert match is not None, test
    if match["prompt"]:
        return profile.prefill_ms(shape, int(match["prompt"])) / int(match["prompt"])
    return profile.decode_ms(shape, int(match["depth"] or 0) + int(match["decoded"]) // 2)
