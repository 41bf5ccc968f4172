"""Round weights onto the grids of shipped types, to the bit as the exporters write and the runtimes read them.

A row [in] is split into blocks of G weights with one scale d each. A weight becomes d times a small whole number.
Blocks are rows of a matrix [N, G] here. Rounding twice equals rounding once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PIECE = 2**18
"""Weights that are rounded at once, so that they stay in the cache: 0.46 s for 135M of them on one core with weighting,
0.84 s with twice as many."""

FINER = 0.9
"""Second candidate scale, as a share of the scale with the largest weight at -8. KL of SmolLM2-135M, rounded alone:
0.412 with llama.cpp's scales, 0.289 with the best ones for the same codes, 0.266 with these codes as well, 0.247 with
five."""


@dataclass(frozen=True)
class Grid:
    """Storage of a block in a type."""

    block: int
    """Weights that share a scale. 0: a whole row."""
    round_blocks: Callable[[Tensor, Tensor], None]
    """Round fp32 [N, G] into the second tensor."""
    round_weighted: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """The same with squared errors weighted by the third tensor [N / out, G]. None if the grid has no choice."""

    @torch.no_grad()
    def round(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return fp32 [out, in] rounded, padded with zeros if blocks do not divide rows.

        `importance` fp32 [in] weights the squared errors of each column, if the grid's scale has a choice.
        """
        rows, columns = weight.shape
        block = self.block or columns
        width = -(-columns // block) * block
        if width != columns:  # as the exporters pad: the zeros of the last block take part in its scale
            weight = functional.pad(weight, (0, width - columns))
        weights = None
        if importance is not None:
            weights = functional.pad(importance.float(), (0, width - columns)).view(-1, block)
        rounded = torch.empty_like(weight, memory_format=torch.contiguous_format)
        step = max(1, PIECE // width)
        for start in range(0, rows, step):
            piece = slice(start, start + step)
            blocks, out = weight[piece].reshape(-1, block), rounded[piece].view(-1, block)
            if weights is None or self.round_weighted is None:
                self.round_blocks(blocks, out)
            else:
                self.round_weighted(blocks, out, weights)
        return rounded[:, :columns].contiguous() if width != columns else rounded


def _largest(blocks: Tensor) -> Tensor:
    """Return [N, 1]: the weight of the largest magnitude, the first of two."""
    high, low = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)
    largest = torch.where(-low > high, low, high)
    is_tied = (-low == high).flatten()
    if is_tied.any():
        tied = blocks[is_tied]
        largest[is_tied] = tied.gather(1, tied.abs().argmax(1, keepdim=True))
    return largest


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1 / scales)


def _as_fp16(scales: Tensor) -> Tensor:
    return scales.half().float()


def round_q4_0(blocks: Tensor, out: Tensor) -> None:
    """Round to codes -8 to 7, the largest weight at -8, scale in fp16 (ggml-quants.c, quantize_row_q4_0_ref)."""
    scales = _largest(blocks) / -8
    # codes come from the fp32 scale and values from the stored fp16 one, as llama.cpp computes both
    torch.mul(blocks, _inverse(scales), out=out)
    out.add_(8.5).trunc_().clamp_(0, 15).sub_(8)
    out.mul_(_as_fp16(scales))


def round_q4_0_weighted(blocks: Tensor, out: Tensor, weights: Tensor) -> None:
    """Round as `round_q4_0` with the best scale for the codes, or with codes of a finer, clipping scale.

    The largest magnitude of a rounded block is always 8 scales, so llama.cpp's quantiser reproduces scale and codes.
    """
    coarsest = _largest(blocks) / -8
    _nearest_codes(blocks, coarsest, out)
    scales, gain = _best_scales(blocks, out, weights)
    finer = torch.empty_like(out)
    _nearest_codes(blocks, FINER * coarsest, finer)
    finer_scales, finer_gain = _best_scales(blocks, finer, weights)
    is_finer = finer_gain > gain * (1 + 1e-6)  # a rounded block stays as it is
    torch.where(is_finer, finer, out, out=out)
    out.mul_(_as_fp16(torch.where(is_finer, finer_scales, scales)))


def _nearest_codes(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Round to codes -8 to 7."""
    torch.mul(blocks, _inverse(scales), out=out)
    out.round_().clamp_(-8, 7)


def _best_scales(blocks: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales [N, 1] of least weighted squared error for codes c [N, G], and the error reduction [N, 1].

    The scale is w x c / w c^2, both summed over a block. The reduction is relative to zeros.
    """
    by_row = codes.view(-1, *weights.shape)  # [out, N / out, G]: the weights of columns are the same in every row
    weighed = (by_row * weights).view(codes.shape)
    squares = (weighed * codes).sum(1, keepdim=True)
    products = weighed.mul_(blocks).sum(1, keepdim=True)
    scales = torch.where(squares == 0, 0.0, products / squares)
    return scales, scales * products


def round_q8_0(blocks: Tensor, out: Tensor) -> None:
    """Round to codes -127 to 127, half away from zero, scale in fp16 (ggml-quants.c, quantize_row_q8_0_ref)."""
    scales = _magnitude(blocks) / 127
    torch.mul(blocks, _inverse(scales), out=out)
    torch.copysign(out.abs().add_(0.5).floor_(), out, out=out)
    out.mul_(_as_fp16(scales))


def _magnitude(blocks: Tensor) -> Tensor:
    """Return [N, 1]: the largest magnitude."""
    return torch.maximum(blocks.amax(1, keepdim=True), -blocks.amin(1, keepdim=True))


def round_int4(blocks: Tensor, out: Tensor) -> None:
    """Round to codes -8 to 7, the largest weight at -8, scale in fp32: MatMulNBits as export/onnx fills it."""
    scales = _largest(blocks) / -8
    _nearest_codes(blocks, scales, out)
    out.mul_(scales)


def round_int4_bfloat16(blocks: Tensor, out: Tensor) -> None:
    """Round to codes -8 to 7, the largest magnitude at 7, scale in bf16, as export/executorch does for XNNPACK."""
    scales = (_magnitude(blocks) / 7).bfloat16().float()
    _nearest_codes(blocks, scales, out)
    out.mul_(scales)


def round_int8(blocks: Tensor, out: Tensor) -> None:
    """Round to codes -127 to 127, scale in fp32."""
    scales = _magnitude(blocks) / 127
    torch.mul(blocks, _inverse(scales), out=out)
    out.round_().mul_(scales)


GRIDS = {
    "q8_0": Grid(32, round_q8_0),
    "q4_0": Grid(32, round_q4_0, round_q4_0_weighted),
    "int4": Grid(32, round_int4),
    "int4-bf16": Grid(32, round_int4_bfloat16),
    "int8": Grid(0, round_int8),
}
"""Tensor type -> its grid."""
