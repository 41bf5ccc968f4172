"""The table of the home-control job: its baselines and its rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")
if importlib.util.find_spec("sklearn") is None:  # every worker collects this file, and to import it takes a second
    pytest.skip("could not import 'sklearn'", allow_module_level=True)

from efficientllm.devices.results import Measurement, summarize
from efficientllm.train.data.chat import Chat
from efficientllm.train.evaluation.job_metrics import Example, calls_in
from efficientllm.train.evaluation.jobs import JobResult, read_examples
from research.jobs import home
from research.jobs.baselines import baselines, classifier_answers, matcher_answers, request_of, score
from research.jobs.table import HEADER, Row, draw

pytestmark = pytest.mark.xdist_group("home job")  # as in test_home_job.py


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    home.write_job(folder, 400, 20, 1)
    return folder


def test_the_matcher_fills_arguments_of_templates_that_it_has() -> None:
    answers = matcher_answers(["add oat milk to my shopping list", "what is the capital of lisbon"])
    assert calls_in(answers[0]) == [("HassShoppingListAddItem", {"item": "oat milk"})]
    assert answers[1] == ""


def test_the_classifier_chooses_a_function_and_no_arguments(job: Path) -> None:
    examples = read_examples(job / "test.jsonl")
    answers = classifier_answers(read_examples(job / "train.jsonl"), list(map(request_of, examples)))
    result = score(answers, examples)
    assert result.mean("function") > 0.3
    assert all(not arguments for answer in answers for _, arguments in calls_in(answer))


def test_each_baseline_is_scored(job: Path) -> None:
    results = baselines(job, 5)
    assert list(results) == ["hassil, templates of training", "linear classifier"]
    assert all(len(result.answers) == 5 for result in results.values())


def test_the_classifier_chooses_labels() -> None:
    training, test = (
        [Example(Chat((message("user", text), message("assistant", label))), {}) for text, label in pairs]
        for pairs in ([("turn it up", "louder"), ("turn it down", "softer")], [("up", "louder"), ("down", "softer")])
    )
    answers = classifier_answers(training, [request_of(each) for each in test])
    assert score(answers, test, "label").mean("accuracy") == 1


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_row_has_the_time_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"exact": [1.0, 0.0], "function": [1.0, 1.0], "argument_f1": [1.0, 0.5], "refused": [0.0, 1.0]}
    result = JobResult("call", values, ["", ""], 1.0, 150.0)
    measured = Measurement({"pp22": [440.0], "tg25": [250.0]}, peak_rss_bytes=200_000_000)
    speed = summarize("home", "0", "llama.cpp", 40_000_000, {}, [measured])
    rows = [Row("home", result, speed), Row("home, 20MB", result, speed), Row("nothing", result)]
    assert rows[0].cells()[-3:] == ["40.0", "150", "200"]
    assert rows[2].cells()[-3:] == ["", "", ""]
    assert {len(row.cells()) for row in rows} == {len(HEADER)}
    labels: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.annotate", lambda self, text, *more, **options: labels.append(text))
    draw(rows, tmp_path / "job.png")
    assert labels == ["home", "nothing"]  # two sizes of one kind have one name
    assert (tmp_path / "job.png").read_bytes().startswith(b"\x89PNG")


def test_the_seed_decides_on_the_templates_of_the_matcher(job: Path) -> None:
    rows = [json.loads(line) for line in (job / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    new = [row["messages"][0]["content"] for row in rows if row["is_new_template"]][:8]
    expected = [row["messages"][1].get("tool_calls") for row in rows if row["is_new_template"]][:8]
    found = [calls_in(answer) for answer in matcher_answers(new, seed=1)]
    wanted = [
        [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls or ()]
        for calls in expected
    ]
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) < len(new)
