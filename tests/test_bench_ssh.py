"""efficientllm-bench on a board: a real sshd of this machine, connections that drop, boards that lack something."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from board import SSHD, Board, DroppingProxy, board

from efficientllm.devices import cli, ssh
from efficientllm.devices.device import DeviceOptions
from efficientllm.devices.results import BenchOptions, Measurement
from efficientllm.devices.ssh import SshDevice
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import DeviceError
from efficientllm.runtime.engines.artefact import Artefact

QUICK = ["--prompt-tokens", "16", "--decode-tokens", "4,8", "--depths", "16", "--repetitions", "2", "--rounds", "2"]
pytestmark = [
    pytest.mark.skipif(not Path(SSHD).is_file(), reason="sshd is not installed (apt install openssh-server)"),
    pytest.mark.xdist_group("board"),
]


@pytest.fixture
def reached(tmp_path: Path) -> Iterator[Board]:
    with board(tmp_path) as made:
        yield made


@pytest.mark.slow
def test_a_board_gets_its_environment_and_measures(
    reached: Board, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "board.json"
    command = [str(artefact), "--device", "ssh://board", "--ssh", reached.client, *QUICK, "--threads", "1"]
    assert run_command(cli.body, [*command, "--json", str(output)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "copying model.gguf" in printed.err
    assert "installing efficientllm[gguf] on board" in printed.err
    run = json.loads(output.read_text())
    assert run["device"]["name"] == "ssh://board"
    assert run["device"]["machine"] == os.uname().machine
    assert run["device"]["cores"] >= 1
    assert run["device"]["ram_bytes"] > 0
    (result,) = run["results"]
    assert set(result["speeds"]) == {"pp16", "tg4", "tg8", "tg4@d16"}
    assert all(figure["n"] == 4 and figure["median"] > 0 for figure in result["speeds"].values())
    assert result["engine_version"].startswith("llama-cpp-python ")
    assert result["sha256"] == Artefact.open(artefact).sha256
    assert result["peak_rss_bytes"] > 0
    # the second time everything is there; afterwards nothing is
    assert run_command(cli.body, [*command, "--clean-up"]) == 0
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith(("copying", "installing"))]
    assert not reached.store.exists()


MEASURES_THE_SECOND_TIME = """#!{python}
import os, sys, time, pathlib
started = pathlib.Path("{folder}/started")
with started.open("a") as stream:
    print(os.getpid(), file=stream)
if len(started.read_text().split()) == 1:
    time.sleep(60)
print({measurement!r})
"""
FAILING_PIP = """#!/bin/sh
echo 'ERROR: Could not find a version that satisfies the requirement efficientllm (from versions: none)' >&2
echo 'ERROR: No matching distribution found for efficientllm' >&2
[ "$PIP_DISABLE_PIP_VERSION_CHECK" ] || echo '[notice] To update, run: pip install --upgrade pip' >&2
exit 1
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def is_alive(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline")
    return command.is_file() and bool(command.read_bytes())


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cut_connection_leaves_no_measurement_behind(
    reached: Board, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What went on at the board would be timed beside the second try."""
    monkeypatch.setattr(ssh, "RETRY_SECONDS", (0.2, 0.2))
    said: list[str] = []
    proxy = DroppingProxy(reached.port, limit=0)
    reached.configure(proxy.port)
    expected = Measurement({"tg4": [10.0]}, engine_version="engine 1")
    text = MEASURES_THE_SECOND_TIME.format(
        python=sys.executable, folder=tmp_path, measurement=json.dumps(dataclasses.asdict(expected))
    )
    write_program(reached.home / "env/bin/python", text)
    device = SshDevice(DeviceOptions(device="ssh://board", ssh=reached.client), said.append)
    device.describe()
    device._environments["llama.cpp"] = "env"
    reached.store.mkdir(parents=True)
    started = tmp_path / "started"

    def cut() -> None:
        wait_until(lambda: started.is_file() and started.read_text().endswith("\n"))
        proxy.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    assert device.measure(Artefact.open(artefact), BenchOptions()) == expected
    thread.join()
    first, second = (int(line) for line in started.read_text().split())
    wait_until(lambda: not is_alive(first) and not is_alive(second))
    assert "trying again in 0.2 s (2/3)" in said[-1]
    assert not list(reached.store.glob("measuring-*"))
    device.close()
    proxy.close()


def test_a_measurement_that_the_board_thinks_is_wanted_is_ended(reached: Board, artefact: Path) -> None:
    """As after a power cut of this computer: the board has not noticed."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "efficientllm.devices.measure"]
    orphan = subprocess.Popen(sleeper)
    reached.store.mkdir(parents=True)
    (reached.store / f"measuring-{platform.node()}").write_text(f"{orphan.pid}\n")
    expected = Measurement({"tg4": [10.0]})
    write_program(reached.home / "env/bin/python", f"#!/bin/sh\necho '{json.dumps(dataclasses.asdict(expected))}'\n")
    device = SshDevice(DeviceOptions(device="ssh://board", ssh=reached.client), lambda line: None)
    device._environments["llama.cpp"] = "env"
    assert device.measure(Artefact.open(artefact), BenchOptions()) == expected
    assert orphan.wait(timeout=20) == -signal.SIGTERM
    device.close()


@pytest.mark.slow
def test_failed_installation_shows_the_message_of_pip(
    reached: Board, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "efficientllm-0.2.0-py3-none-any.whl"
    wheel.touch()
    pip = write_program(tmp_path / "pip", FAILING_PIP)
    python = f'#!/bin/sh\n[ "$2" = venv ] || exec {sys.executable} "$@"\nmkdir -p $3/bin && cp {pip} $3/bin/python\n'
    fake = write_program(tmp_path / "fake-python", python)
    command = [str(artefact), "--device", "ssh://board", "--ssh", reached.client, "--board-python", str(fake), *QUICK]
    command += ["--wheel", str(wheel)]
    assert run_command(cli.body, command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "board: pip install failed: No matching distribution found for efficientllm; an engine without" in line


def test_board_names_its_emulator(reached: Board) -> None:
    device = SshDevice(DeviceOptions(device="ssh://board", ssh=reached.client), lambda line: None)
    assert not device.describe().emulator
    assert Path(device._facts["python_runs_in"]).is_file()
    device._facts["python_runs_in"] = "/usr/bin/qemu-aarch64-static"
    assert device.describe().emulator == "qemu-user"
    device.close()


@pytest.mark.slow
def test_interrupted_copy_resumes(reached: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "RETRY_SECONDS", (0.2, 0.2))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + os.urandom(3_000_000))
    said: list[str] = []
    proxy = DroppingProxy(reached.port, limit=1_500_000)
    reached.configure(proxy.port)
    device = SshDevice(DeviceOptions(device="ssh://board", ssh=reached.client), said.append)
    device.describe()
    device._copy(Artefact.open(file))
    device.close()
    proxy.close()
    assert proxy.dropped == 1
    first, second = (line for line in said if line.startswith("copying"))
    assert first == "copying model.gguf"
    resumed_at = int(second.removeprefix("copying model.gguf from byte ").removesuffix(" on").replace(",", ""))
    assert 0 < resumed_at < 1_500_000
    (copied,) = (path for path in reached.store.rglob("*") if path.is_file())
    assert copied.name == "model.gguf"
    assert copied.read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_half_file_of_something_else_is_not_trusted(reached: Board, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + os.urandom(100_000))
    artefact = Artefact.open(file)
    folder = reached.store / "artefacts" / artefact.sha256[:32]
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(file.read_bytes()[:50_000])  # a truncated copy
    (folder / "model.gguf.part").write_bytes(bytes(60_000))
    device = SshDevice(DeviceOptions(device="ssh://board", ssh=reached.client), lambda line: None)
    device.describe()
    device._copy(artefact)
    device.close()
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    assert (folder / "model.gguf").read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_bad_boards_give_one_line(
    reached: Board, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device: str, *more: str) -> str:
        command = [str(artefact), "--device", device, "--ssh", reached.client, *QUICK, *more]
        assert run_command(cli.body, command) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    assert "give ssh://USER@HOST" in fails("ssh:board")
    assert "is unknown; use local, ssh://USER@HOST[:PORT] or adb[:SERIAL]" in fails("telnet://board")
    assert "nowhere.invalid cannot be reached: " in fails("ssh://nowhere.invalid")
    assert "board: no-python is missing" in fails("ssh://board", "--board-python", "no-python")
    assert "--wheel nothing.whl is not a wheel file" in fails("ssh://board", "--wheel", "nothing.whl")
    assert not list(reached.store.glob("env*"))
    (reached.folder / "user.pub").write_text("")
    assert "Permission denied" in fails("ssh://board")
    assert "no-ssh is not installed or not on the PATH" in fails("ssh://board", "--ssh", "no-ssh")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"machine": "armv7l"}, "install a 64-bit operating system"),
        ({"python": "3.9"}, "python3 is 3.9"),
        ({"python_bits": "32"}, "has a 32-bit Python"),
        ({"free_disk_kb": "585940"}, "of free disk"),
        ({"free_ram_kb": "1000"}, "of memory, the device has"),
    ],
)
def test_a_board_that_lacks_something_gets_nothing(
    reached: Board, artefact: Path, facts: dict[str, str], message: str
) -> None:
    device = SshDevice(DeviceOptions(device="ssh://board", ssh=reached.client), lambda line: None)
    device._facts = device.facts | facts
    with pytest.raises(DeviceError, match=message):
        device.prepare([Artefact.open(artefact)], BenchOptions())
    device.close()
    assert not reached.store.exists()
