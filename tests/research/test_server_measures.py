"""The load that several clients put on a server, measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import loaded_pool, serve

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.options import AppOptions
from research import server_load as load


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    pool = loaded_pool({"model": str(artefact)}, EngineOptions(threads=1, context=512, parallel=4))
    with serve(pool, AppOptions()) as served:
        yield f"{served}/v1"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_clients_in_numbers(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(load.body, [address, "--clients", "1,3", "--requests", "2", "--rounds", "1"]) == 0
    *_, one, three = capsys.readouterr().out.splitlines()
    assert [cells(row)[1] for row in (one, three)] == ["1", "3"]
    assert [cells(row)[6:] for row in (one, three)] == [["2", "0"], ["6", "0"]]  # answers, lost


def test_separate_prompts_share_no_beginning(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    beginnings = {load.question(number, 5) for number in range(-20, 200)}
    assert len(beginnings) == 220
    flags = ("--clients", "2", "--requests", "1", "--rounds", "1", "--words", "0,20", "--tokens", "2")
    assert run_command(load.body, [address, *flags]) == 0
    *_, short, long = capsys.readouterr().out.splitlines()
    assert int(cells(short)[0].split()[0]) < int(cells(long)[0].split()[0])
