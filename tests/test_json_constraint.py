"""What may follow in a JSON object, against Python's own parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.json_constraint import JsonConstraint, JsonTokens
from efficientllm.runtime.sampling import SamplingOptions

VALID = [
    "{}",
    '{"a": 1}',
    ' {"a":[1, -2.5e+3, {"b": null}, [], "x\\n\\u00e9 日本"], "c": true , "d": false}',
    '{"n": [0, -0, 0.5, 1E9, 10e-2]}',
]
INVALID = ["[1]", '{"a" 1}', '{"a": 01}', '{"a": 1.}', '{"a": .5}', '{"a": +1}', "{'a': 1}", '{"a": 1,}', '{"a": [1,]}']
INVALID += ['{"a": tru}', '{"a": "\n"}', '{"a": "\\x"}', '{"a": 1]', '{"a": 1} x', '{"a": 1e}', '{"a": -}', "{,}"]


@pytest.mark.parametrize("text", VALID)
def test_valid_objects_are_accepted_byte_by_byte(text: str) -> None:
    json.loads(text)
    constraint = JsonConstraint()
    for byte in text.encode():
        assert not constraint.is_complete
        assert constraint.push(bytes([byte]))
    assert constraint.is_complete


@pytest.mark.parametrize("text", INVALID)
def test_invalid_objects_are_refused(text: str) -> None:
    constraint = JsonConstraint()
    assert not all(constraint.push(bytes([byte])) for byte in text.encode())


def test_a_refusal_changes_nothing() -> None:
    constraint = JsonConstraint()
    assert constraint.push('{"é'.encode())
    assert not constraint.push(b"\xff")
    assert not constraint.push(b'" 1')
    assert constraint.push(b'": 1}')
    assert constraint.is_complete


def test_half_a_character_is_no_escape() -> None:
    constraint = JsonConstraint()
    assert constraint.push(b'{"\\')
    assert not constraint.push("é".encode()[:1])
    assert constraint.push(b"n")


@pytest.mark.parametrize("seed", range(5))
def test_a_random_model_writes_json(artefact: Path, seed: int) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1))
    sampling = SamplingOptions(temperature=1.5, seed=seed)
    constraint = JsonTokens(engine.token_bytes)
    generation = Generation(engine, [1, 5, 9], AnswerOptions(200, sampling), constraint)
    text = "".join(generation)
    if generation.stats.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert not constraint.is_complete
    engine.close()
