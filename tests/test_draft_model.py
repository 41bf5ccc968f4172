"""A draft model proposes tokens: answers are those without it, and it ends where it loses time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import exporting
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from serving import loaded_pool
from shared import made_once
from test_recurrent import write_mamba
from test_sequences import run
from tiny import tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.runtime import chat
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.engines import draft_model
from efficientllm.runtime.engines.draft_model import DraftModel
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.protocol import Chunk
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.engines.scheduling_policy import PassTimes
from efficientllm.runtime.engines.speculation import Speculation
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.sampling import SamplingOptions
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.vocabulary.tokenizer_pruning import prune_tokenizer

PROMPTS = [[5 + (7 * index + step * step) % 300 for step in range(20 + 60 * index)] for index in range(4)]
FREE = PassTimes((1.0,) * 64)

Draft = Callable[[str], Path]


@pytest.fixture(scope="session")
def draft_of(artefact: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Draft:
    """draft_of(kind) -> a draft of `artefact`: the same model, one with noise, with fewer tokens, or another one."""

    def build(kind: str) -> tuple[Any, Any]:
        model = tiny_model(tiny_architecture(), seed=kind == "other", max_position_embeddings=4096)
        if kind == "noisy":
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
        if kind == "foreign":  # the merges of another text
            text = ["".join(map(chr, np.random.default_rng(0).integers(0x400, 0x4FF, 5000)))]
            return model, tokenizer.train_new_from_iterator(text, 400)
        if kind != "pruned":
            return model, tokenizer
        kept = list(range(360))
        smaller = tiny_model(replace(tiny_architecture(), vocab_size=len(kept)), max_position_embeddings=4096)
        state = model.state_dict()
        smaller.load_state_dict(
            {name: value[: len(kept)] if len(value) == 400 else value for name, value in state.items()}
        )
        return smaller, prune_tokenizer(tokenizer, kept)

    def path(kind: str) -> Path:
        def make(folder: Path) -> None:
            save_checkpoint(*build(kind), folder / "checkpoint")
            assert exporting.export(folder / "checkpoint", "gguf", folder / "gguf", "--quantize", "f32") == 0

        return artefact if kind == "same" else made_once(tmp_path_factory, f"draft-{kind}", make) / "gguf"

    return path


def load(path: Path, draft: Path | str = "", **options: Any) -> EngineScheduler:
    fixed: dict[str, Any] = {"threads": 1, "context": 512, "parallel": 4, "kv_cache": "f32", "lookup": False}
    return load_engine(path, EngineOptions(draft=str(draft), **{**fixed, **options}))


@pytest.fixture
def every_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pass check eight proposals, however unlikely."""
    monkeypatch.setattr(draft_model, "MIN_PROBABILITY", 0.0)
    monkeypatch.setattr(Speculation, "draft_length", lambda self, right, answers, longest, *costs: min(longest, 8))


def generations(engine: EngineScheduler, **sampling: Any) -> list[Generation]:
    options = AnswerOptions(40, SamplingOptions(**sampling), top_logprobs=2)
    return [Generation(engine, prompt, options) for prompt in PROMPTS]


@pytest.mark.usefixtures("every_proposal")
@pytest.mark.parametrize("kind", ["same", "noisy", "pruned"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 3, "seed": 3}])
def test_answers_are_those_without_a_draft(
    artefact: Path, draft_of: Draft, kind: str, sampling: dict[str, Any]
) -> None:
    """Alone and in a batch, with the same log-probabilities, in fewer passes."""
    plain, engine = load(artefact), load(artefact, draft_of(kind))
    expected = generations(plain, **sampling)
    texts = ["".join(one) for one in expected]
    records = [one.pop_logprobs() for one in expected]
    for together in (False, True):
        answers = generations(engine, **sampling)
        found = run(engine, answers) if together else {id(one): "".join(one) for one in answers}
        assert [found[id(one)] for one in answers] == texts
        for one, logprobs in zip(answers, records, strict=True):
            ours = one.pop_logprobs()
            np.testing.assert_allclose([each.logprob for each in ours], [each.logprob for each in logprobs], atol=1e-4)
        accepted = sum(one.stats.accepted_tokens for one in answers)
        assert sum(one.stats.passes for one in answers) <= sum(one.stats.passes for one in expected) - accepted
        assert accepted >= (100 if kind == "same" and not sampling["temperature"] else 5)
    plain.close()
    engine.close()


@pytest.mark.slow
@pytest.mark.usefixtures("every_proposal")
def test_sampled_answers_have_the_exact_distribution(artefact: Path, draft_of: Draft) -> None:
    """All 32 answers of five tokens among the two likeliest, with accepted and refused proposals."""
    engine, number, prompt = load(artefact, draft_of("noisy")), 1000, PROMPTS[0]
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(5):
        longer = {}
        for answer, before in probability.items():
            logits = engine.prefill([*prompt, *answer])
            low, high = np.argsort(logits)[-2:]
            share = 1 / (1 + np.exp(logits[high] - logits[low]))
            longer |= {(*answer, int(low)): before * share, (*answer, int(high)): before * (1 - share)}
        probability = longer
    assert not any(engine.end_ids & {*answer} for answer in probability)
    counts, accepted, drafted = Counter[tuple[int, ...]](), 0, 0
    for seed in range(number):
        generation = Generation(engine, prompt, AnswerOptions(5, SamplingOptions(temperature=1, top_k=2, seed=seed)))
        list(generation)
        counts[tuple(generation.answer)] += 1
        accepted, drafted = accepted + generation.stats.accepted_tokens, drafted + generation.stats.drafted_tokens
    assert number < accepted < drafted - number
    assert counts.keys() <= probability.keys()
    common = [answer for answer in probability if number * probability[answer] >= 5]
    rare = probability.keys() - {*common}
    found = [*(counts[answer] for answer in common), sum(counts[answer] for answer in rare)]
    expected = [*(probability[answer] for answer in common), sum(probability[answer] for answer in rare)]
    used = [index for index, share in enumerate(expected) if number * share >= 1]
    shares = np.array(expected)[used]
    assert len(common) > 10
    assert chisquare(np.array(found)[used], shares / shares.sum() * sum(np.array(found)[used])).pvalue > 1e-3
    engine.close()


def test_a_wrong_draft_is_given_up(artefact: Path, draft_of: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and proposals take fixed times here: measured ones are those of the machine's other work, too."""
    length = Speculation.draft_length
    monkeypatch.setattr(Speculation, "_pass_ms", lambda self, answers, longest: 10.0 + 2.0 * np.arange(longest + 1))
    monkeypatch.setattr(
        Speculation, "draft_length", lambda self, right, answers, longest, *ms: length(self, right, answers, longest, 1)
    )
    monkeypatch.setattr(draft_model, "MIN_PROBABILITY", 0.0)
    engine = load(artefact, draft_of("other"))
    drafted = []
    for index in range(12):
        never = dict.fromkeys(engine.end_ids, -np.inf)
        generation = Generation(engine, [5 + index, 6, 7], AnswerOptions(100, logit_bias=never))
        list(generation)
        drafted.append(generation.stats.drafted_tokens)
    assert drafted[0] > 0
    assert sum(drafted[6:]) < 60
    engine.close()


def test_a_draft_that_takes_longer_than_it_saves_is_given_up() -> None:
    speculation = Speculation(PassTimes((10.0,) * 64))
    for right in range(200):
        speculation.count(right % 20, True)
    assert speculation.draft_length(0, 1, 8, token_ms=1.0) > 0
    assert speculation.draft_length(0, 1, 8, token_ms=12.0) == 0
    tries = [speculation.draft_length(0, 1, 8, token_ms=12.0) for _ in range(600)]
    costly = [speculation.draft_length(0, 1, 8, 12.0, prompt_ms=30.0) for _ in range(600)]
    assert 0 < sum(count > 0 for count in costly) < sum(count > 0 for count in tries) < 30


def test_a_long_prompt_is_evaluated_in_parts_and_kept_for_the_next_turn(
    artefact: Path, draft_of: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_model, "MIN_PROBABILITY", 0.0)
    monkeypatch.setattr(Speculation, "draft_length", lambda self, right, answers, longest, *costs: min(longest, 8))
    engine = load(artefact, draft_of("same"))
    assert engine._speculation is not None
    model = engine._speculation.draft
    assert isinstance(model, DraftModel)
    widths: list[int] = []
    extend = model._engine.extend

    def record(chunks: Sequence[Chunk]) -> list[np.ndarray]:
        widths.extend(len(chunk.tokens) for chunk in chunks)
        return extend(chunks)

    monkeypatch.setattr(model._engine, "extend", record)
    prompt = [5 + 7 * step % 300 for step in range(400)]
    first = Generation(engine, prompt, AnswerOptions(20))
    list(first)
    assert widths[:3] == [128, 128, 128]
    assert max(widths[3:]) < 30
    assert first.stats.accepted_tokens > 5
    widths.clear()
    list(Generation(engine, [*prompt, *first.answer, 7, 8, 9], AnswerOptions(20)))
    assert max(widths) < 30
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.draft(model.begin(None, prompt), 4)


def test_look_up_comes_before_the_draft(artefact: Path, draft_of: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "draft_length", lambda self, right, answers, longest, *costs: min(longest, 8))
    engine = load(artefact, draft_of("noisy"), lookup=True)
    assert engine._speculation is not None
    proposer = engine.proposer([5, 6, 7, 8, 9, 5, 6, 7])
    assert proposer is not None
    assert engine.draft(proposer, 2) == [8, 9]
    engine.close()


@pytest.mark.slow
def test_a_draft_that_cannot_propose_is_refused_in_one_line(
    artefact: Path, draft_of: Draft, exported: Callable[..., Path], tmp_path: Path
) -> None:
    write_mamba(mamba := tmp_path / "mamba.gguf", artefact / "model.gguf")
    onnx, foreign = exported("onnx"), draft_of("foreign")
    for model, draft, message in (
        (artefact, foreign, f"--draft {foreign}: its vocabulary is not that of {artefact}"),
        (artefact, onnx, f"--draft {onnx}: is for onnxruntime; give a GGUF file"),
        (onnx, artefact, f"--draft {artefact}: onnxruntime checks no proposals"),
        (mamba, artefact, f"--draft {artefact} for {mamba}: a recurrent model"),
        (artefact, mamba, f"--draft {mamba} for {artefact}: a recurrent model"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)) as refusal:
            load(model, draft, kv_cache="auto")
        assert "\n" not in str(refusal.value)


def test_the_memory_of_a_draft_counts(artefact: Path, draft_of: Draft) -> None:
    sizes = []
    for draft in ("", str(draft_of("pruned"))):
        pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=256, draft=draft))
        sizes.append(pool._sizes["tiny"])
        pool.close()
    cache = 2 * 256 * 4 * 2 * 32 * (2 + 2 + 1) // 2
    assert sizes[1] - sizes[0] >= (draft_of("pruned") / "model.gguf").stat().st_size + cache // 2


def test_a_draft_is_a_flag_of_chat(artefact: Path, draft_of: Draft, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for flags in ([], ["--draft", str(draft_of("same"))]):
        assert chat.body([str(artefact), "Hi", "--max-tokens", "12", "--threads", "1", *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
