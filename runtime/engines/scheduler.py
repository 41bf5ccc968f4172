"""The engine of a loaded model as programs use it: tokens, logits, embeddings and answers, from any thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..base.errors import UsageError
from .answer_loop import AnswerLoop
from .cache_pool import Lease
from .prompt_store import PromptStore
from .protocol import Embedder, Engine, Pooling, StateKeeper
from .shared_engine import SharedEngine
from .speculation import PromptLookup


class EngineScheduler(SharedEngine):
    """A loaded engine, and the loop that computes its answers.

    `SharedEngine` runs the passes over the tokens of leases. `CachePool` decides which sequence a lease gets,
    `plan_pass` how many tokens a pass evaluates, and `Batch` which answers take part in it. `AnswerLoop` is the thread
    that runs the passes of answers. `prefill`, `decode` and `evaluate` run theirs in the thread of the caller.
    """

    def __init__(self, engine: Engine, sampling_defaults: Mapping[str, float] | None = None) -> None:
        """Take over `engine`. `sampling_defaults`: fields of SamplingOptions that the model's maker chose."""
        super().__init__(engine)
        self.answers = AnswerLoop(self)
        self.sampling_defaults = dict(sampling_defaults or {})
        self._own_lease = Lease()
        """Sequence of `prefill` and `decode`."""
        self.vocab_size, self.end_ids = engine.vocab_size, engine.end_ids
        self.chat_template, self.adds_bos = engine.chat_template, engine.adds_bos
        self.bos_token, self.eos_token, self.control_texts = engine.bos_token, engine.eos_token, engine.control_texts
        self.load_ms, self.kv_cache_bytes = engine.load_ms, engine.kv_cache_bytes
        self.parked_bytes = self.pool.max_parked * self.kv_cache_bytes // self.cache_slots
        """Memory that parked caches may take beside those of the engine."""

    @property
    def settings(self) -> str:
        """Return the choices made for this machine, such as the attention kernel."""
        return self.traits.settings

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Return token ids, see `Engine.tokenize`. Raise UsageError for text that is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = "a byte that is not UTF-8, or half of a surrogate pair"
            raise UsageError(f"the text has an invalid character: {reason}; remove it") from error
        with self._open() as engine:
            return engine.tokenize(text, special)

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, see `Engine.token_bytes`."""
        with self._open() as engine:
            return engine.token_bytes(token)

    def vocabulary(self) -> list[bytes]:
        """Return `token_bytes` of every token."""
        with self._open() as engine:
            return list(map(engine.token_bytes, range(self.vocab_size)))

    def text_of(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens. Control tokens have none."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def embed(self, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
        """Return the embedding of a text, see `Embedder.embed`.

        Raise UsageError if the engine has no embeddings, ContextOverflowError if the tokens do not fit.
        """
        self.check_length(tokens)
        with self._open() as engine:
            if not isinstance(engine, Embedder):
                raise UsageError("this engine has no embeddings; export the model with --target gguf")
            return engine.embed(tokens, pooling)

    def proposer(self, prompt: Sequence[int]) -> PromptLookup | None:
        """Return the proposals for an answer to `prompt`, None if the engine checks none."""
        return None if self.traits.speculation is None else PromptLookup(self.traits.speculation, prompt)

    def draft(self, proposer: PromptLookup, longest: int) -> list[int]:
        """Return at most `longest` tokens that the next pass checks, [] if that gains nothing or they may not fit."""
        # Proposals must not fill the slots that the next tokens of all answers need.
        room = self.cache_slots - self.used_slots - self.num_sequences
        return proposer.draft(min(longest, room), self.num_leases)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Make `tokens` the sequence of `decode` and return the last one's logits, fp32 [V].

        A cached prefix is not evaluated again. Raise ContextOverflowError if the tokens do not fit.
        """
        with self._turn:  # another thread's tokens must not replace these in between
            self.begin(self._own_lease, tokens)
            return self._own_logits()

    def decode(self, token: int) -> np.ndarray:
        """Append one token to the sequence of `prefill` and return its logits, fp32 [V].

        Raise UsageError if another answer took the sequence.
        """
        with self._turn:
            self._own_lease.tokens.append(token)
            return self._own_logits()

    def _own_logits(self) -> np.ndarray:
        self._own_lease.is_idle = False  # its tokens must not be evicted for others of its own
        logits = self.logits(self._own_lease)
        self._own_lease.is_idle = True
        return logits

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Yield the logits of positions `first`, `first` + 1, ... of `tokens`, fp32 [n, V] each.

        Raise UsageError if another answer took the sequence between two pieces.
        """
        lease = Lease(list(tokens[: first + 1]))
        self.check_length(tokens)
        with self.caches() as caches:
            held = len(caches.cache_of(lease).tokens)
        if held < first:
            lease.tokens = list(tokens[:first])
            self.logits(lease)
        while first < len(tokens):
            lease.tokens = list(tokens[: first + 1])
            lease.draft = list(tokens[first + 1 : first + self.traits.max_rows])
            rows = np.atleast_2d(self.logits(lease))
            first += len(rows)
            yield rows
        self.release(lease)

    def pin(self, tokens: Sequence[int]) -> None:
        """Evaluate `tokens` and never evict them. They take a sequence and its slots from the answers.

        Raise UsageError without a second sequence, ContextOverflowError if the tokens do not fit.
        """
        if self.num_sequences < 2:
            raise UsageError("--pin: a pinned prompt needs a sequence of its own; set --parallel to 2 or more")
        lease = Lease()
        with self.caches() as caches:
            self.begin(lease, tokens)
            self.logits(lease)
            caches.pin(lease)

    def prompt_store(self, folder: Path, model_hash: str, max_bytes: int) -> PromptStore | None:
        """Return the stored prompts of this model in `folder`, None if the engine has none. `model_hash`: its files."""
        with self._open() as engine:
            if not isinstance(engine, StateKeeper):
                return None
            return PromptStore(folder, f"{model_hash}, {engine.state_format}", max_bytes)

    def close(self) -> None:
        """Free the model after the pass in progress, and end all answers with a UsageError.

        A second call does nothing.
        """
        super().close()
        self.answers.close()
