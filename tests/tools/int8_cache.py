"""What attention over an int8 cache takes in onnxruntime and ExecuTorch: `python tests/tools/int8_cache.py`.

One layer of SmolLM2-135M on one thread: GroupQueryAttention with a scale for each channel, and the operators of
export_llm's quantized cache (`custom_quantized_sdpa`, a scale for each token and head), each beside the fp32 one that
our exports use. Writing the cache and quantizing what is new is part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from executorch.extension.llm.custom_ops import custom_ops as _registered  # noqa: F401
from onnx import TensorProto, helper
from torch.ao.quantization.fx import _decomposed as _quantized_ops  # noqa: F401

from efficientllm.runtime.base.quantities import Figure, markdown_table

CONTEXT, HEADS, GROUPS, WIDTH = 2048, 9, 3, 64
DEPTHS, TOKENS, REPEATED = (64, 512, 1536), (1, 24), 60

Attend = Callable[[int, int], object]
"""Attention of so many new tokens after so many cached ones."""


def onnx_attention(quantized: bool) -> Attend:
    """onnxruntime's operator, past and present in one buffer."""
    kind = TensorProto.INT8 if quantized else TensorProto.FLOAT
    values = {"q": ["s", HEADS * WIDTH], "k": ["s", GROUPS * WIDTH], "v": ["s", GROUPS * WIDTH]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *shape]) for name, shape in values.items()]
    cache = [1, GROUPS, "c", WIDTH]
    inputs += [helper.make_tensor_value_info(name, kind, cache) for name in ("past_k", "past_v")]
    inputs += [helper.make_tensor_value_info("last", TensorProto.INT32, [1])]
    inputs += [helper.make_tensor_value_info("total", TensorProto.INT32, [])]
    names, attributes, scales = [item.name for item in inputs], {}, []
    if quantized:
        names += ["", "", "", "", "", "scales", "scales"]  # of keys and of values
        attributes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        shape = [1, GROUPS, 1, WIDTH]
        scales = [helper.make_tensor("scales", TensorProto.FLOAT, shape, np.full(GROUPS * WIDTH, 0.03, np.float32))]
    outputs = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
    outputs += [helper.make_tensor_value_info(name, kind, cache) for name in ("new_k", "new_v")]
    heads = {"num_heads": HEADS, "kv_num_heads": GROUPS}
    node = helper.make_node(
        "GroupQueryAttention", names, ["o", "new_k", "new_v"], domain="com.microsoft", **heads, **attributes
    )
    graph = helper.make_graph([node], "attention", inputs, outputs, scales)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return _bound(onnx.ModelProto.SerializeToString(model), np.int8 if quantized else np.float32)


def _bound(model: bytes, dtype: type) -> Attend:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, settings, ["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    binding = session.io_binding()
    for part in "kv":
        array = (random.standard_normal((1, GROUPS, CONTEXT, WIDTH)) * (30 if dtype is np.int8 else 1)).astype(dtype)
        buffer = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(f"past_{part}", buffer)
        binding.bind_ortvalue_output(f"new_{part}", buffer)

    def attend(tokens: int, depth: int) -> None:
        for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            binding.bind_cpu_input(name, np.ones((1, tokens, heads * WIDTH), dtype=np.float32))
        binding.bind_cpu_input("last", np.asarray([depth + tokens - 1], dtype=np.int32))
        binding.bind_cpu_input("total", np.asarray(depth + tokens, dtype=np.int32))
        binding.bind_output("o", "cpu")
        session.run_with_iobinding(binding)

    return attend


def _int8(x: torch.Tensor) -> list[torch.Tensor]:
    """Codes, scales and zero points of the last axis's vectors."""
    ops: Any = torch.ops.quantized_decomposed
    scales, zeros = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = ops.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
    return [codes, scales.to(torch.float32), zeros.to(torch.int8)]


def executorch_attention(quantized: bool) -> Attend:
    """ExecuTorch's operators, called from torch."""
    ops: Any = torch.ops.llama
    keys, values = (torch.randn(1, CONTEXT, GROUPS, WIDTH) for _ in range(2))
    caches = [_int8(keys), _int8(values)] if quantized else [[keys], [values]]

    def attend(tokens: int, depth: int) -> torch.Tensor:
        query, new = torch.ones(1, tokens, HEADS, WIDTH), torch.ones(1, tokens, GROUPS, WIDTH)
        for cache in caches:
            for part, stored in zip(_int8(new) if quantized else [new], cache, strict=True):
                ops.update_cache(part, stored, depth)
        if not quantized:
            return ops.custom_sdpa(query, keys, values, depth, None, 0.0, True)
        (codes, scales, zeros), (key, *key_rest), (value, *value_rest) = _int8(query), *caches
        rest = [zeros, scales, *reversed(key_rest), *reversed(value_rest)]
        return ops.custom_quantized_sdpa(codes, key, value, depth, None, 0.0, True, None, *rest, False)

    return attend


def rows() -> Iterator[list[str]]:
    """A row per runtime, depth and number of new tokens; fp32 and int8 take turns."""
    torch.set_num_threads(1)
    for runtime, make in (("onnxruntime", onnx_attention), ("ExecuTorch", executorch_attention)):
        both = [make(False), make(True)]
        for depth in DEPTHS:
            for tokens in TOKENS:
                clocks = [[time.perf_counter(), *_times(both, tokens, depth)] for _ in range(REPEATED)]
                taken = np.diff(np.asarray(clocks)[5:], axis=1).T * 1e6  # the first ones warm up
                figures = [Figure.of(list(values)) for values in taken]
                shown = [f"{figure.median:.0f} ({figure.low:.0f}-{figure.high:.0f})" for figure in figures]
                yield [runtime, str(depth), str(tokens), *shown, f"{figures[1].median / figures[0].median:.2f}"]


def _times(both: list[Attend], tokens: int, depth: int) -> Iterator[float]:
    for attend in both:
        attend(tokens, depth)
        yield time.perf_counter()


if __name__ == "__main__":
    print(markdown_table([["runtime", "cached", "new tokens", "fp32, µs", "int8, µs", "ratio"], *rows()]))
