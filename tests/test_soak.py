"""The soak of tests/tools, shortened: nothing lost, nothing crossed, every place given back."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soak
from serving import loaded_pool, serve

from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.server.models.worker import Deadline, EngineWorker
from efficientllm.server.options import AppOptions

OPTIONS = EngineOptions(threads=1, context=4096, parallel=2)


@pytest.fixture(scope="module")
def tokens(artefact: Path) -> dict[str, int]:
    engine = load_engine(artefact, OPTIONS)
    tokens = soak.distinct_tokens(engine)
    engine.close()
    return tokens


def test_clients_that_go_give_their_place_back(artefact: Path, tokens: dict[str, int]) -> None:
    async def phases() -> list[str]:
        return [phase async for phase, _ in soak.cancellations(address, pool, tokens, 3 * len(soak.PHASES))]

    pool = loaded_pool({"model": str(artefact)}, OPTIONS)
    with serve(pool, AppOptions()) as address:
        assert asyncio.run(asyncio.wait_for(phases(), 60)) == [*soak.PHASES] * 3


def test_a_place_in_line_is_free_before_the_pass_of_others_ends(artefact: Path) -> None:
    """And one of an answer that takes part in the pass when it has ended."""
    engine = load_engine(artefact, EngineOptions(threads=1, context=64))
    extend, begun, may_end = engine._extend, threading.Event(), threading.Event()

    def wait(*arguments: Any) -> list[np.ndarray]:
        rows = extend(*arguments)
        begun.set()
        assert may_end.wait(20)
        return rows

    engine._extend = wait  # type: ignore[method-assign]

    async def go() -> None:
        worker = EngineWorker(engine, waiting=4, on_idle=lambda: None)
        answers = []
        for token in (5, 6):
            worker.enter()
            pieces = worker.stream([Generation(engine, [token], AnswerOptions(32))], Deadline.from_now(60))
            answers.append(asyncio.ensure_future(anext(pieces)))
        await asyncio.to_thread(begun.wait, 20)
        answers[1].cancel()
        await asyncio.wait({answers[1]})
        assert worker.in_flight == 1
        answers[0].cancel()
        await asyncio.wait({answers[0]})
        assert worker.in_flight == 1
        may_end.set()
        while worker.in_flight:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(worker.close)

    asyncio.run(asyncio.wait_for(go(), 60))


def test_a_hostile_crowd_gets_its_own_answers_until_the_server_stops(artefact: Path, tokens: dict[str, int]) -> None:
    clients = [(token, text) for text, token in tokens.items()][:12]
    names = {"model": str(artefact), "other": str(artefact)}
    size = int(1.5 * Artefact.open(artefact).file_bytes)
    options = soak.SoakOptions(clients=12, max_memory=size)
    with soak.server_of(names, options, context=256) as (address, stop):
        found = asyncio.run(soak.crowd(address, list(names), clients, 48, 0, soak.KINDS, stop))
    assert found.statuses.keys() == {200}
    assert found.cancelled
    assert found.lost == found.crossed == 0
    assert found.at_stop.keys() <= {"200", "503", "connection closed"}
