"""What the engines share: artefacts, the description of a genai folder, the capture of native messages."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from exporting import EXACT, export
from tiny import tiny_architecture

from efficientllm.runtime.base import cpu_load
from efficientllm.runtime.base.cpu_load import FreeCores
from efficientllm.runtime.base.errors import ArtefactError, UsageError
from efficientllm.runtime.base.files import sha256_of
from efficientllm.runtime.base.progress import PROGRESS_LOGGER
from efficientllm.runtime.engines import artefact as artefacts
from efficientllm.runtime.engines import tuning
from efficientllm.runtime.engines.artefact import GENAI_CONFIG, Artefact, GenaiConfig
from efficientllm.runtime.engines.engine import CacheChoice, EngineOptions, load_engine
from efficientllm.runtime.engines.executorch import captured_native_log
from efficientllm.runtime.engines.llama_context import AttentionSettings, LlamaContext
from efficientllm.runtime.engines.llama_cpp import LlamaCppEngine
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.engines.onnx import OnnxEngine
from efficientllm.runtime.engines.protocol import Chunk, EvaluationInterrupted
from efficientllm.runtime.engines.tuning import CANDIDATES, FLASH, FLASH_Q8_0, PLAIN, ROUNDS


def test_opening_an_artefact_reads_no_weights(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def count(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(artefacts, "sha256_of", count)
    bare = Artefact.open(artefact / "model.gguf")
    assert hashed == []
    assert bare.sha256 == bare.sha256 == Manifest.read(artefact).files["model.gguf"]["sha256"]
    assert hashed == [artefact / "model.gguf"]
    assert Artefact.open(artefact).sha256 != bare.sha256
    assert Artefact.open(artefact / "manifest.json") == Artefact.open(artefact)
    assert hashed == [artefact / "model.gguf"]  # the manifest holds the hashes


def test_opened_artefact_is_loaded_unchanged(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Artefact.open(artefact)
    monkeypatch.setattr(Artefact, "open", lambda path: pytest.fail("it is open already"))
    engine = load_engine(opened, EngineOptions(threads=1, context=256, kv_cache="q8_0"))  # llama.cpp rounds up to this
    assert engine.kv_cache_bytes == opened.cache_bytes(engine.context_length, 1) * 34 / 32 > 0
    engine.close()


@pytest.mark.parametrize("text", ["{", "[]", '{"model": []}', '{"model": {"context_length": "x"}}'])
def test_malformed_genai_config_gives_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / GENAI_CONFIG).write_text(text)
    with pytest.raises(ArtefactError, match=r"genai_config.json is malformed: "):
        GenaiConfig.read(tmp_path)
    with pytest.raises(ArtefactError, match=r"genai_config.json is malformed: "):
        Artefact.open(tmp_path)


def test_a_genai_config_may_be_short_or_absent(tmp_path: Path) -> None:
    assert GenaiConfig.read(tmp_path) == GenaiConfig()
    (tmp_path / GENAI_CONFIG).write_text('{"model": {"eos_token_id": 2}}')
    assert GenaiConfig.read(tmp_path).end_ids == {2}
    with pytest.raises(ArtefactError, match=r"genai_config.json names no decoder"):
        Artefact.open(tmp_path)


def test_only_the_librarys_own_messages_are_kept_from_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_native_log(r"\[\w+\.cpp:\d+\]") as log:
        os.write(2, b"[program.cpp:12] no such operator\nanother thread's error\n")
        assert log() == "[program.cpp:12] no such operator\n"
    assert capfd.readouterr().err == "another thread's error\n"


def test_a_cache_counts_the_widths_that_layers_have() -> None:
    """Without flash attention llama.cpp pads the values, not the keys, to the widest layer."""
    heads = (3, 1, 2)
    assert AttentionSettings("f16", flash=True).bytes_per_token(heads, 64) == 2 * 64 * (6 + 6)
    assert AttentionSettings("f16", flash=False).bytes_per_token(heads, 64) == 2 * 64 * (6 + 9)
    assert AttentionSettings("q8_0", flash=True).bytes_per_token(heads, 64) == 64 * 12 * 34 / 32


def test_caches_fill_the_requested_bytes(artefact: Path) -> None:
    options = EngineOptions(threads=1, context=256, parallel=3, kv_cache="q8_0", cache_memory=600_000)
    engine = load_engine(artefact, options)
    per_token = engine.kv_cache_bytes / engine.cache_slots
    assert per_token == 32 * 10 * 34 / 32  # five key/value heads of 32
    assert 0 <= engine.cache_slots - 600_000 / per_token < 256  # rounded up
    assert engine.context_length == 256
    engine.close()


def test_the_fastest_attention_is_measured_once(
    unseen: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = {"f16 cache, without flash attention": 0.002, "f16 cache, with flash attention": 0.001}
    measured: list[str] = []

    def measure(context: LlamaContext, sequences: int) -> list[float]:
        measured.append(names[id(context)])
        return [times.get(names[id(context)], 0.003)] * 4

    names: dict[int, str] = {}
    make = LlamaContext.__init__

    def remember(
        self: LlamaContext, model: object, threads: int, attention: AttentionSettings, *more: int, **grows: bool
    ) -> None:
        names[id(self)] = str(attention)
        make(self, model, threads, attention, *more, **grows)

    monkeypatch.setattr(LlamaContext, "__init__", remember)
    monkeypatch.setattr(tuning, "_attention_seconds", measure)
    options = EngineOptions(threads=1, context=64, parallel=2, tune=False)
    with contextlib.closing(load_engine(unseen, options)) as engine:
        assert engine.settings == str(PLAIN)
    assert not measured
    choices: list[tuple[CacheChoice, AttentionSettings]]
    choices = [("auto", FLASH), ("f16", FLASH), ("q8_0", FLASH_Q8_0), ("auto", FLASH)]
    for kv_cache, expected in choices:
        engine = load_engine(unseen, EngineOptions(threads=1, context=64, kv_cache=kv_cache))
        assert engine.settings == str(expected)
        engine.close()
    assert len(measured) == 3 + 1 + 2 + 1  # only the fastest has a second round, because the others are far from it
    announced = "model.gguf is new here: timing attention on this CPU, usually 1 to 4 s"
    assert sum(announced in message for message in caplog.messages) == 2


def test_attention_is_timed_later_if_the_machine_is_busy(
    unseen: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured: list[int] = []
    caplog.set_level(logging.DEBUG, PROGRESS_LOGGER)
    monkeypatch.setattr(tuning, "_attention_seconds", lambda *arguments: measured.append(1) or [1.0])
    for load, expected in ((99.0, 0), (0.0, ROUNDS * len(CANDIDATES["auto"]))):
        monkeypatch.setattr(tuning, "is_busy", lambda load=load: load > cpu_load.BUSY_LOAD)
        with contextlib.closing(load_engine(unseen, EngineOptions(threads=1, context=64))) as engine:
            assert expected or engine.settings.startswith(str(PLAIN))
        assert len(measured) == expected
    assert sum("is timed on this CPU at a later load" in each for each in caplog.messages) == 1


def test_the_attention_of_a_new_model_is_timed(
    artefact: Path,
    first_attention: Callable[[LlamaContext, int], list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path))
    found: list[list[float]] = []

    def measure(context: LlamaContext, sequences: int) -> list[float]:
        found.append(first_attention(context, sequences))
        return found[-1]

    monkeypatch.setattr(tuning, "_attention_seconds", measure)
    engine = load_engine(artefact, EngineOptions(threads=1, context=64, parallel=3))
    assert engine.settings.partition(";")[0] in map(str, CANDIDATES["auto"])
    engine.close()
    assert {len(times) for times in found} == {8}
    assert len(CANDIDATES["auto"]) < len(found) <= ROUNDS * len(CANDIDATES["auto"])
    assert min(map(min, found)) > 0


def test_tokens_of_any_length_have_their_text(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1, context=64))
    expected = [engine.token_bytes(token) for token in range(engine.vocab_size)]
    read = llama_cpp.llama_token_to_piece

    def long_piece(vocab: Any, token: int, piece: Any, capacity: int, *more: Any) -> int:
        """Say that every piece needs 1000 bytes."""
        return read(vocab, token, piece, capacity, *more) if capacity >= 1000 else -1000

    monkeypatch.setattr(llama_cpp, "llama_token_to_piece", long_piece)
    assert [engine.token_bytes(token) for token in range(engine.vocab_size)] == expected
    engine.close()


def test_heads_without_whole_blocks_get_no_quantized_cache(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert export(save_tiny(tiny_architecture(head_dim=16)), "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    engine = load_engine(tmp_path / "gguf", EngineOptions(threads=1, context=64))
    assert "f16 cache" in engine.settings
    engine.close()
    with pytest.raises(ArtefactError, match="q8_0 cache"):
        load_engine(tmp_path / "gguf", EngineOptions(threads=1, context=64, kv_cache="q8_0"))


def test_llama_cpp_chooses_the_type_of_a_cache(source_folder: Path, tmp_path: Path) -> None:
    assert export(source_folder, "onnx", tmp_path / "onnx", "--quantize", "f32", "--no-verify") == 0
    with pytest.raises(UsageError, match="--kv-cache q8_0: the export of onnx fixed its cache type"):
        load_engine(tmp_path / "onnx", EngineOptions(kv_cache="q8_0"))


@pytest.mark.parametrize("target", ["onnx", pytest.param("executorch", marks=pytest.mark.slow), "gguf"])
def test_an_interrupted_pass_changes_nothing(exported: Callable[..., Path], target: str) -> None:
    folder = exported(target, *(EXACT if target == "executorch" else EXACT[:2]))
    options = EngineOptions(threads=1, context=128)
    with contextlib.closing(load_engine(folder, options)) as owned, owned._open() as engine:
        chunk = Chunk(0, list(range(5, 65)), True)
        expected = engine.extend([chunk])[0]
        engine.truncate(0, 10)
        engine.interrupt()
        for _ in range(2):  # until it is taken back
            with pytest.raises(EvaluationInterrupted):
                engine.extend([Chunk(0, chunk.tokens[10:], True)])
        engine.resume()
        assert np.allclose(engine.extend([Chunk(0, chunk.tokens[10:], True)])[0], expected, atol=1e-4)


def test_onnxruntime_stops_amid_a_pass(exported: Callable[..., Path]) -> None:
    folder = exported("onnx", "--quantize", "f32")
    options = EngineOptions(threads=1, context=128)
    with contextlib.closing(load_engine(folder, options)) as owned, owned._open() as engine:
        assert isinstance(engine, OnnxEngine)
        engine._run_options.terminate = True  # as `interrupt` does, when the pass has begun
        with pytest.raises(EvaluationInterrupted):
            engine.extend([Chunk(0, [5, 6, 7], True)])
        engine.resume()
        assert engine.extend([Chunk(0, [5, 6, 7], True)])[0].shape == (engine.vocab_size,)


@pytest.mark.parametrize("target", ["gguf", "onnx", "bare"])
def test_a_context_beyond_training_is_refused(target: str, exported: Callable[..., Path]) -> None:
    folder = exported("onnx" if target == "onnx" else "gguf", "--quantize", "f32")
    path = folder / "model.gguf" if target == "bare" else folder
    with pytest.raises(UsageError, match=r"^--context 4097: the model was trained on 4096 tokens; use at most 4096$"):
        load_engine(path, EngineOptions(threads=1, context=4097))
    load_engine(path, EngineOptions(threads=1, context=4096)).close()


def _stat(busy: int, other_core: int = 0) -> str:
    """Return /proc/stat of two cores that were busy for so many of 100 ticks each, and of a third that is not ours."""
    lines = [f"cpu{core} {ticks} 0 0 {100 - ticks} 0 0 0 0 0 0" for core, ticks in enumerate((busy, other_core))]
    return "\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *lines, "cpu7 900 0 0 0 0 0 0 0 0 0", "intr 3"])


@pytest.mark.parametrize(
    ("busy", "own_seconds", "threads"),
    [
        ((0, 0), 0.0, 2),
        ((100, 100), 2.0, 2),  # by this process
        ((100, 100), 1.0, 1),
        ((100, 100), 0.2, 1),
        ((70, 70), 1.1, 2),
        ((70, 30), 0.0, 1),
    ],
)
def test_other_programs_keep_their_cores(
    busy: tuple[int, int], own_seconds: float, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [100.0, 7.0]  # the time and the CPU time of this process

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        (tmp_path / "stat").write_text(_stat(*busy))

    monkeypatch.setattr(cpu_load, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(cpu_load.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cpu_load.time, "process_time", lambda: clock[1])
    monkeypatch.setattr(cpu_load.time, "sleep", sleep)
    assert FreeCores.where_known(2) is None
    (tmp_path / "stat").write_text(_stat(0).replace("100", "0"))
    free = FreeCores.where_known(2)
    assert free is not None
    clock[1] += own_seconds * cpu_load.INTERVAL
    assert free.update() == threads  # before the first pass
    assert clock[0] == 100 + cpu_load.INTERVAL
    (tmp_path / "stat").write_text(_stat(0).replace("100", "0"))
    clock[0] += 0.1
    assert free.update() == threads  # too early to measure again
    clock[0] += 60
    free.update()
    (tmp_path / "stat").write_text(_stat(*busy))
    clock[:] = [clock[0] + 100, clock[1] + 100 * own_seconds]
    assert free.update() == threads  # after a pass that took long because its cores were shared


def test_first_answer_beside_two_spinning_processes_uses_one_thread(artefact: Path) -> None:
    before = os.sched_getaffinity(0)
    cores = sorted(before)[:2]
    script = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"
    with contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, cores)
        stack.callback(os.sched_setaffinity, 0, before)
        for core in (cores[0], cores[-1]):
            command = [sys.executable, "-c", script, str(core)]
            spinning = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(spinning.kill)
            assert spinning.stdout is not None
            spinning.stdout.readline()
        options = EngineOptions(context=256, tune=False)
        with contextlib.closing(LlamaCppEngine(artefact / "model.gguf", options)) as engine:
            engine.extend([Chunk(0, [1, 2, 3, 4], True)])
            assert llama_cpp.llama_n_threads(engine._context._context) == 1


def test_a_pass_uses_the_threads_that_have_cores(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    counts = iter([3, 1, 2])

    def update(self: FreeCores) -> int:
        self.count = next(counts)
        return self.count

    monkeypatch.setattr(FreeCores, "update", update)
    found, used = [], []
    with contextlib.closing(LlamaCppEngine(artefact / "model.gguf", EngineOptions(context=256, tune=False))) as engine:
        for _ in range(3):
            found += engine.extend([Chunk(0, [1, 2, 3, 4], True)])
            engine.truncate(0, 0)
            used.append(llama_cpp.llama_n_threads(engine._context._context))
    assert used == [3, 1, 2]
    assert all(np.array_equal(found[0], logits) for logits in found)
    fixed = EngineOptions(threads=2, context=256, tune=False)
    with contextlib.closing(LlamaCppEngine(artefact / "model.gguf", fixed)) as engine:
        assert engine._context.free_cores is None
