"""Random models of a given shape, as GGUF files: what they say is noise, how long they take is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..runtime.base.extras import extra

HEAD_DIM = 64
VOCAB_SIZE = 512
"""Small, so that the output layer hardly counts."""
CONTEXT = 2048

WeightType = Literal["q4_0", "q8_0", "f16"]


@dataclass(frozen=True)
class Shape:
    """A model of equal layers."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_layers: int
    held_out: bool = False
    """Whether it checks the fit instead of taking part in it."""

    @property
    def name(self) -> str:
        heads = f"{self.num_attention_heads}-{self.num_key_value_heads}"
        return f"h{self.hidden_size}-a{heads}-f{self.intermediate_size}-l{self.num_layers}"

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's query, key, value and output projections."""
        return 2 * self.hidden_size * HEAD_DIM * (self.num_attention_heads + self.num_key_value_heads)

    @property
    def ffn_weights(self) -> int:
        """Weights of one layer's gate, up and down projections."""
        return 3 * self.hidden_size * self.intermediate_size


SHAPES = (
    Shape(576, 9, 3, 1536, 8),
    Shape(576, 9, 3, 1536, 16),
    Shape(576, 3, 3, 1536, 8),
    Shape(576, 9, 3, 512, 8),
    Shape(320, 5, 5, 1024, 8),
    Shape(320, 15, 5, 512, 8),
    Shape(960, 15, 5, 2560, 8),
    Shape(960, 5, 5, 512, 8),
    Shape(576, 6, 3, 1024, 8, held_out=True),
    Shape(448, 8, 4, 1280, 12, held_out=True),
    Shape(768, 12, 4, 1792, 8, held_out=True),
)
"""Widths of models of 30 to 400 million parameters, all multiples of 32 so that every weight type can store them."""


def write_gguf(shape: Shape, weight_type: WeightType, path: Path) -> None:
    """Write a llama model with normal weights (standard deviation 0.02); MissingExtraError without gguf."""
    with extra("gguf"):
        import gguf
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{index}>" for index in range(VOCAB_SIZE)])
    writer.add_token_merges(["< 0"])  # llama.cpp refuses to load none
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    stored = gguf.GGMLQuantizationType[weight_type.upper()]
    random = np.random.default_rng(0)
    for name, (rows, columns) in _matrices(shape).items():
        weights = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, gguf.quants.quantize(weights, stored), raw_dtype=stored)
    for name in _norms(shape):
        writer.add_tensor(name, np.ones(shape.hidden_size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """{tensor: [out, in]}; the embedding is the output layer too."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    query, key = HEAD_DIM * shape.num_attention_heads, HEAD_DIM * shape.num_key_value_heads
    layer = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    layers = {f"blk.{i}.{name}.weight": size for i in range(shape.num_layers) for name, size in layer.items()}
    return {"token_embd.weight": (VOCAB_SIZE, hidden), **layers}


def _norms(shape: Shape) -> list[str]:
    names = [f"blk.{i}.{name}_norm.weight" for i in range(shape.num_layers) for name in ("attn", "ffn")]
    return ["output_norm.weight", *names]
