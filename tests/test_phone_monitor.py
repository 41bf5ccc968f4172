"""Monitoring of a program on a phone: power and clock are those of the work, not of the idle phone after it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from phone import entry, program, sysfs

from efficientllm.devices import phone_monitor
from efficientllm.devices.llama_bench import RunnerOutput, calls_of, parse_output
from efficientllm.devices.phone_monitor import ProgramRecord, RunnerCall, monitor_script, parse_record, summarize_calls
from efficientllm.devices.results import BenchOptions, summarize
from efficientllm.runtime.engines.artefact import Artefact

OPTIONS = BenchOptions(prompt_tokens=(16,), decode_tokens=(8, 24), depths=(), repetitions=2)


def run_monitored(folder: Path, path: Path, root: Path, shell: str) -> ProgramRecord:
    text = monitor_script(str(folder), ["sh", str(path)]).replace("/sys/", f"{root}/")
    environment = {"SYS": str(root), "PATH": os.environ["PATH"]}
    done = subprocess.run([shell, "-c", text], capture_output=True, text=True, check=True, env=environment)
    assert sorted(file.name for file in folder.iterdir()) == [path.name]  # nothing of the script's is left
    return parse_record(done.stdout.replace(f"{root}/", "/sys/"))


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["sh", "mksh"])
def test_power_and_clock_are_sampled_during_the_work(tmp_path: Path, shell: str) -> None:
    """Sample 12 W and 2.4 GHz, then 8 W and 1.8 GHz in the longest decode. Other tests compute energies of records."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell}, Android's shell, is not installed (apt install mksh)")
    root, folder = sysfs(tmp_path / "sys"), tmp_path / "artefact"
    folder.mkdir()
    steps = "set_phone -3000000 2400000\nsleep 1.2\nset_phone -2000000 1800000\nsleep 2.3"
    path = program(folder / "program.sh", steps, [entry(16, 0, 40.0), entry(0, 8, 40.0), entry(0, 24, 27.0)])
    record = run_monitored(folder, path, root, shell)
    assert record.code == 0
    assert record.peak_rss_bytes > 100_000
    currents = dict.fromkeys(each.contents[f"{phone_monitor.BATTERY}/current_now"] for each in record.samples)
    assert [each for each in currents if each != "-200000"] == ["-3000000", "-2000000"]  # others are at rest
    measured = summarize_calls([RunnerCall(parse_output(record.output), record)], 0, OPTIONS)
    assert len(measured.joules_per_token or ()) == 2
    assert measured.clock_mhz == (2400.0, 1800.0)
    assert measured.temperature_celsius == (31.5, 31.5)
    assert measured.threads == 2
    assert summarize("m", "", "", 1, {}, [measured]).throttled == "clock fell from 2400 to 1800 MHz"


def record_of(watts: float, seconds: float, status: str = "Discharging", clock: int = 1_000_000) -> ProgramRecord:
    contents = {
        f"{phone_monitor.BATTERY}/status": status,
        f"{phone_monitor.BATTERY}/current_now": str(round(-watts * 250_000)),
        f"{phone_monitor.BATTERY}/voltage_now": "4000000",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": str(clock),
    }
    count = round(seconds / phone_monitor.SAMPLE_SECONDS) + 1
    return ProgramRecord(
        0,
        1,
        "",
        "",
        tuple(phone_monitor.SensorSample(phone_monitor.SAMPLE_SECONDS * i, contents) for i in range(count)),
    )


def test_energy_leaves_out_the_last_sample() -> None:
    record = record_of(8, 4)
    at_rest = record_of(0.8, 0).samples[0]
    record = replace(record, samples=(*record.samples[:-1], replace(at_rest, seconds=4.0)))
    call = RunnerCall(RunnerOutput({"tg24": [12.0]}, "llama.cpp 1", 1), record)
    assert call.joules_per_token() == [pytest.approx(8 / 12)]


def test_steady_clock_shows_no_throttling() -> None:
    call = RunnerCall(RunnerOutput({"pp16": [8.0], "tg24": [12.0]}, "llama.cpp 1", 1), record_of(8, 4))
    measured = summarize_calls([call], 0, OPTIONS)
    assert measured.clock_mhz == (1000.0, 1000.0)
    assert measured.joules_per_token == [pytest.approx(8 / 12)]
    assert measured.skipped == {}


def test_missing_energy_names_its_reason() -> None:
    def reason(record: ProgramRecord, speed: float) -> str:
        output = RunnerOutput({"tg24": [speed]}, "llama.cpp 1", 1)
        measured = summarize_calls([RunnerCall(output, record)], 0, OPTIONS)
        assert measured.joules_per_token == []
        return measured.skipped.get("J/token", "")

    assert "tg24 was over in 0.2 s, the battery's meter needs 1 s" in reason(record_of(8, 4), 100.0)
    assert "the battery was not discharging" in reason(record_of(8, 4, "Charging"), 4.0)
    assert reason(ProgramRecord(0, 1, "", "", ()), 4.0) == ""  # no meter: no column, no word


def test_the_longest_decode_is_the_last_test_of_the_first_call(artefact: Path) -> None:
    options = BenchOptions(decode_tokens=(128, 64))
    first, _ = calls_of(Artefact.open(artefact), options)
    assert re.search(r"-n 64,128$", " ".join(first))


def test_a_program_that_outlived_its_connection_is_ended(tmp_path: Path) -> None:
    """It would take cores and power beside the next."""
    folder = tmp_path / "artefact"
    folder.mkdir()
    runner = tmp_path / "runner"
    runner.write_text("#!/bin/sh\necho done\n")
    runner.chmod(0o755)
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(runner)])
    (tmp_path / "measuring").write_text(f"{orphan.pid}\n")
    text = monitor_script(str(folder), [str(runner)])
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert orphan.wait(timeout=20) == -signal.SIGTERM
    assert parse_record(done.stdout).output == "done\n"
    assert not (tmp_path / "measuring").exists()


def test_a_program_that_cannot_be_started_has_no_figures(tmp_path: Path) -> None:
    text = monitor_script(str(tmp_path / "missing"), ["true"])
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert parse_record(done.stdout) == ProgramRecord(None, 0, "", "", ())
    folder = tmp_path / "artefact"
    folder.mkdir()
    text = monitor_script(str(folder), ["sh", "-c", "echo no such model >&2; exit 3"])
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert (parse_record(done.stdout).code, parse_record(done.stdout).errors) == (3, "no such model\n")
