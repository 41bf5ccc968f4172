"""Scores of whole blocks, and the common unit of blocks and groups: expected loss in nats per token.

A block's score is measured (BlockProbe). A group's saliency is a Taylor estimate. It ranks the groups of one block
well, but its scale depends on the criterion, the batch and the block. The groups of a block therefore share the block's
price: loss(group) = loss(block) * amplitude(group) / sum of the amplitudes of the block's groups. This is exact if the
effects of a block's groups add up. An amplitude is the saliency, or its root if the criterion is an energy (a square of
changes). Shares of first-order saliency are near the cost of removing parts of a block. Shares of energies are a fifth
of it for the cheapest sixth of an FFN (research/log), because a block's energy concentrates in few channels and its
effect saturates.

Prices are measured again as the model changes: all of them `renewals` times while the budget falls, and always the next
block before its removal, again if another block was removed since. No block is removed by a price from before its
neighbours were removed. Of a layer, both halves are measured and their sum ranks it until it is next.

The measured price is KL(model ‖ model without the block) on text, in nats per token. To second order in the removed
part, this and the expected rise of the cross-entropy are both 1/2 d^T F d (F: the Fisher information). The KL has no
first-order term, which on a few thousand tokens is noise as large as the effect. Layers below the first absent block
are computed once per batch. The model is called through its training loss, as in a step, so it may be sharded.

Let h be the hidden states and z = W h the logits of the whole model, h' and z' the same without the block. With
p = softmax(z) and m = W^T p, the mean row of the LM head, KL = log sum exp(z') - log sum exp(z) - (h' - h) . m. The
whole model's part is computed once per batch. An absence then needs only the sum over its own logits.
Shapes: n windows of S tokens, N predicted tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..compute.distributed import Parallel, reshard
from ..compute.loss import CHUNK_TOKENS, ROWS_IN_CACHE, TrainingLoss, count_predicted
from ..model.architecture import Architecture
from ..model.groups import BLOCKS
from ..model.modeling_efficientllm import NoAttention, NoFeedForward
from .criteria import is_energy
from .running_scores import Scores
from .selection import Unit

Half = Literal["attention", "ffn"]

Absence = tuple[tuple[int, Half], ...]
"""Blocks that are absent at once, (layer, half)."""

LOGIT_ROWS = 64
"""Rows of fp32 logits at once."""
EXACT_LOGITS = 8
"""Likeliest tokens whose logits are not rounded to bf16."""


@contextlib.contextmanager
def evaluating(loss: TrainingLoss) -> Iterator[None]:
    """Evaluate the model of `loss` in this block."""
    was_training = loss.training
    loss.eval()
    try:
        # --compile would otherwise compile it for shapes that training does not have
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        reshard(loss)  # the optimizer updates shards
        loss.train(was_training)


class BlockProbe:
    """Measure prices of a model's blocks on fixed windows."""

    def __init__(
        self,
        loss: TrainingLoss,
        windows: np.ndarray,
        batch_size: int,
        parallel: Parallel,
        check: Callable[[], None] = lambda: None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Use `windows` [n, S + 1], the same on every rank. Each rank takes its share, `batch_size` at a time.

        `check` is called before every forward pass without blocks, equally often on every rank, and may raise. `report`
        gets the passes done and their number where several blocks are measured.
        """
        self._report = report
        self._loss, self._parallel, self._check = loss, parallel, check
        rows = torch.from_numpy(parallel.own_rows(windows)).to(parallel.device)
        self._batches = rows.split(batch_size)

    @torch.no_grad()
    def losses(self, absences: Sequence[Absence]) -> list[float]:
        """Return the nats per token that each absence costs (a collective call)."""
        total = torch.zeros(len(absences), dtype=torch.float64)
        with evaluating(self._loss):
            for number, batch in enumerate(self._batches):
                total += self._of_batch(batch, absences, number)
        num_predicted = sum(count_predicted(batch) for batch in self._batches)
        mean = (total / max(1, num_predicted)).to(self._parallel.device)
        self._parallel.mean_tensors([mean])
        return mean.clamp(min=0).tolist()  # rounding may leave a little less

    def _of_batch(self, batch: Tensor, absences: Sequence[Absence], number: int) -> Tensor:
        """Return the nats of all predicted tokens of the batch `number`, fp64 [absences]."""
        decoder = self._loss.model.model
        streams, whole = self._whole(batch)
        found = []
        for absence in absences:
            self._check()
            # below the first absent block the stream is that of the whole model, which is computed once per batch
            first = min(layer for layer, _ in absence)
            with _without(decoder, absence), _from_layer(decoder, first, streams[first]):
                found.append(self._loss(batch, read=whole.divergence))
            if len(absences) > 1:
                self._report(number * len(absences) + len(found), len(self._batches) * len(absences))
        return torch.tensor(found, dtype=torch.float64)

    def _whole(self, batch: Tensor) -> tuple[list[Tensor], WholeModel]:
        """Return (inputs [n, S, H] of every layer, predictions of the whole model)."""
        streams: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            for layer in self._loss.model.model.layers:
                # transformers passes the stream as the first argument
                hook = layer.register_forward_pre_hook(lambda module, arguments: streams.append(arguments[0]))
                hooks.enter_context(hook)
            return streams, self._loss(batch, read=WholeModel.of)


@dataclass(frozen=True)
class WholeModel:
    """Predictions of the whole model for N tokens, to compare others with."""

    states: Tensor
    """Last hidden states, fp32 [N, H]."""
    likely: Tensor
    """Likeliest tokens, int64 [N, EXACT_LOGITS]."""
    log_sums: Tensor
    """Logarithms of the sums of exp(logits), fp32 [N]."""
    mean_rows: Tensor
    """Mean row of the LM head by the predicted probabilities, fp32 [N, H]."""

    @classmethod
    def of(cls, states: Tensor, head: Tensor) -> WholeModel:
        """Read the last hidden states [N, H] and the LM head [V, H], both in the type of products."""
        likely, mean_rows = [], []
        for rows in states.split(LOGIT_ROWS):
            logits = (rows @ head.T).float()
            likely.append(logits.topk(min(EXACT_LOGITS, len(head)), dim=-1).indices)
            mean_rows.append(logits.softmax(dim=-1).to(head.dtype) @ head)
        likely_tokens = torch.cat(likely)
        log_sums = _log_sums(states, head, likely_tokens)
        return cls(states.float(), likely_tokens, log_sums, torch.cat(mean_rows).float())

    def divergence(self, states: Tensor, head: Tensor) -> float:
        """Return KL(whole model ‖ model with these states) over all tokens, in nats."""
        log_sums = _log_sums(states, head, self.likely)
        # the states are subtracted before the product: the products of both are large and nearly equal
        expected = ((states.float() - self.states) * self.mean_rows).sum(-1)
        divergences = log_sums - self.log_sums - expected
        return float(divergences.double().sum())


def _log_sums(states: Tensor, head: Tensor, likely: Tensor) -> Tensor:
    """Return log sum exp of the logits of states [N, H], fp32 [N]. The logits of `likely` tokens [N, k] are exact.

    A product in bf16 is rounded to bf16. A large logit is then off by up to 0.06, more than a block may cost.
    """
    # a large product is fast, but its sums should be taken over as many rows as stay in the processor's cache
    rows_at_once = CHUNK_TOKENS
    if states.device.type == "cpu":
        rows_at_once = ROWS_IN_CACHE * torch.get_num_threads()
    found = []
    for rows, tokens in zip(states.split(CHUNK_TOKENS), likely.split(CHUNK_TOKENS), strict=True):
        exact = torch.einsum("nh,nkh->nk", rows.float(), head[tokens].float())
        rounded = rows @ head.T
        parts = (each.split(rows_at_once) for each in (rounded, tokens, exact))
        for logits, some_tokens, values in zip(*parts, strict=True):
            corrected = logits.float().scatter_(1, some_tokens, values)
            found.append(corrected.logsumexp(dim=-1))
    return torch.cat(found)


@contextlib.contextmanager
def _without(decoder: Any, absence: Absence) -> Iterator[None]:
    """Run the decoder without some blocks in this context."""
    taken: list[tuple[Any, str, nn.Module]] = []
    for index, half in absence:
        layer = decoder.layers[index]
        if half == "attention":
            name, stand_in = "self_attn", NoAttention(index)
        else:
            name, stand_in = "mlp", NoFeedForward()
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
        # placeholders keep the indices of the others, by which some families select a layer's mask; each returns its
        # input, and the last one `stream`
        skipped = [_SkippedLayer() for _ in range(first - 1)]
        decoder.layers = nn.ModuleList([*skipped, _SkippedLayer(stream), *layers[first:]])
    try:
        yield
    finally:
        decoder.layers = layers


class _SkippedLayer(nn.Module):
    """Placeholder of a layer that is not computed again."""

    def __init__(self, stream: Tensor | None = None) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states if self._stream is None else self._stream


HALVES: dict[Half, tuple[str, tuple[str, ...]]] = {
    "attention": ("kv_group", ("kv_group", "query_head")),
    "ffn": ("ffn", ("ffn",)),
}
"""Block of a layer -> (kind that is whole with it, kinds that are scored within it)."""

HALF_OF_BLOCK: dict[str, Half] = {"attention_block": "attention", "ffn_block": "ffn"}


def absence_of(name: str, layer: int) -> Absence:
    """Return the blocks that are absent after the removal of a block of this kind."""
    return tuple((layer, half) for half, (kind, _) in HALVES.items() if kind in BLOCKS[name].takes)


class BlockScores:
    """Last measured price of every block of a model."""

    def __init__(self, names: Sequence[str], saliency: str, num_layers: int, renewals: int, span: float) -> None:
        """Create unmeasured scores for `saliency`, the criterion of the groups.

        `span` is the fall of the budget's measure over the whole run.
        """
        self.names = tuple(names)
        self._is_energy = is_energy(saliency)
        self._interval = span / renewals
        self._losses = {name: torch.zeros(num_layers, dtype=torch.float64) for name in BLOCKS}
        """Nats per token without the block; 0 for absent blocks. Groups need the prices of all halves."""
        self._factors = {half: torch.zeros(num_layers, dtype=torch.float64) for half in HALVES}
        """Nats per unit of amplitude in each half of each layer."""
        self._current: set[tuple[str, int]] = set()
        """Blocks measured since the last removal of a block."""
        self._renewed_at: float | None = None
        """The budget's measure when all blocks were last measured."""

    @property
    def next_renewal(self) -> float:
        """Return the value of the budget's measure at which all blocks are measured again."""
        # infinity: prices are measured before the first removal, whatever the size is
        return math.inf if self._renewed_at is None else self._renewed_at - self._interval

    def renew(self, probe: BlockProbe, architecture: Architecture, scores: Scores, size: float) -> None:
        """Measure the halves of all layers and the scale of their groups (a collective call).

        The price of a whole layer is the sum of its halves. On SmolLM2-135M it is 0.63 to 1.64 times that (research/
        log), so it is measured before the layer is removed.
        """
        keys = [
            (name, layer)
            for name in HALF_OF_BLOCK
            for layer in range(len(architecture.layers))
            if BLOCKS[name].is_in(architecture, layer)
        ]
        losses = probe.losses([absence_of(*key) for key in keys])  # may raise, so nothing changes before it
        for vector in self._losses.values():
            vector.zero_()
        for (name, layer), loss in zip(keys, losses, strict=True):
            self._losses[name][layer] = loss
            self._losses["layer"][layer] += loss
        for name, half in HALF_OF_BLOCK.items():
            whole, _ = HALVES[half]
            for layer, loss in enumerate(self._losses[name]):
                amplitude = 0.0
                if whole in scores:
                    amplitude = float(self._amplitudes(scores[whole][layer]).sum())
                self._factors[half][layer] = loss / amplitude if amplitude > 0 else 0.0
        # without the whole layers, whose sums are no measurement: `is_outdated` asks for one before a removal
        self._current, self._renewed_at = set(keys), size

    def shift_renewal(self, size: float) -> None:
        """Record that the budget's measure fell to `size` without changes to blocks."""
        if self._renewed_at is not None:
            self._renewed_at = size

    def measure(self, probe: BlockProbe, name: str, layer: int) -> None:
        """Measure one block again (a collective call)."""
        self._losses[name][layer] = probe.losses([absence_of(name, layer)])[0]
        self._current.add((name, layer))

    def is_outdated(self, unit: Unit, taken: Sequence[Unit] = ()) -> bool:
        """Tell whether a unit is a block that must be measured again before its removal, with `taken` removed."""
        if unit.kind not in BLOCKS:
            return False
        takes_block = any(other.kind in BLOCKS for other in taken)
        return takes_block or (unit.kind, unit.layer) not in self._current

    def invalidate(self, units: Sequence[Unit] | None = None) -> None:
        """Require a new measurement of every block.

        Only blocks among the removed `units` count; None means that the model was trained.
        """
        if units is None or any(unit.kind in BLOCKS for unit in units):
            self._current = set()

    def in_nats(self, scores: Scores) -> Scores:
        """Return the scores of groups as expected loss, together with those of the blocks."""
        all_factors = torch.cat(list(self._factors.values()))
        known = all_factors[all_factors > 0]
        # a stem channel lies in all blocks at once and has no price of its own; the scale does not matter if only the
        # stem is scored
        typical = float(known.median()) if len(known) else 1.0
        found: Scores = {}
        for name, vectors in scores.items():
            factors = torch.full((len(vectors),), typical, dtype=torch.float64)
            for half, (_, kinds) in HALVES.items():
                if name in kinds:
                    factors = self._factors[half]
            amplitudes = [self._amplitudes(vector) for vector in vectors]
            found[name] = [amplitude * factor for amplitude, factor in zip(amplitudes, factors, strict=True)]
        for name in self.names:
            found[name] = list(self._losses[name].split(1))
        return found

    def _amplitudes(self, saliency: Tensor) -> Tensor:
        """Return fp64 amplitudes on the CPU."""
        values = saliency.double().cpu()
        return values.clamp(min=0).sqrt() if self._is_energy else values

    def state(self) -> dict[str, Any]:
        """Return tensors and numbers for `load_state`."""
        return {
            "losses": self._losses,
            "factors": self._factors,
            "renewed_at": self._renewed_at,
            "confirmed": sorted(self._current),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the values of `state`."""
        # checkpoints load to the device of training, and a ranking works on the CPU
        self._losses = {name: vector.cpu() for name, vector in state["losses"].items()}
        self._factors = {half: vector.cpu() for half, vector in state["factors"].items()}
        self._renewed_at = state["renewed_at"]
        self._current = {(name, layer) for name, layer in state["confirmed"]}
