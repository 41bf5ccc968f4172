"""The linear classifier that jobs are compared with."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("sklearn") is None:  # every worker collects this file, and to import it takes a second
    pytest.skip("could not import 'sklearn'", allow_module_level=True)

from efficientllm.train.data.chat import Chat
from efficientllm.train.evaluation.job_metrics import Example
from research.jobs.baselines import classifier_answers, request_of, score


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_classifier_chooses_labels() -> None:
    training, test = (
        [Example(Chat((message("user", text), message("assistant", label))), {}) for text, label in pairs]
        for pairs in ([("turn it up", "louder"), ("turn it down", "softer")], [("up", "louder"), ("down", "softer")])
    )
    answers = classifier_answers(training, [request_of(each) for each in test])
    assert score(answers, test, "label").mean("accuracy") == 1
