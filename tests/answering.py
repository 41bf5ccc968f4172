"""Answers that one engine computes together."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue

from efficientllm.runtime.engines.batch import Answer, AnswerProgress
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import Generation


def answer_of(generation: Generation, inbox: SimpleQueue[AnswerProgress] | None = None) -> Answer:
    """Return an answer for a batch, whose progress is put into `inbox`."""
    return Answer(generation, (inbox or SimpleQueue()).put, generation)


def answer_together(engine: EngineScheduler, generations: Sequence[Generation]) -> list[str]:
    """Compute answers that arrive at once, and return their texts."""
    inbox, texts = SimpleQueue[AnswerProgress](), {id(generation): "" for generation in generations}
    with engine.changed:
        for generation in generations:
            engine.answers.add(answer_of(generation, inbox))
    unfinished = len(generations)
    while unfinished:
        progress = inbox.get(timeout=60)
        assert progress.error is None, progress.error
        texts[id(progress.answer.generation)] += progress.text
        unfinished -= progress.is_over
    return list(texts.values())
