"""What a phone tells while a program runs on it: sensors, memory, output and exit code.

One script of shell starts the program and reads the sensors beside it. What is read over adb before or after is a phone
at rest: its power is a tenth of what the program draws, its clock the idle governor's.

One measurement out of the calls of a phone's program: what it printed, and what the phone told while it ran.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .remote import MARK
from .results import BenchOptions, Measurement
from .runners import Parsed
from .sensors import BATTERY, CLOCKS, ZONES, battery_celsius, battery_watts, both, clock_mhz, temperature_celsius

SAMPLE_SECONDS = 0.2
"""Between two readings; a battery's meter gives a new value every quarter of a second to every few seconds."""
FEWEST = 5
"""Readings that a figure needs."""
FACTS = re.compile(r"^(code|peak_kb)=(\d+)", re.MULTILINE)

SCRIPT = r"""
cd {folder} || exit 1
warmth={battery}/temp
[ -r $warmth ] || warmth='{zones}'
files=
for file in {battery}/status {battery}/current_now {battery}/voltage_now $warmth {clocks}; do
  [ -r $file ] && files="$files $file"
done
pid=$(cat ../measuring 2> /dev/null) && grep -q {program} /proc/$pid/cmdline 2> /dev/null && kill $pid
{command} > out.txt 2> err.txt &
pid=$!
echo $pid > ../measuring
trap 'kill $pid; exit 129' HUP TERM
peak=0
while kill -0 $pid; do
  read -r now rest < /proc/uptime && echo "@ $now"
  for file in $files; do
    read -r value < $file && echo "$file $value"
  done
  while read -r name value rest; do
    [ "$name" = VmHWM: ] && peak=${{value%% *}}
  done < /proc/$pid/status
  sleep {seconds}
done > samples.txt 2> /dev/null
wait $pid
echo code=$?
echo peak_kb=$peak
echo {mark}
cat samples.txt
echo {mark}
cat out.txt
echo {mark}
tail -n 3 err.txt
rm -f samples.txt out.txt err.txt ../measuring
"""
"""Builtins alone but for sleep: a process per reading would be part of what is measured. Zones, of which there may be
eighty, are asked only where the battery has no thermometer. A program that outlived its connection is ended first."""


@dataclass(frozen=True)
class Moment:
    """One reading of every sensor, as a `sensors.Shell`: what looks at a device looks at its past, too."""

    seconds: float
    """Since the phone was started."""
    contents: dict[str, str]
    """{file: its line}"""

    def read(self, pattern: str) -> list[str]:
        return [text for path, text in sorted(self.contents.items()) if fnmatchcase(path, pattern)]

    def run(self, command: Sequence[str]) -> str | None:
        return None


@dataclass(frozen=True)
class Watched:
    """A program that has ended."""

    code: int | None
    """Its exit code; None where the script itself was stopped."""
    peak_rss_bytes: int
    output: str
    errors: str
    """Its last lines of stderr."""
    moments: tuple[Moment, ...]

    def last(self, seconds: float) -> list[Moment]:
        """The readings of its last `seconds`, without the very last: while it was read, the program may have ended."""
        return [moment for moment in self.moments[:-1] if moment.seconds >= self.moments[-1].seconds - seconds]


def script(folder: str, command: Sequence[str]) -> str:
    """Lines of shell that run `command` in `folder` of the phone and print what `parse` reads."""
    return SCRIPT.format(
        folder=shlex.quote(folder),
        command=shlex.join(command),
        program=shlex.quote(command[0]),
        battery=BATTERY,
        zones=ZONES,
        clocks=CLOCKS,
        seconds=SAMPLE_SECONDS,
        mark=MARK,
    )


def parse(text: str) -> Watched:
    """What `script` printed."""
    head, samples, output, errors = (*text.replace("\r\n", "\n").split(f"{MARK}\n"), "", "", "")[:4]
    facts = {name: int(value) for name, value in FACTS.findall(head)}
    return Watched(facts.get("code"), 1024 * facts.get("peak_kb", 0), output, errors, tuple(_moments(samples)))


def _moments(text: str) -> list[Moment]:
    moments = []
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name == "@":
            moments.append(Moment(float(value), {}))
        elif moments:
            moments[-1].contents[name] = value
    return moments


def mean_watts(moments: Sequence[Moment]) -> float | None:
    """Power over evenly spaced readings; None where they are few or the battery charged or hid it at one of them."""
    watts = [value for moment in moments if (value := battery_watts(moment)) is not None]
    return statistics.fmean(watts) if FEWEST <= len(watts) == len(moments) else None


def clocks_mhz(moments: Sequence[Moment], cores: int) -> tuple[float, float] | None:
    """Clock of the `cores` fastest cores at the beginning and at the end: medians of a fifth of the readings, of three
    at least."""
    clocks = [value for moment in moments if (value := clock_mhz(moment, cores)) is not None]
    if len(clocks) < FEWEST:
        return None
    count = max(3, len(clocks) // 5)
    return statistics.median(clocks[:count]), statistics.median(clocks[-count:])


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
