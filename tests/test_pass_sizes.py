"""How many answers a pass serves: as many as the machine gains from, the others in turn."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from answering import answer_together

from efficientllm.runtime.engines import answer_loop, tuning
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.llama_context import LlamaContext
from efficientllm.runtime.engines.pass_sizes import PassTimes
from efficientllm.runtime.engines.protocol import Chunk
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.server.models.worker import EngineWorker

PROMPTS = [[5 + (7 * index + step) % 300 for step in range(12)] for index in range(4)]

ONE_OR_EIGHT = PassTimes((7.0, 27, 34, 41, 49, 53, 55, 49, 56, 60))
"""q8_0 on AVX-512: a single token has a kernel of its own, eight rows another."""
FOURS = PassTimes((4.5, 11.7, 16.4, 16.2, 23.2, 28.1, 32.3, 24.3))
"""q4_0 there: rows come in fours."""
ALL = PassTimes((10.0, 11, 12, 13))
"""With AMX."""


@pytest.mark.parametrize(
    ("times", "expected"),
    [(ONE_OR_EIGHT, [1, 1, 1, 1, 1, 1, 1, 8, 9, 10]), (FOURS, [1, 1, 1, 4, 4, 4, 4, 8]), (ALL, [1, 2, 3, 4])],
)
def test_as_many_answers_as_give_the_most_tokens_per_second(times: PassTimes, expected: list[int]) -> None:
    assert [times.num_decodes(waiting) for waiting in range(1, len(expected) + 1)] == expected


def test_beside_a_prompt_all_answers_are_served() -> None:
    assert [ONE_OR_EIGHT.num_decodes(waiting, prompt_tokens=20) for waiting in (1, 4, 7)] == [1, 4, 7]


def test_more_answers_than_were_measured() -> None:
    assert ALL.num_decodes(6) == 6


def test_log_shortens_the_sizes_of_passes() -> None:
    assert str(ALL) == "1 to 4 answers a pass"
    assert str(PassTimes((1.0, 3))) == "1 answer a pass"
    assert str(ONE_OR_EIGHT) == "1 or 8 to 10 answers a pass"
    assert str(FOURS) == "1, 4 or 8 answers a pass"
    holes = PassTimes(tuple(10.0 + number + 5 * (number % 2) for number in range(1, 20)))
    assert str(holes) == "1 to 18 answers a pass"  # noise: not a list of half of all numbers


@pytest.mark.parametrize("text", ["7", "", "[]", "null", "[1.0]", "[0.0, 1.0]", "[NaN, 1]", '["a", 1]', "[1, 2, 3]"])
def test_damaged_finding_is_measured_again(text: str, unseen: Path, tmp_path: Path) -> None:
    """The cache is a file that anybody may have written."""
    options = EngineOptions(threads=1, context=64, parallel=2)
    load_engine(unseen, options).close()
    seen = tmp_path / "cache" / "file_cache.json"
    kept = json.loads(seen.read_text())
    seen.write_text(json.dumps({key: text if "passes" in key or "attention" in key else kept[key] for key in kept}))
    engine = load_engine(unseen, options)
    assert engine.settings.endswith("1 to 2 answers a pass")
    engine.close()
    assert json.loads(seen.read_text()) == kept


@pytest.fixture
def engine(artefact: Path) -> Iterator[EngineScheduler]:
    engine = load_engine(artefact, EngineOptions(threads=1, context=256, parallel=4, kv_cache="f32", lookup=False))
    yield engine
    engine.close()


def answer_all(engine: EngineScheduler) -> list[list[int]]:
    """Tokens of every prompt's answer, all computed together."""
    generations = [Generation(engine, prompt, AnswerOptions(8)) for prompt in PROMPTS]
    answer_together(engine, generations)
    return [generation.answer for generation in generations]


def test_answers_take_turns_where_passes_of_one_are_fastest(
    engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer_all(engine)
    assert engine._engine is not None
    extend, passes = engine._engine.extend, []

    def record(chunks: Sequence[Chunk]) -> object:
        passes.append([chunk.sequence for chunk in chunks])
        return extend(chunks)

    monkeypatch.setattr(engine._engine, "extend", record)
    monkeypatch.setattr(engine.traits, "pass_times", PassTimes((1.0, 8, 12, 16)))
    assert answer_all(engine) == expected
    turns = [served for one in passes if len(one) == 1 for served in one]
    assert len(turns) > 20
    for index in range(len(turns) - 8):  # nobody has a second turn before the others had theirs
        assert len(set(turns[index : index + 4])) == 4


def test_a_short_prompt_is_evaluated_as_fast_as_its_tokens_can_be(
    engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.prefill(PROMPTS[0])
    assert engine._engine is not None
    extend, passes = engine._engine.extend, []

    def record(chunks: Sequence[Chunk]) -> object:
        passes.append([(len(chunk.tokens), chunk.wants_logits) for chunk in chunks])
        return extend(chunks)

    monkeypatch.setattr(engine._engine, "extend", record)
    monkeypatch.setattr(engine.traits, "pass_times", PassTimes((1.0, 8, 12, 16)))
    engine.prefill([*PROMPTS[0][:-3], 301, 302, 303])  # the rest is cached
    assert passes == [[(1, False)], [(1, False)], [(1, True)]]
    engine.prefill(PROMPTS[1])  # more than was measured goes in one piece
    assert passes[3:] == [[(len(PROMPTS[1]), True)]]
    np.testing.assert_allclose(engine.prefill(PROMPTS[0]), expected, atol=1e-3)


def test_passes_are_timed_when_several_chats_are_first_loaded(
    unseen: Path, passes_of_all: Callable[[LlamaContext, int, int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    def measure(context: LlamaContext, size: int, depth: int) -> float:
        found.append(passes_of_all(context, size, depth))
        return found[-1]

    monkeypatch.setattr(tuning, "_pass_ms", measure)
    for parallel, timed in ((6, 6 * tuning.PASS_REPETITIONS), (6, 0), (1, 0)):
        found.clear()
        engine = load_engine(unseen, EngineOptions(threads=1, context=64, parallel=parallel))
        assert len(found) == timed
        assert ("a pass" in engine.settings) == (parallel > 1)
        assert engine.prefill([5, 6, 7]).shape == (engine.vocab_size,)  # the measured tokens are gone
        engine.close()
    assert min(found, default=1) > 0


def test_passes_are_timed_later_for_a_server(unseen: Path) -> None:
    options = EngineOptions(threads=1, context=64, parallel=3)
    for should_stop, text in ((True, "attention"), (False, "a pass")):
        engine = load_engine(unseen, options, measure_passes=False)
        assert "a pass" not in engine.settings
        logits = engine.prefill([5, 6, 7])
        engine.measure_passes(lambda stop=should_stop: stop)
        assert engine.settings.endswith(text)
        with engine.caches() as caches:
            assert caches.used == 3  # the chats keep their caches
        np.testing.assert_allclose(engine.prefill([5, 6, 7]), logits, atol=1e-5)
        engine.close()
    engine = load_engine(unseen, options, measure_passes=False)
    assert engine.settings.endswith("a pass")  # as measured before
    engine.close()


def start_worker(unseen: Path, monkeypatch: pytest.MonkeyPatch) -> EngineWorker:
    monkeypatch.setattr(answer_loop, "QUIET_SECONDS", 0.01)
    engine = load_engine(unseen, EngineOptions(threads=1, context=64, parallel=3), measure_passes=False)
    return EngineWorker(engine, waiting=4, on_idle=lambda: None)


def wait_for(is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_times_passes_while_no_request_waits(unseen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start_worker(unseen, monkeypatch)
    wait_for(lambda: worker.engine.settings.endswith("a pass"))
    worker.close()


def test_a_server_waits_with_the_timing_for_requests_in_preparation(
    unseen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker(unseen, monkeypatch)
    worker.enter()
    time.sleep(0.2)
    assert not worker.engine.settings.endswith("a pass")
    worker.leave()
    wait_for(lambda: worker.engine.settings.endswith("a pass"))
    worker.close()


def test_a_server_answers_after_the_timing_failed(
    unseen: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> float:
        raise RuntimeError("llama_decode: -3")

    monkeypatch.setattr(tuning, "_pass_ms", fail)
    worker = start_worker(unseen, monkeypatch)
    wait_for(lambda: any("not prepared: RuntimeError: llama_decode: -3" in line for line in caplog.messages))
    assert Generation(worker.engine, [5, 6], AnswerOptions(2)).whole() is not None
    worker.close()


def test_an_interrupted_timing_is_continued(unseen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(tuning, "_pass_ms", lambda context, size, depth: sizes.append(size) or 1.0)
    options = EngineOptions(threads=1, context=64, parallel=4)
    with contextlib.closing(load_engine(unseen, options, measure_passes=False)) as engine:
        for _ in range(4):
            before = len(sizes)
            engine.measure_passes(lambda before=before: len(sizes) > before + tuning.PASS_REPETITIONS)
        assert "a pass" in engine.settings
    assert max(map(sizes.count, sizes)) <= 2 * tuning.PASS_REPETITIONS


def test_times_of_a_replaced_file_are_not_stored(unseen: Path, artefact: Path) -> None:
    options = EngineOptions(threads=1, context=64, parallel=3)
    with contextlib.closing(load_engine(unseen, options, measure_passes=False)) as engine:
        os.replace(shutil.copy(artefact / "model.gguf", unseen / "other"), unseen / "model.gguf")
        engine.measure_passes()
        assert "a pass" not in engine.settings


def test_a_server_stops_the_timing_when_it_is_wanted(unseen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_go_on, passes = threading.Event(), threading.Event(), list[int]()

    def measure(context: LlamaContext, size: int, depth: int) -> float:
        passes.append(size)
        began.set()
        may_go_on.wait(10)
        return 1.0

    monkeypatch.setattr(tuning, "_pass_ms", measure)
    worker = start_worker(unseen, monkeypatch)
    assert began.wait(10)
    closing = threading.Thread(target=worker.close)
    closing.start()
    while not worker.engine.answers._is_closing:
        time.sleep(0.01)
    may_go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    assert len(passes) == 1


def test_a_slow_machine_times_the_most_telling_passes(unseen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def measure(context: LlamaContext, size: int, depth: int) -> float:
        sizes.append(size)
        return float(size + 10)

    monkeypatch.setattr(tuning, "_pass_ms", measure)
    monkeypatch.setattr(tuning, "PASS_SECONDS", -1)
    engine = load_engine(unseen, EngineOptions(threads=1, context=64, parallel=8))
    assert sorted(set(sizes)) in ([1], [8])
    engine.close()
    assert list(tuning._sizes_to_measure(16))[:5] == [16, 1, 8, 4, 12]
