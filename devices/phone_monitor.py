"""Monitoring of a program on a phone: sensors, memory, output and exit code while it runs.

One shell script starts the program and reads the sensors beside it. Readings over adb before or after the program
describe an idle phone, whose power is a tenth of the program's, and whose clock is the idle governor's.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .llama_bench import RunnerOutput
from .remote import MARK
from .results import BenchOptions, Measurement
from .sensors import BATTERY, CLOCKS, ZONES, battery_celsius, battery_watts, clock_mhz, pair_of, temperature_celsius

SAMPLE_SECONDS = 0.2
"""Seconds between two readings. A battery's meter updates every 0.25 seconds to every few seconds."""
MIN_SAMPLES = 5
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
"""Shell script with built-in commands only, except sleep: a process per reading would disturb the measurement.

Thermal zones, up to eighty of them, are read only if the battery has no thermometer. A program that survived its
connection is killed first.
"""


@dataclass(frozen=True)
class SensorSample:
    """One reading of all sensors. It is a `sensors.Shell`, so that the functions of `sensors` can read it."""

    seconds: float
    """Time since the phone started."""
    contents: dict[str, str]
    """Maps each file to its line."""

    def read(self, pattern: str) -> list[str]:
        return [text for path, text in sorted(self.contents.items()) if fnmatchcase(path, pattern)]

    def run(self, command: Sequence[str]) -> str | None:
        return None


@dataclass(frozen=True)
class ProgramRecord:
    """The record of a finished program."""

    code: int | None
    """Exit code; None if the script itself was stopped."""
    peak_rss_bytes: int
    output: str
    errors: str
    """Last lines of standard error."""
    samples: tuple[SensorSample, ...]

    def last(self, seconds: float) -> list[SensorSample]:
        """Return the samples of the last `seconds`, without the final one."""
        # the program may have ended before the final one
        begin = self.samples[-1].seconds - seconds if self.samples else 0.0
        return [sample for sample in self.samples[:-1] if sample.seconds >= begin]


def monitor_script(folder: str, command: Sequence[str]) -> str:
    """Return a shell script that runs `command` in `folder` of the phone and prints the input of `parse_record`."""
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


def parse_record(text: str) -> ProgramRecord:
    """Parse the output of `monitor_script`."""
    sections = text.replace("\r\n", "\n").split(f"{MARK}\n")  # older phones' adb ends lines as terminals do
    # a script that was stopped, or lost its connection, prints only the first sections
    head, samples, output, errors = (*sections, "", "", "")[:4]
    facts = {name: int(value) for name, value in FACTS.findall(head)}
    peak_bytes = 1024 * facts.get("peak_kb", 0)
    return ProgramRecord(facts.get("code"), peak_bytes, output, errors, tuple(_parse_samples(samples)))


def _parse_samples(text: str) -> list[SensorSample]:
    samples: list[SensorSample] = []
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name == "@":
            samples.append(SensorSample(float(value), {}))
        elif samples:
            samples[-1].contents[name] = value
    return samples


def mean_watts(samples: Sequence[SensorSample]) -> float | None:
    """Return the mean power, and None for fewer than MIN_SAMPLES or if any sample has no power."""
    watts = [value for sample in samples if (value := battery_watts(sample)) is not None]
    is_complete = len(watts) == len(samples)
    return statistics.fmean(watts) if is_complete and len(watts) >= MIN_SAMPLES else None


def clocks_mhz(samples: Sequence[SensorSample], cores: int) -> tuple[float, float] | None:
    """Return the clock of the `cores` fastest cores at the beginning and at the end.

    Both are medians over a fifth of the samples, and at least three. Returns None for fewer than MIN_SAMPLES.
    """
    clocks = [value for sample in samples if (value := clock_mhz(sample, cores)) is not None]
    if len(clocks) < MIN_SAMPLES:
        return None
    count = max(3, len(clocks) // 5)
    return statistics.median(clocks[:count]), statistics.median(clocks[-count:])


@dataclass(frozen=True)
class RunnerCall:
    """One call of a runner on the phone."""

    output: RunnerOutput
    record: ProgramRecord

    def joules_per_token(self) -> list[float]:
        """Return the energy per token of the last test, one entry per repetition.

        Returns [] if the battery charged, has no meter, or the test was too short for it.
        """
        # the last samples belong to the last test, because the program ends with it
        watts = mean_watts(self.record.last(self.output.seconds(self.output.last)))
        if watts is None:
            return []
        return [watts / speed for speed in self.output.speeds[self.output.last]]

    def clocks_mhz(self, threads: int) -> tuple[float, float] | None:
        """Return the clock of the working cores at the beginning and the end of the tests, without the loading."""
        return clocks_mhz(self.record.last(self.output.seconds(*self.output.speeds)), threads)

    def missing_energy_reason(self) -> str:
        """Return why there is no energy figure, and "" if the phone has no meter."""
        samples = self.record.samples
        if not any(name.endswith("/current_now") for sample in samples for name in sample.contents):
            return ""
        if any(battery_watts(sample) is None for sample in samples):
            return "the battery was not discharging; unplug the phone and use adb over Wi-Fi (adb tcpip 5555)"
        seconds, needed = self.output.seconds(self.output.last), MIN_SAMPLES * SAMPLE_SECONDS
        return (
            f"{self.output.last} was over in {seconds:.1f} s, the battery's meter needs {needed:.0f} s; "
            "give a longer --decode-tokens or more --repetitions"
        )


def summarize_calls(calls: Sequence[RunnerCall], kv_cache_bytes: int, options: BenchOptions) -> Measurement:
    """Return one measurement with the speeds of all calls. Energy is that of the first call's last test.

    That is the longest decode.
    """
    speeds = {test: values for call in calls for test, values in call.output.speeds.items()}
    threads, joules = calls[0].output.threads, calls[0].joules_per_token()
    reason = "" if joules else calls[0].missing_energy_reason()
    clocks = [pair for call in calls if (pair := call.clocks_mhz(threads))]
    samples = [sample for call in calls for sample in call.record.samples]
    celsius = [battery_celsius(sample) or temperature_celsius(sample) for sample in samples]
    first_prompt = options.prompt_tokens[0]
    prompt_speeds = speeds.get(f"pp{first_prompt}", [])
    return Measurement(
        speeds=speeds,
        engine_version=calls[0].output.version,
        threads=threads,
        time_to_first_token_ms=[1000 * first_prompt / speed for speed in prompt_speeds],
        peak_rss_bytes=max(call.record.peak_rss_bytes for call in calls),
        kv_cache_bytes=kv_cache_bytes,
        temperature_celsius=pair_of(celsius[0], celsius[-1]) if celsius else None,
        clock_mhz=(clocks[0][0], min(end for _, end in clocks)) if clocks else None,
        joules_per_token=joules,
        skipped={"J/token": reason} if reason else {},
    )
