"""Proposed tokens that a pass checks: answers are those without them, and losing proposals end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering import answer_together
from scipy.stats import chisquare
from test_grammar import FORCING

from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.pass_sizes import PassTimes
from efficientllm.runtime.engines.protocol import Chunk
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.engines.speculation import MAX_DRAFT, PromptLookup, Speculation
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.grammar import Grammar, GrammarConstraint
from efficientllm.runtime.sampling import SamplingOptions

PROMPTS = [[5 + (7 * index + step % 9) % 300 for step in range(20 + 15 * index)] for index in range(4)]
FREE = PassTimes((1.0,) * 64)
"""Passes that take the same time whatever they check."""
LINEAR = PassTimes(tuple(map(float, range(1, 65))))


def load(artefact: Path, **options: object) -> EngineScheduler:
    return load_engine(artefact, EngineOptions(threads=1, context=256, parallel=4, kv_cache="f32", **options))  # type: ignore[arg-type]


@pytest.fixture
def engine(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineScheduler]:
    """An engine that checks every proposal."""
    engine = load(artefact)
    monkeypatch.setattr(Speculation, "draft_length", lambda self, num_right, num_answers, longest: max(0, longest))
    yield engine
    engine.close()


def generations(engine: EngineScheduler, tokens: int = 60, **sampling: float) -> list[Generation]:
    biases = dict.fromkeys(range(5, 9), 4.0)
    options = AnswerOptions(tokens, SamplingOptions(**sampling), top_logprobs=2, logit_bias=biases)  # type: ignore[arg-type]
    return [Generation(engine, prompt, options) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.1}])
def test_answers_equal_those_without_proposals(
    engine: EngineScheduler, artefact: Path, sampling: dict[str, Any]
) -> None:
    """Alone and in a batch, with the same log-probabilities, in fewer passes."""
    plain = load(artefact, lookup=False)
    expected = generations(plain, **sampling)
    texts = ["".join(one) for one in expected]
    records = [one.pop_logprobs() for one in expected]
    for together in (False, True):
        answers = generations(engine, **sampling)
        assert (answer_together(engine, answers) if together else ["".join(one) for one in answers]) == texts
        for one, other, logprobs in zip(answers, expected, records, strict=True):
            ours = one.pop_logprobs()
            assert [each.token for each in ours] == [each.token for each in logprobs] == one.answer
            found, wanted = (np.array([each.logprob for each in group], float) for group in (ours, logprobs))
            np.testing.assert_allclose(found, wanted, atol=1e-4)
            assert one.stats.finish_reason == other.stats.finish_reason
            is_ended = one.stats.finish_reason == "stop"
            assert one.stats.accepted_tokens + one.stats.passes == len(one.answer) + is_ended
        assert sum(one.stats.drafted_tokens for one in answers) > sum(one.stats.accepted_tokens for one in answers) > 0
    plain.close()


@pytest.mark.slow
def test_sampled_answers_have_the_exact_distribution(engine: EngineScheduler) -> None:
    """All 32 answers of five tokens among two, of which most have accepted and refused proposals."""
    low, high = 5, 6
    prompt, number = [low, low, low, high, low, high, high, high, low, low], 1000
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(5):
        longer = {}
        for answer, before in probability.items():
            low_logit, high_logit = engine.prefill([*prompt, *answer])[[low, high]]
            share = 1 / (1 + np.exp(high_logit - low_logit))
            longer |= {(*answer, low): before * share, (*answer, high): before * (1 - share)}
        probability = longer
    counts, accepted, drafted = Counter[tuple[int, ...]](), 0, 0
    for seed in range(number):
        sampling = SamplingOptions(temperature=1, top_k=0, top_p=1, min_p=0, seed=seed)
        generation = Generation(engine, prompt, AnswerOptions(5, sampling, logit_bias={low: 90.0, high: 90.0}))
        list(generation)
        counts[tuple(generation.answer)] += 1
        accepted, drafted = accepted + generation.stats.accepted_tokens, drafted + generation.stats.drafted_tokens
    assert number < accepted < drafted - number
    assert counts.keys() <= probability.keys()
    common = [answer for answer in probability if number * probability[answer] >= 5]
    rare = probability.keys() - {*common}
    groups = [*([one] for one in common), *([rare] if rare else [])]
    found = [sum(counts[answer] for answer in group) for group in groups]
    expected = [number * sum(probability[answer] for answer in group) for group in groups]
    assert len(common) > 10
    assert chisquare(found, np.multiply(expected, number / sum(expected))).pvalue > 1e-3


@pytest.mark.parametrize("name", FORCING)
def test_proposals_and_forced_tokens_share_passes(engine: EngineScheduler, artefact: Path, name: str) -> None:
    grammar, plain = Grammar.json_schema(FORCING[name]), load(artefact, lookup=False)
    passes: list[list[int]] = []
    for prompt in ([5, 6, 7], [9, 4, 8, 2], plain.tokenize('{"color": "red", "sizes": [1, 2]}' * 2, special=False)):
        answers = []
        for one in (engine, plain):
            generation = Generation(one, prompt, AnswerOptions(60), GrammarConstraint(one, grammar))
            answers.append("".join(generation))
            passes.append([generation.stats.passes, generation.stats.accepted_tokens])
        assert answers[0] == answers[1]
    assert sum(one for one, _ in passes[::2]) <= sum(one for one, _ in passes[1::2])
    plain.close()


def test_wrong_proposals_leave_no_trace_in_the_cache(engine: EngineScheduler, artefact: Path) -> None:
    """The next turn of a chat continues the cache and has the logits of a fresh evaluation."""
    never = dict.fromkeys(engine.end_ids, -np.inf)
    options = AnswerOptions(30, SamplingOptions(temperature=1.2, seed=1), logit_bias={**never, 5: 9.0, 6: 9.0})
    generation = Generation(engine, PROMPTS[0], options)
    list(generation)
    assert generation.stats.drafted_tokens > generation.stats.accepted_tokens
    turn = [*PROMPTS[0], *generation.answer, 301, 302]
    again, plain = Generation(engine, turn, AnswerOptions(1)), load(artefact, lookup=False)
    again.begin()
    np.testing.assert_allclose(engine.logits(again.lease), plain.prefill(turn), atol=1e-3)
    assert again.lease.cached_tokens >= len(turn) - 3
    plain.close()


def test_proposals_end_with_the_window_and_with_the_answer(engine: EngineScheduler) -> None:
    widths: list[int] = []
    assert engine._engine is not None
    extend = engine._engine.extend

    def record(chunks: Sequence[Chunk]) -> object:
        widths.extend(chunk.num_drafted for chunk in chunks)
        return extend(chunks)

    engine._engine.extend = record  # type: ignore[method-assign, assignment]
    never = dict.fromkeys(engine.end_ids, -np.inf)
    for tokens, options in ((200, AnswerOptions(7, logit_bias=never)), (250, AnswerOptions(50, logit_bias=never))):
        widths.clear()
        generation = Generation(engine, [5, 6, 7, 8] * (tokens // 4), options)
        list(generation)
        assert len(generation.answer) == min(options.max_tokens, 256 - len(generation.tokens) + len(generation.answer))
        assert max(widths) < len(generation.answer)
    sliding = Generation(engine, [5, 6, 7, 8] * 60, AnswerOptions(60, overflow="slide", logit_bias=never))
    list(sliding)
    assert len(sliding.answer) == 60


def lookup_of(text: str, speculation: Speculation | None = None) -> PromptLookup:
    return PromptLookup(speculation or Speculation(FREE), list(map(ord, text)))


def test_lookup_proposes_the_tokens_of_an_earlier_place() -> None:
    assert bytes(lookup_of("the lamp in the hall. the lamp").draft(9, 1)) == b" in the h"
    assert bytes(lookup_of("abcabcabc").draft(7, 1)) == b"abcabca"  # a repetition goes on
    assert lookup_of("abcdefg").draft(9, 1) == []
    lookup = lookup_of("name: Ann. name:")
    for character in b" Bob. name:":
        lookup.push(character)
    assert bytes(lookup.draft(4, 1)) == b" Bob"  # the latest place counts


def test_as_many_tokens_are_proposed_as_pay() -> None:
    assert Speculation(FREE).draft_length(0, 1, MAX_DRAFT) == MAX_DRAFT
    assert Speculation(LINEAR).draft_length(0, 1, MAX_DRAFT) == 0
    assert Speculation().draft_length(0, 1, 0) == 0
    steps = PassTimes((1.0, 1.0, 1.0, 1.0, *[9.0] * 20))
    assert Speculation(steps).draft_length(0, 1, MAX_DRAFT) == 3
    assert Speculation(steps).draft_length(0, 3, MAX_DRAFT) == 1  # beside two other answers


def test_losing_proposals_end_and_are_tried_again() -> None:
    """Wrong proposals are counted while nothing is proposed, so that a later repetition is."""
    speculation = Speculation(PassTimes(tuple(1 + 0.2 * index for index in range(64))))
    assert speculation.draft_length(0, 1, 8) > 0
    for _ in range(200):
        speculation.count(0, False)
    lengths = [speculation.draft_length(0, 1, 8) for _ in range(640)]
    assert 5 < sum(length > 0 for length in lengths) < 30
    assert speculation.draft_length(32, 1, 8) > 0  # in a long repetition
    for _ in range(200):
        speculation.count(0, True)
    assert speculation.draft_length(0, 1, 8) > 0


def test_large_passes_are_found_where_small_ones_gain_nothing() -> None:
    """q8_0 on AVX-512: passes of 2 to 7 tokens gain nothing, larger ones do. Nothing is known at first."""
    speculation, milliseconds, tokens = Speculation(), 0.0, 0
    sizes = (1, 2, 4, 8, 16, 32)
    while tokens < 300:  # a copy of 300 tokens
        count = speculation.draft_length(tokens, 1, MAX_DRAFT)
        duration = float(np.interp(1 + count, sizes, (6.2, 27.6, 38.4, 48.3, 54.9, 90.0)))
        speculation.record_pass(1 + count, duration)
        milliseconds, tokens = milliseconds + duration, tokens + 1 + count
        for right in range(tokens - 1 - count, tokens):
            speculation.count(right, True)
    assert milliseconds < 0.7 * 6.2 * 300


@pytest.mark.parametrize("slope", [9.0, 6.2, 0.5])
def test_text_without_repetitions_loses_at_most_3_percent(slope: float) -> None:
    """Half of the tokens have a proposal, of which one in twenty is right."""
    chance, speculation, milliseconds, tokens = np.random.default_rng(0), Speculation(), 0.0, 0
    while tokens < 3000:
        has_proposal = chance.random() < 0.5
        count = speculation.draft_length(0, 1, MAX_DRAFT) if has_proposal else 0
        duration = 6.2 + slope * count
        speculation.record_pass(1 + count, duration)
        is_right = chance.random() < 0.05
        if has_proposal:
            speculation.count(0, bool(is_right))
        milliseconds, tokens = milliseconds + duration, tokens + 1 + (is_right and count > 0)
    assert milliseconds < 1.03 * 6.2 * tokens


def test_the_time_of_passes_is_measured_while_serving() -> None:
    speculation = Speculation(FREE)
    for _ in range(100):
        for size in range(1, 26):
            speculation.record_pass(size, 10.0 * size)
    assert speculation.draft_length(0, 1, MAX_DRAFT) == 0
    speculation.record_pass(1, 1e6)  # a disturbance
    assert speculation.draft_length(0, 1, MAX_DRAFT) == 0
