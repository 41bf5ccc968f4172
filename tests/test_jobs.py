"""Scores of a job: metrics, and `efficientllm-eval --task` on checkpoints and exported files."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from training import ERRORS

from efficientllm.export import cli as export_cli
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import DataError, EfficientLLMError, UsageError
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.contract_text import job_rows, with_jobs
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import ToolUse, chat_prompt, tool_prompt
from efficientllm.runtime.tool_format import LEARNED_MARK
from efficientllm.server.schemas.messages import ResponseFormat
from efficientllm.train.checkpoint.run_folder import foreign_files
from efficientllm.train.data.chat import Chat
from efficientllm.train.evaluation import cli, jobs
from efficientllm.train.evaluation.evaluate import Evaluation
from efficientllm.train.evaluation.job_metrics import Example, calls_in, macro_f1, metric_named
from efficientllm.train.evaluation.job_score import stored_scores
from efficientllm.train.evaluation.jobs import JobResult, read_examples
from efficientllm.train.evaluation.perplexity import Perplexity
from efficientllm.train.evaluation.scoring import EngineModel

CALL = {"name": "set_light", "arguments": {"area": "loft", "level": 3}}
LIGHT = {"type": "object", "properties": {"area": {"type": "string"}, "level": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "set_light", "parameters": LIGHT}}


def example(expected: str, **record: Any) -> Example:
    return Example(Chat.of(("user", "Hi"), ("assistant", expected)), record)


def called(*calls: dict[str, Any]) -> Example:
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}
    return Example(Chat(({"role": "user", "content": "Hi"}, message)), {})


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CALL),
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        json.dumps({"name": "set_light", "parameters": CALL["arguments"]}),
        f"[TOOL_CALLS]set_light{json.dumps(CALL['arguments'])}",
        f"Sure. {json.dumps(CALL)} Done {{not json}}.",
    ],
)
def test_calls_are_read_in_every_format_of_templates(text: str) -> None:
    assert calls_in(text) == [("set_light", {"area": "loft", "level": 3})]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('set_light {"level": 3}', [("set_light", {"level": 3})]),
        ('dim{"level": 3}', [("dim", {"level": 3})]),
        ('dim({"level": 3})', [("dim", {"level": 3})]),
        ('The level {"level": 3}', []),
        ('Contact {"name": "Bob"}', []),
        ('Then {"name": "set_light"}', [("set_light", {})]),
        ('{"name": "dim"}', [("dim", {})]),
    ],
)
def test_words_before_objects_are_functions_or_prose(text: str, found: list[tuple[str, dict[str, Any]]]) -> None:
    assert calls_in(text, {"set_light"}) == found


def test_a_call_is_compared_by_name_and_arguments() -> None:
    score = metric_named("call")
    right = score(json.dumps(CALL), called(CALL))
    assert right == pytest.approx(
        {"exact": 1, "function": 1, "argument_f1": 1, "valid": 1, "refused": math.nan}, nan_ok=True
    )
    near = score(json.dumps({"name": "set_light", "arguments": {"area": "attic", "level": 3}}), called(CALL))
    assert (near["exact"], near["function"], near["argument_f1"]) == (0, 1, 0.5)
    nothing = score("I cannot.", called(CALL))
    assert (nothing["exact"], nothing["valid"], nothing["argument_f1"]) == (0, 0, 0)


def test_missing_call_scores_no_argument() -> None:
    bare = {"name": "stop", "arguments": {}}
    found = [metric_named("call")(answer, called(bare))["argument_f1"] for answer in ("Sorry.", json.dumps(bare))]
    assert found == [0, 1]


def test_calls_may_be_expected_as_json_text() -> None:
    expected = example(json.dumps({"name": CALL["name"], "arguments": json.dumps(CALL["arguments"])}))
    for right in (expected.expected, json.dumps(CALL)):
        assert metric_named("call")(right, expected)["exact"] == 1
    other = {"name": CALL["name"], "arguments": {**CALL["arguments"], "level": True}}
    assert metric_named("call")(json.dumps(other), expected)["exact"] == 0


@pytest.mark.parametrize("metric", ["call", "json"])
def test_an_answer_that_only_opens_brackets_is_wrong(metric: str) -> None:
    assert next(iter(metric_named(metric)('{"a":' * 2000, example(json.dumps(CALL))).values())) == 0


def test_a_refusal_is_right_without_a_call() -> None:
    refusal = example("Sorry, I can only control the home.")
    assert metric_named("call")("No.", refusal)["refused"] == 1
    braces = Chat(example("I cannot {} do that.").chat.messages, (TOOL,))
    assert metric_named("call")("No.", Example(braces, {}))["refused"] == 1
    assert metric_named("call")(json.dumps(CALL), refusal)["refused"] == 0


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "value"),
    [
        ("exact", " a  b\n", "a b", 1),
        ("exact", "a", "b", 0),
        ("contains", "It is PARIS.", "Paris", 1),
        ("json", '{"b": 1, "a": 2}', '{"a": 2, "b": 1}', 1),
        ("json", "{", "{}", 0),
        ("call", 'turn_on {"name": "lamp"}', '{"name": "turn_on", "arguments": {"name": "lamp"}}', 1),
        ("call", '{"name": "now"}', '{"name": "now", "arguments": {}}', 1),
        ("call", 'Sure. {"name": "now"}', '{"name": "now", "arguments": {}}', 1),
        ("call", '{"name": "f", "arguments": {"x": 1}', "Sorry.", 1),  # cut before its end
        ("label", "Translate\nmore", "translate", 1),
    ],
)
def test_metrics_of_texts(metric: str, answer: str, expected: str, value: float) -> None:
    for record in ({}, {"references": ["another"]}):
        assert next(iter(metric_named(metric)(answer, example(expected, **record)).values())) == value


@pytest.mark.parametrize(("metric", "row", "reason"), [("json", {"completion": "{"}, "Expecting property name")])
def test_examples_that_a_metric_cannot_score_are_refused_before_a_model_is_loaded(
    metric: str, row: dict[str, Any], reason: str, tmp_path: Path, capsys: ERRORS
) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"prompt": "Which?", **row}), encoding="utf-8")
    (tmp_path / "no model").mkdir()
    flags = [f"--task={path}", f"--metric={metric}", f"--output={tmp_path}"]
    assert run_command(cli.body, [str(tmp_path / "no model"), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --metric {metric}: example 1 of --task cannot be scored: ")
    assert reason in said


SCHEMA_OF_ANSWERS = {"type": "object", "properties": {"a": {"enum": ["x", None]}}, "required": ["a"]}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {**SCHEMA_OF_ANSWERS, "additionalProperties": False}},
}
INEFFECTIVE = {
    "calls": (
        ["--metric", "call"],
        {},
        "--metric call: no example of --task has tools or expects a call; give --metric",
    ),
    "no form": (["--constrain", "schema"], {}, "has no effect: no example of --task has tools or a response_format"),
    "no tools": (["--constrain", "copy"], {"response_format": FORM}, "has no effect: no example of --task has tools"),
    "other form": (["--constrain", "schema"], {"response_format": {"type": "x"}}, "response_format must be {"),
    "other answer": (
        ["--constrain", "schema"],
        {"response_format": FORM, "completion": '{"a": "y"}'},
        """line 1 expects what its own grammar rejects: its response_format takes no 'y"}' after '{"a": "'""",
    ),
    "other call": (
        ["--constrain", "copy"],
        {
            "tools": [TOOL],
            "completion": [called({"name": "set_light", "arguments": {"level": 3, "area": "loft"}}).chat.messages[1]],
        },
        'rejects: set_light takes no , "area": "loft"} after {"level": 3',
    ),
    "other argument": (
        ["--constrain", "schema"],
        {"tools": [TOOL], "completion": [called({"name": "set_light", "arguments": {"lvl": 3}}).chat.messages[1]]},
        'rejects: set_light takes no argument "lvl"',
    ),
    "other function": (
        ["--constrain", "schema"],
        {"tools": [TOOL], "completion": [called({"name": "dim", "arguments": {}}).chat.messages[1]]},
        "rejects: dim is none of its tools",
    ),
    "no call": (["--metric", "call"], {"tools": [TOOL]}, "example 1 of --task: the expected answer is no call; write"),
    "bad schema": (
        ["--constrain", "schema"],
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "--constrain schema: example 1 of --task: json_schema: Invalid type: x",
    ),
}


@pytest.mark.parametrize("case", INEFFECTIVE)
def test_a_metric_or_constraint_without_effect_is_refused(
    case: str, artefact: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    flags, fields, reason = INEFFECTIVE[case]
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"prompt": "Which?", "completion": '{"a": "x"}', **fields}), encoding="utf-8")
    assert run_command(cli.body, [str(artefact), f"--task={path}", f"--output={tmp_path}", *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert reason in said


def test_answers_follow_the_response_format_of_their_example(artefact: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "test.jsonl", tmp_path / "out"
    record = {"prompt": "Which?", "completion": '{"a": "x"}'}
    rows = [{**record, "response_format": FORM}, {**record, "response_format": FORM, "tools": [TOOL]}, record]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = [str(artefact), "--task", str(path), "--task-tokens", "32", "--threads", "1", "--output", str(output)]
    assert run_command(cli.body, [*arguments, "--metric", "json", "--constrain", "schema"]) == 0
    (found,) = json.loads((output / "results.json").read_text())["evaluations"]
    *formed, free = found["job"]["answers"]
    # a model without a format of calls may name the function, and the grammar leaves no third way
    assert all(json.loads(answer) in ({"a": "x"}, {"a": None}) or "set_light" in answer for answer in formed)
    assert json.loads(formed[0])["a"] in ("x", None)
    assert found["job"]["values"]["valid_json"][0] == 1
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(free)


@pytest.mark.parametrize(
    ("answer", "expected", "values"),
    [
        ('{"b": 2, "a": 1}', {"a": 1, "b": 2}, (1, 1, 1)),
        ('{"a": 1, "b": 3, "c": 4}', {"a": 1, "b": 2}, (0, 2 / 5, 1)),
        ('{"a": 1.0}', {"a": 1}, (1, 1, 1)),
        ('{"a": true}', {"a": 1}, (0, 0, 1)),
        ('{"a": NaN}', {"a": 1}, (0, 0, 0)),
        ("[1]", {"a": 1}, (0, 0, 1)),
        ("null", {"a": 1}, (0, 0, 1)),
        ("{", {"a": 1}, (0, 0, 0)),
        ("[" * 100_000, {"a": 1}, (0, 0, 0)),
        ("[1, 2]", [1, 2], (1, math.nan, 1)),
        ("{}", {}, (1, math.nan, 1)),
    ],
)
def test_json_is_compared_as_a_value_and_by_fields(answer: str, expected: Any, values: tuple[float, ...]) -> None:
    found = metric_named("json")(answer, example(json.dumps(expected)))
    assert list(found) == ["exact", "field_f1", "valid_json"]
    assert tuple(found.values()) == pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize("metric", ["chrf", "rouge"])
def test_metrics_of_libraries_take_the_best_reference(metric: str) -> None:
    pytest.importorskip("sacrebleu" if metric == "chrf" else "rouge_score")
    score = metric_named(metric)
    several = example("", references=["a green lamp", "the lamp is green"])
    (right,), (wrong,) = (score(text, several).values() for text in ("the lamp is green", "nothing of it"))
    assert right > 0.99
    assert wrong < 0.5


def test_macro_f1_gives_rare_labels_the_same_weight() -> None:
    expected, answers = ["a", "a", "a", "b"], ["A", "a\nmore", "b", "x"]
    # a: 2 right of 3 expected and 2 given, b: none right
    assert macro_f1(expected, answers) == pytest.approx((2 * 2 / 5 + 0) / 2)
    everything = pytest.importorskip("sklearn.metrics")
    given = ["a", "a", "b", "a"]
    assert macro_f1(expected, given) == pytest.approx(everything.f1_score(expected, given, average="macro"))


def test_a_metric_may_be_a_function_of_a_module() -> None:
    assert metric_named("python:operator:eq")("x", example("y")) == {"eq": 0.0}
    for name in ("bleu", "python:no_module_of_this_name:f", "python:json:nothing", "python::f", "python:.json:f"):
        with pytest.raises(UsageError, match=re.escape(f"--metric {name}: ")):
            metric_named(name)


def test_a_metric_may_lie_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metric_of_this_folder.py").write_text("def half(answer, record):\n    return 0.5\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.chdir(tmp_path)
    assert metric_named("python:metric_of_this_folder:half")("x", example("y")) == {"half": 0.5}


def test_errors_are_bootstrapped_and_differences_are_paired() -> None:
    first = JobResult("exact", {"exact": [0.0, 1.0] * 50}, [""] * 100, 1, 1)
    other = JobResult("exact", {"exact": [1.0, 1.0] + [0.0, 1.0] * 49}, [""] * 100, 1, 1)
    assert first.stderr("exact") == pytest.approx(0.05, rel=0.1)
    difference, error = first.difference(other, "exact")
    assert difference == pytest.approx(0.01)
    assert error < 0.02
    assert JobResult.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_values_that_apply_to_no_example_are_not_shown() -> None:
    job = JobResult("call", {"exact": [1.0], "refused": [math.nan]}, ["x"], 1, 1)
    evaluation = Evaluation("model", "", {"m": Perplexity(9.0, 1.0, 9, 9, 1, math.nan)}, {}, None, job)
    stored = Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict(), allow_nan=False)))
    assert stored.job is not None
    assert math.isnan(stored.job.mean("refused"))
    assert math.isnan(stored.perplexity["m"].stderr)
    names = [row[0] for row in cli.rows([Evaluation("model", "", {}, {}, None, job)])]
    assert names == ["measure", "job, exact", "tokens per answer", "ms per answer"]


def test_a_model_of_a_run_has_the_name_of_the_run() -> None:
    job = JobResult("exact", {"exact": [1.0]}, ["x"], 1, 1)
    models = ("runs/job/model", "job.gguf", "model")
    names = [cli.rows([Evaluation(model, "", {}, {}, None, job)])[0][-1] for model in models]
    assert names == ["job", "job.gguf", "model"]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Turn on lamp {index}"}, {"role": "assistant", "content": "ok"}]}
        for index in range(3)
    ]
    rows += [{"messages": [{"role": "user", "content": "Light"}, called(CALL).chat.messages[1]], "tools": [TOOL]}]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "file", "schema", "copy"])
def test_a_job_is_scored_on_checkpoints_and_files(
    kind: str, task: Path, artefact: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    model = artefact.parent / "checkpoint" if kind == "checkpoint" else artefact
    arguments = [str(model), "--task", str(task), "--metric", "call", "--task-tokens", "8", "--threads", "1"]
    arguments += ["--constrain", kind] if kind in ("schema", "copy") else []
    assert run_command(cli.body, [*arguments, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "job, exact" in shown
    assert re.search(r"job, exact of no call +3 examples", shown)
    assert re.search(r"job, exact of set_light +1 examples", shown)
    assert "macro F1" not in shown
    assert "perplexity" not in shown
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    assert len(found["job"]["answers"]) == 4
    assert found["job"]["scores"]["exact"]["mean"] <= 1
    (page,) = (tmp_path / "out").glob("misses-1-*.md")
    assert "# Misses of" in page.read_text()


def test_answers_are_kept_when_an_evaluation_ends_early(
    task: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    """Interrupt one by a signal, and end one by a metric that cannot score an answer."""
    output, answer, asked = tmp_path / "out", EngineModel.answer, []
    command = [str(artefact), "--task", str(task), "--metric", "python:of_these_answers:measure"]
    command += ["--task-tokens", "4", "--threads", "1", "--output", str(output)]
    module = tmp_path / "of_these_answers.py"
    monkeypatch.syspath_prepend(tmp_path)

    def interrupted(self: EngineModel, prompts: Any, max_tokens: int) -> Any:
        for text in answer(self, prompts, max_tokens):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(text)
            yield text

    monkeypatch.setattr(EngineModel, "answer", interrupted)
    task.write_text("\n".join(task.read_text(encoding="utf-8").splitlines()[:3]), encoding="utf-8")
    module.write_text("def measure(answer, record): return {'ok': 1.0}[answer]", encoding="utf-8")
    assert run_command(cli.body, command) == 130
    assert len(asked) == 2
    monkeypatch.setattr(EngineModel, "answer", lambda self, prompts, limit: map(count, answer(self, prompts, limit)))

    def count(text: str) -> str:
        asked.append(text)
        return text

    assert run_command(cli.body, command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: --metric python:of_these_answers:measure: the answer to example 1 of --task cannot")
    assert len(asked) == 3  # two of them were kept
    command[command.index("--metric") + 1] = "contains"
    somebodys = output / "my-answers.jsonl"
    somebodys.touch()
    assert run_command(cli.body, command) == 0
    assert somebodys.exists()
    assert len(asked) == 3
    (found,) = json.loads((output / "results.json").read_text())["evaluations"]
    assert found["job"]["answers"] == asked
    assert run_command(cli.body, command) == 0  # a finished evaluation leaves none
    assert len(asked) == 6


def test_schemas_are_enforced_as_by_the_server(artefact: Path, tmp_path: Path, capsys: ERRORS) -> None:
    """A keyword that cannot be enforced is ignored if the function is not strict."""
    path = tmp_path / "test.jsonl"
    message = called(CALL).chat.messages[1]
    for strict in (False, True):
        parameters = {**LIGHT, "properties": {**LIGHT["properties"], "a": {"type": "array", "uniqueItems": True}}}
        tool = {"type": "function", "function": {"name": "set_light", "parameters": parameters, "strict": strict}}
        chat = {"messages": [{"role": "user", "content": "Light"}, message], "tools": [tool]}
        path.write_text(json.dumps(chat), encoding="utf-8")
        arguments = ["--metric", "call", "--constrain", "schema", "--task-tokens", "4", "--threads", "1"]
        command = [str(artefact), "--task", str(path), *arguments, "--output", str(tmp_path / "out")]
        assert run_command(cli.body, command) == (2 if strict else 0)
    assert "error: --task: example 1: tool 'set_light'" in capsys.readouterr().err


@pytest.mark.parametrize("strict", [False, True])
def test_response_format_is_enforced_as_by_the_server(strict: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}
    asked = [example(answer, response_format=form) for answer in ('{"a": [1]}', '{"b": 1}')]
    assert asked[0].schema == ResponseFormat.model_validate(form).answer_schema()
    with contextlib.nullcontext() if not strict else pytest.raises(DataError, match="`uniqueItems` cannot be enforced"):
        jobs.check_examples(asked[:1], "json", "schema")
    with pytest.raises(DataError, match="cannot be enforced" if strict else "its response_format takes no 'b"):
        jobs.check_examples(asked[1:], "json", "schema")


def test_two_models_are_compared_example_by_example(task: Path, artefact: Path, tmp_path: Path, capsys: ERRORS) -> None:
    models = [str(artefact), "--compare", str(artefact.parent / "checkpoint")]
    limits = ["--metric", "label", "--task-tokens", "4", "--task-limit", "2", "--threads", "1"]
    assert run_command(cli.body, [*models, "--task", str(task), *limits, "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("job, accuracy"))
    assert "2 examples" in row
    assert [line.split()[-2:] for line in lines if line.startswith("job, macro F1")] == [["0.000", "0.000"]]
    assert "(+0.000 ± 0.000)" in row


@pytest.mark.parametrize("kind", ["checkpoint", "artefact"])
def test_an_example_beyond_the_context_is_named(
    kind: str, task: Path, artefact: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    asked = {"role": "user", "content": "Turn on lamp 1. " * 2000}
    long = {"messages": [asked, {"role": "assistant", "content": "ok"}]}
    path = tmp_path / "long.jsonl"
    path.write_bytes(task.read_bytes() + b"\n" + json.dumps(long).encode())
    model = artefact.parent / "checkpoint" if kind == "checkpoint" else artefact
    limits = ["--metric", "exact", "--task-tokens", "4", "--threads", "1"]
    assert run_command(cli.body, [str(model), "--task", str(path), *limits, "--output", str(tmp_path / "out")]) == 2
    assert "--task: example 5 has" in capsys.readouterr().err


def test_the_page_of_misses_shows_request_expected_and_answer(task: Path) -> None:
    examples = read_examples(task)
    result = JobResult("exact", {"exact": [1.0, 0.0, 1.0, 1.0]}, ["ok", "no", "ok", "ok"], 1, 1)
    page = jobs.misses_page("model", examples, result)
    assert "## Example 2: 0.00" in page
    assert all(text in page for text in ("    Turn on lamp 1", "    ok", "    no"))
    assert "Example 1:" not in page


def conversation(tmp_path: Path) -> Path:
    """A file with one conversation: a call, its result, an answer, and an answer that is not learned."""
    lamp = {"type": "function", "function": {"name": "turn_on", "arguments": {"name": "Lamp"}}}
    messages = [
        {"role": "system", "content": "Lamps: Lamp" + "." * 5000 + "the end"},
        {"role": "user", "content": "Turn it on"},
        {"role": "assistant", "content": None, "tool_calls": [lamp]},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Hm.", "weight": 0},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Good night."},
    ]
    path = tmp_path / "conversation.jsonl"
    path.write_text(json.dumps({"messages": messages, "references": ["Good night.", "Bye."]}), encoding="utf-8")
    return path


def test_each_learned_answer_of_a_conversation_is_an_example(tmp_path: Path) -> None:
    examples = read_examples(conversation(tmp_path))
    assert [each.expected for each in examples] == [
        '{"name": "turn_on", "arguments": {"name": "Lamp"}}',
        "Done.",
        "Good night.",
    ]
    assert [len(each.prompt.messages) for each in examples] == [2, 4, 8]
    assert [each.references[-1] for each in examples] == [examples[0].expected, "Done.", "Bye."]
    assert [each.expected for each in read_examples(conversation(tmp_path), 2)] == [examples[0].expected, "Done."]
    after_result = metric_named("call")
    assert after_result("done.", examples[1]) == {"exact": 1, "function": 1, "after_result": 1}
    assert after_result("It failed.", examples[1])["exact"] == 0
    assert after_result(examples[0].expected, examples[1])["function"] == 0
    assert "after_result" not in after_result("Good night.", examples[2])


def test_the_page_of_misses_shows_the_context(tmp_path: Path) -> None:
    examples = read_examples(conversation(tmp_path))
    result = JobResult("call", {"exact": [1.0, 1.0, 0.0]}, ["", "", "no"], 1, 1)
    page = jobs.misses_page("model", examples, result)
    context = page.partition("context:")[2].partition("request:")[0]
    assert "    system: Lamps: Lamp..." in context
    assert "... ..." in context
    assert "the end\n    user: Turn it on\n    assistant: {" in context
    assert "    tool: ok\n" in context
    assert len(context) < 5000


BAD = {
    "not a file": (None, "no such file"),
    "only an answer": ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1 has no message before its ans"),
    "not JSON": ("{", "line 1 is not JSON"),
    "a text": ('{"text": "a"}', "line 1 does not end with an answer of the assistant"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "line 1 has no answer to learn"),
    "nothing": ("\n", "the file has no examples"),
    "deep": ("[" * 100_000, "line 1 is not JSON"),
    "references as a text": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "references": "b"}',
        "line 1: references must be a list of texts",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_examples_give_one_line(case: str, tmp_path: Path) -> None:
    content, reason = BAD[case]
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(EfficientLLMError, match=re.escape(reason)) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"--task {path}: ")
    assert isinstance(caught.value, UsageError | DataError)


def test_cut_archive_gives_one_line(task: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(task.read_bytes())[:-6])
    with pytest.raises(DataError, match=re.escape(f"--task {path}: cannot be read")):
        read_examples(path)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("lambda answer, record: record['missing']", "KeyError('missing')"),
        ("lambda answer, record: None", "TypeError"),
        ("lambda answer, record: float('nan')", "no example of --task has a score"),
    ],
)
def test_failing_metric_gives_one_line(
    metric: str, reason: str, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric.py").write_text(f"measure = {metric}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metric", raising=False)
    with pytest.raises(DataError, match=re.escape(reason)):
        jobs.check_examples(read_examples(task), "python:own_metric:measure")


def test_copied_texts_of_a_model_that_knows_its_functions(artefact: Path) -> None:
    text = {"type": "string"}
    parameters = {"type": "object", "properties": {"area": text, "name": text}, "required": ["area", "name"]}
    tool = {"type": "function", "function": {"name": "set_light", "parameters": parameters}}
    model = EngineModel(artefact, EngineOptions(threads=1))
    model.engine.chat_template = LEARNED_MARK + str(model.chat_template)
    chat = [{"role": "user", "content": "Light the Loft lamp"}]
    prompt = tool_prompt(model.engine, chat, ToolUse([tool], must_call=True, arguments="copy"))
    assert prompt.tokens == chat_prompt(model.engine, chat)  # it does not describe the function
    limits = AnswerOptions(max_tokens=200)
    call = json.loads("".join(Generation(model.engine, prompt.tokens, limits, prompt.constraint(model.engine))))
    assert call["arguments"].keys() == {"area", "name"}
    assert all(value.casefold() in "light the loft lamp" for value in call["arguments"].values())


def test_a_score_travels_to_cards_manifests_and_pages(
    task: Path, straight: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    """From a checkpoint through its export to the hub's folder and the page of results."""
    model, artefact = tmp_path / "model", tmp_path / "small"
    shutil.copytree(straight / "model", model)
    score = ["--task", str(task), "--metric", "contains", "--task-tokens", "4", "--threads", "1", "--write"]
    score += ["--output", str(tmp_path / "out")]
    for _ in range(2):  # the second one replaces the first
        assert run_command(cli.body, [str(model), *score]) == 0
    assert set(foreign_files(tmp_path)) == {"out", task.name}  # --overwrite of the run may delete the score
    (stored,) = stored_scores(model)
    digest = hashlib.sha256(task.read_bytes()).hexdigest()
    assert (stored["task"], stored["task_sha256"], stored["examples"]) == ("test.jsonl", digest, 4)
    assert stored["source"] is None
    card = (model / "README.md").read_text(encoding="utf-8")
    assert card.count(f"| test.jsonl ({digest[:12]}) | contains: contains | 4 | 0.") == card.count("## Jobs") == 1
    assert card.partition("## Licence")[2] == (straight / "model/README.md").read_text().partition("## Licence")[2]

    settings = ["--target", "gguf", "--quantize", "f32", "--no-verify", "--output", str(artefact)]
    assert run_command(export_cli.body, [str(model), *settings]) == 0
    assert Manifest.read(artefact).jobs == [stored]
    assert run_command(cli.body, [str(model), "--compare", str(artefact), *score]) == 0
    assert stored_scores(model) == [stored]  # the source of a comparison is only compared with
    _, own = Manifest.read(artefact).jobs
    assert own["measured_on"].startswith("llama.cpp f32, 1 threads of ")
    assert own["source"]["model"] == "model"
    assert own["source"]["difference"] == own["values"]["contains"]["mean"] - stored["values"]["contains"]["mean"]
    Artefact.open(artefact).verify()
    assert run_command(export_cli.body, [str(model), *settings, "--overwrite"]) == 0  # nothing in it is foreign
    assert Manifest.read(artefact).jobs == [stored]

    # fewer examples replace no score of more
    assert run_command(cli.body, [str(model), *score, "--task-limit", "2"]) == 0
    assert [each["examples"] for each in stored_scores(model)] == [4, 2]


def test_a_score_needs_a_folder_and_a_job(task: Path, artefact: Path, tmp_path: Path, capsys: ERRORS) -> None:
    assert run_command(cli.body, [str(artefact), "--metric", "call", f"--output={tmp_path}"]) == 2
    assert "--task: missing; give the examples that --metric" in capsys.readouterr().err
    assert run_command(cli.body, [str(artefact), "--write", f"--output={tmp_path}"]) == 2
    assert "--write stores the score of a job; give --task" in capsys.readouterr().err
    (file,) = artefact.glob("*.gguf")
    assert run_command(cli.body, [str(file), "--task", str(task), "--write", f"--output={tmp_path}"]) == 2
    assert "is no model folder and no folder written by efficientllm-export" in capsys.readouterr().err


def test_one_example_has_no_error_and_a_card_of_others_stays() -> None:
    score = {"task": "a.jsonl", "task_sha256": "0" * 64, "metric": "call", "constrain": "copy", "examples": 1}
    score |= {"score": "exact", "values": {"exact": {"mean": 1.0, "stderr": None}}, "source": None}
    score |= {"ms_per_answer": 7.4, "tokens_per_answer": 9.0, "measured_on": "torch float32, 2 threads of a CPU"}
    _, row = job_rows([score])
    assert row[1:6] == ["call, copy: exact", "1", "1.000", "unknown", "7"]
    assert with_jobs("# A card\n", [score]) == "# A card\n"


def test_constraints_need_an_exported_file(task: Path, artefact: Path, capsys: ERRORS) -> None:
    arguments = [str(artefact.parent / "checkpoint"), "--task", str(task), "--constrain", "copy"]
    assert run_command(cli.body, [*arguments, "--output", str(task.parent / "out")]) == 2
    assert "--constrain copy needs an exported file" in capsys.readouterr().err
