"""What evaluation asks of a model: token ids, and log-probabilities of tokens given those before them.

What an evaluation found: scores of tasks and perplexities of texts, with their errors. Imports no lm-eval.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...runtime.base.errors import ModelError
from ...runtime.base.files import sha256_of
from ...runtime.engines.artefact import GENAI_CONFIG, Artefact
from ...runtime.engines.engine import EngineOptions, load_engine
from ...runtime.generation import AnswerOptions, Generation
from ...runtime.sampling import log_softmax


@dataclass(frozen=True)
class Request:
    """Score tokens[first:], each given all tokens before it; first is at least 1."""

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Score:
    """Log-probabilities (nats) of a request's scored tokens, fp64 [n], and whether each was the most likely one."""

    log_probs: np.ndarray
    is_greedy: np.ndarray


class ScoredModel(Protocol):
    """A model under evaluation."""

    context_length: int
    """Longest request that can be scored, in tokens."""
    vocab_size: int
    separator: int
    """End-of-text token: stands between documents and in place of an empty context."""
    chat_template: str | None
    bos_token: str
    eos_token: str

    def tokenize(self, text: str) -> list[int]:
        """Ids as the model was trained to read text: with BOS where its tokenizer adds one."""
        ...

    def encode_markup(self, text: str) -> list[int]:
        """Ids of what a chat template wrote: control tokens where it names them, nothing added."""
        ...

    def num_bytes(self, tokens: Sequence[int]) -> int:
        """UTF-8 bytes of the tokens' text."""
        ...

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[str]:
        """Yield the greedy answer to each prompt, up to its end of turn or `max_tokens`."""
        ...

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
        """Yield (index of the request, its score), in an order that suits the model."""
        ...


class EngineModel:
    """An exported artefact, scored by the runtime's engine: what is measured is the file that ships."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        artefact = Artefact.open(path)
        if options.kv_cache == "auto" and artefact.engine == "llama.cpp":
            # the fastest cache differs between machines, which figures of quality must not
            options = replace(options, kv_cache="f16")
        self.engine = load_engine(artefact, options)
        self.context_length, self.vocab_size = self.engine.context_length, self.engine.vocab_size
        ends = (self.engine.tokenize(text, True) for text in ("<|endoftext|>", self.engine.eos_token))
        single = [ids[0] for ids in ends if len(ids) == 1]
        self.separator = single[0] if single else min(self.engine.end_ids)
        self.chat_template = self.engine.chat_template
        self.bos_token, self.eos_token = self.engine.bos_token, self.engine.eos_token
        self._bos = self.engine.tokenize(self.engine.bos_token, True) if self.engine.adds_bos else []

    def tokenize(self, text: str) -> list[int]:
        return [*self._bos, *self.engine.tokenize(text, special=True)]

    def encode_markup(self, text: str) -> list[int]:
        return self.engine.tokenize(text, special=True)

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[str]:
        for prompt in prompts:
            yield "".join(Generation(self.engine, prompt, AnswerOptions(max_tokens=max_tokens)))

    def num_bytes(self, tokens: Sequence[int]) -> int:
        return sum(len(self.engine.token_bytes(token)) for token in tokens)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
        # in token order, so that neighbours share what the KV cache holds of their common prefix
        for index in sorted(range(len(requests)), key=lambda index: requests[index].tokens):
            yield index, self._score(requests[index])

    def _score(self, request: Request) -> Score:
        targets = np.asarray(request.tokens[request.first :])
        log_probs, greedy, done = np.empty(len(targets)), np.empty(len(targets), dtype=bool), 0
        for logits in self.engine.evaluate(request.tokens[:-1], request.first - 1):
            rows = slice(done, done + len(logits))
            log_probs[rows] = log_softmax(logits)[np.arange(len(logits)), targets[rows]]
            greedy[rows] = logits.argmax(axis=-1) == targets[rows]
            done += len(logits)
        return Score(log_probs, greedy)


def fingerprint(path: Path) -> str:
    """sha256 over the weight files of a model folder, or over all files of an artefact as they are now."""
    if is_checkpoint(path):
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
        if not files:
            raise ModelError(f"{path} has a config.json but no weights (*.safetensors)")
    else:
        files = list(Artefact.open(path).files)
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder: ONNX artefacts have a config.json, too, for transformers.js."""
    return (path / "config.json").is_file() and not (path / GENAI_CONFIG).is_file()


@dataclass(frozen=True)
class TaskResult:
    """A task's score."""

    metric: str
    documents: list[str]
    """Hash of each document, to pair results of several models."""
    values: dict[str, list[float]]
    """Score of every document under each of the task's metrics."""

    def mean(self, metric: str = "") -> float:
        return statistics.fmean(self.values[metric or self.metric])

    def stderr(self, metric: str = "") -> float:
        """Standard error of the mean over documents."""
        values = self.values[metric or self.metric]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    def to_dict(self) -> dict[str, Any]:
        scores = {name: {"mean": self.mean(name), "stderr": self.stderr(name)} for name in self.values}
        return {"metric": self.metric, "num_documents": len(self.documents), "scores": scores, "samples": vars(self)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TaskResult:
        return cls(**value["samples"])
