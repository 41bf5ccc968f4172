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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.distributed import Parallel, full, scatter
from ..model.irregular import architecture_of
from ..model.tensors import input_axis, same_input
from .selection import Removal
from .surgery import kept_channels, removed_positions

BATCH = 8
"""Windows per forward pass of a layer."""
ROWS_PER_INPUT = 16
"""Most tokens per input of a matrix in its regression (5 recover less, research/log)."""


class LeastSquares:
    """Refit of a pruned model to its earlier function."""

    def __init__(
        self, model: Any, former: Any, stem: Tensor, damping: float, dtype: torch.dtype, rows: Tensor | None = None
    ) -> None:
        """Prepare the fit.

        `stem` are the surviving hidden channels as positions in `former`, `rows` the same of the vocabulary. Products
        are in `dtype`, solutions in fp64.
        """
        self.model, self.former, self.damping, self.dtype = model.model, former.model, damping, dtype
        self.stem, self.rows = stem, rows

    @torch.no_grad()
    def fit(self, windows: Tensor, parallel: Parallel, check: Callable[[], None] = lambda: None) -> None:
        """Fit every layer on windows [n, S] of token ids, this rank's share.

        `check` is called before every matrix and may raise.
        """
        same_text = windows if self.rows is None else self.rows.to(windows.device)[windows]
        ours, theirs = self.model.embed_tokens(windows).float(), self.former.embed_tokens(same_text).float()
        for layer, former_layer in zip(self.model.layers, self.former.layers, strict=True):
            for block, name, forward in PARTS:
                check()
                former_matrix, matrix = (getattr(getattr(each, block), name, None) for each in (former_layer, layer))
                theirs += self._run(partial(forward, former_layer, self.former), former_matrix, theirs)[1]
                if matrix is None:
                    continue
                read, _ = self._run(partial(forward, layer, self.model), matrix, ours)
                self._solve(matrix, read, theirs.index_select(-1, self.stem.to(theirs.device)) - ours, parallel)
                ours += (read.to(self.dtype) @ matrix.weight.T.to(self.dtype)).float()

    def _run(self, forward: Callable[[Tensor], Tensor], matrix: Any, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return (inputs of `matrix` [n, S, C], the part's output to the residual stream [n, S, H] in fp32)."""
        read: list[Tensor] = []
        hook = matrix.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0])) if matrix else None
        with torch.autocast(stream.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            written = [forward(rows).float() for rows in stream.split(BATCH)]
        if hook is not None:
            hook.remove()
        return torch.cat(read) if read else stream.new_empty(0), torch.cat(written)

    def _solve(self, matrix: Any, read: Tensor, wanted: Tensor, parallel: Parallel) -> None:
        """Change `matrix` so that its inputs give the wanted outputs. A bias stays unchanged."""
        stride = max(1, read[..., 0].numel() // (ROWS_PER_INPUT * read.shape[-1]))
        x, y = read.flatten(0, 1)[::stride].float(), wanted.flatten(0, 1)[::stride]
        weight = matrix.weight.float()
        error = y - x @ weight.T if matrix.bias is None else y - x @ weight.T - matrix.bias.float()
        energy = y.square().mean(1)
        weighted = x / (energy + energy.median().clamp(min=1e-12))[:, None]
        gram, cross = weighted.T @ x, weighted.T @ error
        parallel.mean_tensors([gram, cross])
        gram = gram.double()  # fp64: often close to singular
        gram.diagonal().add_(self.damping * gram.diagonal().mean().clamp(min=1e-12))
        matrix.weight += torch.linalg.solve(gram, cross.double()).T.to(matrix.weight.dtype)


def _attention(layer: Any, model: Any, stream: Tensor) -> Tensor:
    """Return the addition of a layer's attention to the residual stream [n, S, H]."""
    length = stream.shape[1]
    positions = torch.arange(length, device=stream.device)[None]
    return layer.self_attn(
        hidden_states=layer.input_layernorm(stream),
        position_embeddings=model.rotary_emb(stream, positions),
        attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=stream.device).tril(),
    )[0]


def _feed_forward(layer: Any, model: Any, stream: Tensor) -> Tensor:
    """Return the addition of a layer's FFN to the residual stream [n, S, H]."""
    return layer.mlp(layer.post_attention_layernorm(stream))


PARTS = (("self_attn", "o_proj", _attention), ("mlp", "down_proj", _feed_forward))
"""(block, its matrix that writes to the residual stream, its forward pass) in the order of a layer."""


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

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the Gram matrices as they are."""
        return {name: gram.clone() for name, gram in self.grams.items()}

    def attach(self, model: Any) -> None:
        """Observe `model`, again after it is rebuilt."""
        self.detach()
        for name, module in model.named_modules():
            suffix = name.split(".", 3)[-1]
            if suffix in self.readers and input_axis(suffix) in self.axes and isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_pre_hook(self._observer(name)))

    def detach(self) -> None:
        """Stop observing and keep the averages."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observer(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if not module.training or (self.max_width and arguments[0].shape[-1] > self.max_width):
                return
            x = arguments[0].detach().flatten(0, -2)
            x = (x[:: max(1, len(x) // self.rows)] if self.rows else x).float()  # fp32: bf16 sums would cancel
            with torch.autocast(x.device.type, enabled=False):
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
            prefix, suffix = name.rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
            layer = int(name.split(".")[2])
            kept = kept_channels(removal.kept, removal.before, layer, input_axis(suffix))
            if kept is None or len(kept) == 0:
                continue
            matrix = compensation(gram, kept.to(gram.device), self.damping)
            removed = removed_positions(kept, gram.shape[0]).to(gram.device)
            for reader in self.readers[suffix]:
                parameter = model.get_submodule(f"{prefix}.{reader}").weight
                weight = full(parameter.detach()).clone()
                absorbed = weight[:, removed].to(matrix.dtype) @ matrix
                weight[:, kept.to(weight.device)] += absorbed.to(weight.dtype)
                scatter(parameter.data, weight)

    def keep(self, removal: Removal) -> None:
        """Drop the rows and columns of removed inputs after the physical removal."""
        for name, gram in list(self.grams.items()):
            axis = input_axis(".".join(name.rsplit(".", 2)[1:]))
            kept = kept_channels(removal.kept, removal.before, int(name.split(".")[2]), axis)
            if kept is not None and not len(kept):  # the block is gone
                del self.grams[name]
            elif kept is not None:
                index = kept.to(gram.device)
                self.grams[name] = gram[index][:, index].contiguous()


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
    h_qq = h_qq + damping * scale * torch.eye(len(kept), dtype=torch.float64, device=gram.device)
    return torch.linalg.solve(h_qq, hessian[kept][:, removed]).T
