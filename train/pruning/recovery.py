"""Closed-form recovery after a removal (`--recover least-squares`): refit the writers of the residual stream.

After each layer, the pruned model's residual stream should equal that of the model before the removal. For a matrix W
[H, C] (o_proj, down_proj), X [n, C] are its inputs for n tokens in the pruned model. Y [n, H] is the difference between
the former model's stream after the same matrix and the pruned model's stream before it. The ridge regression towards
the current W is W <- W + (Y - X W^T)^T D X (X^T D X + lambda I)^-1, lambda = damping * mean(diag(X^T D X)). D weights
token t by 1 / (|y_t|^2 + median |y|^2). Without it, the few tokens of massive activations (arXiv 2402.17762) dominate.

Layers are fitted in order, so each compensates errors of earlier ones. Fitting a matrix to its own former output, all
at once, or a trained model to its source recovers less or does harm (research/log). The fit needs forward passes only,
and the former model beside the pruned one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compute.distributed import Parallel

BATCH = 8
"""Windows per forward pass of a layer."""
ROWS_PER_INPUT = 16
"""Most tokens per input of a matrix in its regression (5 recover less, research/log)."""


class LeastSquares:
    """Refit of a pruned model to its earlier function."""

    def __init__(
        self, model: Any, whole: Any, stem: Tensor, damping: float, dtype: torch.dtype, rows: Tensor | None = None
    ) -> None:
        """Prepare the fit.

        `stem` are the surviving hidden channels as positions in `whole`, `rows` the same of the vocabulary. Products
        are in `dtype`, solutions in fp64.
        """
        self.model, self.whole, self.damping, self.dtype = model.model, whole.model, damping, dtype
        self.stem, self.rows = stem, rows

    @torch.no_grad()
    def fit(self, windows: Tensor, parallel: Parallel) -> None:
        """Fit every layer on windows [n, S] of token ids, this rank's share."""
        same_text = windows if self.rows is None else self.rows.to(windows.device)[windows]
        ours, theirs = self.model.embed_tokens(windows).float(), self.whole.embed_tokens(same_text).float()
        for layer, original in zip(self.model.layers, self.whole.layers, strict=True):
            for part in (_Attention, _FeedForward):
                theirs += self._run(part(original, self.whole), theirs)[1]
                if (matrix := part.matrix(layer)) is None:
                    continue
                read, _ = self._run(part(layer, self.model), ours)
                self._solve(matrix, read, theirs.index_select(-1, self.stem.to(theirs.device)) - ours, parallel)
                ours += (read.to(self.dtype) @ matrix.weight.T.to(self.dtype)).float()

    def _run(self, part: Any, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return (inputs of the part's matrix [n, S, C], its output to the residual stream [n, S, H] in fp32)."""
        read: list[Tensor] = []
        matrix, written = part.matrix(part.layer), []
        hook = matrix.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0])) if matrix else None
        with torch.autocast(stream.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for rows in stream.split(BATCH):
                written.append(part(rows).float())
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


class _Attention:
    """A layer's attention as its addition to the residual stream."""

    def __init__(self, layer: Any, model: Any) -> None:
        self.layer, self.model = layer, model

    @staticmethod
    def matrix(layer: Any) -> Any | None:
        return getattr(layer.self_attn, "o_proj", None)

    def __call__(self, stream: Tensor) -> Tensor:
        """Map the stream [n, S, H] -> [n, S, H]."""
        length = stream.shape[1]
        positions = torch.arange(length, device=stream.device)[None]
        return self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(stream),
            position_embeddings=self.model.rotary_emb(stream, positions),
            attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=stream.device).tril(),
        )[0]


class _FeedForward:
    """A layer's FFN as its addition to the residual stream."""

    def __init__(self, layer: Any, model: Any) -> None:
        self.layer, self.model = layer, model

    @staticmethod
    def matrix(layer: Any) -> Any | None:
        return getattr(layer.mlp, "down_proj", None)

    def __call__(self, stream: Tensor) -> Tensor:
        """Map the stream [n, S, H] -> [n, S, H]."""
        return self.layer.mlp(self.layer.post_attention_layernorm(stream))
