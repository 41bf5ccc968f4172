"""efficientllm-bench on this machine: figures, comparison, interrupted runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from made_up import LAPTOP, FakeDevice, speed
from tiny import tiny_architecture

from efficientllm.devices import board_environment, cli, local, run_table
from efficientllm.devices.bench import bench, cool_down
from efficientllm.devices.device import DeviceOptions
from efficientllm.devices.local import LocalDevice, parse_measurement
from efficientllm.devices.measure import EngineTests
from efficientllm.devices.profiling.random_models import make_artefacts
from efficientllm.devices.results import BenchOptions, DeviceInfo, Figure, Run, summarize
from efficientllm.export import cli as export_cli
from efficientllm.runtime.base.child import ProcessResult, run_python
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError, DeviceError
from efficientllm.runtime.base.ggml_types import FILE_TYPES, TENSOR_TYPES
from efficientllm.runtime.engines.artefact import Artefact, describe_gguf
from efficientllm.runtime.engines.cache_pool import common_length
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.engines.tuning import CANDIDATES
from efficientllm.runtime.latency.shape import DecoderShape, LayerShape

TESTS = ["--prompt-tokens", "16,24", "--decode-tokens", "4,8", "--depths", "20"]
QUICK = [*TESTS, "--repetitions", "2", "--rounds", "2", "--threads", "1"]
NAMES = ["pp16", "pp24", "tg4", "tg8", "tg4@d20"]


def run_of(*values: float, name: str = "model", device: DeviceInfo = LAPTOP, size: int = 100) -> Run:
    result = summarize(
        name, hashlib.sha256(name.encode()).hexdigest(), "llama.cpp", size, {}, [speed(value) for value in values]
    )
    return Run(device, BenchOptions(), [result])


@pytest.mark.slow
def test_measures_artefacts_and_bare_files(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = save_tiny(tiny_architecture()), tmp_path / "gguf"
    perplexity = {"source": 10.0, "after_pruning": 20.0, "final": 12.5}
    training = {"tokens": 1000, "seconds": 2.5, "held_out_tokens": 64, "perplexity": perplexity}
    (checkpoint / "training.json").write_text(json.dumps(training))
    arguments = [str(checkpoint), "--target", "gguf", "--quantize", "q8_0", "--output", str(output)]
    assert run_command(export_cli.body, arguments) == 0
    bare, saved = output / "model.gguf", tmp_path / "bench.json"
    assert run_command(cli.body, [str(output), str(bare), *QUICK, "--json", str(saved)]) == 0
    printed = capsys.readouterr()
    assert "held-out perplexity (64 tokens): source 10.00, after pruning 20.00, final 12.50" in printed.out
    rounds = [line.partition("  ETA")[0] for line in printed.err.splitlines() if line.startswith("round")]
    files = ((1, output), (2, bare))  # they take turns
    assert rounds == [f"round {turn}/2, {index}/2: {name}" for turn in (1, 2) for index, name in files]
    assert "ETA" in printed.err
    values = json.loads(saved.read_text())
    assert values["device"]["cores"] > 0
    assert values["device"]["ram_bytes"] > 1e9
    results = values["results"]
    for result in results:
        assert list(result["speeds"]) == NAMES
        assert all(figure["n"] == 4 for figure in result["speeds"].values())
        assert list(result["cpu_ms_per_token"]) == NAMES
        assert all(figure["n"] == 4 and figure["median"] > 0 for figure in result["cpu_ms_per_token"].values())
        quiet = result["quiet_ms_per_token"]
        assert list(quiet) == [name + clock for name in ("tg4", "tg8", "tg4@d20") for clock in ("", " CPU")]
        assert 0 < quiet["tg8"]["median"] < 1000 / result["speeds"]["tg8"]["low"]  # the better tokens, against all
        assert result["speeds"]["tg8"]["low"] <= result["speeds"]["tg8"]["median"]
        assert result["time_to_first_token_ms"]["median"] > 8000 / result["speeds"]["pp16"]["median"]  # the same prompt
        assert result["peak_rss_bytes"] > 10_000_000
        assert result["kv_cache_bytes"] > 0
        # a process measures for itself where the file is too new to remember
        assert set(result["engine_settings"].split(", or ")) <= set(map(str, CANDIDATES["auto"]))
        assert re.match(r"llama-cpp-python \d", result["engine_version"])
        assert re.match(r"CPU : .* \| ggml version \d.* \| ggml commit [0-9a-f]{7}", result["engine_build"])
        assert result["threads"] >= 1
        assert list(result["process_medians"]) == NAMES
        assert all(len(medians) == 2 for medians in result["process_medians"].values())
    assert "processes differ by pp16 " in printed.out
    assert results[0]["file_bytes"] == bare.stat().st_size
    assert results[0]["sha256"] != results[1]["sha256"]
    assert results[1]["manifest"] == {}
    assert json.loads(saved.read_text())["results"][0]["speeds"]["tg8"]["n"] == 4


def test_benchmark_is_quiet_in_python(artefact: Path) -> None:
    options = BenchOptions((16,), (4,), (), repetitions=1, rounds=1, threads=1)
    command = (
        f"from efficientllm.devices import bench, results; bench.benchmark([{str(artefact)!r}], results.{options})"
    )
    done = run_python("-c", command)
    assert (done.code, done.output, done.errors) == (0, "", "")


def test_the_source_tree_is_found_through_links() -> None:
    """Of an editable install in strict mode, where the package is a tree of links."""
    assert (board_environment.SOURCE_ROOT / "pyproject.toml").is_file()


def test_names_in_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    run_table.print_table(run_of(10, name="model[b]"))
    assert "model[b]" in capsys.readouterr().out


def test_tests_that_do_not_fit_are_left_out(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.read(artefact)
    short = tmp_path / "short"
    short.mkdir()
    for name in manifest.files:
        (short / name).symlink_to(artefact / name)
    dataclasses.replace(manifest, context_length=18).write(short)
    assert run_command(cli.body, [str(short), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "pp16 t/s" in printed
    assert "short: pp24 skipped: needs a context of 24 tokens, the artefact holds 18" in printed


def test_figures_are_quartiles() -> None:
    assert Figure.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Figure(3.0, 2.0, 4.0, 5)
    assert Figure.of([7.0]) == Figure(7.0, 7.0, 7.0, 1)


def test_throttling_is_reported() -> None:
    runs = [speed(10, clock_mhz=(2000.0, 1900.0), temperature_celsius=(40.0, 60.0))]
    assert summarize("m", "", "", 1, {}, runs).throttled == ""
    runs.append(speed(10, clock_mhz=(2000.0, 1600.0), temperature_celsius=(60.0, 80.0)))
    result = summarize("m", "", "", 1, {}, runs)
    assert result.throttled == "clock fell from 2000 to 1600 MHz"
    assert result.temperature_celsius == (40.0, 80.0)
    assert result.clock_mhz == (2000.0, 1600.0)


def test_waits_for_a_cool_device() -> None:
    said: list[str] = []
    slept: list[float] = []
    options = BenchOptions(max_temp=37.0, cool_down_minutes=1.0)
    cool_down(FakeDevice(), options, said.append, slept.append)
    assert slept == [5.0, 5.0]
    assert said == ["waiting for the device to cool from 50.0 to 37 C"]
    hot = FakeDevice()
    hot.temperatures = [50.0] * 100
    cool_down(hot, options, said.append, slept.append)
    assert sum(slept[2:]) == 60.0
    assert said[-1] == "still at 50.0 C after 1 minutes; measuring nevertheless"


def test_interrupted_benchmark_resumes(artefact: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "bench.json", BenchOptions(rounds=3)
    artefacts = [Artefact.open(artefact)]
    with pytest.raises(DeviceError, match="gone"):
        bench(FakeDevice(speed(1), speed(2), None), artefacts, options, lambda line: None, output)
    assert not output.exists()
    said: list[str] = []
    run = bench(FakeDevice(speed(3)), artefacts, options, said.append, output)
    assert [("before" in line) for line in said] == [True, True, False]
    assert run.results[0].speeds["tg4"].n == 9
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    other = dataclasses.replace(options, threads=1)  # another question: nothing of the journal counts
    with pytest.raises(DeviceError):
        bench(FakeDevice(speed(1), None), artefacts, options, lambda line: None, output)
    bench(FakeDevice(speed(1), speed(2), speed(3)), artefacts, other, said.append, output)
    assert "before" not in "".join(said[3:])


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*command: str) -> str:
        assert run_command(cli.body, list(command)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "does not exist" in fails(str(tmp_path / "nowhere"))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF and then nothing")
    assert fails(str(bad), *QUICK).startswith("error: ")
    assert "--rounds 0: must be positive" in fails(str(bad), "--rounds", "0")
    assert "'x' is not a comma-separated list of whole numbers" in fails(str(bad), "--prompt-tokens", "x")
    assert "--prompt-tokens 8,0: must be positive" in fails(str(bad), "--prompt-tokens", "8,0")
    assert "give at least one artefact" in fails()
    for flag, device in (("--runner", "adb"), ("--wheel", "ssh://"), ("--engine-wheels", "ssh://")):
        assert re.search(rf"{flag} nothere: is for .* --device {device}", fails(str(bad), flag, "nothere"))
    assert "its folder does not exist" in fails(str(bad), "--json", str(tmp_path / "no/where.json"))


def test_outputs_replace_no_other_file(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is measured."""
    (tmp_path / "mine.json").write_text('{"my": "precious"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "run.json.partial").mkdir()
    for flags, message in (
        (["--json", artefact / "manifest.json"], "which is read; name another file"),
        (["--json", tmp_path / "same", "--profile", tmp_path / "same"], "is also --json; name two files"),
        (["--json", tmp_path / "mine.json"], "was not written by this command; name another file"),
        (["--profile", tmp_path / "mine.json"], "was not written by this command; name another file"),
        (["--json", tmp_path / "folder"], "is a folder; name a file"),
        (["--json", tmp_path / "run.json"], "run.json.partial is a folder; name another file"),
    ):
        assert run_command(cli.body, [str(artefact), *QUICK, *map(str, flags)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert message in error
    assert (tmp_path / "mine.json").read_text() == '{"my": "precious"}'
    assert Manifest.read(artefact)


def test_a_bare_gguf_file_tells_its_parameters_and_type(tmp_path: Path) -> None:
    shape = DecoderShape(128, 64, 512, (LayerShape(3, 1, 96), LayerShape(2, 2, 64)))
    (made,) = make_artefacts([shape], "llama.cpp", "q8_0", 128, tmp_path, lambda line: None)
    file = made.model_file
    weights = 2 * 128 * 64 * (4 + 4) + 3 * 128 * (96 + 64) + 512 * 128 + 5 * 128
    assert describe_gguf(file)[1:] == (weights, "q8_0")
    whole = file.read_bytes()
    for damaged in (
        b"",
        b"GGUF",
        whole[:100],
        whole[:2000],
        b"GGUF" + bytes([255]) * 100,
        whole[:24] + bytes([9]) * 500,
    ):
        file.write_bytes(damaged)
        assert describe_gguf(file)[1:] == (0, "")


def test_types_are_called_as_the_format_calls_them() -> None:
    for name in TENSOR_TYPES.keys() - {"q2_0"}:  # newer than the gguf package
        number, *block = TENSOR_TYPES[name]
        assert gguf.GGMLQuantizationType(number).name.lower() == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == tuple(block)
    for name in FILE_TYPES.keys() - {"q2_0"}:
        assert gguf.LlamaFileType(FILE_TYPES[name]).name.lower() in (f"mostly_{name}", f"all_{name}")


class CountingEngine:
    """An engine that keeps what it evaluated and takes from its cache what it can, as every engine may."""

    context_length, vocab_size = 64, 400

    def __init__(self) -> None:
        self.cached: list[int] = []
        self.evaluated = 0

    def prefill(self, tokens: list[int]) -> None:
        common = common_length(self.cached, tokens, len(tokens) - 1)
        self.evaluated, self.cached = len(tokens) - common, list(tokens)

    def decode(self, token: int) -> None:
        self.cached.append(token)


def test_no_timed_prefill_finds_its_tokens_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, recorded = CountingEngine(), []
    tests = EngineTests(engine, BenchOptions((16, 32), (4, 8), (16, 32)))  # type: ignore[arg-type]

    def record(test: str, tokens: int, span: object) -> None:
        recorded.append(tokens == engine.evaluated if test.startswith("pp") else True)

    monkeypatch.setattr(tests, "_record", record)
    for _ in range(500):  # more often than there are tokens to begin with
        tests.repeat()
    assert len(recorded) == 500 * 6
    assert all(recorded)


@pytest.mark.parametrize(
    ("code", "message"),
    [(-11, "the engine ended by SIGSEGV"), (132, "the engine ended by SIGILL"), (-9, "memory ran out"), (1, "m: busy")],
)
def test_how_a_measurement_ended_is_named(code: int, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        parse_measurement("m", ProcessResult(code, "", "busy\n"))


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    LocalDevice(DeviceOptions(), lines.append).prepare([], BenchOptions())
    assert not lines
    monkeypatch.setattr(local, "is_busy", lambda: True)
    LocalDevice(DeviceOptions(), lines.append).prepare([], BenchOptions())
    assert lines == ["other programs use this machine, so it seems slower than it is; stop them, or give --threads 1"]
