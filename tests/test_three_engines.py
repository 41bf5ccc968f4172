from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exporting import EXACT
from test_grammar import FORCING, check_forced_tokens

from efficientllm.runtime.engines.engine import CacheChoice, EngineOptions, load_engine
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import chat_prompt

CHATS = (
    [{"role": "user", "content": "Hello there"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Once upon a time"},
        {"role": "assistant", "content": "there was a king"},
        {"role": "user", "content": "Go on."},
    ],
)

CACHE: dict[str, CacheChoice] = {"gguf": "f32"}
"""Of keys and values; `auto` may take one of 8 bits."""


@pytest.mark.slow
def test_three_engines_give_the_same_text(exported: Callable[..., Path]) -> None:
    pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    answers, logits = {}, {}
    for target in ("gguf", "onnx", "executorch"):
        artefact = exported(target, *(EXACT if target == "executorch" else EXACT[:2]))
        engine = load_engine(
            artefact, EngineOptions(threads=1, context=128, warm_up=True, kv_cache=CACHE.get(target, "auto"))
        )
        prompts = [chat_prompt(engine, chat) for chat in CHATS]
        answers[target] = ["".join(Generation(engine, prompt, AnswerOptions(24))) for prompt in prompts]
        logits[target] = engine.prefill(prompts[1])
        engine.close()
    assert answers["gguf"] == answers["onnx"] == answers["executorch"]
    assert all(answers["gguf"])
    np.testing.assert_allclose(logits["onnx"], logits["executorch"], atol=2e-4)  # fp32 sums in another order
    np.testing.assert_allclose(logits["gguf"], logits["onnx"], atol=1e-2)  # llama.cpp's attention is not all fp32


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gguf", "onnx", "executorch"])
def test_forced_tokens_change_no_greedy_answer_of_an_engine(target: str, exported: Callable[..., Path]) -> None:
    if target == "executorch":
        pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    artefact = exported(target, *(EXACT if target == "executorch" else EXACT[:2]))
    options = EngineOptions(threads=1, context=128, kv_cache=CACHE.get(target, "auto"))
    engine = load_engine(artefact, options)
    for name in FORCING:
        check_forced_tokens(engine, name, prompts=42)
    engine.close()
