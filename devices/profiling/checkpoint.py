"""Random models of a given shape, as Hugging Face folders: what they say is noise, how long they take is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ...runtime.base.extras import extra
from ...runtime.engines.hf_tokenizer import byte_alphabet
from ...runtime.latency.shape import DecoderShape

END = "<|endoftext|>"
POOL = 1 << 20
"""Random weights that are made; matrices begin at other places of them, since XNNPACK stores equal matrices once."""


def write_checkpoint(shape: DecoderShape, folder: Path, context: int) -> None:
    """Write a Llama with weights of standard deviation 0.02, fp16, for `context` tokens.

    Layers that lost everything are left out. MissingExtraError without safetensors.
    """
    with extra("export"):
        from safetensors.numpy import save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(_tensors(shape)), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(shape, context))
    _tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"bos_token": END, "eos_token": END})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _config(shape: DecoderShape, context: int) -> dict[str, Any]:
    layers = shape.present_layers
    widths = [
        {
            "num_attention_heads": layer.num_attention_heads,
            "num_key_value_heads": layer.num_key_value_heads,
            "intermediate_size": layer.intermediate_size,
        }
        for layer in layers
    ]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden_size,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "num_hidden_layers": len(layers),
        **widths[0],
        "per_layer_config": {str(index): each for index, each in enumerate(widths) if each != widths[0]},
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _tokenizer() -> Tokenizer:
    """Bytes alone: the rows of the embedding beyond them have no token."""
    vocab = {END: 0} | {character: index + 1 for index, character in enumerate(sorted(byte_alphabet()))}
    first, second = sorted(byte_alphabet())[:2]
    vocab[first + second] = len(vocab)  # llama.cpp refuses to load no merge
    tokenizer = Tokenizer(models.BPE(vocab, [(first, second)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def _tensors(shape: DecoderShape) -> Iterator[tuple[str, np.ndarray]]:
    pool = (0.02 * np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)).astype(np.float16)
    for number, (name, size) in enumerate(_matrices(shape)):
        yield name, np.resize(np.roll(pool, 4001 * number), size)
    for name in _norms(shape):
        yield name, np.ones(shape.hidden_size, np.float16)


def _matrices(shape: DecoderShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """(tensor, [out, in]); the embedding is the output layer too."""
    hidden = shape.hidden_size
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for index, layer in enumerate(shape.present_layers):
        query, key = shape.head_dim * layer.num_attention_heads, shape.head_dim * layer.num_key_value_heads
        prefix, ffn = f"model.layers.{index}", layer.intermediate_size
        if query:
            yield f"{prefix}.self_attn.q_proj.weight", (query, hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (key, hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (key, hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, query)
        if ffn:
            yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)


def _norms(shape: DecoderShape) -> Iterator[str]:
    yield "model.norm.weight"
    for index, layer in enumerate(shape.present_layers):
        if layer.num_attention_heads:
            yield f"model.layers.{index}.input_layernorm.weight"
        if layer.intermediate_size:
            yield f"model.layers.{index}.post_attention_layernorm.weight"
