"""Score a model's answers on the held-out examples of a job: calls, labels, JSON or text.

An example is a conversation up to an answer that is expected, one for each answer of a chat. The model answers greedily
after the messages before it.
"""

from __future__ import annotations

import gzip
import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...runtime.base.errors import ContextOverflowError, DataError, UsageError
from ...runtime.chat_template import Message
from ...runtime.engines.calibration import CONSTRAINTS
from ...runtime.grammar import Grammar
from ...runtime.tool_format import tool_format, why_not_called
from ..data.chat import Chat, ChatFormat
from ..data.documents import split_job
from ..data.records import BadLines, ReadContext, document_of
from .job_metrics import FORM, Example, Values, macro_f1, metric_named, text_of
from .scoring import Advance, EngineModel, EvaluatedModel, LineCache, cache_key

BOOTSTRAP_SAMPLES = 1000
"""Resamplings of the examples for a standard error."""

WORST = 20
"""Missed examples on the page of misses."""

SHOWN_CHARACTERS = 4000
"""Characters of an earlier message on that page, from its beginning and its end."""

NO_CALL = "no call"
"""Name of the function that a refusal calls, in tables."""

Constrain = Literal["none", "schema", "copy", "examples", "listed"]
"""Grammar of answers: none, the functions and the response format of the example, or in addition texts in arguments
that are copied from the request, those examples of their schemas that occur in it, or values that the conversation
lists."""


def read_examples(task: str | Path, limit: int = 0) -> list[Example]:
    """Read the examples of a .jsonl or .jsonl.gz file, or of FILE@JOB, at most `limit` (0: all).

    Each answer of a chat that is learned (see `Chat.is_learned`) is an example, with the messages before it.
    Raises UsageError for a missing file or another kind of file, and DataError for a malformed record.
    """
    name, job = split_job(str(task), "--task")
    path = Path(name)
    if not path.exists():
        raise UsageError(f"--task {path}: no such file")
    if not path.is_file() or not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise UsageError(f"--task {path}: give a .jsonl or .jsonl.gz file of chats")
    context = ReadContext(str(path), "text", BadLines(0, flag="--task"), "--task", job)
    examples: list[Example] = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            chat = document_of(context, record, f"line {number}")
        except UnicodeDecodeError as error:
            raise context.not_utf8(error, f"line {number} is ") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"--task {path}: line {number} is not JSON: {error}") from error
        if not isinstance(chat, Chat) or chat.messages[-1]["role"] != "assistant":
            raise DataError(f"--task {path}: line {number} does not end with an answer of the assistant")
        if len(chat.messages) < 2:
            raise DataError(f"--task {path}: line {number} has no message before its answer")
        references = record.get("references") or []
        if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
            raise DataError(f"--task {path}: line {number}: references must be a list of texts")
        examples += _examples(chat, record)
        if 0 < limit <= len(examples):
            del examples[limit:]
            break
    if not examples:
        raise DataError(f"--task {path}: the file has no examples")
    return examples


def _examples(chat: Chat, record: Mapping[str, Any]) -> list[Example]:
    """Return an example for each learned answer of a chat. `references` are those of the last one."""
    examples: list[Example] = []
    for index in filter(chat.is_learned, chat.answers):
        is_last = index == len(chat.messages) - 1
        before = replace(chat, messages=chat.messages[: index + 1])
        examples.append(Example(before, record if is_last else {**record, "references": None}))
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of a file. Raises DataError if it cannot be read."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            yield from enumerate(stream, 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"--task {path}: cannot be read: {error}") from error


def check_examples(examples: Sequence[Example], metric: str, constrain: Constrain = "none") -> None:
    """Score the expected answers, and compile the grammars of `constrain`.

    Raises UsageError for a metric or a constraint that has no effect on the examples, and DataError if an example or
    all of them have no score.
    """
    _check_calls(examples, metric, constrain)
    _scored(examples, [each.expected for each in examples], metric, "example")


def _scored(examples: Sequence[Example], answers: Sequence[str], metric: str, subject: str) -> list[Values]:
    """Return the values of each answer. Raises DataError if one, called `subject`, or all of them have no score."""
    score = metric_named(metric)
    found: list[Values] = []
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True), 1):
        try:
            found.append(score(answer, example))
        except UsageError:
            raise
        except Exception as error:  # a metric of the user's may raise anything
            reason = str(error) if isinstance(error, ValueError | DataError) else repr(error)
            raise DataError(f"--metric {metric}: {subject} {number} of --task cannot be scored: {reason}") from error
    if all(math.isnan(next(iter(each.values()))) for each in found):
        raise DataError(f"--metric {metric}: no example of --task has a score")
    return found


def _check_calls(examples: Sequence[Example], metric: str, constrain: Constrain) -> None:
    has_tools = any(each.chat.tools for each in examples)
    # a text without a call counts as a refusal, so that every answer would be right
    if metric == "call" and not has_tools and not any(each.calls for each in examples):
        remedy = "give --metric json for answers in JSON, or exact, label or another one for texts"
        raise UsageError(f"--metric call: no example of --task has tools or expects a call; {remedy}")
    for number, each in enumerate(examples, 1) if metric == "call" else ():
        if each.expected.lstrip().startswith("{") and not each.calls:
            reason = 'the expected answer is no call; write {"name": ..., "arguments": {...}}'
            raise DataError(f"--metric call: example {number} of --task: {reason}")
    if constrain == "none":
        return
    has_schema = False
    for number, each in enumerate(examples, 1):
        try:
            grammar = Grammar.json_schema(each.schema) if each.schema is not None else None
            has_schema |= grammar is not None
            reason = _why_rejected(each, grammar if constrain == "schema" else None)
        except (ValueError, UsageError) as error:
            raise DataError(f"--constrain {constrain}: example {number} of --task: {error}") from error
        if reason:
            where = each.chat.place or f"example {number} of --task"
            raise DataError(f"--constrain {constrain}: {where} expects what its own grammar rejects: {reason}")
    if not has_tools and not (has_schema and constrain == "schema"):
        needed = "tools or a response_format" if constrain == "schema" else "tools"
        raise UsageError(f"--constrain {constrain} has no effect: no example of --task has {needed}")


def _why_rejected(example: Example, grammar: Grammar | None) -> str:
    """Return why the grammar of an example's answers rejects the expected one, "" if it allows it."""
    tools, calls = example.chat.tools, example.chat.messages[-1].get("tool_calls", ())
    if calls or tools or grammar is None:
        reasons = (why_not_called(call["function"], tools) for call in calls if tools)
        return next(filter(None, reasons), "")
    start = grammar.allowed_start(example.expected)
    rest = example.expected[len(start or "") :]
    return "" if start is None else f"its response_format takes no {rest[:40]!r} after {start[-40:]!r}"


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
    functions: list[str] = field(default_factory=list)
    """Function that each example expects, "no call" for a refusal. [] for metrics other than call."""
    probabilities: list[float | None] = field(default_factory=list)
    """`GenerationStats.mean_probability` of each answer, None for that of a checkpoint."""

    @property
    def score_name(self) -> str:
        """Return the name of the first value, which is the score."""
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
        """Return the fields and the scores."""
        means = {name: {"mean": self.mean(name), "stderr": self.stderr(name)} for name in self.values}
        return {**asdict(self), "scores": means}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> JobResult:
        """Return the result whose `to_dict` is `value`, with None for NaN. Fields that it lacks have their defaults."""
        fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        values = {name: [math.nan if each is None else each for each in of] for name, of in value["values"].items()}
        return cls(**{**fields, "values": values})


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
    cache: LineCache | None = None,
    advance: Advance = lambda done, total: None,
) -> JobResult:
    """Answer all examples greedily and score the answers. Those in `cache` are not asked for again.

    With `constrain`, a grammar limits calls to the functions of each example, and other answers to its response format,
    for engines only. Raises UsageError for a model without a chat template, and DataError for an example that the model
    cannot answer or the metric cannot score.
    """
    cache = LineCache() if cache is None else cache
    settings = repr((constrain, max_tokens))
    questions = (f"{settings} {each.prompt.to_json()} {json.dumps(each.record.get(FORM))}" for each in examples)
    keys = [cache_key(question) for question in questions]
    missing = [index for index, key in enumerate(keys) if key not in cache]
    answered = _answered(model, examples, missing, max_tokens, constrain)
    began = time.perf_counter()
    for done, index in enumerate(missing, len(examples) - len(missing) + 1):
        try:
            text = next(answered)
        except (ContextOverflowError, UsageError) as error:
            raise DataError(f"--task: example {index + 1}: {error}") from error
        now = time.perf_counter()
        sure = model.mean_probability if isinstance(model, EngineModel) else None
        cache[keys[index]] = (text, sure), 1e3 * (now - began)
        began = now
        advance(done, len(examples))
    found_answers, elapsed_ms = zip(*(cache[key] for key in keys), strict=True)
    written, probabilities = zip(*found_answers, strict=True)
    tokens = sum(len(model.tokenize(text)) for text in written)
    format = tool_format(model.chat_template, model.bos_token, model.eos_token)
    answers = [format.plain(text) for text in written]
    found = _scored(examples, answers, metric, "the answer to example")
    # in the order of the first example, whose first value is the score
    names = dict.fromkeys(name for each in found for name in each)
    values = {name: [each.get(name, math.nan) for each in found] for name in names}
    whole: dict[str, float] = {}
    if metric == "label":
        whole["macro F1"] = macro_f1([each.expected for each in examples], answers)
    calls = [each.calls for each in examples] if metric == "call" else []
    functions = [found[0][0] if found else NO_CALL for found in calls]
    mean_tokens, mean_ms = tokens / len(answers), sum(elapsed_ms) / len(answers)
    return JobResult(metric, values, answers, mean_tokens, mean_ms, whole, functions, [*probabilities])


def _answered(
    model: EvaluatedModel, examples: Sequence[Example], chosen: Sequence[int], max_tokens: int, constrain: Constrain
) -> Iterator[str]:
    """Return an iterator over the answers to the chosen examples. Raises UsageError or DataError."""
    chat_format = ChatFormat.of(model.chat_template, model.bos_token, model.eos_token)
    if chat_format is None:
        raise UsageError("--task needs a model with a chat template")
    if constrain != "none":
        if not isinstance(model, EngineModel):
            raise UsageError(f"--constrain {constrain} needs an exported file; a Hugging Face folder answers freely")
        chats = [(examples[index].prompt, examples[index].schema) for index in chosen]
        return model.answer_in_form(chats, CONSTRAINTS[constrain], max_tokens)
    prompts: list[list[int]] = []
    for index in chosen:
        try:
            prompts.append(model.encode_markup(chat_format.chat_prompt(examples[index].prompt)))
        except UsageError as error:
            raise DataError(f"--task: example {index + 1}: {error}") from error
        if (length := len(prompts[-1])) >= model.context_length:
            lengths = f"{length} tokens before its answer, the context of the model {model.context_length}"
            raise DataError(f"--task: example {index + 1} has {lengths}; shorten or remove it")
    return model.answer(prompts, max_tokens)


def misses_page(name: str, examples: Sequence[Example], result: JobResult) -> str:
    """Return a Markdown page of the worst missed examples: context, request, expected answer and given answer."""
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
        *earlier, request = examples[index].chat.messages[:-1]
        fields = {
            **({"context": "\n".join(map(_shown, earlier))} if earlier else {}),
            "request": request["content"],
            "expected": examples[index].expected,
            "answered": result.answers[index],
        }
        lines += ["", f"## Example {index + 1}: {scores[index]:.2f}"]
        for title, text in fields.items():
            indented = [f"    {line}" for line in (text or "(nothing)").splitlines()]
            lines += ["", f"{title}:", "", *indented]
    return "\n".join(lines) + "\n"


def _shown(message: Message) -> str:
    """Return an earlier message as text, without the middle of a long one."""
    text, half = f"{message['role']}: {text_of(message)}", SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
