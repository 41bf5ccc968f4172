"""Public jobs as chats: read by training and by the metric of calls, without overlap of training and test."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from efficientllm.train.data.documents import DataSpec, open_documents
from efficientllm.train.evaluation.job_metrics import metric_named
from efficientllm.train.evaluation.jobs import check_examples, read_examples
from research.jobs import shared

DATA = Path(__file__).parents[3] / "shared" / "data" / "jobs"
METRICS = {"clinc150": "label", "sgd_calls": "call", "wikisql": "exact", "e2e": "contains"}
CALL = {"name": "find", "arguments": {"city": "Bern"}}


def dialogue(number: int) -> dict[str, Any]:
    turns = ["A salon?", "Which city?", f"Bern, {number}", json.dumps(CALL)]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"messages": messages, "tools": [{"type": "function", "function": {"name": "find"}}], "seen_service": True}


def test_calls_are_served_calls_and_earlier_answers_are_not_learned(tmp_path: Path) -> None:
    for part, numbers in (("train", range(5)), ("test", range(4, 7))):
        lines = "\n".join(json.dumps(dialogue(number)) for number in numbers)
        (tmp_path / f"sgd_calls_{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    shared.write_job(tmp_path, "sgd_calls", tmp_path / "job", 0, 2, 0)
    learned = list(open_documents(DataSpec(str(tmp_path / "job" / "train.jsonl"))))
    assert len(learned) == 4  # number 4 is in the test
    _, earlier, _, last = learned[0].messages  # type: ignore[union-attr]
    assert earlier == {"role": "assistant", "content": "Which city?", "weight": 0}
    assert last["tool_calls"] == [{"type": "function", "function": CALL}]
    examples = read_examples(tmp_path / "job" / "test.jsonl")
    assert len(examples) == 2
    assert all(metric_named("call")(json.dumps(CALL), each)["exact"] == 1 for each in examples)
    assert examples[0].record["seen_service"] is True


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the project")
@pytest.mark.parametrize("name", shared.NAMES)
def test_expected_answers_score_one(name: str, tmp_path: Path) -> None:
    shared.write_job(DATA, name, tmp_path, 50, 50, 0)
    assert len(list(open_documents(DataSpec(str(tmp_path / "train.jsonl"))))) == 50
    examples = read_examples(tmp_path / "test.jsonl")
    check_examples(examples, METRICS[name])
    score = metric_named(METRICS[name])
    assert all(next(iter(score(each.expected, each).values())) == 1 for each in examples)
