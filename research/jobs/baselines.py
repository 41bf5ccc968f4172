"""Score the home-control job without a language model: hassil's matcher and a linear classifier.

    python -m research.jobs.baselines FOLDER --limit 300

reads train.jsonl and test.jsonl of `research.jobs.home`. The matcher has the sentence templates of training and all
names of the test, so it fails on new phrasing only. The classifier chooses the function and fills no arguments.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hassil import Intents, recognize_best
from hassil.intents import SlotList, TextSlotList

from efficientllm.train.evaluation.jobs import Example, JobResult, call, read_examples

from .home import TEST_NAMES, Language, NewNames, split_templates

NOTHING = "refuse"
"""Class of requests that fit no intent."""


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


def classifier_answers(training: Path, requests: Sequence[str]) -> list[str]:
    """Return the function that a linear classifier over words and pairs of words chooses, without arguments."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    texts, names = zip(*_labelled(training), strict=True)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    model.fit(texts, names)
    found = model.predict(list(requests))
    return ["" if name == NOTHING else json.dumps({"name": name, "arguments": {}}) for name in found]


def _labelled(training: Path) -> Iterator[tuple[str, str]]:
    """Yield (request, function) of the training chats."""
    for line in training.read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        calls = answer.get("tool_calls")
        yield question["content"], calls[0]["function"]["name"] if calls else NOTHING


def request_of(example: Example) -> str:
    """Return the user's request."""
    return str(example.chat.messages[-2]["content"])


def score(answers: Sequence[str], examples: Sequence[Example]) -> JobResult:
    """Score answers of no model by the metric of calls."""
    found = [call(answer, example) for answer, example in zip(answers, examples, strict=True)]
    values = {name: [each[name] for each in found] for name in found[0]}
    return JobResult("call", values, list(answers), 0.0, 0.0)


def main() -> None:
    """Print the scores of both."""
    parser = argparse.ArgumentParser(description="Score hassil's matcher and a linear classifier on the home job.")
    parser.add_argument("folder", type=Path, help="folder written by research.jobs.home")
    parser.add_argument("--limit", type=int, default=300, help="requests of the test [300]")
    arguments = parser.parse_args()
    examples = read_examples(arguments.folder / "test.jsonl", arguments.limit)
    requests = [request_of(each) for each in examples]
    answers = {
        "hassil, templates of training": matcher_answers(requests),
        "linear classifier": classifier_answers(arguments.folder / "train.jsonl", requests),
    }
    for name, given in answers.items():
        result = score(given, examples)
        values = ", ".join(f"{each} {result.mean(each):.3f} ± {result.stderr(each):.3f}" for each in result.values)
        print(f"{name}: {values}")


if __name__ == "__main__":
    main()
