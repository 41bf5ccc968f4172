"""A draft model: a smaller model that proposes the next tokens of an answer, which one pass of the large one checks.

The proposals are the draft's most likely tokens. `speculation` decides from measured times and shares of right
proposals how many are worth their time. The cache of the draft follows the answer as the engine's own cache does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from .protocol import CacheFullError, Chunk, Engine
from .scheduling_policy import PREFILL_BESIDE_DECODES, CachePool, SequenceCache, common_length
from .speculation import MAX_DRAFT, PromptLookup, Speculation

MIN_MAPPED_SHARE = 0.9
"""Least share of the smaller vocabulary whose texts the larger one has."""

MIN_PROBABILITY = 0.5
"""Probability of the draft's own choice below which it proposes nothing further."""

MAX_STEP_TOKENS = 8
"""Largest number of pending tokens whose evaluation counts as a part of the next proposals. More are a prompt."""

EXPECTED_TOKENS = 64
"""Assumed length of the rest of an answer, over which the time for its prompt is spread."""

KEPT_SHARE = 0.95
"""Weight of earlier times in the running means after each draft."""


class TokenMap:
    """Translates tokens between the vocabularies of a model and its draft by their texts."""

    def __init__(self, target: Engine, draft: Engine) -> None:
        self._draft, self._texts = draft, _texts(target)
        own = _texts(draft)
        self._to_draft = _translation(self._texts, own)
        self.to_target = _translation(own, self._texts)
        """Token of the model for each token of the draft, -1 if it has none."""
        self._split: dict[int, list[int]] = {}
        """{token of the model that the draft lacks: its text in tokens of the draft}"""

    @property
    def is_sound(self) -> bool:
        """Return True if one vocabulary is the other or a part of it."""
        shared = sum(token >= 0 for token in self.to_target)
        return shared >= MIN_MAPPED_SHARE * min(len(self._texts), len(self.to_target))

    def in_draft(self, token: int) -> list[int]:
        """Return the tokens of the draft with the text of a `token` of the model, [] if there are none."""
        if (found := self._to_draft[token]) >= 0:
            return [found]
        if token not in self._split:
            text = self._texts[token].decode("utf-8", "ignore")  # a part of a character cannot be tokenized
            self._split[token] = self._draft.tokenize(text, special=False) if text else []
        return self._split[token]


def _texts(engine: Engine) -> list[bytes]:
    """Return the text of every token, control tokens included."""
    texts = list(map(engine.token_bytes, range(engine.vocab_size)))
    for text in engine.control_texts:
        texts[engine.tokenize(text, special=True)[-1]] = text.encode()
    return texts


def _translation(texts: Sequence[bytes], others: Sequence[bytes]) -> list[int]:
    """Return for every text its number in `others`, the same number if possible, -1 if there is none."""
    numbers = {text: token for token, text in enumerate(others) if text}
    found = []
    for token, text in enumerate(texts):
        has_same_number = token < len(others) and others[token] == text
        found.append(token if has_same_number else numbers.get(text, -1))
    return found


class DraftModel:
    """A loaded draft of one engine, which closes it. Any thread may use it."""

    def __init__(self, engine: Engine, target: Engine, speculation: Speculation) -> None:
        """Take over `engine`, which proposes tokens of `target`. `speculation`: that of `target`."""
        self._engine, self._end_ids = engine, target.end_ids
        self.tokens = TokenMap(target, engine)
        self._speculation = Speculation(None, beside=speculation)
        self._caches = CachePool(engine)
        self._turn = threading.Lock()
        """Held while tokens are proposed."""
        self._step_ms = self._num_steps = 0.0
        """Time of drafts without prompts, and their proposals. Earlier ones have less weight."""
        self._prompt_ms = self._num_prompt = 0.0
        """Time of prompts, and their tokens, in the same way."""

    def begin(self, lookup: PromptLookup | None, prompt: Sequence[int]) -> DraftedAnswer:
        """Return the proposals of the answer to `prompt`."""
        return DraftedAnswer(self, lookup, prompt)

    def count(self, num_right: int, is_right: bool) -> None:
        """Count a proposal after `num_right` right ones, see `Speculation.count`."""
        self._speculation.count(num_right, is_right)

    def propose(self, answer: DraftedAnswer, longest: int, num_answers: int) -> list[int]:
        """Return at most `longest` tokens that a pass of `num_answers` answers checks, [] if that gains nothing."""
        with self._turn:
            tokens = answer.in_draft()
            if not tokens or longest < 1 or len(tokens) + MAX_DRAFT > self._engine.context_length:
                return []
            cache = self._cache_of(answer, tokens)
            pending = len(tokens) - len(cache.tokens)
            prompt_ms = 0.0
            if pending > MAX_STEP_TOKENS:
                prompt_ms = pending * self._prompt_ms / max(1.0, self._num_prompt)
            step_ms = self._step_ms / max(1.0, self._num_steps)
            token_ms = step_ms + prompt_ms / min(longest, EXPECTED_TOKENS)
            count = self._speculation.draft_length(
                answer.num_right, num_answers, min(longest, MAX_DRAFT), token_ms, prompt_ms
            )
            cache.holder = answer  # not evicted meanwhile
            try:
                return self._draft(cache, tokens, count) if count else []
            except CacheFullError:
                return []
            finally:
                cache.holder = None
                answer.cache, answer.last_used = cache, cache.last_used
                answer.num_known = min(len(tokens), len(cache.tokens))

    def _cache_of(self, answer: DraftedAnswer, tokens: Sequence[int]) -> SequenceCache:
        """Return the cache with the longest prefix of `tokens` but the last: the answer's own, if it has one."""
        cache, known = answer.cache, answer.num_known
        # another number of the last use: another answer took the cache since, which nobody holds between two drafts
        if cache is None or cache.last_used != answer.last_used or len(cache.tokens) < known:
            return self._caches.assign(answer, tokens)
        right = common_length(cache.tokens[known:], tokens[known:], max(0, len(tokens) - 1 - known))
        self._caches.truncate(cache, min(known + right, len(tokens) - 1))
        return cache

    def _draft(self, cache: SequenceCache, tokens: Sequence[int], count: int) -> list[int]:
        """Return at most `count` proposals after `tokens`, or [] after a part of a long prompt."""
        pending, began = list(tokens[len(cache.tokens) :]), time.perf_counter()
        # a long prompt is evaluated in parts, one for each call, so that other answers do not wait for it
        is_whole = len(pending) <= PREFILL_BESIDE_DECODES
        logits = self._evaluate(cache, pending[:PREFILL_BESIDE_DECODES], is_whole)
        if len(pending) > MAX_STEP_TOKENS:
            milliseconds, began = 1e3 * (time.perf_counter() - began), time.perf_counter()
            self._prompt_ms = KEPT_SHARE * self._prompt_ms + milliseconds
            self._num_prompt = KEPT_SHARE * self._num_prompt + min(len(pending), PREFILL_BESIDE_DECODES)
        if not is_whole:
            return []
        proposals: list[int] = []
        while True:
            token = int(logits.argmax())
            proposal = self.tokens.to_target[token]
            # the sum is 1 / p of the likeliest token
            is_likely = np.exp(logits - logits[token]).sum() * MIN_PROBABILITY <= 1
            if proposal < 0 or proposal in self._end_ids or not is_likely:
                break
            proposals.append(proposal)
            if len(proposals) == count:
                break
            logits = self._evaluate(cache, [token])
        self._step_ms = KEPT_SHARE * self._step_ms + 1e3 * (time.perf_counter() - began)
        self._num_steps = KEPT_SHARE * self._num_steps + len(proposals)
        return proposals

    def _evaluate(self, cache: SequenceCache, tokens: list[int], wants_logits: bool = True) -> np.ndarray:
        """Append `tokens` and return the last one's logits, fp32 [V of the draft], empty if they are not wanted."""
        self._caches.make_room(len(tokens))
        while True:
            try:
                rows = self._engine.extend([Chunk(cache.sequence, tokens, wants_logits)])
            except CacheFullError:  # as in `EngineScheduler`
                if not self._caches.evict_idle():
                    raise
            else:
                cache.tokens += tokens
                self._caches.touch(cache)
                return rows[0] if wants_logits else np.empty(0, np.float32)

    def close(self) -> None:
        """Free the model."""
        self._engine.close()


class DraftedAnswer:
    """Proposes tokens of one answer: those of `PromptLookup` if there are any, else the draft's."""

    def __init__(self, model: DraftModel, lookup: PromptLookup | None, prompt: Sequence[int]) -> None:
        self._model, self._lookup = model, lookup
        self._new = list(prompt)
        """Tokens that are not in `_tokens` yet."""
        self._tokens: list[int] = []
        """Prompt and answer in tokens of the draft."""
        self._proposed = deque[int]()
        """Proposals of the draft that the answer has not reached."""
        self.num_right = 0
        """The draft's right proposals since the last wrong one."""
        self.cache: SequenceCache | None = None
        """Cache of the last draft. It is still the answer's if `last_used` is its own."""
        self.last_used = self.num_known = 0
        """Number of the last use of `cache`, and of the tokens that it had in common with the answer then."""

    def push(self, token: int) -> None:
        """Append the next token of the answer and count whether it was proposed."""
        if self._lookup is not None:
            self._lookup.push(token)
        self._new.append(token)
        if self._proposed:
            is_right = self._proposed.popleft() == token
            self._model.count(self.num_right, is_right)
            self.num_right = self.num_right + 1 if is_right else 0
            if not is_right:
                self._proposed.clear()

    def in_draft(self) -> list[int]:
        """Return prompt and answer in tokens of the draft."""
        for token in self._new:
            self._tokens += self._model.tokens.in_draft(token)
        self._new.clear()
        return self._tokens

    def draft(self, longest: int, num_answers: int) -> list[int]:
        """Return the tokens that the next pass of `num_answers` answers checks, [] if that gains nothing."""
        self._proposed.clear()
        if self._lookup is not None and (found := self._lookup.draft(longest, num_answers)):
            return found
        proposals = self._model.propose(self, longest, num_answers)
        self._proposed.extend(proposals)
        return proposals
