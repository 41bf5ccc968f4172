"""Several chats on one engine: each keeps its cache, all are decoded together, and none sees another's tokens."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering import answer_of, answer_together
from exporting import export

from efficientllm.runtime.engines import answer_loop
from efficientllm.runtime.engines.batch import LONG_CHAT, RESERVED_TOKENS, Answer, Batch
from efficientllm.runtime.engines.cache_pool import MAX_PARKED_CHATS, Lease
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.llama_context import FIRST_SLOTS
from efficientllm.runtime.engines.llama_cpp import MIN_CROWDED_SLOTS, LlamaCppEngine
from efficientllm.runtime.engines.pass_sizes import PREFILL_BESIDE_DECODES, split_pass
from efficientllm.runtime.engines.protocol import Chunk
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.sampling import SamplingOptions

PROMPTS = [[5 + (7 * index + step) % 300 for step in range(20 + 15 * index)] for index in range(4)]

EXACT = EngineOptions(threads=1, context=256, parallel=4, kv_cache="f32")


@pytest.fixture
def engine(artefact: Path) -> Iterator[EngineScheduler]:
    engine = load_engine(artefact, EXACT)
    yield engine
    engine.close()


def answers(engine: EngineScheduler, prompts: Sequence[Sequence[int]], tokens: int = 24) -> list[Generation]:
    return [Generation(engine, prompt, AnswerOptions(tokens)) for prompt in prompts]


def watch_passes(
    engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch, before: Callable[[list[int]], Any] = list
) -> list[int]:
    """Return a list that gets the number of chunks of each pass. `before` is called with it when a pass begins."""
    assert engine._engine is not None
    extend, sizes = engine._engine.extend, list[int]()

    def watched_extend(chunks: Sequence[Chunk]) -> list[np.ndarray]:
        sizes.append(len(chunks))
        before(sizes)
        return extend(chunks)

    monkeypatch.setattr(engine._engine, "extend", watched_extend)
    return sizes


def test_answers_of_a_batch_equal_those_of_one_after_the_other(engine: EngineScheduler) -> None:
    alone = ["".join(generation) for generation in answers(engine, PROMPTS)]
    together = answers(engine, PROMPTS)
    assert answer_together(engine, together) == alone
    assert all(generation.stats.decode_seconds > 0 for generation in together)


def test_a_batch_is_one_pass(engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.traits, "speculation", None)  # else right proposals end some answers early
    passes = watch_passes(engine, monkeypatch)
    answer_together(engine, answers(engine, PROMPTS, tokens=8))
    assert len(passes) <= 9
    assert passes.count(4) >= 7


def test_every_chat_keeps_its_cache(engine: EngineScheduler) -> None:
    chats = [list(prompt) for prompt in PROMPTS]
    for turn in range(3):
        for chat in chats:
            generation = Generation(engine, chat, AnswerOptions(6))
            list(generation)
            if turn:  # all but what was said since, and the last token: its logits are asked for
                assert generation.stats.prefilled_tokens <= 4
            chat += [*generation.answer, 301, 302, 303]


def test_idle_chats_take_no_slots_from_a_new_one_and_come_back(engine: EngineScheduler) -> None:
    long = [[11 * index + step for step in range(2, 80)] for index in range(3)]
    alone = [engine.prefill(prompt) for prompt in long]
    engine.prefill(newest := [330, *long[0]])
    # llama.cpp's attention reads every slot in use, of whichever chat
    assert engine.pool.used == len(newest)
    for prompt, expected in zip(long, alone, strict=True):
        engine.prefill([*prompt, 7])
        assert engine._own_lease.cached_tokens == len(prompt)
        np.testing.assert_allclose(engine.prefill(prompt), expected, atol=1e-4)
        assert engine._own_lease.cached_tokens == len(prompt) - 1


def test_idle_chats_are_parked_before_the_next_prompt(engine: EngineScheduler) -> None:
    prompts = [[60 * index + step for step in range(2, 2 + length)] for index, length in enumerate((100, 100, 100, 40))]
    leases = [Lease(list(prompt)) for prompt in prompts]
    for lease in leases:
        engine.logits(lease)
    for lease in leases:
        engine.release(lease)
    with engine.caches() as caches:
        caches.park_in_advance()  # as many as fit into a window of 256 tokens, and not the last one
    assert [each.tokens for each in engine.pool._parked] == prompts[:2]
    assert engine.pool.used == 140
    engine.prefill([*prompts[0], 7])
    assert engine._own_lease.cached_tokens == len(prompts[0])


def test_parked_chats_are_dropped_beyond_a_window(engine: EngineScheduler) -> None:
    prompts = [[11 * index + step for step in range(2, 80)] for index in range(5)]
    for prompt in prompts:
        engine.prefill(prompt)
    parked = [len(each.tokens) for each in engine.pool._parked]
    assert parked == [78] * 3  # 4 do not fit into 256 tokens
    engine.prefill(prompts[0])
    assert engine._own_lease.cached_tokens == 0


def test_many_short_chats_are_not_all_parked(artefact: Path) -> None:
    engine = load_engine(artefact, replace(EXACT, context=1024))
    for index in range(MAX_PARKED_CHATS + 4):
        engine.prefill([index + 2, *range(100, 140)])
    assert len(engine.pool._parked) == MAX_PARKED_CHATS
    engine.close()


def test_a_cache_grows_when_tokens_need_it_and_keeps_those_that_it_has(artefact: Path) -> None:
    engine = load_engine(artefact, replace(EXACT, context=800))
    assert isinstance(engine._engine, LlamaCppEngine)
    context = engine._engine._context
    prompts = [[5 + (11 * index + step) % 290 for step in range(400)] for index in range(4)]
    alone = [engine.prefill(prompt) for prompt in prompts]
    assert (context._open_slots, context.slots) == (FIRST_SLOTS, 1792)
    for prompt, expected in zip(prompts, alone, strict=True):
        np.testing.assert_allclose(engine.logits(Lease(list(prompt))), expected, atol=1e-4)
    assert context._open_slots == 1792
    # all were copied to larger caches, and one token after each attends to them
    expected = [engine.logits(Lease([*prompt, 7])) for prompt in prompts]
    fresh = load_engine(artefact, replace(EXACT, context=800))
    for prompt, logits in zip(prompts, expected, strict=True):
        np.testing.assert_allclose(logits, fresh.prefill([*prompt, 7]), atol=1e-4)
    fresh.close()
    engine.close()


WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
from typing import Any
from efficientllm.runtime.base.errors import ContextOverflowError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.generation import AnswerOptions, Generation

engine = load_engine(Path(sys.argv[1]), EngineOptions(threads=1, context=4096, kv_cache="f32", tune=False))
short, long = ([5 + 11 * step % 290 for step in range(count)] for count in (2000, 2100))
answer = lambda prompt: "".join(Generation(engine, prompt, AnswerOptions(4)))
expected = answer(short)
size = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
for extra in (-(1 << 20), 4 << 20):  # neither a copy of the cache fits, or no larger one
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, -1))
    try:
        answer(long)
    except ContextOverflowError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert engine._engine._context._open_slots == 2048
    assert answer(short) == expected
print(len(answer(long)) > 0, engine._engine._context._open_slots)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_a_cache_without_memory_to_grow_fails_one_request(artefact: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_MEMORY, str(artefact)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    refused = "there is no memory for a cache of 4,096 tokens; make room, or shorten the text"
    assert done.stdout.splitlines() == [refused, refused, "True 4096"]


def test_a_parked_chat_grows_the_cache_unless_its_state_is_damaged(artefact: Path) -> None:
    engine = load_engine(artefact, replace(EXACT, context=800))
    assert isinstance(engine._engine, LlamaCppEngine)
    context, prompt = engine._engine._context, PROMPTS[3] * 5
    engine._engine.extend([Chunk(0, prompt)])
    state = context.sequence_state(0)
    engine._engine.extend([Chunk(1, prompt[:100])])
    damaged = memoryview(bytearray(state[: len(state) // 2]))
    assert not context.restore_sequence(2, damaged, len(prompt))
    assert context._open_slots == FIRST_SLOTS
    assert context.restore_sequence(2, state, len(prompt))
    assert context._open_slots == 2 * FIRST_SLOTS
    engine.close()


def test_a_copy_owns_the_slots_that_its_source_leaves(engine: EngineScheduler) -> None:
    first, second = Lease(list(PROMPTS[3])), Lease([*PROMPTS[3], 9])
    engine.logits(first)
    engine.logits(second)
    assert engine.pool.used == len(PROMPTS[3]) + 1
    engine.pool.truncate(engine.pool.cache_of(first), 10)
    assert engine.pool.used == len(PROMPTS[3]) + 1
    assert engine.pool.cache_of(second).own_tokens == len(PROMPTS[3]) + 1 - 10


def test_a_prompt_that_is_being_evaluated_is_not_evaluated_again(engine: EngineScheduler) -> None:
    choices = [
        Generation(engine, PROMPTS[3], AnswerOptions(4, SamplingOptions(temperature=1.0, seed=seed)))
        for seed in range(4)
    ]
    answer_together(engine, choices)
    assert sum(choice.stats.prefilled_tokens for choice in choices) == len(PROMPTS[3]) + 3


def test_chats_that_share_a_beginning_do_not_disturb_each_other(engine: EngineScheduler) -> None:
    shared = PROMPTS[3]
    prompts = [[*shared, 300 + index, 310 + index] for index in range(3)]
    alone, again = answers(engine, prompts), answers(engine, prompts)
    for generation in alone:
        list(generation)
    assert len({tuple(generation.answer) for generation in alone}) > 1
    assert [generation.stats.cached_tokens for generation in alone[1:]] == [len(shared)] * 2
    answer_together(engine, again)
    assert [generation.answer for generation in again] == [generation.answer for generation in alone]


def test_where_the_caches_are_full_the_youngest_waits(artefact: Path) -> None:
    """Room for two windows of 256 tokens, asked for by four answers that take 150 each."""
    engine = load_engine(artefact, EXACT)
    prompts = [[5 + (11 * index + step) % 290 for step in range(60)] for index in range(4)]
    forever = [
        AnswerOptions(150, SamplingOptions(), logit_bias=dict.fromkeys(engine.end_ids, -np.inf)) for _ in prompts
    ]
    alone = ["".join(Generation(engine, prompt, options)) for prompt, options in zip(prompts, forever, strict=True)]
    together = [Generation(engine, prompt, options) for prompt, options in zip(prompts, forever, strict=True)]
    assert sum(len(prompt) + RESERVED_TOKENS for prompt in prompts) <= engine.cache_slots < 4 * 210
    texts = answer_together(engine, together)
    assert [len(generation.answer) for generation in together] == [150] * 4
    # what was evaluated anew may fall another way at near-ties
    assert sum(one == other for one, other in zip(texts, alone, strict=True)) >= 2
    engine.close()


def test_a_shared_prefix_takes_room_once(engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers share 200 tokens in a cache of 512, where two prompts of their own would fit."""
    assert engine.cache_slots == 512
    passes = watch_passes(engine, monkeypatch)
    prompts = [[*(5 + step % 290 for step in range(200)), 300 + index, 310] for index in range(4)]
    options = AnswerOptions(24, logit_bias=dict.fromkeys(engine.end_ids, -np.inf))
    generations = [Generation(engine, prompt, options) for prompt in prompts]
    answer_together(engine, generations)
    assert max(passes) == 4
    assert sum(one.stats.prefilled_tokens for one in generations) == 202 + 3 * 2
    assert engine.used_slots == 0


def test_long_chats_wait_for_long_ones_in_a_crowded_cache(artefact: Path) -> None:
    """Answer only the last two of four long chats at once. Short ones wait for none."""
    engine = load_engine(artefact, replace(EXACT, context=512, parallel=6, cache_memory=10_000_000))
    assert engine.traits.crowded_slots == MIN_CROWDED_SLOTS
    engine.traits.crowded_slots = LONG_CHAT + RESERVED_TOKENS
    prompts = [[5 + (11 * index + step) % 290 for step in range(LONG_CHAT)] for index in range(4)] + PROMPTS[:2]
    alone = ["".join(generation) for generation in answers(engine, prompts)]
    together, at_once = answers(engine, prompts), []
    texts, batch = dict.fromkeys(map(id, together), ""), Batch(engine)
    for generation in together:
        batch.add(answer_of(generation))
    while len(batch):
        for progress in batch.step():
            texts[id(progress.answer.generation)] += progress.text
        is_long = [len(answer.generation.tokens) >= LONG_CHAT for answer in batch._active]
        at_once.append((is_long.count(True), is_long.count(False)))
    assert [texts[id(generation)] for generation in together] == alone
    assert (at_once[0], max(at_once)) == ((1, 1), (2, 0))
    engine.close()


@pytest.mark.parametrize(("last", "expected"), [(300, [0, 1, 2, 3]), (60, [0, 1, 3, 2])])
def test_a_long_chat_is_overtaken_by_short_ones_only(last: int, expected: list[int], artefact: Path) -> None:
    """Three chats of 300 tokens would be no crowd, so the last one could start before the one of 500."""
    engine = load_engine(artefact, replace(EXACT, context=600, parallel=6, cache_memory=10_000_000))
    engine.traits.crowded_slots = 3 * (300 + RESERVED_TOKENS)
    lengths = (300, 300, 500, last)
    prompts = [[5 + (11 * index + step) % 290 for step in range(length)] for index, length in enumerate(lengths)]
    together, started, batch = answers(engine, prompts), list[int](), Batch(engine)
    for generation in together:
        batch.add(answer_of(generation))
    while len(batch):
        batch.step()
        active = [[id(one) for one in together].index(id(answer.generation)) for answer in batch._active]
        started += [index for index in active if index not in started]
    assert started == expected
    engine.close()


def test_chats_with_a_common_prefix_share_one_pass(artefact: Path) -> None:
    engine = load_engine(artefact, replace(EXACT, context=512, parallel=6, cache_memory=10_000_000))
    engine.traits.crowded_slots = 400
    prompts = [[*(5 + step % 290 for step in range(400)), 300 + index, 310] for index in range(5)]
    together, at_once, batch = answers(engine, prompts), [], Batch(engine)
    for generation in together:
        batch.add(answer_of(generation))
    while len(batch):
        batch.step()
        at_once.append(len(batch._active))
    assert max(at_once) > 2
    engine.close()


def test_a_cancelled_answer_leaves_the_others_alone(engine: EngineScheduler) -> None:
    alone = ["".join(generation) for generation in answers(engine, PROMPTS)]
    together = answers(engine, PROMPTS)
    together[1].cancel()
    texts = answer_together(engine, together)
    assert texts == [alone[0], "", *alone[2:]]


def test_many_chats_in_a_small_window_fit_a_pass(artefact: Path) -> None:
    """llama.cpp ends the process where a pass has more tokens than it was told of."""
    engine = load_engine(artefact, EngineOptions(threads=1, context=30, parallel=16, kv_cache="q8_0"))
    together = answers(engine, [[5 + (3 * index + step) % 300 for step in range(25)] for index in range(16)], tokens=4)
    answer_together(engine, together)
    assert all(generation.answer for generation in together)
    assert engine.context_length == 30
    engine.close()


@pytest.mark.parametrize("target", ["onnx"])
def test_engines_that_take_one_at_a_time_keep_a_cache_per_chat(
    target: str, source_folder: Path, tmp_path: Path
) -> None:
    assert export(source_folder, target, tmp_path / target, "--quantize", "f32", "--no-verify") == 0
    engine = load_engine(tmp_path / target, EngineOptions(threads=1, context=256, parallel=4))
    alone = ["".join(generation) for generation in answers(engine, PROMPTS)]
    again = answers(engine, PROMPTS)
    assert answer_together(engine, again) == alone
    assert [generation.stats.prefilled_tokens for generation in again] == [1] * 4
    engine.close()


def test_a_pass_serves_next_tokens_first_then_short_prompts() -> None:
    assert split_pass([1, 1, 700, 1], 512) == [1, 1, PREFILL_BESIDE_DECODES, 1]
    assert split_pass([3000, 40, 50], 512) == [512 - 90, 40, 50]
    assert split_pass([3000, 400, 500, 300], 512) == [128, 84, 0, 300]
    assert split_pass([1] * 8, 8) == [1] * 8
    assert split_pass([600], 512) == [512]


@pytest.mark.parametrize("cancelled", [1, 2])
def test_a_pass_ends_early_only_if_all_its_answers_are_cancelled(
    engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch, cancelled: int
) -> None:
    generations = answers(engine, PROMPTS[:2])
    for generation in generations:
        generation.begin()
    found = list[bool]()
    watch_passes(engine, monkeypatch, lambda _: found.extend(each.cancel() for each in generations[:cancelled]))
    rows = engine.step([generation.lease for generation in generations])
    assert [row is None for row in rows] == [cancelled == 2] * 2
    assert found == [True] * cancelled


def test_threads_share_passes(engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ["".join(generation) for generation in answers(engine, PROMPTS)]
    # all other threads wait for their next pass meanwhile
    sizes = watch_passes(engine, monkeypatch, lambda _: time.sleep(0.01))
    monkeypatch.setattr(engine.traits, "speculation", None)
    monkeypatch.setattr(engine.traits, "pass_times", None)  # else the measured times may ask for passes of one answer
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        assert list(threads.map("".join, answers(engine, PROMPTS))) == alone
    assert len(sizes) < 0.9 * sum(sizes)  # how many share a pass depends on the load


def test_ctrl_c_in_one_thread_leaves_no_empty_pass_to_another(
    engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = answers(engine, PROMPTS[:2])
    alone = "".join(answers(engine, PROMPTS[1:2])[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    add, added = engine.answers.add, threading.Semaphore(0)

    def add_and_count(answer: Answer) -> None:
        add(answer)
        added.release()

    def interrupt_the_first_shared_pass(sizes: list[int]) -> None:
        if len(sizes) == 1:  # the other thread may not have asked yet
            assert added.acquire(timeout=60)
            assert added.acquire(timeout=60)
        if sizes[-1] == 2 and sizes.count(2) == 1:
            signal.raise_signal(signal.SIGINT)  # the main thread gets it, whichever evaluates

    sizes = watch_passes(engine, monkeypatch, interrupt_the_first_shared_pass)
    monkeypatch.setattr(answer_loop, "TOGETHER_SECONDS", 20)  # a busy machine is slow to ask again
    monkeypatch.setattr(engine.answers, "add", add_and_count)
    monkeypatch.setattr(engine.traits, "speculation", None)
    monkeypatch.setattr(engine.traits, "pass_times", None)
    with ThreadPoolExecutor(1) as threads:
        text = threads.submit("".join, second)
        with pytest.raises(KeyboardInterrupt):
            "".join(first)
        assert text.result(60) == alone
    assert 0 not in sizes
