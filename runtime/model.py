"""The Python interface of a loaded artefact."""

from __future__ import annotations

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
"""A question of the user, or a whole conversation that ends with it."""


class Model:
    """A loaded model. Close it, or use it in a `with` block.

    It computes one answer at a time, or `EngineOptions.parallel` answers. Threads that call `chat`, `complete` or
    `generate` take turns. An answer that is read from `stream` ends with a UsageError if another one takes its place.
    Any thread may close the model, and an answer in progress then ends with a UsageError.

    All methods take the same keyword options, and raise UsageError for an unknown one:

    - `max_tokens` [256], `seed`.
    - `stop`: a string or several that end the answer and are not part of it.
    - `overflow`: "error", or "slide" to drop the oldest tokens at the end of the context window.
    - `logit_bias`: {token: number}.
    - `temperature` [0: always the most likely token, None: the model's default].
    - `top_k`, `top_p`, `min_p`, `repetition_penalty` [the model's defaults], `frequency_penalty`, `presence_penalty`.
    - `grammar`: a `runtime.grammar.Grammar` that restricts the answer (not in `generate`).
    """

    def __init__(self, engine: EngineScheduler) -> None:
        """Wrap `engine`, which is closed with the model. Use `load` instead."""
        self.engine = engine
        """Computes logits from token ids. Raises UsageError after the model is closed."""
        self.stats: GenerationStats | None = None
        """Token counts, times and finish reason of the last answer."""

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine's memory after the token in progress. A second call does nothing."""
        self.engine.close()

    def chat(self, question: Question, **options: Any) -> str:
        """Return the answer, using the model's chat template. Raises ArtefactError without a template.

        model.chat("What is the capital of France?", temperature=0.7, seed=1)
        """
        return self._answer(self._chat_prompt(question), options).whole()

    def stream(self, question: Question, **options: Any) -> Iterator[str]:
        """Yield the answer of `chat` in pieces as they are generated.

        for piece in model.stream([{"role": "user", "content": "Hi"}], stop=["\\n"]):
            print(piece, end="", flush=True)
        """
        return iter(self._answer(self._chat_prompt(question), options))

    def _chat_prompt(self, question: Question) -> list[int]:
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return chat_prompt(self.engine, messages)

    def complete(self, text: str, **options: Any) -> str:
        """Return a continuation of `text`, without a chat template.

        model.complete("Paris is the capital of", max_tokens=8)
        """
        prompt = text_prompt(self.engine, text)
        if not prompt:
            raise UsageError("the text is empty, and this model has no BOS token; give a text")
        return self._answer(prompt, options).whole()

    def generate(self, tokens: Sequence[int], **options: Any) -> list[int]:
        """Return the token ids that follow `tokens`, without the end token.

        model.generate(model.tokenize("Paris is"), max_tokens=8)
        """
        self._check_tokens(tokens)
        if not tokens:
            raise UsageError("the list of tokens is empty; give at least one")
        generation = Generation(self.engine, tokens, _answer_options(options))
        generation.whole()
        self.stats = generation.stats
        return generation.answer

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of `text`. `special` turns text such as <|im_end|> into its control token."""
        return self.engine.tokenize(text, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens` without control tokens."""
        self._check_tokens(tokens)
        return self.engine.text_of(tokens)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise UsageError for an id outside the vocabulary."""
        # some engines crash there
        size = self.engine.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise UsageError(f"token {token} is outside the vocabulary of {size}")

    def _answer(self, prompt: Sequence[int], options: dict[str, Any]) -> Generation:
        grammar = options.pop("grammar", None)
        constraint = GrammarConstraint(self.engine, grammar) if grammar is not None else None
        generation = Generation(self.engine, prompt, _answer_options(options), constraint)
        self.stats = generation.stats
        return generation


def _answer_options(given: dict[str, Any]) -> AnswerOptions:
    """Return AnswerOptions of keyword arguments, which may be fields of SamplingOptions as well."""
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
    """Load a folder of efficientllm-export, or a bare .gguf or .pte file, in its engine.

    Raises ArtefactError for a missing, damaged or foreign artefact, MissingExtraError for a missing engine package.

        from efficientllm.runtime import EngineOptions, load

        with load("small-gguf", EngineOptions(threads=2, context=1024)) as model:
            print(model.chat("What is the capital of France?", max_tokens=64, temperature=0.7, seed=1))
            print(model.stats.decode_tokens_per_second)
    """
    return Model(load_engine(path, options))
