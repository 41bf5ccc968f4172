"""The home-control job: reproducible, readable by training, and without overlap between training and test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")

from research.jobs import home

pytestmark = pytest.mark.xdist_group("home job")  # one worker reads the templates, which takes seconds


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    home.write_job(folder, 300, 80, 1)
    return folder


def test_the_job_follows_from_the_seed(job: Path, tmp_path: Path) -> None:
    home.write_job(tmp_path / "same", 300, 80, 1)
    home.write_job(tmp_path / "other", 300, 80, 2)
    for file in job.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "other" / "test.jsonl").read_bytes() != (job / "test.jsonl").read_bytes()


def test_every_call_is_of_an_offered_tool(job: Path) -> None:
    test = rows(job / "test.jsonl")
    offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in test[0]["tools"]}
    for row in rows(job / "train.jsonl") + test:
        for call in row["messages"][-1].get("tool_calls", []):
            arguments = json.loads(call["function"]["arguments"])
            properties = list(offered[call["function"]["name"]]["properties"])
            assert list(arguments) == sorted(arguments, key=properties.index)


def test_training_and_test_share_no_request(job: Path) -> None:
    asked = [{row["messages"][-2]["content"] for row in rows(job / f"{name}.jsonl")} for name in ("train", "test")]
    assert len(asked[0]) == 300
    assert len(asked[1]) == 80
    assert not asked[0] & asked[1]


def test_most_test_requests_have_unseen_phrasing(job: Path) -> None:
    test = rows(job / "test.jsonl")
    assert sum(row["is_new_template"] for row in test) >= 0.75 * len(test)


def test_training_refuses_more_requests_than_the_test_and_others(job: Path) -> None:
    def refused(name: str) -> list[str]:
        return [row["messages"][-2]["content"] for row in rows(job / name) if row["messages"][-1].get("content")]

    assert len(refused("train.jsonl")) / 300 == pytest.approx(home.REFUSED_IN_TRAINING, abs=0.04)
    assert len(refused("test.jsonl")) / 80 == pytest.approx(home.REFUSED, abs=0.05)
    openings = {template.partition("{")[0] for template in home.TRAINING_REFUSED_REQUESTS}
    assert not [text for text in refused("test.jsonl") if any(text.startswith(each) for each in openings if each)]
