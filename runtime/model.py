"""A loaded artefact for programs: text in, text out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .base.errors import UsageError
from .chat_template import Message
from .engines.engine import EngineOptions, load_engine
from .engines.scheduler import EngineScheduler
from .generation import AnswerOptions, Generation, GenerationStats
from .grammar import GrammarConstraint
from .prompt import chat_prompt, text_prompt
from .sampling import SamplingOptions

Question = str | Sequence[Message]
"""What the user says, or the whole conversation up to it."""


class Model:
    """A model that answers. Close it, or use it in a `with` block.

    It has room for one answer, or for `EngineOptions.parallel`. Threads that ask `chat`, `complete` or `generate` take
    turns; an answer that is read piece by piece from `stream` ends in a UsageError where one too many was begun. Any
    thread may close it: an answer in progress then ends in a UsageError.

    The methods take the same options: `max_tokens` [256]; `stop`, a string or several that end the answer and are not
    part of it; `overflow` ("error", or "slide": forget the oldest tokens where the context window ends); `logit_bias`
    {token: number}; the fields of SamplingOptions: `temperature` [0: always the most likely token; None: the model's
    own], `top_k`, `top_p`, `min_p`, `repetition_penalty` [the model's own], `frequency_penalty`, `presence_penalty`,
    `seed`. A UsageError names an option that does not exist. `chat`, `stream` and `complete` also take `grammar`, a
    `runtime.grammar.Grammar` that the answer keeps to.
    """

    def __init__(self, engine: EngineScheduler) -> None:
        """Usually made by `load`; `engine` is closed with the model."""
        self.engine = engine
        """Token ids in, logits out; UsageError once the model is closed."""
        self._turn = threading.BoundedSemaphore(engine.num_sequences)
        """Held during an answer that is asked for as a whole."""
        self.stats: GenerationStats | None = None
        """Figures of the last answer: tokens, times, why it ended."""

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine's memory when the token in progress is computed; a second time does nothing."""
        self.engine.close()

    def chat(self, question: Question, **options: Any) -> str:
        """The answer under the model's own chat template; ArtefactError where it has none.

        model.chat("What is the capital of France?", temperature=0.7, seed=1)
        """
        with self._turn:
            return "".join(self.stream(question, **options))

    def stream(self, question: Question, **options: Any) -> Iterator[str]:
        """`chat`, piece by piece as it is computed.

        for piece in model.stream([{"role": "user", "content": "Hi"}], stop=["\\n"]):
            print(piece, end="", flush=True)
        """
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return self._answer(chat_prompt(self.engine, messages), options)

    def complete(self, text: str, **options: Any) -> str:
        """How `text` goes on, without a chat template.

        model.complete("Paris is the capital of", max_tokens=8)
        """
        prompt = text_prompt(self.engine, text)
        if not prompt:
            raise UsageError("the text is empty, and this model has no token to begin with")
        with self._turn:
            return "".join(self._answer(prompt, options))

    def generate(self, tokens: Sequence[int], **options: Any) -> list[int]:
        """Token ids that follow `tokens`, without the one that ends the answer.

        model.generate(model.tokenize("Paris is"), max_tokens=8)
        """
        self._check_tokens(tokens)
        if not tokens:
            raise UsageError("there are no tokens to go on from")
        generation = Generation(self.engine, tokens, _answer_options(options))
        with self._turn:
            for _ in generation:
                pass
            self.stats = generation.stats
        return generation.answer

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; `special` turns text such as <|im_end|> into its control token."""
        return self.engine.tokenize(text, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens left out."""
        self._check_tokens(tokens)
        return b"".join(map(self.engine.token_bytes, tokens)).decode("utf-8", errors="replace")

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Engines do not all survive an id that is none."""
        size = self.engine.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise UsageError(f"token {token} is outside the vocabulary of {size}")

    def _answer(self, prompt: Sequence[int], options: dict[str, Any]) -> Iterator[str]:
        grammar = options.pop("grammar", None)
        constraint = GrammarConstraint(self.engine, grammar) if grammar is not None else None
        # refuses a bad prompt here and now
        generation = Generation(self.engine, prompt, _answer_options(options), constraint)
        self.stats = generation.stats
        return iter(generation)


def _answer_options(given: dict[str, Any]) -> AnswerOptions:
    """AnswerOptions of keyword arguments that may also be SamplingOptions' fields."""
    sampling = {field.name for field in fields(SamplingOptions)}
    answer = {field.name for field in fields(AnswerOptions)} - {"sampling", "top_logprobs"}
    unknown = given.keys() - sampling - answer
    if unknown:
        raise UsageError(f"unknown option {min(unknown)!r}; known: {', '.join(sorted(sampling | answer))}")
    if isinstance(given.get("stop"), str):
        given = given | {"stop": (given["stop"],)}
    chosen = SamplingOptions(**{name: value for name, value in given.items() if name in sampling})
    return AnswerOptions(sampling=chosen, **{name: value for name, value in given.items() if name in answer})


def load(path: str | Path, options: EngineOptions | None = None) -> Model:
    """Load what efficientllm-export wrote (or a bare .gguf or .pte file) in the engine that runs it.

    Raises ArtefactError for a missing, damaged or foreign artefact, MissingExtraError for a missing engine package.

        from efficientllm.runtime import EngineOptions, load

        with load("small-gguf", EngineOptions(threads=2, context=1024)) as model:
            print(model.chat("What is the capital of France?", max_tokens=64, temperature=0.7, seed=1))
            print(model.stats.decode_tokens_per_second)
    """
    return Model(load_engine(path, options))
