"""Measure the loss without whole blocks: KL(model ‖ model without them) on text, in nats per token.

To second order in the removed part, this and the expected rise of the cross-entropy are both 1/2 d^T F d (F: the Fisher
information). The KL has no first-order term, which on a few thousand tokens is noise as large as the effect. Layers
below the first absent block are computed once per batch. The model is called through its training loss, as in a step,
so it may be sharded. Shapes: n windows of S tokens, H hidden.
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
"""Blocks that are absent at once, (layer, half)."""


class BlockProbe:
    """Measure prices of a model's blocks on fixed windows."""

    def __init__(self, loss: TrainingLoss, windows: np.ndarray, batch_size: int, parallel: Parallel) -> None:
        """Use `windows` [n, S + 1], the same on every rank. Each rank takes its share, `batch_size` at a time."""
        self._loss, self._parallel = loss, parallel
        rows = torch.from_numpy(parallel.my_rows(windows)).to(parallel.device)
        self._batches = rows.split(batch_size)

    @torch.no_grad()
    def losses(self, absences: Sequence[Absence]) -> list[float]:
        """Return the nats per token that each absence costs (a collective call)."""
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
        """Return fp64 [absences] of one batch."""
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
        """Return (inputs [n, S, H] of every layer, last hidden states [m, H] of the predicted tokens)."""
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
    """Run the decoder without some blocks in this context."""
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
    """Run the decoder with `stream` as the output below layer `first` in this context."""
    layers = decoder.layers
    if first:
        passed = [_Passed() for _ in range(first - 1)]
        decoder.layers = nn.ModuleList([*passed, _Passed(stream), *layers[first:]])
    try:
        yield
    finally:
        decoder.layers = layers


class _Passed(nn.Module):
    """Placeholder of a layer that is not computed again."""

    def __init__(self, stream: Tensor | None = None) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states if self._stream is None else self._stream
