"""`--target onnx`: a folder that onnxruntime and onnxruntime-genai run, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...runtime.base.errors import MissingExtraError, UsageError
from ...runtime.engines.engine import EngineOptions
from ...runtime.engines.onnx import OnnxEngine
from ..calibration import input_grams
from ..checkpoint import Checkpoint
from ..manifest import bits_per_weight, copy_tokenizer, describe_artefact
from ..request import ExportRequest
from ..verification import sample_tokens, torch_logits, verify_stepwise
from .quantize import preset

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
DEFAULT = "int8"


def export_onnx(checkpoint: Checkpoint, request: ExportRequest, folder: Path) -> None:
    """Write the model with external data, tokenizer files, genai_config.json and manifest."""
    try:
        import onnx_ir as ir
        import onnxruntime  # noqa: F401  the quantiser and the verification need it

        from .graph import GraphBuilder
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "onnxruntime", "onnx") from error
    options = request.options
    name = options.quantize or ("f32" if options.portable else DEFAULT)
    bits = preset(name)
    if options.portable:
        if name != "f32":
            raise UsageError(f"--portable takes --quantize f32, not {name}: standard operators hold no packed weights")
        _write_portable(checkpoint, folder / MODEL_FILE)
    else:
        grams = input_grams(checkpoint, options.calibrate) if options.calibrate else None
        ir.save(GraphBuilder(checkpoint, bits, grams).build(), folder / MODEL_FILE, external_data=DATA_FILE)
    config = genai_config(checkpoint, shares_cache=not options.portable)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = [MODEL_FILE, DATA_FILE, "genai_config.json", "generation_config.json", *copy_tokenizer(checkpoint, folder)]
    (folder / "generation_config.json").write_text(
        json.dumps(generation_config(checkpoint), indent=2) + "\n", encoding="utf-8"
    )
    weight_bytes = (folder / DATA_FILE).stat().st_size
    # with int8 activations, the matrices that stay in fp32 do not make the rest any closer
    stored = min(bits_per_weight(checkpoint, weight_bytes), 8.0 if bits.dynamic else 32.0)
    verification = _verify(checkpoint, request, folder, name, stored) if request.verify else {}
    describe_artefact(
        checkpoint,
        request,
        folder,
        engine="onnxruntime",
        files=names,
        quantization=name,
        weight_bytes=weight_bytes,
        layout="onnx, standard operators" if options.portable else "onnx",
        verification=verification,
    )


def _write_portable(checkpoint: Checkpoint, path: Path) -> None:
    try:
        from .portable import write_portable
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "onnxscript", "onnx-portable") from error
    write_portable(checkpoint, path)


def genai_config(checkpoint: Checkpoint, shares_cache: bool) -> dict[str, Any]:
    """onnxruntime-genai's description; its runtime reads each layer's key/value heads from the graph itself.

    `shares_cache`: whether the attention operator can write into the past in place.
    """
    architecture = checkpoint.architecture
    ends = checkpoint.end_of_generation_ids
    heads = max(layer.num_attention_heads for layer in architecture.layers)
    groups = max(layer.num_key_value_heads for layer in architecture.layers)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": architecture.head_dim,
        "hidden_size": architecture.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": len(architecture.layers),
        "num_key_value_heads": groups,
    }
    bos = checkpoint.config.get("bos_token_id")
    return {
        "model": {
            "type": "llama",
            "vocab_size": architecture.vocab_size,
            "context_length": checkpoint.context_length,
            "bos_token_id": bos if bos is not None else 0,
            "eos_token_id": ends or [0],
            "pad_token_id": ends[0] if ends else 0,
            "decoder": decoder,
        },
        "search": {
            "max_length": checkpoint.context_length,
            "do_sample": False,
            "past_present_share_buffer": shares_cache,
        },
    }


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own generation_config.json, else the special tokens that transformers would read from it."""
    path = checkpoint.folder / "generation_config.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    values = {"bos_token_id": checkpoint.config.get("bos_token_id"), "eos_token_id": checkpoint.end_of_generation_ids}
    return {name: value for name, value in values.items() if value not in (None, [])}


def _verify(
    checkpoint: Checkpoint, request: ExportRequest, folder: Path, name: str, bits: float
) -> dict[str, dict[str, object]]:
    """Prefill and teacher-forced decoding through our engine against torch."""
    tokens = sample_tokens(checkpoint)
    engine = OnnxEngine(folder / MODEL_FILE, EngineOptions(context=len(tokens) + 1))
    reference = torch_logits(checkpoint.folder, tokens)
    agreement = verify_stepwise(engine, tokens, reference, request, name, bits, "onnx", "file")
    if agreement.mean_kl > 0.2:
        request.say(f"warning: {name} costs this model a mean KL of {agreement.mean_kl:.2f}; int8 is the safe choice")
    return {"exact" if name == "f32" else "quantized": agreement.to_dict()}
