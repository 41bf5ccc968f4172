"""An engine has one owner: no order of asking, answering, unloading and closing ends the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exporting import export

from efficientllm.runtime import EfficientLLMError, EngineOptions, Model, load
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.engines.cache_pool import Lease
from efficientllm.runtime.engines.engine import load_engine
from efficientllm.runtime.engines.llama_context import MAX_PASS_TOKENS
from efficientllm.runtime.generation import AnswerOptions, Generation

OPTIONS = EngineOptions(threads=1, context=1024)


def together(*actions: Callable[[], object]) -> list[BaseException | None]:
    """What each raised, all run in threads of their own at once."""
    raised: list[BaseException | None] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            actions[index]()
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def test_four_threads_on_one_model_take_turns(artefact: Path) -> None:
    with load(artefact, OPTIONS) as model:
        questions = [f"Question {index} " * (index + 1) for index in range(4)]
        alone = [model.chat(question, max_tokens=24) for question in questions]
        answers = [""] * 4

        def ask(index: int) -> None:
            for _ in range(4):
                answers[index] = model.chat(questions[index], max_tokens=24)

        assert together(*[lambda index=index: ask(index) for index in range(4)]) == [None] * 4
        # a cached beginning is evaluated in other pieces: near-ties may fall another way
        assert sum(one == other for one, other in zip(alone, answers, strict=True)) >= 3


def test_four_streaming_threads_end_or_get_an_error(artefact: Path) -> None:
    with load(artefact, OPTIONS) as model:

        def ask(index: int) -> None:
            for _ in range(4):
                list(model.stream(f"Question {index} " * 40, max_tokens=24))

        for error in together(*[lambda index=index: ask(index) for index in range(4)]):
            assert error is None or (isinstance(error, EfficientLLMError) and "another answer started" in str(error))
        assert model.chat("Hello", max_tokens=4)


def test_interleaved_answers_raise_an_error(artefact: Path) -> None:
    engine = load_engine(artefact, OPTIONS)
    first, second = (Generation(engine, [5, 6, 7, token], AnswerOptions(64)) for token in (8, 9))
    engine.prefill([5, 6])
    pieces = iter(first)
    next(pieces)
    assert "".join(second)
    with pytest.raises(EfficientLLMError, match="another answer started"):
        list(pieces)
    with pytest.raises(EfficientLLMError, match="another answer started"):
        engine.decode(5)  # the sequence is an answer's
    chunks = engine.evaluate(list(range(5, 200)), 0)
    next(chunks)
    engine.prefill([5])
    with pytest.raises(EfficientLLMError, match="another answer started"):
        list(chunks)
    engine.close()


def test_an_unfinished_evaluation_leaves_no_tokens_to_other_prompts(artefact: Path) -> None:
    engine, fresh = load_engine(artefact, OPTIONS), load_engine(artefact, OPTIONS)
    next(engine.evaluate(list(range(5, 200)), 0))
    np.testing.assert_allclose(engine.prefill([9, 8, 7]), fresh.prefill([9, 8, 7]), atol=1e-4)
    fresh.close()
    engine.close()


USES: dict[str, Callable[[Model], object]] = {
    "tokenize": lambda model: model.tokenize("Hi"),
    "detokenize": lambda model: model.detokenize([5]),
    "token bytes": lambda model: model.engine.token_bytes(5),
    "prefill": lambda model: model.engine.prefill([5]),
    "decode": lambda model: model.engine.decode(5),
    "evaluate": lambda model: list(model.engine.evaluate([5, 6, 7], 0)),
    "chat": lambda model: model.chat("Hi"),
}


@pytest.mark.parametrize("use", USES)
def test_use_after_close_raises(artefact: Path, use: str) -> None:
    model = load(artefact, OPTIONS)
    model.close()
    model.close()
    with pytest.raises(EfficientLLMError, match="the model is closed; load it again"):
        USES[use](model)


def test_an_onnx_model_may_be_closed_twice(source_folder: Path, tmp_path: Path) -> None:
    assert export(source_folder, "onnx", tmp_path / "onnx", "--quantize", "f32", "--no-verify") == 0
    model = load(tmp_path / "onnx", EngineOptions(threads=1, context=64))
    answer = model.stream("Hello", max_tokens=16)
    next(answer)
    model.close()
    model.close()
    with pytest.raises(EfficientLLMError, match="the model is closed"):
        list(answer)


def test_closing_during_answers_ends_them(artefact: Path) -> None:
    """With threads in the middle of tokenizing, prefilling and decoding."""
    for _ in range(5):
        model = load(artefact, OPTIONS)

        def ask(model: Model = model) -> None:
            while True:
                model.chat("word " * 100, max_tokens=24)

        def close(model: Model = model) -> None:
            time.sleep(0.1)
            model.close()

        *asked, closed = together(ask, ask, ask, close)
        assert closed is None
        for error in asked:
            assert isinstance(error, EfficientLLMError)
            assert "the model is closed" in str(error)


def test_a_model_that_is_never_closed_lets_the_process_end(artefact: Path) -> None:
    script = f"""
from efficientllm.runtime import EngineOptions, load
model = load({str(artefact)!r}, EngineOptions(threads=1, context=64))
answer = model.stream("Hello", max_tokens=16)
next(answer)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_cancelled_answer_stops_amid_its_prompt(artefact: Path) -> None:
    engine = load_engine(artefact, OPTIONS)
    prompt = [5 + index % 300 for index in range(900)]
    whole = "".join(Generation(engine, prompt, AnswerOptions(4)))
    engine.prefill([5])
    generation = Generation(engine, prompt, AnswerOptions(4))
    step = engine.step

    def cancel_after_one(leases: list[Lease]) -> object:
        rows = step(leases)
        generation.cancel()
        return rows

    engine.step = cancel_after_one  # type: ignore[method-assign, assignment]
    assert list(generation) == []
    engine.step = step  # type: ignore[method-assign]
    again = Generation(engine, prompt, AnswerOptions(4))
    assert "".join(again) == whole  # in two passes as in one
    assert again.stats.cached_tokens == 1 + MAX_PASS_TOKENS  # the first token was there already
    assert again.stats.prefilled_tokens == 900 - 1 - MAX_PASS_TOKENS
    engine.close()


def test_cancelling_ends_the_pass_in_progress(artefact: Path) -> None:
    """Called while llama.cpp is evaluating 512 tokens; what was there before stays, and goes on."""
    engine = load_engine(artefact, OPTIONS)
    prompt = [5 + index % 300 for index in range(900)]
    for wait in (0.0, 0.001, 0.003, 0.01):
        engine.prefill(prompt[:100])
        generation = Generation(engine, prompt, AnswerOptions(4))
        cancelling = threading.Timer(wait, generation.cancel)
        cancelling.start()
        list(generation)
        cancelling.join()
        assert generation.is_over
        fresh = np.asarray(engine.prefill(prompt[:120]))
        engine.prefill([7])
        np.testing.assert_allclose(fresh, engine.prefill(prompt[:120]), atol=5e-2)  # of Q8_0 or fp16, in other pieces
    engine.close()


def test_prefill_figures_exclude_cached_tokens(artefact: Path) -> None:
    with load(artefact, OPTIONS) as model:
        for cached in (False, True):
            model.chat("word " * 50, max_tokens=2)
            stats = model.stats
            assert stats is not None
            assert stats.cached_tokens == (stats.prompt_tokens - 1 if cached else 0)
            assert stats.prefilled_tokens == stats.prompt_tokens - stats.cached_tokens
            expected = stats.prefilled_tokens / stats.time_to_first_token_ms * 1e3
            assert stats.prefill_tokens_per_second == pytest.approx(expected)


BETWEEN_TORCH_S_PRODUCTS = """
import sys
from pathlib import Path
import torch
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
engine = load_engine(Path(sys.argv[1]), EngineOptions(threads=1, context=256))
matrix = torch.ones(256, 256, dtype=torch.bfloat16)
answers = []
for _ in range(2):
    answers.append([float(rows.sum()) for rows in engine.evaluate([5, 6, 7, 8] * 16, 0)])
    engine.evaluate([9], 0)  # nothing of the prompt is cached the next time
    matrix @ matrix
assert answers[0] == answers[1]
"""


@pytest.mark.slow
def test_torch_in_bfloat16_may_compute_between_two_passes(exported: Callable[..., Path]) -> None:
    """On a CPU with AMX the second pass would be an illegal instruction (runtime/engines/llama_context.py)."""
    artefact = exported("gguf", "--quantize", "q8_0")
    done = run_python("-c", BETWEEN_TORCH_S_PRODUCTS, str(artefact))
    assert done.code == 0, done.errors
