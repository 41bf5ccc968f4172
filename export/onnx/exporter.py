"""`--target onnx`: a folder that onnxruntime and onnxruntime-genai run, verified."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base import flags
from ...runtime.base.extras import extra, require_extra
from ...runtime.base.files import require_room
from ...runtime.engines.engine import EngineOptions
from ...runtime.engines.onnx import OnnxEngine
from ...runtime.engines.scheduler import EngineScheduler
from ...train.model.target_rules import check_target
from ..calibration import input_grams
from ..checkpoint import Checkpoint, choose_type
from ..manifest import Contents, copy_tokenizer, write_manifest
from ..request import ExportRequest, RoundingOptions
from ..targets import Exporter
from ..verification import Written, run_chunks, step_through, torch_sample
from .quantize import Bits, preset, stored_head_dim

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
"""File name that transformers.js requests."""
CONFIG_FILES = ("genai_config.json", "generation_config.json", "config.json")
DEFAULT = "int8"


@dataclass(frozen=True)
class OnnxOptions(RoundingOptions):
    """--target onnx."""

    quantize: str = flags.type_name()
    """Weight type: f32, f16, int8, mixed, int4, web; default: the trained type (--qat), else int8."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        if self.quantize:
            preset(self.quantize)


def check_onnx(options: OnnxOptions) -> None:
    """Raise MissingExtraError without onnxruntime."""
    require_extra("onnx", "onnx", "onnx_ir", "onnxruntime")


def export_onnx(checkpoint: Checkpoint, request: ExportRequest[OnnxOptions], folder: Path) -> None:
    """Write the model with external data, tokenizer files, genai_config.json and manifest."""
    check_target("onnx", checkpoint.config, checkpoint.architecture)
    options = request.options
    name = choose_type(checkpoint, request, "onnx", options.quantize, DEFAULT)
    bits = preset(name)
    request.clock.begin("writing")
    write_model(checkpoint, options, bits, folder)
    write_json(folder / "genai_config.json", genai_config(checkpoint))
    write_json(folder / "generation_config.json", generation_config(checkpoint))
    write_json(folder / "config.json", browser_config(checkpoint))
    weight_bytes = (folder / DATA_FILE).stat().st_size
    tokenizer_files = copy_tokenizer(checkpoint, folder)  # which our engine reads, too
    verification = _verify(checkpoint, request, folder, name, bits) if options.verify else {}
    contents = Contents(
        engine="onnxruntime",
        files=[MODEL_FILE, DATA_FILE, *CONFIG_FILES, *tokenizer_files],
        quantization=name,
        weight_bytes=weight_bytes,
        layout="onnx",
        verification=verification,
    )
    write_manifest(checkpoint, request, folder, contents)


EXPORTER = Exporter(OnnxOptions, export_onnx, check_onnx)


def write_model(checkpoint: Checkpoint, options: OnnxOptions, bits: Bits, folder: Path) -> None:
    """Write the graph and its external data."""
    with extra("onnx"):
        import onnx_ir as ir
        import onnxruntime  # noqa: F401  the quantiser and the verification need it

        from .graph import GraphBuilder
    grams = input_grams(checkpoint, options.calibrate) if options.calibrate else None
    model = GraphBuilder(checkpoint, bits, grams).build()
    weights = (value.const_value for value in model.graph.initializers.values())
    require_room(folder / MODEL_FILE, sum(weight.nbytes for weight in weights if weight is not None))
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def genai_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return onnxruntime-genai's config. Its runtime reads each layer's key/value heads from the graph."""
    architecture = checkpoint.architecture
    ends = checkpoint.end_of_generation_ids
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": stored_head_dim(checkpoint),
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
        "num_attention_heads": architecture.widest.num_attention_heads,
        "num_hidden_layers": len(architecture.layers),
        "num_key_value_heads": architecture.widest.num_key_value_heads,
    }
    bos = checkpoint.bos_id
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
        "search": {"max_length": checkpoint.context_length, "do_sample": False, "past_present_share_buffer": True},
    }


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's generation_config.json, or the special tokens that transformers would read."""
    own = checkpoint.json_file("generation_config.json")
    if own:
        return own
    values = {"bos_token_id": checkpoint.bos_id, "eos_token_id": checkpoint.end_of_generation_ids}
    return {name: value for name, value in values.items() if value not in (None, [])}


def browser_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a config.json for transformers.js with a known family. It reads the caches' sizes from the graph."""
    architecture = checkpoint.architecture
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "head_dim": stored_head_dim(checkpoint),
        "num_hidden_layers": len(architecture.layers),
        "num_attention_heads": architecture.widest.num_attention_heads,
        "num_key_value_heads": architecture.widest.num_key_value_heads,
        "max_position_embeddings": checkpoint.context_length,
        "bos_token_id": checkpoint.bos_id,
        "eos_token_id": checkpoint.end_of_generation_ids,
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": True},  # files without a suffix
    }


def _verify(
    checkpoint: Checkpoint, request: ExportRequest[OnnxOptions], folder: Path, name: str, bits: Bits
) -> dict[str, dict[str, object]]:
    """Compare our engine and a padded batch with torch, on the source's weights (f32) or on the file's own."""
    request.clock.begin("verifying")
    with extra("train"):
        from ..parity import check_written
    from .reader import read_weights, run_padded_batch

    sample, path = torch_sample(checkpoint), folder / MODEL_FILE
    tokens = sample.tokens

    def load() -> EngineScheduler:
        context = min(len(tokens) + 1, checkpoint.context_length)
        return EngineScheduler(OnnxEngine(path, EngineOptions(context=context)))

    runs = [step_through(load(), tokens), run_chunks(load(), tokens), run_padded_batch(path, tokens)]
    stored = None if name == "f32" else read_weights(path, checkpoint, bits)
    return check_written(checkpoint, request, Written("onnx", "file", name, doubtful=0.2), sample, runs, stored)
