"""Run a task of lm-evaluation-harness on an evaluated model."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate

from .scoring import Advance, EvaluatedModel, ScoreCache, ScoreRequest
from .tasks import TASKS, TaskResult, open_task

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its greeting and warnings do not concern the user

GOLD = "gold_log_likelihood"
"""Log-likelihood of the right choice in nats. Between two models it differs far more clearly than accuracy, which
changes only with the few documents whose order of choices changes."""


class HarnessModel(TemplateLM):
    """Adapter of an EvaluatedModel to lm-eval's interface."""

    def __init__(self, model: EvaluatedModel, cache: ScoreCache, advance: Advance) -> None:
        super().__init__()
        self.evaluated = model
        self.cache = cache
        self.advance = advance

    @property
    def eot_token_id(self) -> int:
        return self.evaluated.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.evaluated.tokenize(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        wanted = [self._request(context, continuation) for _, context, continuation in requests]
        return self.cache.totals(self.evaluated, wanted, self.advance)

    def _request(self, context: list[int], continuation: list[int]) -> ScoreRequest:
        """Return a request of the last tokens that fit the context, as lm-eval's own models truncate."""
        tokens = (*context, *continuation)[-(self.evaluated.context_length + 1) :]
        return ScoreRequest(tokens, max(1, len(tokens) - len(continuation)))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        raise NotImplementedError("perplexity is measured by efficientllm-eval itself")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("the tasks of efficientllm-eval are multiple choice")


def run_task(
    name: str,
    model: EvaluatedModel,
    data_dir: Path | None,
    limit: int,
    cache: ScoreCache,
    advance: Advance = lambda done, total: None,
) -> TaskResult:
    """Return the zero-shot scores of a task on its first `limit` documents, or on all if `limit` is 0.

    For mmlu the limit holds for each subject.
    """
    documents: list[str] = []
    values: dict[str, list[float]] = {}
    with contextlib.redirect_stderr(io.StringIO()), open_task(name, data_dir) as tasks:  # 57 progress bars for mmlu
        lm = HarnessModel(model, cache, advance)
        results: Any = evaluate(lm, tasks, limit=limit or None, bootstrap_iters=0, log_samples=True)
    for name_of_task, samples in results["samples"].items():
        task = tasks[name_of_task]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            documents.append(sample["doc_hash"][:16])
            for metric in sample["metrics"]:
                values.setdefault(metric, []).append(float(sample[metric]))
            values.setdefault(GOLD, []).append(_gold_log_likelihood(task, sample))
    return TaskResult(TASKS[name].metric, documents, values)


def _gold_log_likelihood(task: Any, sample: dict[str, Any]) -> float:
    """Return the log-likelihood of the right choice in one of lm-eval's logged samples.

    If the choices come before the answer (winogrande), the text of the document is the index of the choice.
    """
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    log_likelihood, _ = sample["filtered_resps"][int(gold)]
    return float(log_likelihood)
