"""Answers a model gave already, on disk one by one: a killed evaluation that is started again loses nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .scoring import Request, ScoredModel

Answer = tuple[float, bool]
"""(sum of the scored tokens' log-probabilities in nats, whether every one was the most likely)."""

Advance = Callable[[int, int], None]
"""advance(done, total), called after every answer."""


def no_progress(done: int, total: int) -> None:
    """An Advance that shows nothing."""


class RequestCache:
    """Answers by request, appended to a JSON-lines file."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` None: remember for this process only."""
        self.path = path
        self._answers: dict[str, Answer] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    key, log_prob, greedy = json.loads(line)
                except ValueError:  # the end of the file, or cut off by the kill
                    continue
                self._answers[key] = (log_prob, greedy)

    def answers(self, model: ScoredModel, requests: Sequence[Request], advance: Advance = no_progress) -> list[Answer]:
        """The answer to each request; only those not known yet are put to the model."""
        keys = [hashlib.sha256(repr((r.tokens, r.first)).encode()).hexdigest()[:32] for r in requests]
        open_places = [place for place, key in enumerate(keys) if key not in self._answers]
        done = len(keys) - len(open_places)
        for index, score in model.score([requests[place] for place in open_places]):
            answer = (float(score.log_probs.sum()), bool(score.is_greedy.all()))
            self._put(keys[open_places[index]], answer)
            done += 1
            advance(done, len(keys))
        return [self._answers[key] for key in keys]

    def _put(self, key: str, answer: Answer) -> None:
        self._answers[key] = answer
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([key, *answer]) + "\n")
