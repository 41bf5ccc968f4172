"""Score a job of calls or labels without a language model: with a linear classifier.

    python -m research.jobs.baselines FOLDER --metric label --limit 300

The command reads train.jsonl and test.jsonl. The classifier chooses the answer, for calls the function without
arguments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from efficientllm.train.evaluation.job_metrics import Example, metric_named
from efficientllm.train.evaluation.jobs import JobResult, read_examples


def classifier_answers(training: Sequence[Example], requests: Sequence[str]) -> list[str]:
    """Return the answers that a linear classifier over words and pairs of words chooses, calls without arguments."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    model.fit([request_of(each) for each in training], [_answer_class(each) for each in training])
    return [str(each) for each in model.predict(list(requests))]


def _answer_class(example: Example) -> str:
    calls = example.calls
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


def main() -> None:
    """Print the score."""
    parser = argparse.ArgumentParser(description="Score a linear classifier on a job.")
    parser.add_argument("folder", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--metric", choices=("call", "label"), default="call", help="[call]")
    parser.add_argument("--limit", type=int, default=300, help="requests of the test [300]")
    options = parser.parse_args()
    examples = read_examples(options.folder / "test.jsonl", options.limit)
    training = read_examples(options.folder / "train.jsonl")
    result = score(classifier_answers(training, list(map(request_of, examples))), examples, options.metric)
    values = ", ".join(f"{each} {result.mean(each):.3f} ± {result.stderr(each):.3f}" for each in result.values)
    print(f"linear classifier: {values}")


if __name__ == "__main__":
    main()
