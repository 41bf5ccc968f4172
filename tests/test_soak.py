"""The soak of tests/tools, shortened: nothing lost, nothing crossed, every place given back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import soak
from serving import serve

from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.server.app import AppOptions
from efficientllm.server.models.pool import ModelPool


def test_every_phase_of_an_answer_gives_its_place_back(artefact: Path) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1, context=1024, parallel=2))
    found = asyncio.run(asyncio.wait_for(soak.cancellations(engine, 3 * len(soak.PHASES)), 60))
    assert {phase: len(seconds) for phase, seconds in found.items()} == dict.fromkeys(soak.PHASES, 3)


def test_a_crowd_gets_its_own_answers(artefact: Path) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1, context=256))
    tokens = soak.distinct_tokens(engine, 24)
    engine.close()
    assert len(tokens) == 24
    pool = ModelPool({"model": str(artefact)}, EngineOptions(threads=1, context=256), waiting=24)
    with serve(pool, AppOptions()) as address:
        found = asyncio.run(soak.crowd(address, tokens, requests=96, seconds=0))
    assert found.statuses.keys() == {200}
    assert found.statuses[200] >= 96
    assert found.crossed == 0
