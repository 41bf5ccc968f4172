"""What measures endpoints: clients in numbers, and a long prompt amid somebody's answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import serve

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.options import AppOptions
from research import server_load as load
from research import server_stall as stall


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    pool = ModelPool({"model": str(artefact)}, EngineOptions(threads=1, context=512, parallel=4))
    with serve(pool, AppOptions()) as served:
        yield f"{served}/v1"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_clients_in_numbers(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(load.body, [address, "--clients", "1,3", "--requests", "2", "--rounds", "1"]) == 0
    *_, one, three = capsys.readouterr().out.splitlines()
    assert [cells(row)[0] for row in (one, three)] == ["1", "3"]
    assert [cells(row)[5:] for row in (one, three)] == [["2", "0"], ["6", "0"]]  # answers, lost


def test_a_long_prompt_amid_an_answer(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--rounds", "2", "--tokens", "120", "--undisturbed", "4", "--sentences", "3")
    assert run_command(stall.body, [address, *flags]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert cells(header)[1:] == ["answers", "pause before, ms", "meanwhile, ms", "longest, ms", "long prompt, s"]
    endpoint, answers, *figures = cells(row)
    assert (endpoint, answers) == (address, "2")
    assert all(figures)


def test_what_cannot_be_measured_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(stall.body, [address, "--undisturbed", "160"]) == 2
    assert "--undisturbed 160: must be below --tokens" in capsys.readouterr().err
    assert run_command(stall.body, ["http://127.0.0.1:9/v1"]) == 2
    assert capsys.readouterr().err == "error: http://127.0.0.1:9/v1: All connection attempts failed\n"
