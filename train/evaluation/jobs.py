"""Score a model's answers on the held-out examples of a job: calls, labels, JSON, SQL or text.

An example is a chat whose last answer is expected. The model answers greedily after the messages before it. A metric
returns one or more values in [0, 1] for an answer; the first one is its score.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import re
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...runtime.base.errors import ContextOverflowError, DataError, UsageError
from ...runtime.base.extras import extra
from ...runtime.tool_format import tool_format
from ..data.chat import Chat, ChatFormat
from ..data.records import BadLines, ReadContext, document_of
from .scoring import Advance, EngineModel, EvaluatedModel
from .sql import gives_same_rows, has_database, normalised

BOOTSTRAP_SAMPLES = 1000
"""Resamplings of the examples for a standard error."""

WORST = 20
"""Missed examples on the page of misses."""

Constrain = Literal["none", "schema", "copy", "examples"]
"""Grammar of calls: none, the functions and their schemas, or in addition texts that are copied from the request, or
those examples of their schemas that occur in it."""

Values = dict[str, float]
"""{name: value in [0, 1]}; NaN if the value does not apply to the example."""


@dataclass(frozen=True)
class Example:
    """A held-out example of a job."""

    chat: Chat
    """The conversation with the expected answer as its last message."""
    record: Mapping[str, Any]
    """The whole record, for metrics that read further fields."""

    @property
    def expected(self) -> str:
        """Return the expected answer as text. Calls are JSON."""
        message = self.chat.messages[-1]
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        texts = [message["content"]] if message["content"] else []
        return "\n".join([*texts, *calls])

    @property
    def references(self) -> list[str]:
        """Return all right answers: the field `references`, or the expected answer."""
        return list(self.record.get("references") or [self.expected])

    @property
    def prompt(self) -> Chat:
        """Return the conversation before the expected answer."""
        return Chat(self.chat.messages[:-1], self.chat.tools)


def read_examples(path: Path, limit: int = 0, database: str = "") -> list[Example]:
    """Read the examples of a .jsonl or .jsonl.gz file, at most `limit` (0: all).

    A record's `database` is relative to the file's folder. `database` is that of records without one.
    Raises UsageError for a missing file or another kind of file, and DataError for a malformed record.
    """
    if not path.is_file() or not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise UsageError(f"--task {path}: give a .jsonl or .jsonl.gz file of chats")
    context = ReadContext(str(path), "text", BadLines(0, flag="--task"), "--task")
    examples: list[Example] = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            chat = document_of(context, record, f"line {number}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"--task {path}: line {number} is not JSON: {error}") from error
        if not isinstance(chat, Chat) or chat.messages[-1]["role"] != "assistant":
            raise DataError(f"--task {path}: line {number} does not end with an answer of the assistant")
        references = record.get("references") or []
        if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
            raise DataError(f"--task {path}: line {number}: references must be a list of texts")
        if record.get("database"):
            record["database"] = str(path.parent / str(record["database"]))
        elif database and not record.get("schema"):
            record["database"] = database
        examples.append(Example(chat, record))
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(f"--task {path}: the file has no examples")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of a file. Raises DataError if it cannot be read."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            yield from enumerate(stream, 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"--task {path}: cannot be read: {error}") from error


def calls_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the (name, arguments) of all calls in an answer.

    A call is a JSON object with a name and arguments (or parameters), or a name before a JSON object, as templates
    write them. Other objects are ignored.
    """
    decoder = json.JSONDecoder()
    found: list[tuple[str, dict[str, Any]]] = []
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position = text.find("{", position + 1)
            continue
        if isinstance(value, dict):
            arguments = value.get("arguments", value.get("parameters"))
            if isinstance(value.get("name"), str) and isinstance(arguments, dict | None):
                found.append((value["name"], arguments or {}))
            elif name := re.search(r"([A-Za-z_][\w.-]*)\W*$", text[:position]):
                found.append((name[1], value))
        position = text.find("{", end)
    return found


def _normalised(text: str) -> str:
    return " ".join(text.split())


def exact(answer: str, example: Example) -> Values:
    """Return 1 if the answer equals a reference except for white space."""
    return {"exact": float(_normalised(answer) in map(_normalised, example.references))}


def contains(answer: str, example: Example) -> Values:
    """Return 1 if the answer contains a reference, ignoring case and white space."""
    text = _normalised(answer).casefold()
    return {"contains": float(any(_normalised(each).casefold() in text for each in example.references))}


def json_value(answer: str, example: Example) -> Values:
    """Return whether the answer is the expected JSON value, and whether it is JSON."""
    expected = json.loads(example.expected)
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):  # an answer that repeats itself has thousands of brackets
        return {"exact": 0.0, "valid_json": 0.0}
    return {"exact": float(value == expected), "valid_json": 1.0}


def call(answer: str, example: Example) -> Values:
    """Compare calls: exact match, function names, F1 of the arguments, and whether a call can be read.

    An example without a call expects a refusal, which is right if the answer has no call.
    """
    expected, found = calls_in(example.expected), calls_in(answer)
    if not expected:
        refused = float(not found)
        return {"exact": refused, "function": refused, "argument_f1": math.nan, "valid": math.nan, "refused": refused}
    wanted, given = (Counter(_arguments(calls)) for calls in (expected, found))
    shared, total = (wanted & given).total(), wanted.total() + given.total()
    return {
        "exact": float(expected == found),
        "function": float([name for name, _ in expected] == [name for name, _ in found]),
        "argument_f1": 2 * shared / total if total else float(bool(found)),
        "valid": float(bool(found)),
        "refused": math.nan,
    }


def _arguments(calls: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    for _, arguments in calls:
        for name, value in arguments.items():
            yield name, json.dumps(value, sort_keys=True)


def label(answer: str, example: Example) -> Values:
    """Return 1 if the first line of the answer is the expected label, ignoring case."""
    return {"accuracy": float(_label(answer) == _label(example.expected))}


def _label(answer: str) -> str:
    lines = answer.strip().splitlines()
    return _normalised(lines[0] if lines else "").casefold()


def macro_f1(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean over all expected labels of the F1 of each label."""
    pairs = [(_label(one), _label(other)) for one, other in zip(expected, answers, strict=True)]
    right = Counter(one for one, other in pairs if one == other)
    wanted, given = (Counter(label) for label in zip(*pairs, strict=True))
    return statistics.fmean(2 * right[label] / (wanted[label] + given[label]) for label in wanted)


def sql(answer: str, example: Example) -> Values:
    """Return whether the query gives the rows of the expected one, if there is a database, and whether it is the same.

    White space and case outside quotes do not count.
    """
    exact = float(normalised(answer) == normalised(example.expected))
    if not has_database(example.record):
        return {"exact": exact}
    return {"execution": float(gives_same_rows(answer, example.expected, example.record)), "exact": exact}


def chrf(answer: str, example: Example) -> Values:
    """Return chrF (Popovic 2015) against all references, by sacrebleu."""
    with extra("eval", "sacrebleu"):
        import sacrebleu
    return {"chrf": sacrebleu.sentence_chrf(answer, example.references).score / 100}


def rouge(answer: str, example: Example) -> Values:
    """Return the F-measure of ROUGE-L (Lin 2004) against the best reference, by rouge-score."""
    with extra("eval", "rouge-score"):
        from rouge_score import rouge_scorer
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return {"rouge_l": max(scorer.score(each, answer)["rougeL"].fmeasure for each in example.references)}


Metric = Callable[[str, Example], Values]
METRICS: dict[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "json": json_value,
    "call": call,
    "label": label,
    "sql": sql,
    "chrf": chrf,
    "rouge": rouge,
}
"""Values of `--metric`, besides python:MODULE:FUNCTION."""


def metric_named(name: str) -> Metric:
    """Return a metric of METRICS, or a function (answer, record) -> number of an importable module.

    Raises UsageError with the known names.
    """
    if name in METRICS:
        return METRICS[name]
    kind, _, target = name.partition(":")
    module, _, function = target.partition(":")
    if kind != "python" or not function:
        raise UsageError(f"--metric {name}: known are {', '.join(METRICS)} and python:MODULE:FUNCTION")
    try:
        score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--metric {name}: cannot be imported: {error}") from error
    return lambda answer, example: {function: float(score(answer, dict(example.record)))}


def check_examples(examples: Sequence[Example], metric: str) -> None:
    """Score the expected answers. Raises UsageError, or DataError if an example or all of them have no score."""
    score = metric_named(metric)
    scores = []
    for number, example in enumerate(examples, 1):
        try:
            scores.append(next(iter(score(example.expected, example).values())))
        except UsageError:
            raise
        except Exception as error:  # a metric of the user's may raise anything
            reason = str(error) if isinstance(error, ValueError | DataError) else repr(error)
            raise DataError(f"--metric {metric}: example {number} of --task cannot be scored: {reason}") from error
    if all(map(math.isnan, scores)):
        raise DataError(f"--metric {metric}: no example of --task has a score")


@dataclass(frozen=True)
class JobResult:
    """Answers of one model to the examples of a job, with their values."""

    metric: str
    values: dict[str, list[float]]
    """{name: value of each example}, the score first."""
    answers: list[str]
    tokens_per_answer: float
    ms_per_answer: float
    """Elapsed time, of a batch divided by its answers for a Hugging Face folder."""
    whole: dict[str, float] = field(default_factory=dict)
    """{name: value of all answers together}, such as the macro F1 of labels."""

    @property
    def score_name(self) -> str:
        return next(iter(self.values))

    def mean(self, name: str) -> float:
        """Return the mean over the examples to which the value applies."""
        values = self.values[name]
        if np.all(np.isnan(values)):  # nanmean would warn
            return math.nan
        return float(np.nanmean(values))

    def stderr(self, name: str) -> float:
        """Return the bootstrap standard error of the mean."""
        return bootstrap_error(self.values[name])

    def difference(self, other: JobResult, name: str) -> tuple[float, float]:
        """Return the mean of other - self, paired by example, and its bootstrap standard error."""
        # example by example: what is hard for both models then adds nothing to the error
        pairs = np.subtract(other.values[name], self.values[name])
        return float(np.nanmean(pairs)), bootstrap_error(pairs)

    def to_dict(self) -> dict[str, Any]:
        means = {name: {"mean": self.mean(name), "stderr": self.stderr(name)} for name in self.values}
        return {**asdict(self), "scores": means}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> JobResult:
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


def bootstrap_error(values: Sequence[float] | np.ndarray) -> float:
    """Return the standard deviation of the mean over seeded resamplings; NaN for fewer than two values."""
    known = np.asarray(values)[~np.isnan(values)]
    if len(known) < 2:
        return math.nan
    draws = np.random.default_rng(0).integers(len(known), size=(BOOTSTRAP_SAMPLES, len(known)))
    return float(known[draws].mean(axis=1).std(ddof=1))


def run_job(
    model: EvaluatedModel,
    examples: Sequence[Example],
    metric: str,
    *,
    max_tokens: int = 256,
    constrain: Constrain = "none",
    advance: Advance = lambda done, total: None,
) -> JobResult:
    """Answer all examples greedily and score the answers.

    With `constrain`, a grammar limits calls to the functions of each example, for engines only. Raises UsageError for a
    model without a chat template.
    """
    score = metric_named(metric)
    chat_format = ChatFormat.of(model.chat_template, model.bos_token, model.eos_token)
    if chat_format is None:
        raise UsageError("--task needs a model with a chat template")
    if constrain != "none" and not isinstance(model, EngineModel):
        raise UsageError(f"--constrain {constrain} needs an exported file; a Hugging Face folder answers freely")
    began = time.perf_counter()
    if constrain != "none" and isinstance(model, EngineModel):
        chats = [each.prompt for each in examples]
        answered = model.answer_with_tools(chats, "any" if constrain == "schema" else constrain, max_tokens)
    else:
        prompts = [model.encode_markup(chat_format.chat_prompt(each.prompt)) for each in examples]
        for number, prompt in enumerate(prompts, 1):
            if len(prompt) >= model.context_length:
                problem = f"has {len(prompt)} tokens before its answer, the context of the model {model.context_length}"
                raise DataError(f"--task: example {number} {problem}; shorten or remove it")
        answered = model.answer(prompts, max_tokens)
    written: list[str] = []
    try:
        for text in answered:
            written.append(text)
            advance(len(written), len(examples))
    except ContextOverflowError as error:
        raise DataError(f"--task: example {len(written) + 1}: {error}") from error
    elapsed_ms = 1e3 * (time.perf_counter() - began)
    tokens = sum(len(model.tokenize(text)) for text in written)
    format = tool_format(model.chat_template, model.bos_token, model.eos_token)
    answers = [format.plain(text) for text in written]
    found = [score(answer, example) for answer, example in zip(answers, examples, strict=True)]
    # in the order of the first example, whose first value is the score
    names = dict.fromkeys(name for each in found for name in each)
    values = {name: [each.get(name, math.nan) for each in found] for name in names}
    whole: dict[str, float] = {}
    if metric == "label":
        whole["macro F1"] = macro_f1([each.expected for each in examples], answers)
    return JobResult(metric, values, answers, tokens / len(answers), elapsed_ms / len(answers), whole)


def misses_page(name: str, examples: Sequence[Example], result: JobResult) -> str:
    """Return a Markdown page of the worst missed examples: request, expected answer and given answer."""
    score = result.score_name
    scores = result.values[score]
    missed = [index for index, value in enumerate(scores) if value < 1]
    worst = sorted(missed, key=lambda index: scores[index])[:WORST]
    lines = [
        f"# Misses of {name}",
        "",
        f"{score} {result.mean(score):.3f} on {len(examples)} examples (metric {result.metric}).",
    ]
    for index in worst:
        before = examples[index].chat.messages[:-1]
        fields = {
            "request": before[-1]["content"] if before else "",
            "expected": examples[index].expected,
            "answered": result.answers[index],
        }
        lines += ["", f"## Example {index + 1}: {scores[index]:.2f}"]
        for title, text in fields.items():
            indented = [f"    {line}" for line in (text or "(nothing)").splitlines()]
            lines += ["", f"{title}:", "", *indented]
    return "\n".join(lines) + "\n"
