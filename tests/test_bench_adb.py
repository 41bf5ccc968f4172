"""efficientllm-bench on a phone: a real adb server and a daemon that stands for the phone."""

from __future__ import annotations

import json
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adb_daemon import AdbDaemon
from phone import entry, program, sysfs
from training import ERRORS

from efficientllm.devices import cli
from efficientllm.devices.adb import find_serial
from efficientllm.devices.llama_bench import parse_output
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import DeviceError

RUNNER = Path(__file__).parents[1] / "build/android-runner/llama-bench"
QUICK = ["--prompt-tokens", "16", "--decode-tokens", "4,8", "--depths", "16", "--repetitions", "2", "--rounds", "1"]
pytestmark = [
    pytest.mark.skipif(shutil.which("adb") is None, reason="adb is not installed (apt install adb)"),
    pytest.mark.xdist_group("phones"),
]


@pytest.fixture(scope="module")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adb server of the tests' own, with its own keys."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    patch.setenv("ANDROID_USER_HOME", str(tmp_path_factory.mktemp("android")))
    subprocess.run(["adb", "start-server"], check=True, capture_output=True)
    yield
    subprocess.run(["adb", "kill-server"], check=False, capture_output=True)
    patch.undo()


@pytest.fixture
def connect(adb_server: None, tmp_path: Path) -> Iterator[Callable[..., tuple[AdbDaemon, str]]]:
    """Start a phone and connect the adb server to it: (daemon, serial)."""
    daemons = []

    def start(**settings: object) -> tuple[AdbDaemon, str]:
        daemon = AdbDaemon(tmp_path / f"phone{len(daemons)}", **settings)  # type: ignore[arg-type]
        daemons.append(daemon)
        serial = f"127.0.0.1:{daemon.port}"
        subprocess.run(["adb", "connect", serial], check=True, capture_output=True)
        return daemon, serial

    yield start
    for daemon in daemons:
        subprocess.run(["adb", "disconnect", f"127.0.0.1:{daemon.port}"], check=False, capture_output=True)
        daemon.close()


@pytest.fixture
def runner() -> Path:
    if not RUNNER.is_file():
        pytest.skip("the phone's runner is not built (make android-runner)")
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("qemu-user-static is not installed (apt install qemu-user-static)")
    return RUNNER


@pytest.mark.slow
def test_a_phone_runs_the_real_runner(
    connect: Callable[..., tuple[AdbDaemon, str]], artefact: Path, runner: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    daemon, serial = connect()
    command = [str(artefact), "--device", f"adb:{serial}", "--runner", str(runner), *QUICK, "--threads", "1"]
    assert run_command(cli.body, [*command, "--json", str(tmp_path / "phone.json")]) == 0
    printed = capsys.readouterr()
    run = json.loads((tmp_path / "phone.json").read_text())
    assert run["device"]["board"] == "Google Pixel 8"
    assert run["device"]["machine"] == "arm64-v8a"
    assert run["device"]["emulator"]
    assert "EMULATED (" in printed.out
    (result,) = run["results"]
    assert set(result["speeds"]) == {"pp16", "tg4", "tg8", "tg4@d16"}
    assert all(figure["n"] == 2 and figure["median"] > 0 for figure in result["speeds"].values())
    assert result["engine_version"].startswith("llama.cpp ")
    assert result["peak_rss_bytes"] > 1_000_000
    assert result["kv_cache_bytes"] > 0
    assert result["threads"] == 1
    pushed = len(daemon.pushed)
    assert not list(daemon.root.rglob("*.part"))
    assert run_command(cli.body, [*command, "--clean-up"]) == 0  # nothing is pushed twice
    assert len(daemon.pushed) == pushed
    assert "pushing" not in capsys.readouterr().err
    assert not (daemon.root / "efficientllm").exists()


@pytest.mark.slow
def test_energy_is_measured_while_the_program_runs(
    connect: Callable[..., tuple[AdbDaemon, str]], artefact: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    """A phone that draws 8 W at 1.8 GHz in the longest decode and 0.8 W at 600 MHz at rest: 0.5 J/token at 16 t/s."""
    daemon, serial = connect()
    sysfs(daemon.sys)
    elf, saved = tmp_path / "elf", tmp_path / "phone.json"
    elf.write_bytes(b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little"))
    steps = "set_phone -2000000 1800000\nsleep 2.4"
    script = program(tmp_path / "program.sh", steps, [entry(16, 0, 160.0), entry(0, 16, 16.0)])
    daemon.interpreter = f"env SYS={daemon.sys} sh {script}"
    command = [str(artefact), "--device", f"adb:{serial}", "--runner", str(elf), "--json", str(saved)]
    assert run_command(cli.body, [*command, "--rounds", "1", "--depths", "0", "--decode-tokens", "16"]) == 0
    printed = capsys.readouterr().out
    assert "THROTTLED" not in printed
    if platform.machine() == "x86_64":
        assert "EMULATED (programs for arm64-v8a on a kernel for x86_64), no figure here is the device's" in printed
    (result,) = json.loads(saved.read_text())["results"]
    assert result["joules_per_token"]["median"] == pytest.approx(0.5, rel=0.25)  # a busy machine adds samples at rest
    assert result["temperature_celsius"] == [31.5, 31.5]


def test_a_damaged_push_leaves_nothing(
    connect: Callable[..., tuple[AdbDaemon, str]], artefact: Path, runner: Path, capsys: ERRORS
) -> None:
    daemon, serial = connect()
    daemon.corrupt_next = True
    assert run_command(cli.body, [str(artefact), "--device", f"adb:{serial}", "--runner", str(runner), *QUICK]) == 2
    assert "llama-bench arrived damaged" in capsys.readouterr().err.splitlines()[-1]
    assert not [path for path in (daemon.root / "efficientllm").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_bad_phones_give_one_line(
    connect: Callable[..., tuple[AdbDaemon, str]],
    artefact: Path,
    tmp_path: Path,
    capsys: ERRORS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(device: str, *more: str) -> str:
        assert run_command(cli.body, [str(artefact), "--device", device, *QUICK, *more]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    assert "adb has no device: connect the phone" in fails("adb")
    _, locked = connect(authorized=False)
    assert re.search(rf"{locked} is (unauthorized|authorizing): unlock the phone", fails(f"adb:{locked}"))
    _, first = connect()
    daemon, second = connect()
    message = fails("adb")
    assert all(f"--device adb:{serial}" in message for serial in (locked, first, second))
    assert "adb has no device other" in fails("adb:other")
    assert "make android-runner" in fails(f"adb:{first}", "--runner", str(tmp_path / "missing"))
    assert "is not a Linux or Android program" in fails(f"adb:{first}", "--runner", __file__)
    assert "is built for another processor" in fails(f"adb:{first}", "--runner", shutil.which("adb") or "")
    _, watch = connect(**{"ro.product.cpu.abi": "armeabi-v7a"})
    assert "armeabi-v7a" in fails(f"adb:{watch}", "--runner", shutil.which("adb") or "")
    full = daemon.root / ".bin/df"
    full.write_text(
        "#!/bin/sh\necho 'Filesystem 1K-blocks Used Available Use% Mounted on'\necho 'x 9 9 3 100% /data'\n"
    )
    full.chmod(0o755)
    elf = tmp_path / "elf"
    elf.write_bytes(b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little"))
    assert "of free disk, the artefacts need" in fails(f"adb:{second}", "--runner", str(elf))
    assert not (daemon.root / "efficientllm").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "adb is not installed or not on the PATH" in fails("adb")


def test_states_of_adb_devices() -> None:
    head = "List of devices attached\n"
    assert find_serial(head + "R5CT 	device usb:1-1 product:x model:y\n", "") == "R5CT"
    for state, advice in (("offline", "adb reconnect"), ("no permissions (missing udev rules?)", "udev rule")):
        with pytest.raises(DeviceError, match=advice):
            find_serial(f"{head}R5CT	{state}; see [http://x]\n", "")
    assert find_serial(f"{head}a	device\nb	offline\n", "a") == "a"


def test_parser_refuses_output_without_a_result() -> None:
    with pytest.raises(DeviceError, match="llama-bench printed no result: oops"):
        parse_output("oops")
