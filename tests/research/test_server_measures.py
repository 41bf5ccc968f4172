"""What measures answers: clients in numbers, a long prompt amid somebody's answer, passes, and starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import loaded_pool, serve

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.options import AppOptions
from research import answer_passes, server_restart
from research import server_load as load
from research import server_stall as stall


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


def test_prompts_of_their_own_share_no_beginning(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    beginnings = {load.question(number, 5) for number in range(-20, 200)}
    assert len(beginnings) == 220
    flags = ("--clients", "2", "--requests", "1", "--rounds", "1", "--words", "0,20", "--tokens", "2")
    assert run_command(load.body, [address, *flags]) == 0
    *_, short, long = capsys.readouterr().out.splitlines()
    assert int(cells(short)[0].split()[0]) < int(cells(long)[0].split()[0])


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


def test_passes_of_settings_beside_each_other(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = {"type": "object", "properties": {"area": {"type": "string", "examples": ["kitchen", "hall"]}}}
    function = {"name": "light_on", "parameters": schema}
    messages = [{"role": "user", "content": "Light in the kitchen"}, {"role": "assistant", "content": "Yes"}]
    record = {"messages": messages, "tools": [{"type": "function", "function": function}]}
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(record) + '\n{"text": "A word and a word"}\n{"question": "Who?"}\n', encoding="utf-8")
    flags = ("--tokens", "8", "--context", "512")
    assert run_command(answer_passes.body, [str(artefact), str(task), *flags]) == 0
    _, _, *rows = map(cells, capsys.readouterr().out.splitlines())
    assert [row[0] for row in rows] == ["one token a pass", "forced tokens", "look-up"]
    assert all(row[-1] == "3 of 3" for row in rows)
    assert float(rows[0][1]) == 8.0


def test_restarts_continue_a_stored_prompt(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_command(server_restart.body, [str(artefact), "--words", "60", "--context", "512", "--restarts", "1"]) == 0
    )
    _, _, new, restarted = map(cells, capsys.readouterr().out.splitlines())
    assert (new[0], restarted[0]) == ("new file", "restart 1")
    assert int(restarted[-1]) == int(restarted[-2]) - 1  # all but the last token are cached
