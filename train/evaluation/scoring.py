"""Models under evaluation: scores of tokens, answers to prompts, and a cache of scores. Imports no lm-eval."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...runtime.base.errors import ModelError
from ...runtime.base.files import sha256_of
from ...runtime.copied_arguments import ToolArguments
from ...runtime.engines.artefact import GENAI_CONFIG, Artefact
from ...runtime.engines.engine import EngineOptions, load_engine
from ...runtime.generation import AnswerOptions, Generation
from ...runtime.grammar import Grammar, GrammarConstraint
from ...runtime.prompt import ToolUse, tool_prompt
from ...runtime.sampling import log_softmax
from ..data.chat import Chat

Advance = Callable[[int, int], None]
"""advance(done, total), called after every score."""


@dataclass(frozen=True)
class ScoreRequest:
    """A request to score tokens[first:], each given all tokens before it. `first` is at least 1."""

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Score:
    """Scores of the n tokens of a request."""

    log_probs: np.ndarray
    """fp64 [n], nats."""
    is_greedy: np.ndarray
    """bool [n], true if the token was the most likely one."""


class EvaluatedModel(Protocol):
    """A model under evaluation. It scores tokens and answers prompts."""

    context_length: int
    """Longest request that can be scored, in tokens."""
    vocab_size: int
    separator: int
    """End-of-text token, which separates documents and replaces an empty context."""
    chat_template: str | None
    bos_token: str
    eos_token: str

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text as the model was trained to read it, with BOS if its tokenizer adds one."""
        ...

    def encode_markup(self, text: str) -> list[int]:
        """Return the ids of a rendered chat template. Control tokens are parsed and nothing is added."""
        ...

    def num_bytes(self, tokens: Sequence[int]) -> int:
        """Return the number of UTF-8 bytes of the tokens' text."""
        ...

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[str]:
        """Yield the greedy answer to each prompt, up to its end of turn or `max_tokens`."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Yield (index of the request, its score) in the order that is fastest for the model."""
        ...


class EngineModel:
    """An exported artefact in the runtime's engine, so that the figures are those of the shipped file."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        artefact = Artefact.open(path)
        if options.kv_cache == "auto" and artefact.engine == "llama.cpp":
            # the fastest cache differs between machines, and figures of quality must not
            options = replace(options, kv_cache="f16")
        self.engine = load_engine(artefact, options)
        self.context_length, self.vocab_size = self.engine.context_length, self.engine.vocab_size
        ends = (self.engine.tokenize(text, True) for text in ("<|endoftext|>", self.engine.eos_token))
        single = [ids[0] for ids in ends if len(ids) == 1]
        self.separator = single[0] if single else min(self.engine.end_ids)
        self.chat_template = self.engine.chat_template
        self.bos_token, self.eos_token = self.engine.bos_token, self.engine.eos_token
        self._bos = self.engine.tokenize(self.engine.bos_token, True) if self.engine.adds_bos else []
        self.mean_probability: float | None = None
        """`GenerationStats.mean_probability` of the last answer."""

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text that begins a document."""
        return [*self._bos, *self.engine.tokenize(text, special=True)]

    def encode_markup(self, text: str) -> list[int]:
        return self.engine.tokenize(text, special=True)

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[str]:
        """Yield the greedy answer to each prompt, of at most `max_tokens` tokens."""
        for prompt in prompts:
            yield self._whole(prompt, max_tokens)

    def _whole(self, prompt: Sequence[int], max_tokens: int, constraint: GrammarConstraint | None = None) -> str:
        """Return the greedy answer to a prompt, and keep its probability."""
        options = AnswerOptions(max_tokens=max_tokens, measures_probability=True)
        generation = Generation(self.engine, prompt, options, constraint)
        text = generation.whole()
        self.mean_probability = generation.stats.mean_probability
        return text

    def answer_in_form(
        self, chats: Sequence[tuple[Chat, Mapping[str, Any] | None]], arguments: ToolArguments, max_tokens: int
    ) -> Iterator[str]:
        """Yield the greedy answer to each (chat, JSON schema of an answer without calls or None).

        A grammar limits calls to the functions of the chat. `arguments` limits free texts in arguments.
        """
        for chat, schema in chats:
            use = ToolUse(chat.tools, arguments=arguments, otherwise=schema) if chat.tools else None
            prompt = tool_prompt(self.engine, chat.messages, use)
            constraint = prompt.constraint(self.engine)
            if use is None and schema is not None:
                constraint = GrammarConstraint(self.engine, Grammar.json_schema(schema))
            yield self._whole(prompt.tokens, max_tokens, constraint)

    def num_bytes(self, tokens: Sequence[int]) -> int:
        """Return the bytes of the text of tokens."""
        return sum(len(self.engine.token_bytes(token)) for token in tokens)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        # in token order, so that neighbours share their common prefix in the KV cache
        for index in sorted(range(len(requests)), key=lambda index: requests[index].tokens):
            yield index, self._score(requests[index])

    def _score(self, request: ScoreRequest) -> Score:
        targets = np.asarray(request.tokens[request.first :])
        log_probs, greedy, done = np.empty(len(targets)), np.empty(len(targets), dtype=bool), 0
        for logits in self.engine.evaluate(request.tokens[:-1], request.first - 1):
            rows = slice(done, done + len(logits))
            some_targets = targets[rows]
            log_probs[rows] = log_softmax(logits)[np.arange(len(logits)), some_targets]
            greedy[rows] = logits.argmax(axis=-1) == some_targets
            done += len(logits)
        return Score(log_probs, greedy)


Total = tuple[float, bool]
"""Sum of the scored tokens' log-probabilities in nats, and true if each token was the most likely one."""


class LineCache:
    """Pairs of values by `cache_key`, appended to a JSON-lines file so that an interrupted evaluation continues."""

    def __init__(self, path: Path | None = None) -> None:
        """Load the file at `path`. Without a path the values are kept in memory only."""
        self.path = path
        self._values: dict[str, tuple[Any, Any]] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    key, first, second = json.loads(line)
                except ValueError:  # the end of the file, or a line that was cut when the process was killed
                    continue
                self._values[key] = (first, second)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> tuple[Any, Any]:
        return self._values[key]

    def __setitem__(self, key: str, values: tuple[Any, Any]) -> None:
        self._values[key] = values
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([key, *values]) + "\n")


def cache_key(question: str) -> str:
    """Return the key of a question, 32 hexadecimal digits."""
    return hashlib.sha256(question.encode()).hexdigest()[:32]


class ScoreCache(LineCache):
    """Totals of requests."""

    def totals(
        self, model: EvaluatedModel, requests: Sequence[ScoreRequest], advance: Advance = lambda done, total: None
    ) -> list[Total]:
        """Return the total of each request. The model scores only requests that are not cached."""
        keys = [cache_key(repr((request.tokens, request.first))) for request in requests]
        missing = [index for index, key in enumerate(keys) if key not in self]
        done = len(keys) - len(missing)
        for index, score in model.score([requests[index] for index in missing]):
            self[keys[missing[index]]] = float(score.log_probs.sum()), bool(score.is_greedy.all())
            done += 1
            advance(done, len(keys))
        return [self[key] for key in keys]


def fingerprint(path: Path) -> str:
    """Return a SHA-256 over the weight files of a model folder, or over the present files of an artefact."""
    if is_checkpoint(path):
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
        if not files:
            raise ModelError(f"{path} has a config.json but no weights (*.safetensors)")
    else:
        files = list(Artefact.open(path).files)
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Return True for a Hugging Face folder. ONNX artefacts also have a config.json, for transformers.js."""
    return (path / "config.json").is_file() and not (path / GENAI_CONFIG).is_file()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some values and its standard error, which is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error
