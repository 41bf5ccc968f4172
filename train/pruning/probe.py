"""The loss without whole blocks, measured: KL(model ‖ model without them) on text, in nats per token.

To second order in what is removed both this and the expected rise of the cross-entropy are 1/2 d^T F d (F: the Fisher
information), but this has no first-order term, which on a few thousand tokens is noise as large as what is measured.

What lies below the first missing block is computed once per batch. The model is called through its training loss, as
in a step, so that it may be sharded. Shapes: n windows of S tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..compute.distributed import Parallel
from ..compute.gather import shard_again
from ..compute.loss import TrainingLoss, count_predicted
from ..model.modeling_efficientllm import NoAttention, NoFeedForward

Half = Literal["attention", "ffn"]

Absence = tuple[tuple[int, Half], ...]
"""Blocks that are missing at once, (layer, half)."""


class BlockProbe:
    """Measures what blocks of a model are worth on fixed windows."""

    def __init__(self, loss: TrainingLoss, windows: np.ndarray, batch_size: int, parallel: Parallel) -> None:
        """`windows` [n, S + 1], the same on every rank; each takes its share, `batch_size` at a time."""
        self._loss, self._parallel = loss, parallel
        rows = torch.from_numpy(parallel.my_rows(windows)).to(parallel.device)
        self._batches = rows.split(batch_size)

    @torch.no_grad()
    def losses(self, absences: Sequence[Absence]) -> list[float]:
        """Nats per token that each absence costs by itself; a collective call."""
        was_training = self._loss.training
        self._loss.eval()
        total = torch.zeros(len(absences), dtype=torch.float64)
        with torch.compiler.set_stance("force_eager"):  # every shape of what is left would be compiled
            for batch in self._batches:
                total += count_predicted(batch) * self._of_batch(batch, absences)
        shard_again(self._loss)  # an optimizer knows shards
        self._loss.train(was_training)
        mean = (total / max(1, sum(map(count_predicted, self._batches)))).to(self._parallel.device)
        self._parallel.mean_tensors([mean])
        return mean.tolist()

    def _of_batch(self, batch: Tensor, absences: Sequence[Absence]) -> Tensor:
        """fp64 [absences]"""
        streams, states = self._whole(batch)
        found = []
        for absence in absences:
            first = min(layer for layer, _ in absence)
            with _without(self._decoder, absence), _from_layer(self._decoder, first, streams[first]):
                found.append(float(self._loss(batch, states)[0]))
        return torch.tensor(found, dtype=torch.float64)

    @property
    def _decoder(self) -> Any:
        return self._loss.model.model

    def _whole(self, batch: Tensor) -> tuple[list[Tensor], Tensor]:
        """(what every layer reads [n, S, H], last hidden states of the predicted tokens [m, H]) of the whole model."""
        streams: list[Tensor] = []
        states: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda module, arguments: streams.append(arguments[0]))
            for layer in self._decoder.layers
        ]
        handles.append(self._decoder.norm.register_forward_hook(lambda module, inputs, out: states.append(out)))
        try:
            self._loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        return streams, states[0].flatten(0, 1)[(batch[:, 1:] >= 0).flatten()]


@contextlib.contextmanager
def _without(decoder: Any, absence: Absence) -> Iterator[None]:
    """The decoder without some blocks, as it would be built."""
    taken: list[tuple[Any, str, nn.Module]] = []
    for index, half in absence:
        layer = decoder.layers[index]
        name, stand_in = ("self_attn", NoAttention(index)) if half == "attention" else ("mlp", NoFeedForward())
        taken.append((layer, name, getattr(layer, name)))
        setattr(layer, name, stand_in)
    try:
        yield
    finally:
        for layer, name, module in taken:
            setattr(layer, name, module)


@contextlib.contextmanager
def _from_layer(decoder: Any, first: int, stream: Tensor) -> Iterator[None]:
    """The decoder with `stream` given for what comes out below layer `first`."""
    layers = decoder.layers
    if first:
        passed = [_Passed() for _ in range(first - 1)]
        decoder.layers = nn.ModuleList([*passed, _Passed(stream), *layers[first:]])
    try:
        yield
    finally:
        decoder.layers = layers


class _Passed(nn.Module):
    """Stands for a layer that is not computed again."""

    def __init__(self, stream: Tensor | None = None) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states if self._stream is None else self._stream
