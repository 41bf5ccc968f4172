"""The soak of tests/tools, shortened: nothing lost, nothing crossed, every place given back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import soak
from serving import serve

from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.server.app import AppOptions
from efficientllm.server.models.pool import ModelPool

OPTIONS = EngineOptions(threads=1, context=1024, parallel=2)


@pytest.fixture(scope="module")
def tokens(artefact: Path) -> dict[str, int]:
    engine = load_engine(artefact, OPTIONS)
    tokens = soak.distinct_tokens(engine)
    engine.close()
    return tokens


def test_clients_that_go_give_their_place_back(artefact: Path, tokens: dict[str, int]) -> None:
    async def phases() -> list[str]:
        return [phase async for phase, _ in soak.cancellations(address, pool, tokens, 3 * len(soak.PHASES))]

    pool = ModelPool({"model": str(artefact)}, OPTIONS)
    with serve(pool, AppOptions()) as address:
        assert asyncio.run(asyncio.wait_for(phases(), 60)) == [*soak.PHASES] * 3


def test_a_crowd_gets_its_own_answers(artefact: Path, tokens: dict[str, int]) -> None:
    clients = [(token, text) for text, token in tokens.items()][:24]
    pool = ModelPool({"model": str(artefact)}, EngineOptions(threads=1, context=256), waiting=24)
    with serve(pool, AppOptions()) as address:
        found = asyncio.run(soak.crowd(address, ["model"], clients, requests=96, seconds=0))
    assert found.statuses.keys() == {200}
    assert found.statuses[200] >= 96
    assert found.crossed == 0
