"""Closed-form recovery after a removal (`--recover least-squares`): refit the writers of the residual stream.

After each layer, the pruned model's residual stream should equal that of the model before the removal. For a matrix W
[H, C] (o_proj, down_proj), X [n, C] are its inputs for n tokens in the pruned model. Y [n, H] is the difference between
the former model's stream after the same matrix and the pruned model's stream before it. The ridge regression towards
the current W is W <- W + (Y - X W^T)^T D X (X^T D X + lambda I)^-1, lambda = damping * mean(diag(X^T D X)). D weights
token t by 1 / (|y_t|^2 + median |y|^2). Without it, the few tokens of massive activations (arXiv 2402.17762) dominate.

Layers are fitted in order, so each compensates errors of earlier ones. Fitting a matrix to its own former output, all
at once, or a trained model to its source recovers less or does harm (research/log). The fit needs forward passes only,
and the former model beside the pruned one.

Second-order update of the remaining weights (`--weight-update obs`; the paper's EfficientLLM-B).

Let y = W x with inputs x split into removed P and kept Q. The least-squares compensation of the lost W_P x_P is
W_Q <- W_Q + W_P H_PQ (H_QQ + lambda I)^-1 with H = E[x x^T] and lambda = damping * mean(diag H_QQ) (optimal brain
surgeon for a linear layer; SparseGPT, arXiv 2301.00774). H is the Gram matrix of the layer's own inputs, a running
average over the training steps. It is a local Hessian and independent of the global ranking. Inputs: o_proj reads heads
[Q*D], down_proj FFN channels [I], and q, k, v (gate, up) the normalised stem [H].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compute.distributed import Parallel, full, gathered, scatter
from ..model.irregular import architecture_of
from ..model.tensors import input_axis, same_input, split_name
from .selection import Removal
from .surgery import kept_channels, removed_positions

WINDOWS_AT_ONCE = 8
"""Windows per forward pass of a layer."""
ROWS_PER_INPUT = 16
"""Most tokens per input of a matrix in its regression (5 recover less, research/log)."""
ROWS_PER_PRODUCT = 512
"""Tokens per product. A bf16 product is rounded to bf16, so the products of few tokens are added in fp32."""


def fit_inputs(windows: np.ndarray) -> Tensor:
    """Return the token ids [n, S] that a fit reads of windows [n, S + 1], where ~token is a token not predicted."""
    tokens = torch.from_numpy(windows)
    return torch.where(tokens < 0, ~tokens, tokens)[:, :-1]


class LeastSquares:
    """Refit of a pruned model to its earlier function."""

    def __init__(
        self, model: Any, former: Any, stem: Tensor, damping: float, dtype: torch.dtype, rows: Tensor | None = None
    ) -> None:
        """Prepare the fit.

        Layers may be sharded by FSDP, but all other weights are whole (`gathered`). `stem` are the surviving hidden
        channels as positions in `former`, `rows` the same of the vocabulary. Products are in `dtype`, sums of products
        in fp32 and solutions in fp64.
        """
        self.model, self.former = model.model, former.model
        self.damping, self.dtype = damping, dtype
        self.stem, self.rows = stem, rows

    @torch.no_grad()
    def fit(
        self,
        windows: Tensor,
        parallel: Parallel,
        check: Callable[[], None] = lambda: None,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Fit every layer on windows [n, S] of token ids, this rank's share.

        `check` is called before every forward pass of a part and may raise. `report` gets the layers done and their
        number.
        """
        self.stem = self.stem.to(windows.device)
        # the windows count tokens of the pruned vocabulary, and the former model still has the whole one
        former_windows = windows if self.rows is None else self.rows.to(windows.device)[windows]
        stream = self.model.embed_tokens(windows).float()
        former_stream = self.former.embed_tokens(former_windows).float()
        layers = list(zip(self.model.layers, self.former.layers, strict=True))
        for number, (layer, former_layer) in enumerate(layers, 1):
            matrices = [getattr(getattr(layer, part.block), part.matrix, None) for part in PARTS]
            fitted = {matrix: _whole(matrix, stream.device) for matrix in matrices if matrix is not None}
            with gathered(layer, former_layer):
                for part, matrix in zip(PARTS, matrices, strict=True):
                    # also where the block was removed: the next matrices then make up for it
                    former_stream += self._forward(part, self.former, former_layer, former_stream, check)
                    if matrix is None:  # the block was removed
                        continue
                    block = getattr(layer, part.block)
                    setattr(block, part.matrix, nn.Identity())  # the part then returns the inputs of the matrix
                    try:
                        inputs = self._forward(part, self.model, layer, stream, check)
                    finally:
                        setattr(block, part.matrix, matrix)
                    wanted = self._without_stem_channels(former_stream) - stream
                    self._fit_matrix(fitted[matrix], inputs, wanted, parallel)
                    # by the new weights, so that the next part sees the error that this fit leaves
                    stream += self._outputs(fitted[matrix], inputs)
            for matrix, whole in fitted.items():
                if whole is not matrix:
                    scatter(matrix.weight, whole.weight)
            report(number, len(layers))

    def _without_stem_channels(self, former_stream: Tensor) -> Tensor:
        """Return the surviving channels of the former model's stream."""
        is_whole = len(self.stem) == former_stream.shape[-1]
        return former_stream if is_whole else former_stream.index_select(-1, self.stem)

    def _forward(self, part: Part, model: Any, layer: Any, stream: Tensor, check: Callable[[], None]) -> Tensor:
        """Return the output of a part of `layer` [n, S, ...] for the residual stream [n, S, H]."""
        outputs = []
        with self._autocast():
            for rows in stream.split(WINDOWS_AT_ONCE):
                check()
                outputs.append(part.forward(layer, model, rows))
        return torch.cat(outputs)

    def _outputs(self, matrix: nn.Linear, inputs: Tensor) -> Tensor:
        """Return matrix(inputs) in fp32, computed as in training."""
        with self._autocast():
            return matrix(inputs).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.stem.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _fit_matrix(self, matrix: nn.Linear, inputs: Tensor, wanted: Tensor, parallel: Parallel) -> None:
        """Change `matrix` so that its inputs [n, S, C] give the wanted outputs [n, S, H]. A bias stays unchanged."""
        num_tokens = parallel.world_size * inputs[..., 0].numel()
        stride = max(1, num_tokens // (ROWS_PER_INPUT * inputs.shape[-1]))  # the tokens that one process would take
        x = inputs.flatten(0, 1)[::stride]
        y = wanted.flatten(0, 1)[::stride]
        # the regression is on the error, so that a matrix without one stays exactly as it is
        error = y - self._outputs(matrix, x)
        energy = y.square().mean(1)
        # over all ranks, as one process would take it: the number of ranks must not change the fit
        typical_energy = parallel.of_all(energy).median().clamp(min=1e-12)
        weights = 1.0 / (energy + typical_energy)
        gram, cross = self._sums_of_products(x, error, weights, parallel)
        damping = self.damping * gram.diagonal().mean().clamp(min=1e-12)
        gram.diagonal().add_(damping)
        factor, has_failed = torch.linalg.cholesky_ex(gram)
        # `solve` takes three times as long, and also a matrix that rounding leaves not quite positive
        change = torch.linalg.solve(gram, cross) if has_failed else torch.cholesky_solve(cross, factor)
        matrix.weight += change.T

    def _sums_of_products(self, x: Tensor, error: Tensor, weights: Tensor, parallel: Parallel) -> tuple[Tensor, Tensor]:
        """Return (X^T D X [C, C], X^T D E [C, H]) in fp64 for the diagonal D of `weights` [n]."""
        # The matrices are often close to singular. The root of D on both sides keeps the first one symmetric and its
        # eigenvalues positive although X is rounded to bf16.
        roots = weights.sqrt()[:, None]
        num_inputs = x.shape[1]
        both = torch.cat([x * roots, error * roots], dim=1).to(self.dtype)
        sums = torch.zeros(num_inputs, both.shape[1], device=x.device)
        for rows in both.split(ROWS_PER_PRODUCT):
            sums += rows[:, :num_inputs].T @ rows
        parallel.mean_tensors([sums])
        gram, cross = sums.double().split([num_inputs, error.shape[1]], dim=1)
        return gram, cross


def _whole(matrix: nn.Linear, device: torch.device) -> nn.Linear:
    """Return the matrix itself, or a copy with whole fp32 weights if FSDP shards it (a collective call).

    A forward pass gathers weights in the type of products, to which a fit must not round them.
    """
    if not isinstance(matrix.weight, DTensor):
        return matrix
    whole = nn.Linear(matrix.in_features, matrix.out_features, matrix.bias is not None, device="meta")
    for name, parameter in matrix.named_parameters():
        setattr(whole, name, nn.Parameter(full(parameter.detach()).to(device), requires_grad=False))
    return whole


def _attention(layer: Any, model: Any, stream: Tensor) -> Tensor:
    """Return the addition of a layer's attention to the residual stream [n, S, H]."""
    positions = torch.arange(stream.shape[1], device=stream.device)[None]
    return layer.self_attn(
        hidden_states=layer.input_layernorm(stream),
        position_embeddings=model.rotary_emb(stream, positions),
        attention_mask=None,  # causal, by the kernel of training
    )[0]


def _feed_forward(layer: Any, model: Any, stream: Tensor) -> Tensor:
    """Return the addition of a layer's FFN to the residual stream [n, S, H]."""
    return layer.mlp(layer.post_attention_layernorm(stream))


@dataclass(frozen=True)
class Part:
    """Half of a layer, which adds to the residual stream."""

    block: str
    matrix: str
    """Matrix of the block that writes to the stream."""
    forward: Callable[[Any, Any, Tensor], Tensor]
    """(layer, model, stream [n, S, H]) -> the addition to the stream."""


PARTS = (Part("self_attn", "o_proj", _attention), Part("mlp", "down_proj", _feed_forward))
"""The parts of a layer in their order."""


class InputGrams:
    """Running averages of H = E[x x^T], one per observed input, and the update from them."""

    def __init__(self, model: Any, axes: set[str], decay: float, damping: float, max_width: int, rows: int) -> None:
        """Observe inputs along `axes` up to `max_width` wide (0: any), `rows` tokens per step (0: all)."""
        self.axes = axes
        self.decay = decay
        self.damping = damping
        self.max_width = max_width
        self.rows = rows
        self.grams: dict[str, Tensor] = {}
        """{module name: H, fp32 [in, in]}"""
        self._handles: list[Any] = []
        self.readers = same_input(architecture_of(model.config).parts)
        self.attach(model)

    def attach(self, model: Any) -> None:
        """Observe `model`, again after it is rebuilt."""
        self.detach()
        for name, module in model.named_modules():
            _, suffix = split_name(name)
            is_observed = suffix in self.readers and input_axis(suffix) in self.axes
            if is_observed and isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_pre_hook(self._observer(name)))

    def detach(self) -> None:
        """Stop observing and keep the averages."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observer(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            """Add x.T @ x / N of the module's input x [N, D] to the moving average [D, D]."""
            x = arguments[0].detach().flatten(0, -2)
            # measurements run the same modules in eval mode and do not count
            if not module.training or (self.max_width and x.shape[1] > self.max_width):
                return
            if self.rows:
                stride = max(1, len(x) // self.rows)
                x = x[::stride]
            with torch.autocast(x.device.type, enabled=False):
                x = x.float()  # bf16 sums would cancel
                gram = x.T @ x / len(x)
            average = self.grams.get(name)
            if average is None or average.shape != gram.shape:
                self.grams[name] = gram
            else:
                average.lerp_(gram, 1.0 - self.decay)

        return observe

    @torch.no_grad()
    def update_weights(self, model: Any, removal: Removal) -> None:
        """Let the kept inputs of every affected layer absorb the removed ones. Call it before the removal."""
        for name, gram in self.grams.items():
            kept = _kept_inputs(name, removal)
            if kept is None or not len(kept):
                continue
            kept = kept.to(gram.device)
            removed = removed_positions(kept, len(gram)).to(gram.device)
            absorption = compensation(gram, kept, self.damping)
            # q, k and v read the same input, so one Gram matrix and one solution serve all of them
            layer, suffix = split_name(name)
            for reader in self.readers[suffix]:
                parameter = model.get_parameter(f"model.layers.{layer}.{reader}.weight")
                weight = full(parameter.detach()).clone()
                absorbed = weight[:, removed].to(absorption.dtype) @ absorption  # W_P H_PQ (H_QQ + lambda I)^-1
                weight[:, kept] += absorbed.to(weight.dtype)
                scatter(parameter.data, weight)

    def keep(self, removal: Removal) -> None:
        """Drop the rows and columns of removed inputs after the physical removal."""
        for name, gram in list(self.grams.items()):
            kept = _kept_inputs(name, removal)
            if kept is None:
                continue
            index = kept.to(gram.device)
            self.grams[name] = gram[index][:, index].contiguous()
            if not len(kept):  # the block was removed
                del self.grams[name]


def _kept_inputs(name: str, removal: Removal) -> Tensor | None:
    """Return the surviving inputs of a matrix such as "model.layers.0.mlp.down_proj", or None if all survive."""
    layer, suffix = split_name(name)
    return kept_channels(removal.kept, removal.before, layer, input_axis(suffix))


def compensation(gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Return H_PQ (H_QQ + lambda I)^-1, fp64 [P, Q], for kept inputs Q and all others P.

    `gram` is H [n, n].
    """
    removed = removed_positions(kept, gram.shape[0]).to(gram.device)
    hessian = gram.double()  # fp64: H is often close to singular
    h_qq = hessian[kept][:, kept]
    scale = h_qq.diagonal().mean()
    if scale <= 0:  # the inputs were never active: there is nothing to absorb
        return torch.zeros(len(removed), len(kept), dtype=torch.float64, device=gram.device)
    h_qq.diagonal().add_(damping * scale)
    # H is symmetric, so (H_QQ^-1 H_QP)^T = H_PQ H_QQ^-1: one solution instead of an inverse
    return torch.linalg.solve(h_qq, hessian[kept][:, removed]).T
