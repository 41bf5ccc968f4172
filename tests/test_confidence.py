"""The confidence of calls: the engines' figure, its calibration, and the server that asks for other words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import http_client, served
from sklearn.isotonic import IsotonicRegression
from transformers import PreTrainedTokenizerFast

from efficientllm.runtime import load
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.call_reader import ArgumentsEvent, CallEvent, CallReader, TextEvent
from efficientllm.runtime.cautious_reader import UNSURE, CautiousReader, question, reply_to_question
from efficientllm.runtime.engines.calibration import Calibration
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation, GenerationStats
from efficientllm.runtime.grammar import Grammar, GrammarConstraint
from efficientllm.runtime.tool_format import ToolFormat
from efficientllm.server import cli
from efficientllm.server.options import AppOptions
from efficientllm.train.evaluation.confidence import calibration, calibration_error, isotonic, rows
from efficientllm.train.evaluation.jobs import NO_CALL, JobResult
from efficientllm.train.model.source import load_source

MESSAGES = [{"role": "user", "content": "Lock it"}]
TOOL = {"type": "function", "function": {"name": "lock", "parameters": {"type": "object", "properties": {}}}}
CALL = json.dumps({"name": "lock", "arguments": {}})
ASKED = "I am not sure. Do you mean lock?"


def job(probabilities: np.ndarray, is_right: np.ndarray, fits: np.ndarray) -> JobResult:
    """Return the result of examples that are all answered by a call."""
    functions, answers = ["lock" if each else NO_CALL for each in fits], [CALL] * len(fits)
    values = {"exact": is_right.astype(float).tolist()}
    return JobResult("call", values, answers, 9, 9, functions=functions, probabilities=probabilities.tolist())


def drawn_job(seed: int, is_chance: bool = False) -> JobResult:
    """Draw 3,000 calls that are right with the probability confidence², or with 0.5 if they are right by chance."""
    random = np.random.default_rng(seed)
    sure, drawn = random.random(3000), random.random(3000)
    return job(sure, drawn < (0.5 if is_chance else sure**2), random.random(3000) < 0.8)


def test_calibration_holds_for_other_calls_of_the_model() -> None:
    found = calibration(drawn_job(0))
    assert found is not None
    other = drawn_job(1)
    sure, right = np.array(other.probabilities), np.array(other.values["exact"])
    for low in np.arange(0, 1, 0.1):
        chosen = (sure >= low) & (sure < low + 0.1)
        predicted = np.mean([found.probability(each) for each in sure[chosen]])
        assert predicted == pytest.approx(right[chosen].mean(), abs=0.08)
    assert calibration_error(other) < 0.05
    least, acted = found.least(0.05)
    assert (right[sure >= least] == 0).sum() / len(sure) == pytest.approx(0.05, abs=0.015)
    assert acted == pytest.approx((sure >= least).mean(), abs=0.03)


def test_model_that_is_right_by_chance_hardly_acts() -> None:
    found = calibration(drawn_job(0, is_chance=True))
    assert found is not None
    assert found.least(0.02)[1] < 0.08
    assert [found.probability(each) for each in (0.2, 0.5, 0.8)] == pytest.approx([0.5] * 3, abs=0.1)
    always = calibration(job(np.full(50, 0.9), np.arange(50) % 2 == 0, np.ones(50, dtype=bool)))
    assert always is not None
    assert always.least(0.02) == (float("inf"), 0.0)
    assert always.least(0.52) == (0.0, 1.0)
    assert rows([job(np.full(50, 0.9), np.arange(50) % 2 == 0, np.ones(50, dtype=bool))])[0][2] == "none"
    few = calibration(job(np.full(5, 0.9), np.ones(5, dtype=bool), np.ones(5, dtype=bool)))
    assert few is not None
    assert few.least(0.1) == (float("inf"), 0.0)  # five right calls promise no rate below one of six
    assert always.probability(0.99) == 0.5


def test_isotonic_regression_equals_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    sure = random.integers(0, 40, 500) / 40  # with ties
    right = random.random(500) < sure
    expected = IsotonicRegression(out_of_bounds="clip").fit(sure, right)
    asked = np.linspace(-0.1, 1.1, 200)
    assert np.interp(asked, *np.transpose(isotonic(sure, right))) == pytest.approx(expected.predict(asked))


def test_table_has_a_cell_for_each_result() -> None:
    sure, without = drawn_job(0), replace(drawn_job(0), probabilities=[None] * 3000)
    table = rows([without, sure])
    assert [len(row) for row in table] == [4] * 4
    assert not any(row[2] for row in table)
    assert "probability 0." in table[1][3]
    few = job(np.full(19, 0.9), *np.ones((2, 19), dtype=bool))
    assert (len(rows([few])), rows([few, sure])[3][2]) == (3, "")
    assert rows([without, replace(without, probabilities=[])]) == [] == rows([replace(sure, metric="exact")])


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_confidence_equals_the_mean_log_probability_in_torch(exported: Callable[..., Path], kind: str) -> None:
    folder = exported(kind, "--quantize", "f32")
    with load(folder) as loaded:
        prompt = loaded.tokenize("How is Rome?")
        generation = Generation(loaded.engine, prompt, AnswerOptions(8, measures_probability=True))
        generation.whole()
    model = load_source(str(folder.parent / "checkpoint"))[0].eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *generation.answer]])).logits[0, len(prompt) - 1 : -1].double()
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(generation.answer)[:, None])
    assert generation.stats.mean_probability == pytest.approx(float(chosen.mean().exp()), rel=1e-3)


def test_forced_tokens_do_not_count(engine: EngineScheduler) -> None:
    grammar = Grammar.json_schema(
        {"type": "object", "properties": {"is_now": {"type": "boolean"}}, "required": ["is_now"]}
    )
    found = []
    for top in (None, 1):
        options = AnswerOptions(64, measures_probability=True, top_logprobs=top)
        generation = Generation(
            engine, engine.tokenize("Hi", special=False), options, GrammarConstraint(engine, grammar)
        )
        generation.whole()
        found.append((generation.stats.chosen_tokens, generation.stats.mean_probability))
    assert 0 < found[0][0] < len(generation.answer)
    assert found[0] == pytest.approx(found[1])


@pytest.fixture(scope="module")
def calibrated(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the tiny model, with a calibration by which only calls of a confidence of 0.99 are sure enough."""
    folder = tmp_path_factory.mktemp("calibrated") / "gguf"
    shutil.copytree(artefact, folder)
    curve = [[0.99, 0.2, 0.01], [0.0, 0.9, 0.5]]
    scores = {"constrain": "schema", "examples": 9, "calibration": {"points": [[0.0, 0.1], [1.0, 0.9]], "curve": curve}}
    few = {**scores, "examples": 2, "calibration": {**scores["calibration"], "curve": [[0.0, 1.0, 0.0]]}}
    replace(Manifest.read(folder), jobs=(scores, few, {**few, "examples": 99, "constrain": "copy"})).write(folder)
    return folder


def request(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return a request that a random model answers by a call: the start of the other answer, in JSON, is unlikely."""
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    digits = {str(tokenizer.convert_tokens_to_ids(each)): -90 for each in "-0123456789"}
    body = {"messages": MESSAGES, "tools": [TOOL], "response_format": schema, "logit_bias": digits}
    return {**body, "max_tokens": 200, "temperature": 0}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("wrong_acts", "has_calls"), [(1.0, True), (0.6, True), (0.02, False), (0.0, False)])
def test_unsure_calls_become_a_question(
    calibrated: Path, tokenizer: PreTrainedTokenizerFast, wrong_acts: float, has_calls: bool, is_stream: bool
) -> None:
    with served(calibrated, AppOptions(wrong_acts=wrong_acts)) as address, http_client(address) as client:
        body = {"model": "tiny", **request(tokenizer), "stream": is_stream}
        answer = client.post("/v1/chat/completions", json=body)
        demanded = client.post("/v1/chat/completions", json={**body, "tool_choice": "required", "stream": False}).json()
        said = [{"role": "assistant", "content": ASKED}, {"role": "user", "content": "Yes."}]
        agreed = {**body, "messages": [*MESSAGES, *said], "stream": False}
        agreed = client.post("/v1/chat/completions", json=agreed).json()
    assert demanded["choices"][0]["finish_reason"] == agreed["choices"][0]["finish_reason"] == "tool_calls"
    if is_stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        text = "".join(each["choices"][0]["delta"].get("content") or "" for each in events)
        calls = [call for each in events for call in each["choices"][0]["delta"].get("tool_calls", ())]
        last = events[-1]
    else:
        last = answer.json()
        text, calls = last["choices"][0]["message"]["content"], last["choices"][0]["message"].get("tool_calls")
    assert last["choices"][0]["finish_reason"] == ("tool_calls" if has_calls else "stop")
    assert bool(calls) == has_calls
    assert (text or "") == ("" if has_calls else ASKED)
    assert 0.1 < last["timings"]["confidence"] < 0.9


def test_ollama_answers_have_the_confidence_of_their_calls(calibrated: Path) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": [TOOL], "format": {"type": "integer"}}
    with served(calibrated) as address, http_client(address) as client:
        found = []
        for seed in range(30):  # a random model calls in some of them
            options = {"num_predict": 200, "seed": seed, "temperature": 2, "top_k": 0, "top_p": 1, "min_p": 0}
            found.append(client.post("/api/chat", json={**asked, "options": options, "stream": False}).json())
    called = [each for each in found if each["message"].get("tool_calls")]
    assert 0 < len(called) < 30
    assert all(0.1 < each["confidence"] < 0.9 for each in called)
    assert not any("confidence" in each for each in found if each not in called)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("0.02 --tool-arguments listed", "--metric call --constrain listed --write"),
        ("0.001", "--wrong-acts 0.001: the surest calls were wrong more often; allow 0.010"),
    ],
)
def test_limit_of_wrong_acts_needs_a_calibration_that_holds_it(
    calibrated: Path, flags: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(cli.body, [str(calibrated), "--wrong-acts", *flags.split()]) == 2
    assert reason in capsys.readouterr().err


def test_limit_refuses_requests_of_another_grammar(calibrated: Path) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "tools": [TOOL], "tool_arguments": "examples", "max_tokens": 2}
    with served(calibrated, AppOptions(wrong_acts=0.02)) as address, http_client(address) as client:
        assert "has no calibration" in client.post("/v1/chat/completions", json=asked).json()["error"]["message"]


@pytest.mark.parametrize(
    "calibration",
    [
        {},
        {"points": [], "curve": []},
        {"points": [[1, 1], [0, 0]], "curve": [[0, 1, 1]]},
        {"points": [[0, float("nan")]], "curve": [[0, 1, 1]]},
        {"points": [[0, 1]], "curve": [["0", 1, 1]]},
        {"points": [[0, 7]], "curve": [[0, 1, 1]]},
    ],
)
def test_calibration_of_another_shape_is_refused(calibrated: Path, calibration: Any, tmp_path: Path) -> None:
    score = {"calibration": calibration, "constrain": "schema", "examples": 9}
    replace(Manifest.read(calibrated), jobs=(score,)).write(tmp_path)
    with pytest.raises(ArtefactError, match="is incomplete: "):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("cut", [0, 14])
def test_text_before_a_refused_call_is_not_shown(cut: int) -> None:
    calibration = Calibration([(0.0, 0.1), (1.0, 0.9)], [(0.99, 0.2, 0.01), (0.0, 0.9, 0.5)])
    text = "I lock it now.<call>lock:{}</call>"
    other = ASKED.replace("lock", "open")
    for (least, asked, is_agreed), expected in {
        (0.99, "", False): ASKED,
        (0.99, other, True): ASKED,
        (0.5, other, True): ASKED,  # sure, and not what the user said yes to
        (0.99, ASKED, True): "",
        (0.5, ASKED, False): UNSURE,  # sure, and the user said no
        (0.5, other, False): "",
        (0.0, "", False): "",
    }.items():
        stats = GenerationStats(log_probability=-0.5, chosen_tokens=1, finish_reason="stop")
        calls = CallReader(ToolFormat("<call>", ":", "", "</call>"))
        reader = CautiousReader(calls, stats, calibration, least, asked, is_agreed)
        events = reader.push(text[:cut]) + reader.push(text[cut:]) + reader.finish()
        shown = [TextEvent(expected)] if expected else [TextEvent("I lock it now."), CallEvent(0, "lock")]
        assert (events[:2], reader.num_calls) == (shown, 0 if expected else 1)


def test_question_names_the_calls_and_their_values() -> None:
    given = ['{"name":"Attic","domain":["light"],"level":5,"area":[]}', "{}"]
    events = [
        each for index, text in enumerate(given) for each in (CallEvent(index, "turnOn"), ArgumentsEvent(index, text))
    ]
    assert question(events).endswith(" turn on (name Attic, domain light, level 5, area none) and turn on?")
    assert question([*events, CallEvent(2, "cut")]) == UNSURE


@pytest.mark.parametrize("answer", [" Yes, please!", "ok", "yes  please", "YES."])
def test_a_yes_to_questions_of_the_server_answers_their_request_again(answer: str) -> None:
    other = ASKED.replace("lock", "open")
    turns = [("user", "Lock it"), ("assistant", ASKED), ("user", answer)]
    assert reply_to(turns) == (ASKED, 2)
    assert reply_to([*turns, ("assistant", other), ("user", "Yes")]) == (other, 4)
    assert reply_to([*turns[:2], ("user", "No"), ("assistant", other), ("user", "Yes")]) == (other, 2)
    assert reply_to([("system", "Lock it"), *turns[1:]]) == ("", 0)
    assert reply_to([turns[0], ("assistant", "Is it cold?"), turns[2]]) == ("", 0)


@pytest.mark.parametrize("answer", ["no", "yes 21", "Yes?", "yes ❌", "ok, the other", "не yes", ""])
def test_other_replies_agree_to_nothing(answer: str) -> None:
    assert reply_to([("user", "Lock it"), ("assistant", ASKED), ("user", answer)]) == (ASKED, 0)


def reply_to(turns: list[tuple[str, str]]) -> tuple[str, int]:
    return reply_to_question([{"role": role, "content": text} for role, text in turns])
