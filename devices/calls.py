"""One measurement out of the calls of a phone's program: what it printed, and what the phone told while it ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import BenchOptions, Measurement
from .runners import Parsed
from .sensors import battery_celsius, battery_watts, both, temperature_celsius
from .watch import FEWEST, SAMPLE_SECONDS, Watched, clocks_mhz, mean_watts


@dataclass(frozen=True)
class Call:
    """One call of the program."""

    parsed: Parsed
    watched: Watched

    def joules_per_token(self) -> list[float]:
        """Of the last test, one entry per repetition: its readings are the last, since the program ends with it.

        [] where the battery charged or told nothing, or the test was over too soon for its meter.
        """
        watts = mean_watts(self.watched.last(self.parsed.seconds(self.parsed.last)))
        return [watts / speed for speed in self.parsed.speeds[self.parsed.last]] if watts is not None else []

    def clocks_mhz(self, threads: int) -> tuple[float, float] | None:
        """Of the cores that worked, at the beginning and the end of the tests: loading comes before them."""
        return clocks_mhz(self.watched.last(self.parsed.seconds(*self.parsed.speeds)), threads)

    def why_no_energy(self) -> str:
        """ "" where the phone has no meter."""
        told = [battery_watts(moment) is not None for moment in self.watched.moments]
        current = any(name.endswith("/current_now") for moment in self.watched.moments for name in moment.contents)
        if not current:
            return ""
        if not all(told):
            return "the battery was not discharging; unplug the phone and use adb over Wi-Fi (adb tcpip 5555)"
        seconds, needed = self.parsed.seconds(self.parsed.last), FEWEST * SAMPLE_SECONDS
        return (
            f"{self.parsed.last} was over in {seconds:.1f} s, the battery's meter needs {needed:.0f} s; "
            "give a longer --decode-tokens or more --repetitions"
        )


def summarize_calls(
    calls: Sequence[Call], kv_cache_bytes: int, options: BenchOptions, skipped: dict[str, str]
) -> Measurement:
    """Speeds of all calls; energy of the first's last test, the longest decode, and of the calls that repeat it."""
    speeds: dict[str, list[float]] = {}
    for call in calls:
        for test, values in call.parsed.speeds.items():
            speeds.setdefault(test, []).extend(values)
    parsed, watched = [call.parsed for call in calls], [call.watched for call in calls]
    threads = next((entry.threads for entry in parsed if entry.threads), options.threads)
    measured = [call for call in calls if call.parsed.last == calls[0].parsed.last]
    joules = [value for call in measured for value in call.joules_per_token()]
    if measured and not joules and (reason := measured[0].why_no_energy()):
        skipped = skipped | {"J/token": reason}
    clocks = [pair for call in calls if (pair := call.clocks_mhz(threads))]
    moments = [moment for entry in watched for moment in entry.moments]
    degrees = [battery_celsius(moment) or temperature_celsius(moment) for moment in moments]
    first_tokens, first_prompt = speeds.get(f"pp{options.prompt_tokens[0]}", []), options.prompt_tokens[0]
    return Measurement(
        speeds=speeds,
        engine_version=next((entry.version for entry in parsed if entry.version), ""),
        threads=threads,
        time_to_first_token_ms=[1000 * first_prompt / speed for speed in first_tokens],
        peak_rss_bytes=max((entry.peak_rss_bytes for entry in watched), default=0),
        kv_cache_bytes=kv_cache_bytes,
        temperature_celsius=both(degrees[0], degrees[-1]) if degrees else None,
        clock_mhz=(clocks[0][0], min(end for _, end in clocks)) if clocks else None,
        joules_per_token=joules,
        skipped=skipped,
    )
