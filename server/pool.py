"""Several models behind one server: loaded on use, the least recently used unloaded where memory is short."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ..runtime.base.errors import EfficientLLMError
from ..runtime.base.quantities import format_bytes
from ..runtime.engines.artefact import Artefact
from ..runtime.engines.engine import EngineOptions, load_engine
from .schemas import APIError
from .worker import EngineWorker


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
        """Load the first of `artefacts` {name: path} and check the others' files.

        ArtefactError where one is damaged.
        """
        self.artefacts = {name: Artefact.open(path) for name, path in artefacts.items()}
        self.options, self.waiting, self.timeout, self.max_memory = options, waiting, timeout, max_memory
        self._workers: dict[str, EngineWorker] = {}
        self._loading = asyncio.Lock()
        first = next(iter(self.artefacts))
        self._workers[first] = self._load(first)

    def _load(self, name: str) -> EngineWorker:
        return EngineWorker(load_engine(self.artefacts[name], self.options), self.waiting, self.timeout)

    @property
    def loaded(self) -> dict[str, EngineWorker]:
        return dict(self._workers)

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self._workers.values())

    async def worker(self, name: str) -> EngineWorker:
        """The worker of a model, loaded now if need be.

        APIError 404 for an unknown model, 503 where it does not fit beside models that are busy.
        """
        if name not in self.artefacts:
            known = ", ".join(repr(known) for known in self.artefacts)
            raise APIError(404, f"model {name!r} does not exist; this server has {known}", code="model_not_found")
        async with self._loading:
            if name not in self._workers:
                await self._make_room(name)
                try:
                    self._workers[name] = await asyncio.to_thread(self._load, name)
                except EfficientLLMError as error:
                    raise APIError(503, f"model {name!r} cannot be loaded: {error}", "server_error") from error
            return self._workers[name]

    async def _make_room(self, name: str) -> None:
        needed = self.artefacts[name].file_bytes
        while self.max_memory and self._workers and self._used() + needed > self.max_memory:
            idle = [(worker.last_used, key) for key, worker in self._workers.items() if not worker.in_flight]
            if not idle:
                message = f"model {name!r} needs {format_bytes(needed)} and all loaded models are busy; try again later"
                raise APIError(503, message, "server_error", "model_overloaded")
            worker = self._workers.pop(min(idle)[1])
            await asyncio.to_thread(worker.close)

    def _used(self) -> int:
        loaded = self._workers.items()
        return sum(self.artefacts[name].file_bytes + worker.engine.kv_cache_bytes for name, worker in loaded)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
