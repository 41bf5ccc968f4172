"""Random models of given shapes: written as Hugging Face folders and exported by efficientllm-export.

The exported files have the padding of real ones. Weights are noise, which does not change the speed. `devices` imports
no exporter, so efficientllm-export runs in a child process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ...runtime.base.child import run_python
from ...runtime.base.errors import DeviceError
from ...runtime.base.extras import extra
from ...runtime.base.files import json_text
from ...runtime.engines.artefact import Artefact
from ...runtime.engines.hf_tokenizer import byte_alphabet
from ...runtime.latency.shape import DecoderShape

TARGETS = {"llama.cpp": "gguf", "onnxruntime": "onnx", "executorch": "executorch"}
"""Maps an engine to the export target of its artefacts."""
DEFAULT_TYPES = {"llama.cpp": "q4_0", "onnxruntime": "int4", "executorch": "8da4w"}
"""Maps an engine to its default weight type."""
EXPORT = "-m", "efficientllm.runtime.start", "export"
PARALLEL_EXPORTS = 2
END_TOKEN = "<|endoftext|>"
POOL_SIZE = 1 << 20
"""Number of random weights. Matrices start at different offsets, because XNNPACK stores equal matrices once."""


def make_artefacts(
    shapes: Sequence[DecoderShape],
    engine: str,
    quantization: str,
    context: int,
    folder: Path,
    log: Callable[[str], None],
) -> list[Artefact]:
    """Return an artefact of each shape, in order. Existing ones in `folder` are reused, missing ones are exported.

    Raises DeviceError with the exporter's message if an export fails.
    """

    def make(numbered: tuple[int, DecoderShape]) -> Artefact:
        number, shape = numbered
        text = json_text({"shape": asdict(shape), "engine": engine, "type": quantization, "context": context})
        path = folder / f"{quantization}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if not path.exists():
            log(f"exporting {number}/{len(shapes)}, {_describe(shape)}")
            _export(shape, TARGETS[engine], quantization, context, path)
        return Artefact.open(path)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(PARALLEL_EXPORTS) as pool:
        return list(pool.map(make, enumerate(shapes, 1)))


def _export(shape: DecoderShape, target: str, quantization: str, context: int, path: Path) -> None:
    source = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".source", dir=path.parent))
    try:
        write_checkpoint(shape, source, context)
        flags = ["--target", target, "--quantize", quantization, "--no-verify", "--output", str(path)]
        finished = run_python(*EXPORT, str(source), *flags)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if finished.code:
        raise DeviceError(f"exporting {_describe(shape)}: {finished.last_error.removeprefix('error: ')}")


def _describe(shape: DecoderShape) -> str:
    last = shape.layers[-1]
    return (
        f"a random model: hidden {shape.hidden_size}, {len(shape.layers)} layers, the last with "
        f"{last.num_attention_heads}/{last.num_key_value_heads} heads and FFN {last.intermediate_size}"
    )


def write_checkpoint(shape: DecoderShape, folder: Path, context: int) -> None:
    """Write a Llama with fp16 weights of standard deviation 0.02, for `context` tokens.

    Layers without attention and FFN are omitted. Raises MissingExtraError without safetensors.
    """
    with extra("export"):
        from safetensors.numpy import save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(_tensors(shape)), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(shape, context))
    _tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"bos_token": END_TOKEN, "eos_token": END_TOKEN})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _config(shape: DecoderShape, context: int) -> dict[str, Any]:
    widths = [asdict(layer) for layer in shape.present_layers]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden_size,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "num_hidden_layers": len(widths),
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
    """Return a tokenizer of bytes. Further rows of the embedding have no token."""
    characters = sorted(byte_alphabet())
    vocab = {END_TOKEN: 0} | {character: index for index, character in enumerate(characters, 1)}
    first, second = characters[:2]
    vocab[first + second] = len(vocab)  # llama.cpp requires at least one merge
    tokenizer = Tokenizer(models.BPE(vocab, [(first, second)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True)])
    return tokenizer


def _tensors(shape: DecoderShape) -> Iterator[tuple[str, np.ndarray]]:
    noise = np.random.default_rng(0).standard_normal(POOL_SIZE, dtype=np.float32)
    pool = (0.02 * noise).astype(np.float16)
    for number, (name, size) in enumerate(_matrices(shape)):
        yield name, np.resize(np.roll(pool, 4001 * number), size)
    for name in _norms(shape):
        yield name, np.ones(shape.hidden_size, np.float16)


def _matrices(shape: DecoderShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (tensor, [out, in]). The embedding is also the LM head."""
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
