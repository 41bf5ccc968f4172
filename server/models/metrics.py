"""Metrics for Prometheus at /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ...runtime.engines.memory import memory_bytes
from ..schemas.response_models import Usage
from .pool import ModelPool

BUCKET_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and gauges of one server, zero at its start."""

    def __init__(self, pool: ModelPool) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("efficientllm_requests", "Requests answered", ["endpoint", "status"], registry=registry)
        self.prompt_tokens = Counter("efficientllm_prompt_tokens", "Prompt tokens", ["model"], registry=registry)
        self.tokens = Counter("efficientllm_generated_tokens", "Generated tokens", ["model"], registry=registry)
        self.passes = Counter("efficientllm_passes", "Passes of answers", ["model"], registry=registry)
        self.proposed = Counter(
            "efficientllm_proposed_tokens", "Tokens proposed by look-up", ["model", "outcome"], registry=registry
        )
        self.first_token = Histogram(
            "efficientllm_time_to_first_token_seconds",
            "From the request to the first text, the queue included",
            ["model"],
            buckets=BUCKET_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "efficientllm_inter_token_seconds",
            "Between one piece of text and the next, per token",
            ["model"],
            buckets=BUCKET_SECONDS,
            registry=registry,
        )
        self.speed = Gauge(
            "efficientllm_tokens_per_second", "Decode speed of the last answer", ["model"], registry=registry
        )
        in_flight = Gauge("efficientllm_in_flight", "Requests being answered or waiting", registry=registry)
        in_flight.set_function(lambda: pool.in_flight)
        queued = Gauge("efficientllm_queue_length", "Requests that wait in loaded models", registry=registry)
        queued.set_function(
            lambda: sum(max(0, worker.in_flight - worker.engine.num_sequences) for worker in pool.loaded.values())
        )
        used = Gauge("efficientllm_cache_tokens", "Tokens in the caches of answers in progress", registry=registry)
        used.set_function(lambda: sum(worker.engine.used_slots for worker in pool.loaded.values()))
        loaded = Gauge("efficientllm_models_loaded", "Models in memory", registry=registry)
        loaded.set_function(lambda: len(pool.loaded))
        resident = Gauge("efficientllm_resident_memory_bytes", "Resident memory of the server", registry=registry)
        resident.set_function(lambda: memory_bytes().get("rss_bytes", 0))

    def count_request(self, status: int, endpoint: str = "other") -> None:
        """Count a served or refused request. `endpoint` must not come from the client, because it is a label."""
        self.requests.labels(endpoint, str(status)).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


@dataclass
class AnswerClock:
    """Records the times of one answer in the metrics."""

    metrics: Metrics
    model: str
    began: float = field(default_factory=time.perf_counter)
    _first: float = field(default=0.0, init=False)
    _last: float = field(default=0.0, init=False)
    _tokens: int = field(default=0, init=False)

    def record_piece(self, tokens: int) -> None:
        """Record the arrival of a piece of text. `tokens`: tokens of the choice so far."""
        now = time.perf_counter()
        if not self._first:
            self._first = now
            self.metrics.first_token.labels(self.model).observe(now - self.began)
        elif tokens > self._tokens:
            self.metrics.between_tokens.labels(self.model).observe((now - self._last) / (tokens - self._tokens))
        self._last, self._tokens = now, tokens

    def record_end(self, usage: Usage) -> None:
        """Record the tokens of an answer that is complete or whose client has disconnected."""
        tokens, details = usage.completion_tokens, usage.completion_tokens_details
        self.metrics.prompt_tokens.labels(self.model).inc(usage.prompt_tokens)
        self.metrics.passes.labels(self.model).inc(details.passes)
        self.metrics.tokens.labels(self.model).inc(tokens)
        self.metrics.proposed.labels(self.model, "accepted").inc(details.accepted_prediction_tokens)
        self.metrics.proposed.labels(self.model, "rejected").inc(details.rejected_prediction_tokens)
        # the first token's time is that of the prompt
        if tokens > 1 and self._last > self._first:
            self.metrics.speed.labels(self.model).set((tokens - 1) / (self._last - self._first))
