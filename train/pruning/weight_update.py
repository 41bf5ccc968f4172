"""Second-order update of the remaining weights (`--weight-update obs`; the paper's EfficientLLM-B).

For y = W x with inputs x split into removed P and kept Q, the least-squares compensation of the lost W_P x_P is W_Q <-
W_Q + W_P H_PQ (H_QQ + lambda I)^-1, H = E[x x^T], lambda = damping * mean(diag H_QQ) (optimal brain surgeon for a
linear layer; SparseGPT, arXiv 2301.00774). H is the Gram matrix of the layer's own inputs, a running average over the
training steps: a local Hessian, independent of the global ranking. Inputs: o_proj reads heads [Q*D], down_proj FFN
channels [I], and q, k, v (gate, up) the normalised stem [H].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.gather import full, scatter
from ..model.irregular import architecture_of
from ..model.tensors import input_axis, same_input
from .selection import Removal
from .surgery import kept_channels


class InputGrams:
    """Running averages of H = E[x x^T], one per observed input, and the update from them."""

    def __init__(self, model: Any, axes: set[str], decay: float, damping: float, max_width: int, rows: int) -> None:
        """Observe inputs along `axes` up to `max_width` wide (0: any), `rows` tokens per step (0: all)."""
        self.model = model
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
        self.model = model
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
    def update_weights(self, removal: Removal) -> None:
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
                parameter = self.model.get_submodule(f"{prefix}.{reader}").weight
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

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the Gram matrices."""
        return sum(gram.numel() * gram.element_size() for gram in self.grams.values())


def removed_positions(kept: Tensor, size: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask.nonzero().flatten()


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
