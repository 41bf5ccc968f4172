"""Score a job of calls or labels without a language model: a linear classifier, and hassil's matcher.

    python -m research.jobs.baselines FOLDER --limit 300                        # a folder of research.jobs.home
    python -m research.jobs.baselines FOLDER --metric label --only classifier   # labels

The command reads train.jsonl and test.jsonl. The matcher knows the home-control job: it has the sentence templates of
training and all names of the test, so it fails on new phrasing only. The classifier chooses the answer, for calls the
function without arguments.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hassil import Intents, recognize_best
from hassil.intents import SlotList, TextSlotList

from efficientllm.train.evaluation.job_metrics import Example, calls_in, metric_named
from efficientllm.train.evaluation.jobs import JobResult, read_examples

from .home import TEST_NAMES, Language, NewNames, split_templates


def matcher_answers(requests: Sequence[str], seed: int = 0) -> list[str]:
    """Return the answer of hassil to each request, as JSON or an empty string.

    `seed` is that of the job, which decides on the templates of training.
    """
    source = resources.files("home_assistant_intents") / "data" / "en.json"
    data = copy.deepcopy(json.loads(source.read_text(encoding="utf-8")))
    trained = {(each.intent, each.text) for each in split_templates(Language.load(), seed)[0]}
    for name, intent in data["intents"].items():
        for block in intent["data"]:
            block["sentences"] = [text for text in block["sentences"] if (name, text) in trained]
    intents, slot_lists = Intents.from_dict(data), _slot_lists(data)
    answers = []
    for request in requests:
        found = recognize_best(request, intents, slot_lists=slot_lists, best_metadata_key=None)
        answers.append("" if found is None else _as_call(found.intent.name, found.entities_list))
    return answers


def _slot_lists(data: Mapping[str, Any]) -> dict[str, SlotList]:
    """Return the names, rooms and floors of the test's home. Each name has the domain of its device as context."""
    names = [(name, name, {"domain": domain}) for domain, those in TEST_NAMES.items() for name in those]
    lists: dict[str, SlotList] = {"name": TextSlotList.from_tuples(names, name="name")}
    for kind in ("area", "floor"):
        lists[kind] = TextSlotList.from_strings(NewNames.all_of(kind), name=kind)
    return lists


def _as_call(name: str, entities: Sequence[Any]) -> str:
    return json.dumps({"name": name, "arguments": {each.name: each.value for each in entities}})


def classifier_answers(training: Sequence[Example], requests: Sequence[str]) -> list[str]:
    """Return the answers that a linear classifier over words and pairs of words chooses, calls without arguments."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    model.fit([request_of(each) for each in training], [_answer_class(each) for each in training])
    return [str(each) for each in model.predict(list(requests))]


def _answer_class(example: Example) -> str:
    calls = calls_in(example.expected)
    return json.dumps({"name": calls[0][0], "arguments": {}}) if calls else example.expected


def request_of(example: Example) -> str:
    """Return the user's request."""
    return str(example.chat.messages[-2]["content"])


def score(answers: Sequence[str], examples: Sequence[Example], metric: str = "call") -> JobResult:
    """Score answers of no model."""
    measure = metric_named(metric)
    found = [measure(answer, example) for answer, example in zip(answers, examples, strict=True)]
    values = {name: [each[name] for each in found] for name in found[0]}
    return JobResult(metric, values, list(answers), 0.0, 0.0)


def baselines(folder: Path, limit: int, metric: str = "call", only: str | None = None) -> dict[str, JobResult]:
    """Return the scores of hassil's matcher and of a linear classifier on the first `limit` requests of the test."""
    examples = read_examples(folder / "test.jsonl", limit)
    requests = [request_of(each) for each in examples]
    answers = {}
    if only != "classifier":
        answers["hassil, templates of training"] = matcher_answers(requests)
    if only != "matcher":
        answers["linear classifier"] = classifier_answers(read_examples(folder / "train.jsonl"), requests)
    return {name: score(given, examples, metric) for name, given in answers.items()}


def main() -> None:
    """Print the scores of the baselines."""
    parser = argparse.ArgumentParser(description="Score a linear classifier and hassil's matcher on a job.")
    parser.add_argument("folder", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--metric", choices=("call", "label"), default="call", help="[call]")
    parser.add_argument("--limit", type=int, default=300, help="requests of the test [300]")
    parser.add_argument("--only", choices=("classifier", "matcher"), help="one of both")
    for name, result in baselines(**vars(parser.parse_args())).items():
        values = ", ".join(f"{each} {result.mean(each):.3f} ± {result.stderr(each):.3f}" for each in result.values)
        print(f"{name}: {values}")


if __name__ == "__main__":
    main()
