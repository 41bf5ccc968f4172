"""Compute the answers of one engine in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from ..base.errors import UsageError
from ..base.progress import PROGRESS_LOGGER
from .batch import Answer, AnswerProgress, Batch, TokenSource
from .shared_engine import MODEL_CLOSED, SharedEngine

TOGETHER_SECONDS = 0.001
"""Longest time that a pass waits for the readers of the pass before."""

QUIET_SECONDS = 1.0
"""Time without an answer after which passes are measured, if the model is new to the machine."""


class AnswerLoop:
    """Computes all answers of one engine together, in a thread that the first answer starts."""

    def __init__(self, engine: SharedEngine) -> None:
        self._engine, self._changed = engine, engine.changed
        self._batch = Batch(engine)
        self._arrived: list[Answer] = []
        self._pulled: list[Answer] = []
        """Pulled answers of the last pass, whose readers ask for their next texts now."""
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._is_quiet: Callable[[], bool] | None = None
        """Tells whether passes may be measured. None if nothing is prepared for later answers."""

    def add(self, answer: Answer) -> None:
        """Start computing an answer, or the next text of a pulled one. It fails if the model is closed."""
        with self._changed:
            if not self._is_closing:
                self._arrived.append(answer)
                self._start()
                return
        answer.receive(AnswerProgress(answer, is_over=True, error=UsageError(MODEL_CLOSED)))

    def _start(self) -> None:
        """Start the thread, or wake it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._compute, name="answers", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def read(self, generation: TokenSource, is_pulled: bool) -> Iterator[str]:
        """Yield the text of an answer. Raise UsageError if another answer takes its sequence or the model is closed.

        A pulled one is computed only while the caller waits for its next text.
        """
        inbox = SimpleQueue[AnswerProgress]()
        answer = Answer(generation, inbox.put, generation, is_pulled)
        is_over = False
        try:
            self.add(answer)
            while not is_over:
                progress = inbox.get()
                is_over = progress.is_over
                if progress.error is not None:
                    raise progress.error
                if progress.text:
                    yield progress.text
                if is_pulled and not is_over:
                    self.add(answer)
        finally:
            if not is_over:  # also after Ctrl-C, and in garbage collection, where nothing may be waited for
                generation.cancel()
                self.add(answer)

    def prepare_for_later(self, is_quiet: Callable[[], bool]) -> None:
        """Prepare for later answers while there are none: park idle caches, and measure passes while `is_quiet`."""
        with self._changed:
            self._is_quiet = is_quiet
            self._start()

    def close(self) -> None:
        """Compute the answers in progress, refuse the others, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _compute(self) -> None:
        """Run passes while there are answers, then wait for one. This is the thread's function."""
        while True:
            if not len(self._batch):
                self._wait()
            with self._changed:
                self._changed.wait_for(self._has_pulled, TOGETHER_SECONDS)
                arrived, self._arrived = self._arrived, []
                is_closing = self._is_closing
            for answer in arrived:
                self._batch.add(answer)
            if is_closing and not len(self._batch):
                return
            # the lock is free during a pass, so that answers can arrive while the engine computes
            done = self._batch.abandon(UsageError(MODEL_CLOSED)) if is_closing else []
            done += self._batch.step()
            for one in done:
                one.answer.receive(one)
            self._pulled = [one.answer for one in done if one.answer.is_pulled and not one.is_over]

    def _has_pulled(self) -> bool:
        return self._is_closing or all(answer in self._arrived for answer in self._pulled)

    def _wait(self) -> None:
        """Wait for answers to compute or for the end. Prepare for later answers meanwhile."""
        quiet = None
        if self._is_quiet is not None:
            self._prepare(self._park)
            quiet = QUIET_SECONDS
        while True:
            with self._changed:
                if self._changed.wait_for(self._has_work, quiet):
                    return
            if self._may_measure():
                self._prepare(lambda: self._engine.measure_passes(lambda: not self._may_measure()))
                quiet = None

    def _may_measure(self) -> bool:
        return self._is_quiet is not None and self._is_quiet() and not self._has_work()

    def _has_work(self) -> bool:
        return bool(self._arrived) or self._is_closing

    def _park(self) -> None:
        with self._engine.caches() as caches:
            caches.park_in_advance()

    def _prepare(self, work: Callable[[], None]) -> None:
        """Call `work`, which only makes later answers faster, unless answers wait. Report its failure."""
        if self._has_work():
            return
        try:
            work()
        except Exception as error:  # the thread must survive, because answers do not depend on it
            name = type(error).__name__
            logging.getLogger(PROGRESS_LOGGER).warning("later answers are not prepared: %s: %s", name, error)
