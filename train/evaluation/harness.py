"""lm-evaluation-harness around a ScoredModel: the adapter, and one task run through it.

Answers a model gave already, on disk one by one: a killed evaluation that is started again loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate

from .scoring import Request, ScoredModel, TaskResult
from .tasks import TASKS, open_task

Answer = tuple[float, bool]
"""(sum of the scored tokens' log-probabilities in nats, whether every one was the most likely)."""

Advance = Callable[[int, int], None]
"""advance(done, total), called after every answer."""


def no_progress(done: int, total: int) -> None:
    """An Advance that shows nothing."""


class RequestCache:
    """Answers by request, appended to a JSON-lines file."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` None: remember for this process only."""
        self.path = path
        self._answers: dict[str, Answer] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    key, log_prob, greedy = json.loads(line)
                except ValueError:  # the end of the file, or cut off by the kill
                    continue
                self._answers[key] = (log_prob, greedy)

    def answers(self, model: ScoredModel, requests: Sequence[Request], advance: Advance = no_progress) -> list[Answer]:
        """The answer to each request; only those not known yet are put to the model."""
        keys = [hashlib.sha256(repr((r.tokens, r.first)).encode()).hexdigest()[:32] for r in requests]
        open_places = [place for place, key in enumerate(keys) if key not in self._answers]
        done = len(keys) - len(open_places)
        for index, score in model.score([requests[place] for place in open_places]):
            answer = (float(score.log_probs.sum()), bool(score.is_greedy.all()))
            self._put(keys[open_places[index]], answer)
            done += 1
            advance(done, len(keys))
        return [self._answers[key] for key in keys]

    def _put(self, key: str, answer: Answer) -> None:
        self._answers[key] = answer
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([key, *answer]) + "\n")


logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it greets, and warns of what does not concern the user

GOLD = "gold_log_likelihood"
"""Log-likelihood of the right choice in nats: far sharper between two models than accuracy, which counts the few
documents whose order of choices changes."""


def _gold_log_likelihood(task: Any, sample: dict[str, Any]) -> float:
    """Of one of lm-eval's logged samples. Where choices stand before the answer (winogrande), the text is the index."""
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    log_likelihood, _ = sample["filtered_resps"][int(gold)]
    return float(log_likelihood)


class HarnessModel(TemplateLM):
    """lm-eval's view of a ScoredModel."""

    def __init__(self, model: ScoredModel, cache: RequestCache, advance: Advance) -> None:
        super().__init__()
        self.scored = model
        self.cache = cache
        self.advance = advance

    @property
    def eot_token_id(self) -> int:
        return self.scored.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.scored.tokenize(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        wanted = [self._request(context, continuation) for _, context, continuation in requests]
        return self.cache.answers(self.scored, wanted, self.advance)

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """The newest tokens that fit, as lm-eval's own models cut."""
        tokens = (*context, *continuation)[-(self.scored.context_length + 1) :]
        return Request(tokens, max(1, len(tokens) - len(continuation)))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        raise NotImplementedError("perplexity is measured by efficientllm-eval itself")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("the tasks of efficientllm-eval are multiple choice")


def run_task(
    name: str,
    model: ScoredModel,
    data_dir: Path | None,
    limit: int,
    cache: RequestCache,
    advance: Advance = no_progress,
) -> TaskResult:
    """Zero-shot score of a task; `limit` documents (of each of MMLU's subjects), 0: all."""
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
