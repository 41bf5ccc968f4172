"""`--target litert`: a .litertlm that stock LiteRT-LM runs, verified. Imports no torch until it runs."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base import flags
from ...runtime.base.extras import extra
from ..checkpoint import Checkpoint
from ..manifest import Contents, bits_per_weight, write_manifest
from ..request import ExportRequest, RoundingOptions, log
from ..targets import Exporter
from ..verification import SAMPLE_TOKENS, Written, torch_sample, verify_stepwise

MODEL_FILE = "model.litertlm"

RECIPES = {"f32": "none", "int8": "dynamic_wi8_afp32"}
"""--quantize -> ai-edge-quantizer's recipe: int8 weights, activations rounded as they come."""

PREFILL_LENGTHS = (16, 128)
"""Tokens of a prompt that one call takes; LiteRT-LM cuts and pads prompts to these."""


@dataclass(frozen=True)
class LitertOptions(RoundingOptions):
    """--target litert"""

    quantize: str = "int8"
    """Weight type: int8 or f32."""
    max_context: int = flags.count(2048)
    """Slots of the key/value caches, at most the model's context."""

    def __post_init__(self) -> None:
        flags.require(self, "quantize", self.quantize in RECIPES, f"must be one of {', '.join(RECIPES)}")
        least = max(PREFILL_LENGTHS) + 1
        flags.require(self, "max_context", self.max_context >= least, f"must be at least {least}: a prompt and a token")
        flags.require(self, "calibrate", not self.calibrate, "LiteRT's recipes round without text; leave it out")


def export_litert(checkpoint: Checkpoint, request: ExportRequest[LitertOptions], folder: Path) -> None:
    """Write FOLDER/model.litertlm (tokenizer, template and defaults inside) and the manifest."""
    from .conversion import convert

    options = request.options
    if options.verify:  # asked before a minute of conversion
        with extra("litert"):
            import ai_edge_litert  # type: ignore[import-not-found]  # noqa: F401
            import litert_lm  # type: ignore[import-not-found]  # noqa: F401
    context = min(options.max_context, checkpoint.context_length)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        program = convert(checkpoint, Path(work), RECIPES[options.quantize], context, PREFILL_LENGTHS)
        size = program.tflite.stat().st_size
        program.bundle.replace(folder / MODEL_FILE)
        verification = _verify(checkpoint, request, program.tflite, folder) if options.verify else {}
    contents = Contents(
        engine="litert-lm",  # no engine of ours: chat, server and bench say so
        files=[MODEL_FILE],
        quantization=options.quantize,
        weight_bytes=size,
        layout="LiteRT-LM",
        verification=verification,
    )
    write_manifest(checkpoint, request, folder, contents)
    log.info("run it with: litert-lm run %s", shlex.quote(str(request.output / MODEL_FILE)))


def _verify(
    checkpoint: Checkpoint, request: ExportRequest[LitertOptions], tflite: Path, folder: Path
) -> dict[str, dict[str, object]]:
    """The program against torch, logit by logit, and LiteRT-LM's own greedy text against the program's."""
    from .interpreter import TfliteDecoder
    from .stock_runtime import check_greedy_text

    quantize = request.options.quantize
    bits = bits_per_weight(checkpoint, tflite.stat().st_size)
    sample = torch_sample(checkpoint, min(SAMPLE_TOKENS, request.options.max_context))
    written = Written("litert", "program", quantize, bits)
    agreement = verify_stepwise(TfliteDecoder(tflite), sample, written, request)
    characters = check_greedy_text(folder / MODEL_FILE, TfliteDecoder(tflite), checkpoint.tokenizer)
    request.say(f"LiteRT-LM itself writes the same {characters} characters after a prompt as this program does")
    key = "exact" if quantize == "f32" else "quantized"
    return {key: agreement.to_dict(), "litert_lm": {"same_characters": characters}}


EXPORTER = Exporter(LitertOptions, export_litert)
