"""Load models on use, and unload the least recently used one if memory is short."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...runtime.base.errors import EfficientLLMError, UsageError
from ...runtime.base.progress import PROGRESS_LOGGER
from ...runtime.base.quantities import format_bytes
from ...runtime.base.user_cache import cache_folder
from ...runtime.engines.artefact import Artefact
from ...runtime.engines.cache_pool import common_length
from ...runtime.engines.engine import DEFAULT_CONTEXT, EngineOptions, load_engine
from ...runtime.engines.prompt_store import PromptStore
from ...runtime.engines.scheduler import EngineScheduler
from ...runtime.grammar import read_vocabulary
from ...runtime.prompt import tool_prompt
from ..schemas.api_error import APIError, busy_error, shutdown_error, unknown_model_error, validation_message
from ..schemas.completions import ChatRequest
from .pool_options import PoolOptions
from .worker import Deadline, EngineWorker, run_in_thread

DEFAULT_PARALLEL = 16
"""Answers of one model that are computed together, unless --parallel is given."""

CHAT_TOKENS = 2048
"""Tokens of a typical chat, for the line that reports how many chats fit."""


class ModelPool:
    """Models by name, loaded within the limits of the server."""

    def __init__(self, artefacts: Mapping[str, str], options: EngineOptions, limits: PoolOptions | None = None) -> None:
        """Open `artefacts`, {name: path}. `load_first` compares their files and loads the first one."""
        self.artefacts = {name: Artefact.open(path) for name, path in artefacts.items()}
        self.jobs = {
            f"{name}:{job}": (name, job) for name, artefact in self.artefacts.items() for job in artefact.job_names
        }
        """{name of a model, a colon and the name of a job: both names}"""
        if twice := self.jobs.keys() & self.artefacts.keys():
            raise UsageError(f"--model {min(twice)}: is the name of a job; choose another name")
        self.options = replace(options, parallel=options.parallel or DEFAULT_PARALLEL)
        self.limits = limits = limits or PoolOptions()
        self._pins = list(map(read_pin, limits.pin))
        self._keep_seconds: dict[str, float] = {}
        """{name: time in which the model stays loaded without requests}, where a request gave one"""
        self._workers: dict[str, EngineWorker] = {}
        self._loading = asyncio.Lock()
        self._sizes = {name: artefact.file_bytes for name, artefact in self.artefacts.items()}
        """{name: bytes in memory}, of the files and, once the model was loaded, also of its caches."""
        self._arriving = Counter[str]()
        """{name: requests that do not have a worker yet}"""
        self._idle = asyncio.Event()
        """Set when a model has become idle or the server stops."""
        self._needs_room = False
        """True while a load waits until a model is idle. Then all requests take their turn, or it might never be."""
        self._is_stopping = False
        self._unloads = set[asyncio.Task[None]]()
        """Unloads in progress. asyncio itself keeps no reference to a task."""
        self.is_ready = False
        """True once `load_first` has ended."""

    def _verify_and_load(self) -> dict[str, EngineWorker]:
        """Compare all files with their manifests, and return the worker of the first model by its name."""
        for artefact in self.artefacts.values():
            artefact.verify()
        first = next(iter(self.artefacts))
        return {first: self._load(first)}

    async def load_first(self) -> None:
        """Compare all files with their manifests and load the first model, while requests wait.

        Raise ArtefactError if a file is damaged. The requests that wait are refused then, and if the call is cancelled.
        """
        async with self._loading:
            try:
                # a daemon thread, so that a server that stops does not wait for it
                self._workers.update(await run_in_thread(self._verify_and_load))
            except BaseException:
                self.abort()
                raise
        self.is_ready = True

    def _load(self, name: str) -> EngineWorker:
        engine = load_engine(self.artefacts[name], self.options, measure_passes=False)
        caches = engine.kv_cache_bytes + engine.parked_bytes
        self._sizes[name] = self.artefacts[name].file_bytes + caches
        # Read before a request needs a grammar. Reading cannot be stopped and would keep the place of a lost client.
        threading.Thread(target=read_vocabulary, args=(engine,), daemon=True).start()
        save_prompts = self._restore_prompts(name, engine)
        try:
            for pin in self._pins:
                engine.pin(tokens := pinned_tokens(engine, pin))
                logging.getLogger(PROGRESS_LOGGER).info("%s: %d tokens pinned", name, len(tokens))
        except BaseException:
            engine.close()
            raise
        logging.getLogger(PROGRESS_LOGGER).info("%s: %s", name, describe_capacity(engine))
        return EngineWorker(engine, self.limits.waiting, partial(self._record_idle, name), save_prompts)

    def keep(self, name: str, seconds: float) -> None:
        """Keep a model loaded for `seconds` after its last request until it is unloaded. Negative: for ever."""
        self._keep_seconds[self.model_of(name)] = seconds if seconds >= 0 else float("inf")

    def keep_by_default(self, name: str) -> None:
        """Keep a model loaded as long as the server's limits say."""
        self._keep_seconds.pop(self.model_of(name), None)

    def expires_in(self, name: str) -> float:
        """Return the seconds until a loaded model is unloaded if no request comes."""
        return self._idle_seconds(name) - (time.monotonic() - self._workers[name].last_used)

    def _idle_seconds(self, name: str) -> float:
        return self._keep_seconds.get(name, self.limits.idle_unload or float("inf"))

    def _record_idle(self, name: str) -> None:
        """Wake loads that wait for an idle model, and unload this one if it stays idle."""
        self._idle.set()
        if (seconds := self._idle_seconds(name)) < float("inf"):
            loop = asyncio.get_running_loop()

            def unload() -> None:
                self._unloads.add(loop.create_task(self._unload_expired(name)))

            loop.call_later(seconds, unload)

    async def _unload_expired(self, name: str) -> None:
        """Unload a model unless it was used meanwhile."""
        async with self._loading:  # a request that comes now waits, and loads the model again
            worker = self._workers.get(name)
            if worker is not None and not worker.in_flight and self.expires_in(name) <= 0:
                await _run_to_completion(self._unload(name))
        self._unloads = {task for task in self._unloads if not task.done()}

    def _restore_prompts(self, name: str, engine: EngineScheduler) -> Callable[[], None]:
        """Read the stored prompts of a model, and return the function that writes them before it is unloaded."""
        store = None
        if self.limits.prompt_cache:
            folder = cache_folder() / "prompts"
            store = engine.prompt_store(folder, self.artefacts[name].sha256, self.limits.prompt_cache)
        if store is None:
            return lambda: None
        with engine.caches() as caches:
            tokens = store.restore(caches)
        if tokens:
            logging.getLogger(PROGRESS_LOGGER).info("%s: %d tokens of earlier prompts restored", name, tokens)
        return partial(_save_prompts, engine, store)

    @property
    def loaded(self) -> dict[str, EngineWorker]:
        """Return the workers of the loaded models by name."""
        return dict(self._workers)

    @property
    def in_flight(self) -> int:
        """Return the number of requests that wait or are being answered."""
        return sum(worker.in_flight for worker in self._workers.values()) + sum(self._arriving.values())

    @property
    def names(self) -> list[str]:
        """Return the names of all models, then those of all jobs."""
        return [*self.artefacts, *self.jobs]

    def named(self, name: str) -> str:
        """Return the name of the model or job that a request for `name` means.

        Any name means the only model, unless it has jobs. "" means the first model.
        """
        first, *others = self.artefacts
        return name if name and (others or self.jobs) else first

    def model_of(self, name: str) -> str:
        """Return the name of the model that has a job. Raises APIError 404 for an unknown name."""
        if name not in self.names:
            raise unknown_model_error(name, self.names)
        return self.jobs.get(name, (name, ""))[0]

    def job_of(self, name: str) -> str:
        """Return the name of the job that a name has after the model's, "" for a model."""
        return self.jobs.get(name, (name, ""))[1]

    def require(self, name: str) -> Artefact:
        """Return the artefact of a model or job. Raises APIError 404 for an unknown one."""
        return self.artefacts[self.model_of(name)]

    def context_length(self, name: str) -> int | None:
        """Return the tokens of prompt and answer together, or None if only loading can tell."""
        name = self.model_of(name)
        if name in self._workers:
            return self._workers[name].engine.context_length
        trained = self.artefacts[name].context_length
        default = min(DEFAULT_CONTEXT, trained) if trained else None
        return self.options.context or default

    def deadline(self) -> Deadline:
        """Return the deadline of a request that arrives now."""
        return Deadline.from_now(self.limits.timeout)

    async def enter(self, name: str, deadline: Deadline) -> EngineWorker:
        """Take a place in the queue of a model, load the model if necessary, and return its worker.

        A model with a taken place is not unloaded. Raise APIError 404 for an unknown model, 429 if its queue is full,
        503 if it does not fit beside models that are busy until `deadline`, or if the server stops. A cancelled call
        keeps no place.
        """
        name = self.model_of(name)
        # a model that is not loaded has no worker yet, whose places would limit the queue
        if self._arriving[name] >= self.limits.waiting + self.options.parallel:
            raise busy_error()
        if name in self._workers and not self._needs_room:  # another model may be loading
            self._refuse_if_stopping()
            self._workers[name].enter()
            return self._workers[name]
        self._arriving[name] += 1
        try:
            async with asyncio.timeout_at(deadline.at) as waiting:
                async with self._loading:  # in the order of arrival, so that no model excludes another one for ever
                    self._refuse_if_stopping()
                    # again if the caches did not fit after the load, see `_load_into_room`
                    while name not in self._workers:
                        await self._make_room(name)
                        waiting.reschedule(None)  # the deadline does not end a load that has started
                        # also for a cancelled call: the memory of a started load must be counted
                        await _run_to_completion(self._load_into_room(name))
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
        """Unload least recently used models until the model `name` fits. Wait for one that is idle."""
        self._needs_room = True
        try:
            while not self._fits(name):
                if not await self._unload_idle():
                    # nothing is awaited between the look for an idle model and this line, so no wake-up is lost
                    self._idle.clear()
                    await self._idle.wait()
                self._refuse_if_stopping()
        finally:
            self._needs_room = False

    async def _load_into_room(self, name: str) -> None:
        """Load a model. The size of its caches is known only then.

        If it does not fit after all, idle models are unloaded. If none is idle, the model itself is unloaded.
        """
        try:
            worker = await asyncio.to_thread(self._load, name)
        except (EfficientLLMError, OSError) as error:
            raise APIError(503, f"model {name!r} cannot be loaded: {error}", "server_error") from error
        while not self._fits(name):
            if not await self._unload_idle():
                await asyncio.to_thread(worker.close)
                return
        self._workers[name] = worker

    async def _unload_idle(self) -> bool:
        """Unload the least recently used idle model. Return False if none is idle."""
        idle = [(worker.last_used, key) for key, worker in self._workers.items() if not worker.in_flight]
        if idle:
            await self._unload(min(idle)[1])
        return bool(idle)

    async def _unload(self, name: str) -> None:
        self.keep_by_default(name)
        await asyncio.to_thread(self._workers.pop(name).close)

    def _fits(self, name: str) -> bool:
        """Return True if a model fits beside the loaded ones. Any model fits alone."""
        used = sum(self._sizes[each] for each in self._workers)
        return not self.limits.max_memory or not self._workers or used + self._sizes[name] <= self.limits.max_memory

    def abort(self) -> None:
        """End every answer and refuse new ones, because the server stops."""
        self._is_stopping = True
        self._idle.set()  # wakes loads that wait for an idle model, which then refuse
        for worker in self._workers.values():
            worker.abort()

    def _refuse_if_stopping(self) -> None:
        if self._is_stopping:
            raise shutdown_error()

    def close(self) -> None:
        """Unload all models after the answers in progress."""
        for worker in self._workers.values():
            worker.close()


def read_pin(path: str) -> ChatRequest:
    """Return the chat in a file: JSON with messages or with the fields of a request, else the text of a system message.

    Raise UsageError if it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else [{"role": "system", "content": text}]
        return ChatRequest.model_validate(content if isinstance(content, dict) else {"messages": content})
    except ValidationError as error:
        raise UsageError(f"--pin {path}: {validation_message(error.errors())}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--pin {path}: cannot be read: {error}; give a text or a .json file with messages") from error


def pinned_tokens(engine: EngineScheduler, pin: ChatRequest) -> list[int]:
    """Return the tokens that every prompt begins with that continues the chat `pin` with a question."""
    messages = pin.template_messages

    def prompt_with(question: str) -> list[int]:
        asked = [*messages, {"role": "user", "content": question}]
        return tool_prompt(engine, asked, pin.tool_use, pin.template_variables).tokens

    # what two questions share is the chat and what the template writes before a question
    one, other = prompt_with("a"), prompt_with("?")
    return one[: common_length(one, other, len(one))]


def describe_capacity(engine: EngineScheduler) -> str:
    """Return one line on the number of chats that the caches of a model hold."""
    size = f" in {format_bytes(engine.kv_cache_bytes)}" if engine.kv_cache_bytes else ""
    if engine.parked_bytes:
        size += f", {format_bytes(engine.parked_bytes)} more for idle chats"
    chats = min(engine.num_sequences, engine.cache_slots // CHAT_TOKENS)
    answers = f"{engine.num_sequences} answers at once, room for {engine.cache_slots:,} tokens{size}"
    plural = "" if chats == 1 else "s"
    held = f"holds {chats} chat{plural} of" if chats else "less than a chat of"
    return "; ".join(filter(None, [answers, f"{held} {CHAT_TOKENS:,} tokens", engine.settings]))


def _save_prompts(engine: EngineScheduler, store: PromptStore) -> None:
    with engine.caches() as caches:
        store.save(caches)


async def _run_to_completion(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` to its end, even if the caller is cancelled meanwhile."""
    task, cancellation = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    failure = task.exception()  # always retrieved, otherwise asyncio logs an error
    if cancellation is not None:
        raise cancellation
    if failure is not None:
        raise failure
