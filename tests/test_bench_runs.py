"""Which measurements belong together: of an interrupted run, of engine versions, of artefacts of one file name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from made_up import LAPTOP, FakeDevice, speed

from efficientllm.devices import run_table
from efficientllm.devices.bench import Journal, bench
from efficientllm.devices.results import BenchOptions, DeviceInfo, Result, Run, summarize
from efficientllm.runtime.base.errors import DeviceError
from efficientllm.runtime.engines.artefact import Artefact

OPTIONS = BenchOptions(rounds=3)


def result(
    path: str, sha256: str, tokens_per_second: float = 10.0, version: str = "engine 1", size: int = 100
) -> Result:
    return summarize(path, sha256, "llama.cpp", size, {}, [speed(tokens_per_second, engine_version=version)])


def run_of(*results: Result, device: DeviceInfo = LAPTOP) -> Run:
    return Run(device, OPTIONS, list(results))


def test_every_artefact_has_its_own_label() -> None:
    def labels(*results: Result) -> list[str]:
        return run_of(*results).labels

    assert labels(result("/data/small/gguf", "aa")) == ["gguf"]
    assert labels(result("/x/a/gguf", "1"), result("/x/b/gguf", "2"), result("/x/c", "3")) == ["a/gguf", "b/gguf", "c"]
    assert labels(result("model.gguf", "1"), result("b/model.gguf", "2")) == ["model.gguf", "b/model.gguf"]
    assert labels(result("m", "1", version="e 1"), result("m", "1", version="e 2")) == ["m (e 1)", "m (e 2)"]
    assert labels(result("m", "1"), result("m", "1")) == ["m (1)", "m (2)"]


def test_ratios_refer_to_the_first_artefact() -> None:
    run = run_of(result("source", "1", 10, size=200), result("pruned", "2", 21, size=150))
    assert "pruned against source: 0.75 of the bytes, tg4 x2.00" in run_table.notes(run)


def interrupted(artefact: Path, output: Path) -> list[Artefact]:
    """Two of three rounds are in the journal."""
    artefacts = [Artefact.open(artefact)]
    with pytest.raises(DeviceError, match="gone"):
        bench(FakeDevice(speed(1), speed(2), None), artefacts, OPTIONS, lambda line: None, output)
    return artefacts


def test_a_line_that_was_cut_off_costs_its_round_alone(artefact: Path, tmp_path: Path) -> None:
    output, said = tmp_path / "bench.json", []
    artefacts, partial = interrupted(artefact, output), tmp_path / "bench.json.partial"
    partial.write_bytes(partial.read_bytes()[:-30])
    with pytest.raises(DeviceError, match="gone"):
        bench(FakeDevice(speed(3), None), artefacts, OPTIONS, said.append, output)
    assert said[0] == f"{partial}: line 2 is incomplete or damaged; its measurement is repeated"
    assert ["before" in line for line in said[1:]] == [True, False, False]
    said.clear()
    run = bench(FakeDevice(speed(4)), artefacts, OPTIONS, said.append, output)
    assert ["before" in line for line in said[1:]] == [True, True, False]  # round 2 was added after the torn line
    assert run.results[0].speeds["tg4"].n == 9


@pytest.mark.parametrize(
    "damage",
    [
        *(b"null", b"[]", b'{"key": 1}', b"\xff\xfe", b'{"sha256": [], "copy": 0, "round": 0}', b"[" * 100_000),
        *(
            b'{"key": "key", "sha256": "bb", "copy": 0, "round": 0, "measurement": ' + measurement + b"}"
            for measurement in (
                *(b"[1]", b"{}", b'{"speeds": [1]}', b'{"speeds": {"pp16": "x"}}', b'{"speeds": {"pp16": [0]}}'),
                *(b'{"speeds": {}, "clock_mhz": [0, 0]}', b'{"speeds": {}, "peak_rss_bytes": "a"}'),
            )
        ),
    ],
)
def test_journal_drops_a_damaged_line_with_a_message(tmp_path: Path, damage: bytes) -> None:
    path, said = tmp_path / "run.partial", []
    Journal(path, "key", said.append).add(("aa", 0, 0), speed(1))
    path.write_bytes(damage + b"\n" + path.read_bytes())
    assert Journal(path, "key", said.append).get(("aa", 0, 0)) == speed(1)
    assert said == [f"{path}: line 1 is incomplete or damaged; its measurement is repeated"]


def test_engine_versions_are_not_pooled(artefact: Path, tmp_path: Path) -> None:
    """The engine was updated between the interruption and the rest of the run."""
    output, artefacts = tmp_path / "bench.json", [Artefact.open(artefact)]
    old, new = (speed(value, engine_version=f"llama-cpp-python 0.3.{value}") for value in (1, 2))
    with pytest.raises(DeviceError, match="gone"):
        bench(FakeDevice(old, old, None), artefacts, OPTIONS, lambda line: None, output)
    run = bench(FakeDevice(new), artefacts, OPTIONS, lambda line: None, output)
    assert [(entry.engine_version, entry.speeds["tg4"].n) for entry in run.results] == [
        ("llama-cpp-python 0.3.1", 6),
        ("llama-cpp-python 0.3.2", 3),
    ]
    assert run.labels == ["gguf (llama-cpp-python 0.3.1)", "gguf (llama-cpp-python 0.3.2)"]


def test_another_release_starts_the_run_again(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, said = tmp_path / "bench.json", []
    artefacts = interrupted(artefact, output)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    run = bench(FakeDevice(speed(1), speed(2), speed(3)), artefacts, OPTIONS, said.append, output)
    assert "before" not in "".join(said)
    assert run.efficientllm_version == json.loads(output.read_text())["efficientllm_version"] == "9.9.9"
    assert run.measured_at.endswith("+00:00")


def test_an_artefact_given_twice_keeps_its_measurements_apart(artefact: Path, tmp_path: Path) -> None:
    output, artefacts = tmp_path / "bench.json", [Artefact.open(artefact), Artefact.open(artefact)]
    options = BenchOptions(rounds=1)
    with pytest.raises(DeviceError, match="gone"):
        bench(FakeDevice(speed(1), None), artefacts, options, lambda line: None, output)
    run = bench(FakeDevice(speed(5)), artefacts, options, lambda line: None, output)
    assert [entry.speeds["tg4"].median for entry in run.results] == [2, 6]


def test_every_table_marks_emulated_figures(capsys: pytest.CaptureFixture[str]) -> None:
    emulated = dataclasses.replace(LAPTOP, emulator="qemu-user")
    run = run_of(result("m", "aa"), device=emulated)
    run_table.print_table(run)
    printed = capsys.readouterr().out
    assert "artefact, EMULATED" in printed
    assert "EMULATED (qemu-user), no figure here is the device's" in printed
