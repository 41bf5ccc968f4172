"""Sampling against the definition: sort everything, cut, draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import export
from tiny import tiny_architecture

from efficientllm.runtime.base.errors import ArtefactError, UsageError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.sampling import LLAMA_CPP_DEFAULTS, Sampler, SamplingOptions
from efficientllm.runtime.tool_format import LEARNED_MARK

ALL: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Nothing is cut off."""


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """{token: probability}."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    keep = (probabilities >= min_p * probabilities[0]) & (np.cumsum(probabilities) - probabilities < top_p)
    kept = probabilities[keep] / probabilities[keep].sum()
    return dict(zip(order[keep].tolist(), kept.tolist(), strict=True))


def test_sampler_refuses_numbers_that_are_not_finite() -> None:
    logits = np.array([0.0, np.nan, 1.0], dtype=np.float32)
    for temperature in (0.0, 1.0):
        with pytest.raises(ArtefactError, match=r"^the model's numbers are not finite: its file may be damaged"):
            Sampler(SamplingOptions(temperature=temperature, **ALL)).choose(logits.copy())


CUTS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 7, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.5, "top_k": 900, "top_p": 0.8, "min_p": 0.0},
    {"temperature": 2.0, "top_k": 5000, "top_p": 1.0, "min_p": 0.01},
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("size", [50, 1009])
def test_draws_equal_those_of_a_full_sort(cut: dict[str, Any], size: int) -> None:
    logits = (3 * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    expected = reference(logits, **cut)
    sampler = Sampler(SamplingOptions(seed=1, **cut))
    drawn = np.bincount([sampler.choose(logits.copy()) for _ in range(6000)], minlength=size) / 6000
    assert set(np.flatnonzero(drawn).tolist()) <= expected.keys()
    for token, share in expected.items():
        assert drawn[token] == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 6000) + 1e-3)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.array([2.0, 2.1, -1.0], dtype=np.float32)
    cuts: list[dict[str, Any]] = [ALL, {}]
    for cut in cuts:
        sampler = Sampler(SamplingOptions(temperature=1e-38, seed=0, **cut))
        assert {sampler.choose(logits.copy()) for _ in range(20)} == {1}


def test_sampler_never_draws_masked_tokens() -> None:
    logits = np.full(500, -np.inf, dtype=np.float32)
    logits[[3, 77]] = 0.0
    cuts: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, **ALL}, {"temperature": 1.0}]
    for cut in cuts:
        sampler = Sampler(SamplingOptions(seed=0, **cut))
        assert {sampler.choose(logits.copy()) for _ in range(50)} <= {3, 77}


def test_a_seed_repeats_the_draws() -> None:
    logits = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    first, second = (Sampler(SamplingOptions(temperature=1.0, seed=5)) for _ in range(2))
    draws = [first.choose(logits.copy()) for _ in range(20)]
    assert draws == [second.choose(logits.copy()) for _ in range(20)]
    assert len(set(draws)) > 1


def test_repetition_counts_the_prompt_frequency_and_presence_the_answer() -> None:
    def penalized(prompt: list[int], answer: list[int], **options: Any) -> list[float]:
        sampler = Sampler(SamplingOptions(**options), prompt)
        for token in answer:
            sampler.push(token)
        logits = np.array([4.0, -4.0, 1.0, 1.0], dtype=np.float32)
        sampler.choose(logits)
        return logits.tolist()

    assert penalized([0, 0, 1], [2], repetition_penalty=2.0) == [2.0, -8.0, 0.5, 1.0]
    assert penalized([0, 0, 1], [2, 2, 3], frequency_penalty=0.25) == [4.0, -4.0, 0.5, 0.75]
    assert penalized([0, 0, 1], [2, 2, 3], presence_penalty=0.25) == [4.0, -4.0, 0.75, 0.75]


def test_a_bias_moves_and_forbids() -> None:
    logits = np.array([2.0, 1.9, 1.0], dtype=np.float32)
    assert Sampler(SamplingOptions(), (), {2: 5.0}).choose(logits.copy()) == 2
    assert Sampler(SamplingOptions(), (), {0: -np.inf}).choose(logits.copy()) == 1


def test_manifest_has_the_sampling_settings_of_the_model(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny(tiny_architecture())
    own = '{"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.1, "min_p": null}'
    (folder / "generation_config.json").write_text(own)
    assert export(folder, "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify") == 0
    expected = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    assert Manifest.read(tmp_path / "gguf").sampling == expected
    engine = load_engine(tmp_path / "gguf", EngineOptions(threads=1, context=64))
    assert engine.sampling_defaults == expected
    asked = AnswerOptions(sampling=SamplingOptions(temperature=None, top_p=0.5))
    assert Generation(engine, [5], asked).sampler.options == SamplingOptions(
        0.6, LLAMA_CPP_DEFAULTS["top_k"], 0.5, LLAMA_CPP_DEFAULTS["min_p"], 1.1
    )
    with pytest.raises(UsageError, match="logit_bias: token 400 is outside the vocabulary of 400"):
        Generation(engine, [5], AnswerOptions(logit_bias={400: 1.0}))
    engine.close()


def test_a_model_of_one_job_answers_greedily(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny(tiny_architecture())
    (folder / "chat_template.jinja").write_text(LEARNED_MARK + (folder / "chat_template.jinja").read_text())
    assert export(folder, "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify") == 0
    assert Manifest.read(tmp_path / "gguf").sampling == {"temperature": 0.0, "repetition_penalty": 1.0}
    assert "PARAMETER temperature 0\n" in (tmp_path / "gguf" / "Modelfile").read_text()
