"""`--target executorch`: a .pte that ExecuTorch's own LLM runner takes, verified."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.errors import UsageError
from ...runtime.engines.engine import EngineOptions
from ...runtime.engines.executorch import ExecuTorchEngine
from ...runtime.engines.executorch_loader import import_executorch, quiet_executorch
from ..calibration import input_grams
from ..checkpoint import Checkpoint
from ..manifest import copy_tokenizer, describe_artefact
from ..padding import pad_rows, padding_notes
from ..request import ExportRequest
from ..verification import sample_tokens, torch_logits, verify_stepwise
from .recipes import Recipe, load_recipe

MODEL_FILE = "model.pte"


def export_executorch(checkpoint: Checkpoint, request: ExportRequest, folder: Path) -> None:
    """Write the program, tokenizer files and manifest."""
    import_executorch()
    with quiet_executorch():
        _export(checkpoint, request, folder)


def _export(checkpoint: Checkpoint, request: ExportRequest, folder: Path) -> None:
    from ..exporter_config import ExecutorchDecoderConfig
    from .lowering import lower
    from .quantize import ALIGNMENT, quantize_decoder, weight_format
    from .static_decoder import StaticDecoder

    options = request.options
    recipe = load_recipe(options.recipe)
    name = options.quantize or recipe.formats[0]
    weights = weight_format(replace(options, quantize=name))
    if name not in recipe.formats:
        raise UsageError(f"--recipe {recipe.name} takes --quantize {', '.join(recipe.formats)}, not {name}")
    partitioners = recipe.partitioners()
    context = min(options.max_context, checkpoint.context_length)
    original = checkpoint.architecture
    needs_padding = "int4" in (weights.linear, weights.head, weights.embedding) and options.pad == "auto"
    architecture = pad_rows(original, ALIGNMENT) if needs_padding else original
    for note in padding_notes(original, architecture):
        request.say(note)
    tokens = sample_tokens(checkpoint, min(256, context))
    reference = torch_logits(checkpoint.folder, tokens) if request.verify else np.empty(0)

    with _stage(request, "building"):
        model: Any = StaticDecoder(
            checkpoint,
            architecture,
            context,
            custom_ops=options.custom_ops and recipe.custom_ops,
            static_length=recipe.static_length,
            dtype=weights.dtype,
        )
        grams = _grams(checkpoint, request) if weights.linear == "int4" else None
        for note in quantize_decoder(model, weights, options, grams):
            request.say(note)
    constants = _constant_methods(checkpoint, context, recipe, options.custom_ops)
    config = ExecutorchDecoderConfig(checkpoint.config)
    try:
        lowered = lower(model, config, partitioners, constants, lambda title: _stage(request, title))
    except Exception as error:  # a backend's compiler raises what it likes
        if recipe.runs_here:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--recipe {recipe.name} cannot lower this model: {reason} (--debug shows more)") from error
    request.say(f"{recipe.name}: {lowered.describe()}")
    (folder / MODEL_FILE).write_bytes(lowered.buffer)
    names = [MODEL_FILE, *copy_tokenizer(checkpoint, folder)]
    weight_bytes = len(lowered.buffer)
    verification: dict[str, Any] = {}
    if request.verify and recipe.runs_here:
        verification = _verify(request, folder, name, weights.linear_bits, tokens, reference)
    elif request.verify:
        request.say(f"not verified: programs of recipe {recipe.name} run only on its devices")
    describe_artefact(
        checkpoint,
        request,
        folder,
        engine="executorch",
        files=names,
        quantization=name,
        weight_bytes=weight_bytes,
        layout=f"executorch, {recipe.name}, context {context}",
        verification=verification,
    )


def _grams(checkpoint: Checkpoint, request: ExportRequest) -> dict[str, np.ndarray] | None:
    """Second moments of every matrix's inputs under --calibrate, by StaticDecoder's module names."""
    if not request.options.calibrate:
        return None
    grams = input_grams(checkpoint, request.options.calibrate)
    return {name.removeprefix("model.").removesuffix(".weight"): gram for name, gram in grams.items()}


@contextlib.contextmanager
def _stage(request: ExportRequest, title: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    request.print_line(f"{title}: {time.perf_counter() - began:.1f} s")


def _constant_methods(checkpoint: Checkpoint, context: int, recipe: Recipe, custom_ops: bool) -> dict[str, Any]:
    """What ExecuTorch's TextLLMRunner asks a program for."""
    bos = checkpoint.config.get("bos_token_id")
    return {
        "get_max_seq_len": 1 if recipe.static_length else context,
        "get_max_context_len": context,
        "get_vocab_size": checkpoint.architecture.vocab_size,
        "get_n_layers": len(checkpoint.architecture.layers),
        "get_bos_id": bos if bos is not None else 0,
        "get_eos_ids": checkpoint.end_of_generation_ids or [0],
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": custom_ops and recipe.custom_ops,
        "enable_dynamic_shape": not recipe.static_length,
    }


def _verify(
    request: ExportRequest, folder: Path, name: str, bits: float, tokens: list[int], reference: np.ndarray
) -> dict[str, dict[str, object]]:
    """Prefill and teacher-forced decoding of the written file through our engine against torch eager."""
    engine = ExecuTorchEngine(folder / MODEL_FILE, EngineOptions())
    agreement = verify_stepwise(engine, tokens, reference, request, name, bits, "executorch", "program")
    return {"exact" if name == "f32" else "quantized": agreement.to_dict()}
