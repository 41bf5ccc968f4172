"""Weight formats of `--target executorch`, and the quantisation of a StaticDecoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.base.errors import UsageError
from ...train.model.tensors import tensor_names, tensor_shape
from ..group_quantization import keep_scale, quantize_groups, round_to_bfloat16
from ..verification import StoredWeights
from .options import GROUP_SIZES, ExecutorchOptions

ALIGNMENT = 32
"""Multiple of the inputs of an int4 matrix: XNNPACK's smallest group."""


@dataclass(frozen=True)
class WeightFormat:
    """Storage of each part of the model: f32, f16, int8 (per output) or int4 (per group of inputs).

    Products with int8 and int4 weights round activations to int8 per token at run time.
    """

    linear: str
    head: str
    embedding: str

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of activations, caches and unquantised parts."""
        return torch.float16 if self.linear == "f16" else torch.float32


FORMATS = {
    "f32": WeightFormat("f32", "f32", "f32"),
    "f16": WeightFormat("f16", "f16", "f16"),
    "8da4w": WeightFormat("int4", "int8", "int8"),
    "int8": WeightFormat("int8", "int8", "int8"),
}
"""`--quantize` values of `--target executorch`."""


def weight_format(options: ExecutorchOptions) -> WeightFormat:
    """Return the format of the options."""
    chosen = FORMATS[options.weight_type]
    return WeightFormat(chosen.linear, options.output_type or chosen.head, options.embedding_type or chosen.embedding)


class QuantizedEmbedding(nn.Module):
    """Table of int8 rows with one scale each, or int4 rows with one scale per group."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: np.ndarray, scales: np.ndarray, bits: int) -> None:
        """Build the table from `codes` int8 [V, H] and `scales` fp32 [V, groups]."""
        super().__init__()
        self.bits = bits
        if bits == 4:  # two to a byte, the even column in the upper half
            shifted = (codes + 8).astype(np.uint8)
            codes = (shifted[:, ::2] << 4) | shifted[:, 1::2]
        self.register_buffer("codes", torch.from_numpy(codes))
        self.register_buffer("scales", torch.from_numpy(scales[:, 0] if scales.shape[1] == 1 else scales).clone())

    def dequantized(self) -> Tensor:
        """Return the table, fp32 [V, H]."""
        return dequantized_table(self.codes, self.scales, self.bits)

    def forward(self, tokens: Tensor) -> Tensor:
        operators = torch.ops.quantized_decomposed
        if self.bits == 4:
            return operators.embedding_4bit.dtype(self.codes, self.scales, None, -8, 7, tokens, dtype=self.scales.dtype)
        return operators.embedding_byte.dtype(self.codes, self.scales, None, -128, 127, tokens, dtype=self.scales.dtype)


def dequantized_table(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the table of a QuantizedEmbedding's buffers, fp32 [V, H]."""
    numbers = torch.stack([codes >> 4, codes & 15], -1).flatten(1) - 8.0 if bits == 4 else codes
    by_row = scales.reshape(len(codes), -1, 1).float()
    return (numbers.unflatten(1, (by_row.shape[1], -1)) * by_row).flatten(1)


def quantize_decoder(
    model: Any, weights: WeightFormat, options: ExecutorchOptions, grams: dict[str, np.ndarray] | None = None
) -> list[str]:
    """Replace the matrices of a StaticDecoder in place and return notes for the user.

    `grams` is {module name: X^T X of its inputs}, for error-compensated rounding to int4. Raises UsageError for a
    matrix that int4 cannot store.
    """
    smaller = 0
    for name, module in list(model.named_modules()):
        kind = weights.head if name == "lm_head" else weights.linear
        if not isinstance(module, nn.Linear) or kind not in ("int8", "int4"):
            continue
        if kind == "int4" and options.pad == "auto" and module.in_features % ALIGNMENT:
            module = _padded_inputs(model, name, module)
        group = module.in_features if kind == "int8" else group_for(module.in_features, options.group_size)
        if group is None:
            raise UsageError(
                f"int4 needs inputs in multiples of {ALIGNMENT}; {name} has {module.in_features}; use --pad auto or "
                "--quantize int8"
            )
        smaller += kind == "int4" and group != options.group_size
        # of a tied weight only the head's reference is replaced: the embedding is still exact at its own turn below
        gram = grams.get(name) if grams and kind == "int4" else None
        module.weight = nn.Parameter(_quantized(module.weight, kind, group, gram), requires_grad=False)
    if weights.embedding in ("int8", "int4"):
        model.embed_tokens = _quantized_embedding(model.embed_tokens.weight.numpy(), weights.embedding)
    asked = options.group_size
    return [f"{smaller} matrices have smaller groups: {asked} does not divide their inputs"] if smaller else []


def _padded_inputs(model: nn.Module, name: str, module: nn.Linear) -> nn.Linear:
    """Replace a matrix by one with zero columns for zeros behind its inputs, and return the new one."""
    # the heads of an attention need not fill ALIGNMENT; padding.py has padded the widths of the stem and of FFNs
    padding = (0, -module.in_features % ALIGNMENT)
    wide = nn.Linear(module.in_features + padding[1], module.out_features, device="meta")
    wide.weight = nn.Parameter(nn.functional.pad(module.weight, padding), requires_grad=False)
    wide.bias = module.bias
    model.set_submodule(name, nn.Sequential(nn.ConstantPad1d(padding, 0.0), wide))
    return wide


def given_weights(model: Any, weights: WeightFormat) -> StoredWeights:
    """Return the dequantised weights of a StaticDecoder as they are given to the backend."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    # a tied head may be rounded otherwise than the embedding
    architecture = replace(model.architecture, tie_word_embeddings=False)
    tensors, roundings, modules = {}, {}, dict(model.named_modules())
    for name in tensor_names(architecture):
        path, _, kind = name.removeprefix("model.").rpartition(".")
        module = modules[path]
        if isinstance(module, nn.Sequential):  # zeros behind the inputs, then the matrix
            module = module[1]
        value: Any = module.dequantized() if isinstance(module, QuantizedEmbedding) else getattr(module, kind)
        is_integer = isinstance(value, IntxUnpackedToInt8Tensor)
        array = (value.dequantize() if is_integer else value).float().numpy()
        tensors[name] = array[tuple(slice(count) for count in tensor_shape(architecture, name))]
        if is_integer or (weights.dtype == torch.float16 and array.ndim > 1):
            roundings[name] = "int8 per token" if is_integer else "f16 throughout"
    return StoredWeights(architecture, model.scales, tensors, roundings, "codes that were given to the backend")


def group_for(inputs: int, largest: int) -> int | None:
    """Return the largest group up to `largest` that divides `inputs`."""
    return next((size for size in reversed(GROUP_SIZES) if size <= largest and inputs % size == 0), None)


def _quantized(weight: Tensor, kind: str, group: int, gram: np.ndarray | None) -> Tensor:
    """Return torchao's tensor of dynamically quantised products, rounded by our code.

    `gram` may cover fewer inputs if the others are zero padding.
    """
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    bits = 8 if kind == "int8" else 4
    gram = None if gram is None else np.pad(gram, (0, weight.shape[1] - len(gram)))
    # XNNPACK keeps group scales as bfloat16: rounding to what it will read keeps its product equal to ours
    rounding = round_to_bfloat16 if kind == "int4" else keep_scale
    codes, scales = quantize_groups(weight.float().numpy(), bits, group, gram, rounding)
    data = torch.from_numpy(codes)
    return IntxUnpackedToInt8Tensor(
        data,
        torch.from_numpy(scales.copy()),
        torch.zeros(scales.shape, dtype=torch.int8),
        torch.int8 if kind == "int8" else getattr(torch, "int4"),  # noqa: B009 (not in its stubs)
        (1, group),
        torch.float32,
        IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )


def _quantized_embedding(table: np.ndarray, kind: str) -> QuantizedEmbedding:
    width = table.shape[1]
    if kind == "int8":
        return QuantizedEmbedding(*quantize_groups(table, 8, width), bits=8)
    if width % ALIGNMENT:
        raise UsageError(f"--embedding-type int4 needs a hidden size in multiples of {ALIGNMENT}; use --pad auto")
    return QuantizedEmbedding(*quantize_groups(table, 4, ALIGNMENT), bits=4)
