"""Answers under a grammar: every token that the mask leaves keeps the answer within it."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accepting import is_accepted
from exporting import EXACT

from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.grammar import Grammar, GrammarConstraint, read_vocabulary
from efficientllm.runtime.sampling import SamplingOptions


def accepts(engine: EngineScheduler, grammar: Grammar, text: str) -> bool:
    """Whether `text`, in the tokens that the model knows it by, is an answer under the grammar."""
    return is_accepted(GrammarConstraint(engine, grammar), engine, text)


VALID = [
    "{}",
    '{"a": 1}',
    '{"a":[1, -2.5e+3, {"b": null}, [], "x\\n\\u00e9 日本"], "c": true , "d": false}',
    '{\n    "n": [0, -0, 0.5, 1E9, 10e-2]\n}',
]
INVALID = ["[1]", '{"a" 1}', '{"a": 01}', '{"a": 1.}', '{"a": .5}', '{"a": +1}', "{'a': 1}", '{"a": 1,}', '{"a": [1,]}']
INVALID += ['{"a": tru}', '{"a": "\n"}', '{"a": "\\x"}', '{"a": 1]', '{"a": 1} x', '{"a": 1e}', '{"a": -}', "{,}"]


@pytest.mark.parametrize("text", VALID)
def test_objects_are_accepted(engine: EngineScheduler, text: str) -> None:
    json.loads(text)
    assert accepts(engine, Grammar.json_schema({"type": "object"}), text)


@pytest.mark.parametrize("text", [*INVALID, '{"a": ' + " " * 40 + "1}"])
def test_grammar_refuses_other_values_and_endless_space(engine: EngineScheduler, text: str) -> None:
    assert not accepts(engine, Grammar.json_schema({"type": "object"}), text)


@pytest.mark.parametrize(
    ("schema", "numbers"),
    [
        ({"type": "integer", "multipleOf": 9_999_991}, "9999991"),
        ({"type": "number", "multipleOf": 99.9991}, "99.9991"),
        ({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}, "997 and 991"),
    ],
)
def test_multiples_that_would_compute_for_minutes_are_refused(schema: dict[str, Any], numbers: str) -> None:
    said = f"`multipleOf` {re.escape(numbers)} takes too long to enforce; remove it"
    with pytest.raises(UsageError, match=f"^json_schema: {said}"):
        Grammar.json_schema(schema)
    text = json.dumps(schema).replace("O", "\\u004f")
    with pytest.raises(UsageError, match=f"^lark: {said}"):
        Grammar.lark(f"start: %json {text}")


@pytest.mark.parametrize("number", [0.01, 60, 86_400_000, 0.00125, 16_384])
def test_usual_multiples_are_enforced(engine: EngineScheduler, number: float) -> None:
    grammar = Grammar.json_schema({"type": "number", "multipleOf": number})
    assert accepts(engine, grammar, f"{3 * number:f}".rstrip("0").rstrip("."))
    assert not accepts(engine, grammar, f"{number}7" if isinstance(number, float) else str(number + 1))


def test_regular_expressions_and_lark_grammars_hold_from_end_to_end(engine: EngineScheduler) -> None:
    regex, lark = Grammar.regex("(yes|no)!?"), Grammar.lark('start: "a" DIGITS\nDIGITS: /[0-9]{2}/')
    assert [accepts(engine, regex, text) for text in ("yes", "no!", "maybe", "yes!!")] == [True, True, False, False]
    assert [accepts(engine, lark, text) for text in ("a12", "a1", "12")] == [True, False, False]


def test_an_answer_may_end_only_where_the_grammar_does(engine: EngineScheduler) -> None:
    constraint = GrammarConstraint(engine, Grammar.regex("ab?"))
    end = min(engine.end_ids)
    allowed = []
    for token in [*engine.tokenize("a", special=False), None]:
        logits = np.zeros(engine.vocab_size, np.float32)
        constraint.mask(logits)
        allowed.append(logits[end] == 0)
        if token is not None:
            constraint.push(token)
    assert allowed == [False, True]
    assert not constraint.is_complete
    constraint.push(*engine.tokenize("b", special=False))
    assert constraint.is_complete


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 3},
    },
    "required": ["color", "sizes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_random_model_writes_values_of_the_schema(engine: EngineScheduler, seed: int) -> None:
    sampling = SamplingOptions(temperature=1.5, seed=seed)
    generation = Generation(
        engine, [1, 5, 9], AnswerOptions(200, sampling), GrammarConstraint(engine, Grammar.json_schema(SCHEMA))
    )
    answer = json.loads("".join(generation))
    assert generation.stats.finish_reason == "stop"
    assert 0 < generation.stats.mask_seconds < generation.stats.decode_seconds + 1
    assert answer.keys() == {"color", "sizes"}
    assert answer["color"] in ("red", "green")
    assert all(1 <= size <= 9 for size in answer["sizes"])


def test_a_biased_token_stays_within_the_grammar(engine: EngineScheduler) -> None:
    (comma,) = engine.tokenize(",", special=False)
    options = AnswerOptions(200, SamplingOptions(temperature=0), logit_bias={comma: 100.0})
    generation = Generation(engine, [1, 5], options, GrammarConstraint(engine, Grammar.regex("[a-f]{3,5}")))
    assert re.fullmatch("[a-f]{3,5}", "".join(generation))


def one_token_a_pass(engine: EngineScheduler, prompt: list[int], grammar: Grammar, max_tokens: int) -> str:
    """Return the greedy answer that evaluates every token in a pass of its own, forced ones as well."""
    constraint, answer = GrammarConstraint(engine, grammar), list[int]()
    logits = engine.prefill(prompt)
    while len(answer) < max_tokens and not constraint.is_complete:
        forced = constraint.forced_tokens()
        constraint.mask(logits)
        token = forced[0] if forced else int(logits.argmax())
        assert logits[token] > -np.inf
        if token in engine.end_ids:
            break
        constraint.push(token)
        answer.append(token)
        logits = engine.decode(token)
    return b"".join(map(engine.token_bytes, answer)).decode("utf-8", "replace")


FORCING: dict[str, dict[str, Any]] = {
    "names": SCHEMA,
    "choices": {"enum": ["a long constant text", "a long constant word", "another"]},
    "nested": {
        "type": "object",
        "properties": {"outer_value": SCHEMA, "is_finished": {"type": "boolean"}, "text": {"type": "string"}},
        "required": ["outer_value", "is_finished", "text"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"order_number": {"type": "integer"}, "order_name": {"type": "string", "maxLength": 5}},
        "additionalProperties": False,
    },
}


def check_forced_tokens(engine: EngineScheduler, name: str, prompts: int) -> None:
    """Compare greedy answers with forced tokens in one pass with those of one token a pass."""
    grammar, chance = Grammar.json_schema(FORCING[name]), np.random.default_rng(0)
    tokens = passes = 0
    for _ in range(prompts):
        prompt = chance.integers(1, engine.vocab_size - 1, size=int(chance.integers(2, 20))).tolist()
        options = AnswerOptions(60, SamplingOptions(temperature=0, repetition_penalty=1))
        generation = Generation(engine, prompt, options, GrammarConstraint(engine, grammar))
        assert "".join(generation) == one_token_a_pass(engine, prompt, grammar, 60), prompt
        tokens += generation.stats.completion_tokens
        passes += generation.stats.passes
    assert passes < 0.95 * tokens


@pytest.mark.parametrize("name", FORCING)
def test_forced_tokens_of_one_pass_change_no_greedy_answer(engine: EngineScheduler, name: str) -> None:
    check_forced_tokens(engine, name, prompts=10)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gguf", "onnx", "executorch"])
def test_forced_tokens_change_no_greedy_answer_of_an_engine(target: str, exported: Callable[..., Path]) -> None:
    if target == "executorch":
        pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    artefact = exported(target, *(EXACT if target == "executorch" else EXACT[:2]))
    # `auto` may take a cache of 8 bits
    options = EngineOptions(threads=1, context=128, kv_cache="f32" if target == "gguf" else "auto")
    engine = load_engine(artefact, options)
    for name in FORCING:
        check_forced_tokens(engine, name, prompts=42)
    engine.close()


@pytest.mark.parametrize("max_tokens", [3, 200])
def test_an_answer_that_is_forced_needs_no_pass(engine: EngineScheduler, max_tokens: int) -> None:
    """In pieces and whole."""
    text = "the only answer there is"
    for read in ("".join, Generation.whole):
        constraint = GrammarConstraint(engine, Grammar.regex(text))
        generation = Generation(engine, [1, 5], AnswerOptions(max_tokens), constraint)
        answer = read(generation)
        assert answer == text if max_tokens == 200 else text.startswith(answer)
        assert generation.stats.finish_reason == ("stop" if max_tokens == 200 else "length")
        assert generation.stats.passes == 0


def test_a_stop_text_ends_an_answer_within_forced_tokens(engine: EngineScheduler) -> None:
    constraint = GrammarConstraint(engine, Grammar.regex("[ab]the only answer there is"))
    generation = Generation(engine, [1, 5], AnswerOptions(99, stop=["ans"]), constraint)
    assert re.fullmatch("[ab]the only ", "".join(generation))


def test_log_probabilities_and_biases_take_a_pass_for_every_token(engine: EngineScheduler) -> None:
    for options in (AnswerOptions(99, top_logprobs=1), AnswerOptions(99, logit_bias={7: 1.0})):
        generation = Generation(engine, [1, 5], options, GrammarConstraint(engine, Grammar.regex("the only answer")))
        assert "".join(generation) == "the only answer"
        assert generation.stats.passes == generation.stats.completion_tokens
        assert len(generation.pop_logprobs()) == (generation.stats.passes if options.top_logprobs else 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema({"type": "thing"}), "json_schema: Invalid type: thing"),
        (lambda: Grammar.json_schema({"$ref": "https://elsewhere.example/x"}), "json_schema: .*elsewhere"),
        (lambda: Grammar.regex("(a|"), "regex: .*unclosed group"),
        (lambda: Grammar.lark("start: nothing"), 'lark: .*unknown name: "nothing"'),
    ],
)
def test_malformed_grammar_gives_one_line(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_vocabulary_is_freed_with_its_engine(artefact: Path) -> None:
    from efficientllm.runtime import grammar

    gc.collect()  # engines of other tests
    before = len(grammar._TOKENIZERS)
    engine = load_engine(artefact, EngineOptions(threads=1))
    GrammarConstraint(engine, Grammar.regex("a"))
    assert len(grammar._TOKENIZERS) == before + 1
    engine.close()
    del engine
    gc.collect()
    assert len(grammar._TOKENIZERS) == before


def test_a_grammar_is_compiled_once_and_freed_after_others(
    engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficientllm.runtime import grammar

    parsed = []
    parse = Grammar.parse_on_large_stack
    monkeypatch.setattr(
        Grammar, "parse_on_large_stack", lambda self, work: parsed.append(self.source) or parse(self, work)
    )
    for _ in range(2):
        assert accepts(engine, Grammar.regex("(yes|no)!{7}"), "no!!!!!!!")
    assert len(parsed) == 2  # one to validate it, one to compile it
    for number in range(grammar.CACHED_GRAMMARS):
        GrammarConstraint(engine, Grammar.regex(f"a{{{number + 1}}}"))
    assert len(grammar._COMPILED[engine]) == grammar.CACHED_GRAMMARS
    del parsed[:]
    assert not accepts(engine, Grammar.regex("(yes|no)!{7}"), "yes!")
    assert len(parsed) == 1  # compiled again; its check is still remembered


def test_a_vocabulary_is_read_once(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server does when a model is loaded, so that no answer waits for it."""
    read = []
    whole = EngineScheduler.vocabulary
    monkeypatch.setattr(EngineScheduler, "vocabulary", lambda self: read.append(self) or whole(self))
    engine = load_engine(artefact, EngineOptions(threads=1))
    read_vocabulary(engine)
    GrammarConstraint(engine, Grammar.regex("yes|no"))
    assert len(read) == 1
    engine.close()
    closed = load_engine(artefact, EngineOptions(threads=1))
    closed.close()
    read_vocabulary(closed)
