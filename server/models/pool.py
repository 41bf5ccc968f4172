"""Several models behind one server: loaded on use, the least recently used unloaded where memory is short."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

from ...runtime.base.errors import EfficientLLMError
from ...runtime.base.progress import PROGRESS_LOGGER
from ...runtime.base.quantities import format_bytes
from ...runtime.engines.artefact import Artefact
from ...runtime.engines.engine import DEFAULT_CONTEXT, EngineOptions, load_engine
from ...runtime.engines.owned import OwnedEngine
from ...runtime.grammar import read_vocabulary
from ..schemas.error import APIError, stopping
from .worker import Deadline, EngineWorker

PARALLEL = 16
"""Answers of one model that are computed together, where nothing else is asked for."""

CHAT = 2048
"""Tokens of a chat, for saying how many there is room for."""


class ModelPool:
    """Models by name; at most `max_memory` bytes of them are loaded at once (0: no limit)."""

    def __init__(
        self,
        artefacts: Mapping[str, str],
        options: EngineOptions,
        waiting: int = 8,
        timeout: float = 600.0,
        max_memory: int = 0,
    ) -> None:
        """Load the first of `artefacts` {name: path} and compare the others' files with their manifests.

        ArtefactError where one is damaged.
        """
        self.artefacts = {name: Artefact.open(path) for name, path in artefacts.items()}
        for artefact in self.artefacts.values():
            artefact.verify()
        self.options = replace(options, parallel=options.parallel or PARALLEL)
        self.waiting, self.timeout, self.max_memory = waiting, timeout, max_memory
        self._workers: dict[str, EngineWorker] = {}
        self._loading = asyncio.Lock()
        self._sizes = {name: artefact.file_bytes for name, artefact in self.artefacts.items()}
        """Bytes that each takes in memory: its file, and once it was loaded its caches, too."""
        self._arriving = Counter[str]()
        """Requests on their way to a worker, by model."""
        self._idle = asyncio.Event()
        """Set when a model has become idle, and for those who wait for one when the server stops."""
        self._is_stopping = False
        first = next(iter(self.artefacts))
        self._workers[first] = self._load(first)

    def _load(self, name: str) -> EngineWorker:
        engine = load_engine(self.artefacts[name], self.options)
        self._sizes[name] = self.artefacts[name].file_bytes + engine.kv_cache_bytes
        logging.getLogger(PROGRESS_LOGGER).info("%s: %s", name, capacity(engine))
        # while nobody waits for a grammar: reading cannot be stopped, and would keep a place of a client that has gone
        threading.Thread(target=read_vocabulary, args=(engine,), daemon=True).start()
        return EngineWorker(engine, self.waiting, when_idle=self._idle.set)

    @property
    def loaded(self) -> dict[str, EngineWorker]:
        return dict(self._workers)

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self._workers.values()) + sum(self._arriving.values())

    def context_length(self, name: str) -> int | None:
        """Tokens that fit, prompt and answer together; None where loading will tell."""
        if name in self._workers:
            return self._workers[name].engine.context_length
        known = self.artefacts[name].context_length
        return self.options.context or (min(DEFAULT_CONTEXT, known) if known else None)

    def deadline(self) -> Deadline:
        """Of a request that comes now."""
        return Deadline.from_now(self.timeout)

    async def enter(self, name: str, deadline: Deadline) -> EngineWorker:
        """The worker of a model, loaded now if need be, with a place in its queue, which keeps it from being unloaded.

        APIError 404 for an unknown model, 429 where its queue is full, 503 where it does not fit beside models that
        stay busy until `deadline`, or the server stops. Who does not wait any more keeps no place; a load that has
        begun goes on, or nobody would know of its memory.
        """
        if name not in self.artefacts:
            known = ", ".join(repr(known) for known in self.artefacts)
            raise APIError(404, f"model {name!r} does not exist; this server has {known}", code="model_not_found")
        if self._arriving[name] >= self.waiting + self.options.parallel:
            raise APIError(429, "the server is busy; try again later", "rate_limit_error", "rate_limit_exceeded")
        self._arriving[name] += 1
        try:
            async with asyncio.timeout_at(deadline.at) as waiting:
                async with self._loading:  # in the order they came, so that no model keeps another one out for ever
                    self._refuse_if_stopping()
                    while name not in self._workers:
                        await self._make_room(name)
                        waiting.reschedule(None)
                        await _to_its_end(self._load_into_room(name))
                        self._refuse_if_stopping()
                        waiting.reschedule(deadline.at)
                    self._workers[name].enter()
                    return self._workers[name]
        except TimeoutError as error:
            size = format_bytes(self._sizes[name])
            message = f"model {name!r} needs {size} and all loaded models are busy; try again later"
            raise APIError(503, message, "server_error", "model_overloaded") from error
        finally:
            self._arriving[name] -= 1

    async def _make_room(self, name: str) -> None:
        """Unload what was not used for longest; waits for a model that nobody needs."""
        while not self._fits(name):
            if not await self._unload_idle():
                self._idle.clear()
                await self._idle.wait()
            self._refuse_if_stopping()

    async def _load_into_room(self, name: str) -> None:
        """Load a model. Where its caches, whose size is known now, do not fit beside what is loaded, that is unloaded
        or, as long as it is busy, the model itself is, to wait for more room."""
        try:
            worker = await asyncio.to_thread(self._load, name)
        except EfficientLLMError as error:
            raise APIError(503, f"model {name!r} cannot be loaded: {error}", "server_error") from error
        while not self._fits(name):
            if not await self._unload_idle():
                await asyncio.to_thread(worker.close)
                return
        self._workers[name] = worker

    async def _unload_idle(self) -> bool:
        """Unload the model that was not used for longest; whether there was one that nobody uses."""
        idle = [(worker.last_used, key) for key, worker in self._workers.items() if not worker.in_flight]
        if idle:
            await asyncio.to_thread(self._workers.pop(min(idle)[1]).close)
        return bool(idle)

    def _fits(self, name: str) -> bool:
        """Whether a model has room beside those that are loaded; alone, any has."""
        used = sum(self._sizes[each] for each in self._workers)
        return not self.max_memory or not self._workers or used + self._sizes[name] <= self.max_memory

    def abort(self) -> None:
        """End every answer, and begin none: the server stops."""
        self._is_stopping = True
        self._idle.set()
        for worker in self._workers.values():
            worker.abort()

    def _refuse_if_stopping(self) -> None:
        if self._is_stopping:
            raise stopping()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def capacity(engine: OwnedEngine) -> str:
    """How many chats the caches of a model have room for, in one line."""
    size = f" in {format_bytes(engine.kv_cache_bytes)}" if engine.kv_cache_bytes else ""
    chats = min(engine.num_sequences, engine.cache_slots // CHAT)
    found = f"{engine.num_sequences} answers at once, room for {engine.cache_slots:,} tokens{size}"
    plural = "" if chats == 1 else "s"
    chats_line = f"holds {chats} chat{plural} of {CHAT:,} tokens" if chats else f"less than a chat of {CHAT:,} tokens"
    return "; ".join(part for part in (found, chats_line, engine.settings) if part)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, and its end also where nobody waits for that any more."""
    task, cancellation = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    failure = task.exception()  # asked for in any case, or asyncio would complain that nobody saw it
    if cancellation is not None:
        raise cancellation
    if failure is not None:
        raise failure
