"""Next-token cross-entropy and distillation without a full copy of the logits, and perplexity on held-out windows.

Shapes: B sequences, S tokens, N = B*S, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .causal_blocks import choose_attention
from .distributed import Parallel

CHUNK_TOKENS = 512
"""Rows of logits alive at once. torch 2.13's own chunked `linear_cross_entropy` took 6.3 s instead of 0.55 s (1024
tokens, V 49152, bf16, 2 CPU cores), and its bf16 loss was off by 0.6."""

ROWS_IN_CACHE = 4
"""Rows of a chunk that one CPU thread processes at a time, which keeps them in its cache. With distillation this takes
0.74 s instead of 1.33 s for whole chunks (1024 tokens, V 49152, bf16, 1 core)."""

HEAD_ROWS = 8192
"""Rows of the head's gradient per product on a CPU, which avoids a second tensor of its size."""

GPU_LOGIT_BYTES = 2**30
"""Bytes of fp32 logits alive at once on a GPU. Every chunk reads and writes the head's whole gradient."""

fuses_on_gpu = find_spec("triton") is not None
"""Whether a GPU computes the loss of a chunk in few fused kernels (torch.compile) instead of some 15."""


def chunk_tokens(is_on_gpu: bool, vocab_size: int) -> int:
    """Return the rows of logits alive at once."""
    fitting = GPU_LOGIT_BYTES // (4 * vocab_size) if is_on_gpu else 0
    return max(CHUNK_TOKENS, fitting - fitting % CHUNK_TOKENS)


@dataclass(frozen=True)
class LossWeights:
    """Weights of loss = cross_entropy * cross-entropy + distill * KL(teacher || student)."""

    cross_entropy: float = 1.0
    distill: float = 0.0


@dataclass(frozen=True)
class SourceText:
    """The model's text in the tokens of a source with another vocabulary (see vocabulary/retokenization.py)."""

    tokens: Tensor
    """[B, T]"""
    places: Tensor
    """int64 [B * S]: for each of the model's tokens, the position in [B * T] of the source's token with the same end,
    or -1."""
    first: Tensor
    """int64 [V of the source]: the first of the model's tokens that encode each source token."""


@dataclass(frozen=True)
class Reference:
    """Teacher signal of distillation for N predicted tokens."""

    hidden: Tensor
    """[N, Ht]"""
    weight: Tensor
    """[Vt, Ht], in the same type."""
    first: Tensor | None = None
    """As in SourceText, if the vocabularies differ."""
    is_known: Tensor | None = None
    """bool [N]: positions with a teacher signal, by default all."""


def _in_our_tokens(theirs: Tensor, first: Tensor, is_known: Tensor | None, ours: Tensor) -> Tensor:
    """Return fp32 [rows, V]: the source's probabilities [rows, Vt] converted to the model's tokens.

    Positions without a teacher signal (`is_known` [rows]) get the model's own, `ours` [rows, V].
    """
    # several of the source's tokens may begin with the same one of the model's
    found = torch.zeros_like(ours).scatter_add_(1, first.expand(theirs.shape), theirs)
    return found if is_known is None else torch.where(is_known[:, None], found, ours)


def _losses_of_rows(
    logits: Tensor,
    targets: Tensor,
    theirs: Tensor | None,
    first: Tensor | None,
    is_known: Tensor | None,
    weights: tuple[float, float],
    count: int | Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the sums over rows of (log-probability of the targets, divergence from the teacher).

    The logits [R, V] become d loss / d logits, unless `count`, the divisor of the mean, is None. `theirs` are the
    teacher's logits [R, Vt]; `first` and `is_known` are of its Reference; `weights` are (distill, scale).
    """
    distill, scale = weights
    log_p = torch.log_softmax(logits.float(), dim=-1)
    likelihood, divergence, teacher = log_p.gather(1, targets[:, None]).sum(), None, None
    if theirs is not None:
        teacher_log_p = torch.log_softmax(theirs.float(), dim=-1)
        teacher = teacher_log_p.exp()
        if first is not None:
            teacher = _in_our_tokens(teacher, first, is_known, log_p.exp())
            # a token that begins none of the source's has probability 0, and 0 times its logarithm would be NaN
            teacher_log_p = teacher.clamp(min=torch.finfo(torch.float32).tiny).log()
        divergence = (teacher * teacher_log_p.sub_(log_p)).sum()
    if count is not None:
        # scale (p - onehot) + distill (p - p_teacher), in the memory of log_p
        delta = log_p.exp_()
        if teacher is not None:
            delta.mul_(scale + distill).sub_(teacher, alpha=distill)
        elif scale != 1.0:
            delta.mul_(scale)
        delta.scatter_add_(1, targets[:, None], delta.new_full((len(delta), 1), -scale))
        logits.copy_(delta.div_(count))
    return likelihood, divergence


@functools.cache
def _fused_losses_of_rows() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return `_losses_of_rows` as fused kernels."""
    return torch.compile(_losses_of_rows)


class _ChunkedLoss(torch.autograd.Function):
    """Mean of scale * cross-entropy + distill * KL(teacher || student) over softmax(hidden @ weight.T), by chunks.

    Gradients are formed in the forward pass: d cross-entropy / d logits = p - onehot, d KL / d logits = p - p_teacher.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        reference: Reference | None,
        distill: float,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and its cross-entropy, of hidden [N, D], weight [V, D] and targets [N]."""
        # at least 1: a batch without tokens to learn has the loss 0
        h, w, count = hidden.to(dtype), weight.to(dtype), max(1, hidden.shape[0])
        needs_grad = hidden.requires_grad or weight.requires_grad
        cross_entropy = hidden.new_zeros((), dtype=torch.float32)
        divergence = torch.zeros_like(cross_entropy)
        grad_h = torch.empty_like(h) if needs_grad else None
        # fp32: a bf16 sum over chunks would drop the small contributions of rare tokens
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if needs_grad else None
        is_on_gpu = h.device.type == "cuda"
        size = chunk_tokens(is_on_gpu, len(w))
        rows_at_once = size if is_on_gpu else ROWS_IN_CACHE * torch.get_num_threads()
        losses_of_rows = _fused_losses_of_rows() if is_on_gpu and fuses_on_gpu else _losses_of_rows
        divisor: int | Tensor | None = count if needs_grad else None
        if divisor is not None and is_on_gpu:
            # a fused kernel reads the divisor, which would otherwise be part of its code
            divisor = torch.full((), count, device=h.device)
        theirs = first = is_known = None
        if reference is not None:
            first, is_known = reference.first, reference.is_known
        for start in range(0, h.shape[0], size):
            rows = slice(start, start + size)
            logits = h[rows] @ w.T  # [chunk, V]; becomes d loss / d logits
            if reference is not None:
                theirs = reference.hidden[rows] @ reference.weight.T
            for begin in range(0, len(logits), rows_at_once):
                part = slice(begin, min(begin + rows_at_once, len(logits)))
                these = slice(start + part.start, start + part.stop)  # the same rows of everything
                likelihood, divergence_of_rows = losses_of_rows(
                    logits[part],
                    targets[these],
                    None if theirs is None else theirs[part],
                    first,
                    None if is_known is None else is_known[these],
                    (distill, scale),
                    divisor,
                )
                cross_entropy -= likelihood
                if divergence_of_rows is not None:
                    divergence += divergence_of_rows
            if grad_h is not None and grad_w is not None:
                grad_h[rows] = logits @ w
                _add_product(grad_w, logits, h[rows])
        if grad_h is not None and grad_w is not None:
            ctx.gradients = grad_h.to(hidden.dtype), grad_w.to(weight.dtype)
        cross_entropy, divergence = cross_entropy / count, divergence / count
        ctx.mark_non_differentiable(cross_entropy)
        return scale * cross_entropy + distill * divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # taken out of ctx and scaled in place: grad_weight is up to a fifth of a model
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(grad_total), grad_weight.mul_(grad_total), None, None, None, None, None


def _add_product(total: Tensor, deltas: Tensor, hidden: Tensor) -> None:
    """Add deltas.T @ hidden, [n, V] and [n, H] in the type of products, to `total`, fp32 [V, H]."""
    is_mixed = total.device.type == "cuda" and deltas.dtype != total.dtype
    if is_mixed and "dtype_out" in torch.ops.aten.addmm.overloads():  # since torch 2.8
        torch.addmm(total, deltas.T, hidden, out_dtype=total.dtype, out=total)  # sums are fp32 within the product
        return
    for share, product in zip(total.split(HEAD_ROWS), deltas.split(HEAD_ROWS, dim=1), strict=True):
        share += product.T @ hidden


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    weights: LossWeights = LossWeights(),
    reference: Reference | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss to minimise, its cross-entropy), means over tokens in nats; 0 without tokens.

    hidden [N, H], LM-head weight [V, H], targets [N] int64. Matrix products are in `dtype`, sums in fp32. `reference`
    is in `dtype`.
    """
    if not torch.is_grad_enabled():  # which the function itself cannot see: it would form gradients
        hidden, weight = hidden.detach(), weight.detach()
    scales = (weights.distill, weights.cross_entropy)
    return _ChunkedLoss.apply(hidden, weight, targets, dtype, reference, *scales)  # type: ignore[return-value]


class TrainingLoss(nn.Module):
    """The model with its loss: the callable of a training step, which DDP and FSDP wrap."""

    def __init__(
        self, model: Any, dtype: torch.dtype, weights: LossWeights = LossWeights(), teacher: Any | None = None
    ) -> None:
        """Wrap `model`. `teacher` is kept out of the parameters and the state dict."""
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.weights = weights
        # in a tuple: an attribute would make it a submodule, with parameters to train, to wrap and to save
        self._teacher = (teacher,)
        self.source_text: Callable[[Tensor], SourceText] | None = None
        """Function from the model's tokens [B, S] to the teacher's, if their vocabularies differ."""

    @property
    def teacher(self) -> Any | None:
        """Return the model that is distilled from, None without one."""
        return self._teacher[0]

    def around(self, model: Any) -> TrainingLoss:
        """Return the same loss of another model."""
        loss = TrainingLoss(model, self.dtype, self.weights, self._teacher[0])
        loss.source_text = self.source_text
        return loss

    def forward(
        self,
        windows: Tensor,
        predicted: Tensor | None = None,
        read: Callable[[Tensor, Tensor], Any] | None = None,
        text: SourceText | None = None,
    ) -> Any:
        """Return (loss to minimise, cross-entropy) of windows [B, S + 1]. Tokens given as ~token are not predicted.

        `predicted` are the positions in [B * S] of the others (see `to_device`). Finding them here makes the host wait
        for a GPU, and so does the conversion to the teacher's tokens, unless `text` has them. In eval mode the teacher
        is not used, and the loss is its cross-entropy part. With `read`, return instead read(last hidden states [N, H]
        of the predicted tokens, LM-head weight [V, H]), both in the type of products.
        """
        if predicted is None:
            predicted = predicted_positions(windows)
        tokens = torch.where(windows < 0, ~windows, windows)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()[predicted]
        autocast = {"dtype": torch.bfloat16, "enabled": self.dtype == torch.bfloat16}
        # each weight is used once in a pass: a cache would only keep its copy, which backward may make anew
        with torch.autocast(windows.device.type, **autocast, cache_enabled=False):
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, predicted)
        weight, teacher = self.model.lm_head.weight, self.teacher
        if read is not None:
            return read(rows.to(self.dtype), weight.to(self.dtype))
        reference = None
        if teacher is not None and self.training:
            if text is None and self.source_text is not None:
                text = self.source_text(inputs)
            reference = self._reference(teacher, inputs, predicted, text)
        return cross_entropy(rows, weight, targets, self.dtype, self.weights, reference)

    @torch.no_grad()
    def _reference(self, teacher: Any, inputs: Tensor, predicted: Tensor, text: SourceText | None) -> Reference:
        """Return the teacher signal at the predicted positions, int64 [N], after `inputs` [B, S] or their `text`."""
        tokens = inputs if text is None else text.tokens
        hidden = teacher.model(input_ids=tokens, use_cache=False).last_hidden_state.to(self.dtype).flatten(0, 1)
        weight = teacher.lm_head.weight.to(self.dtype)
        if text is None:
            return Reference(hidden.index_select(0, predicted), weight)
        places = text.places[predicted]
        # where the texts have no common end, the first state stands in: `is_known` says that it is not used
        return Reference(hidden[places.clamp(min=0)], weight, text.first, places >= 0)


def frozen_copy(source: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a frozen copy of the model in eval mode, stored in `dtype`."""
    teacher = copy.deepcopy(source).to(device=device, dtype=dtype).eval()
    choose_attention(teacher, device)
    return teacher.requires_grad_(False)


def predicted_positions(windows: Tensor) -> Tensor:
    """Return the positions in [B * S] of the predicted tokens of windows [B, S + 1], int64 [N]."""
    return (windows[:, 1:] >= 0).flatten().nonzero().flatten()


def to_device(windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return windows [B, S + 1] of host memory and their predicted positions on a device, without waiting for it."""
    positions = predicted_positions(windows)
    return windows.to(device, non_blocking=True), _sent(positions, device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of host memory on a device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def source_texts(
    loss: TrainingLoss, microbatches: Sequence[Tensor], device: torch.device
) -> Generator[SourceText | None, None, None]:
    """Yield the teacher's tokens of windows [B, S + 1] in host memory, or None for each if it reads the model's.

    On a GPU a thread converts the tokens of later microbatches while the device computes.
    """
    convert = loss.source_text
    if convert is None or loss.teacher is None:
        yield from itertools.repeat(None, len(microbatches))
        return
    inputs = [torch.where(windows < 0, ~windows, windows)[:, :-1] for windows in microbatches]
    if device.type != "cuda":
        yield from map(convert, inputs)
        return
    with ThreadPoolExecutor(1, "teacher") as worker:
        for text in worker.map(convert, inputs):
            tensors = (text.tokens, text.places, text.first)
            yield SourceText(*(_sent(tensor, device) for tensor in tensors))


def count_predicted(windows: Tensor) -> int:
    """Count the predicted tokens of windows [n, S + 1]."""
    return int((windows[:, 1:] >= 0).sum())


@torch.no_grad()
def perplexity(
    loss: nn.Module,
    windows: np.ndarray,
    batch_size: int,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
    parallel: Parallel | None = None,
) -> float:
    """Return exp(mean cross-entropy) over the predicted tokens of windows [n, S + 1], at least one.

    Each window is read from its own start. `check` is called before every batch and may raise. With `parallel`, each
    rank reads every so many-th batch (a collective call).
    """
    was_training = loss.training
    loss.eval()
    total, count = 0.0, 0.0
    rank, num_ranks = (parallel.rank, parallel.world_size) if parallel is not None else (0, 1)
    starts = range(0, len(windows), batch_size)
    rounds = math.ceil(len(starts) / num_ranks)
    try:
        for place in range(rank, rank + rounds * num_ranks, num_ranks):
            check()
            # a rank without a last batch computes another one and ignores it: ranks that share weights need each other
            start = starts[min(place, len(starts) - 1)]
            batch = torch.from_numpy(windows[start : start + batch_size]).to(device)
            predicted, cross_entropy = count_predicted(batch), float(loss(batch)[1])
            if place < len(starts):
                total, count = total + cross_entropy * predicted, count + predicted
    finally:
        loss.train(was_training)
    if parallel is not None:
        total, count = parallel.mean(total), parallel.mean(count)
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf  # exp of more than 709 overflows
