"""`--target gguf`: write, quantise, verify, describe."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.extras import extra, require_extra
from ...runtime.base.files import write_text_atomically
from ...runtime.base.ggml_types import WRITTEN_TYPES
from ...runtime.base.quantities import unknown_name
from ...runtime.engines.manifest import OLLAMA_FILE
from ...train.model.architecture import Architecture
from ...train.model.file_types import BLOCK, row_multiple
from ...train.model.tensors import EMBEDDING, HEAD
from ..calibration import column_importance, save_for_gguf
from ..checkpoint import Checkpoint
from ..manifest import Contents, write_manifest
from ..padding import pad_inputs, padded_tensors
from ..request import ExportRequest, PaddingOptions, log
from ..targets import Exporter
from ..verification import (
    MAX_EXACT_DIFFERENCE,
    Activation,
    Agreement,
    EngineRun,
    Sample,
    check_distance,
    check_exact,
    compare_logits,
    torch_sample,
)
from .layout import GgufPlan, plan_layout
from .modelfile import MAX_CONTEXT, NO_TEMPLATE, modelfile, ollama_template
from .probe import RUNS, Run, probe
from .quantize import describe_fallbacks, quantize_gguf
from .renderers import differences
from .tensor_data import block_of, check_kept, check_rows, read_weights, tensor_bytes
from .tokenizer import check_tokens, name_losses, sample_texts
from .type_choice import FileTypes, tensor_type
from .writer import gguf_name, write_gguf

MODEL_FILE = "model.gguf"
MAX_TABLE_DIFFERENCE = 1e-2
"""Largest |logit difference| if GELU is a table, or the effect of the whole table on a model that is more sensitive. A
number between two fp16 values may be rounded either way."""


@dataclass(frozen=True)
class GgufOptions(PaddingOptions):
    """--target gguf."""

    quantize: str = flags.type_name()
    """Weight type: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0, iq4_nl, iq4_xs,
    q3_k_m, q2_k; default: the trained type (--qat), else that of --target-bytes, else q8_0."""
    output_type: str = flags.type_name()
    """Type of the LM head, a value of --quantize."""
    embedding_type: str = flags.type_name()
    """Type of the token embedding, a value of --quantize."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        if self.quantize not in ("", *WRITTEN_TYPES):
            raise unknown_name("--quantize", self.quantize, WRITTEN_TYPES, of=" for gguf")


def check_gguf(options: GgufOptions) -> None:
    """Raise UsageError for an unknown tensor type, and MissingExtraError without llama.cpp."""
    require_extra("gguf", "gguf", "llama_cpp")
    tensor_type("--output-type", options.output_type)
    tensor_type("--embedding-type", options.embedding_type)


def export_gguf(checkpoint: Checkpoint, request: ExportRequest[GgufOptions], folder: Path) -> None:
    """Write FOLDER/model.gguf, its manifest and a Modelfile. A failure leaves nothing behind."""
    contents = write_model(checkpoint, request, folder)
    template = ollama_template(checkpoint)
    write_text_atomically(folder / OLLAMA_FILE, modelfile(checkpoint, MODEL_FILE, template))
    is_plain = not template or not template[0].startswith("#")
    if not is_plain:
        for sentence in (NO_TEMPLATE, *differences(folder / MODEL_FILE, checkpoint)):
            request.say(sentence)
    # people may write other defaults into it
    write_manifest(checkpoint, request, folder, replace(contents, editable=(OLLAMA_FILE,)))
    hints = run_hints(request.output, checkpoint.context_length, checkpoint.architecture.head_dim)
    for hint in hints if is_plain else hints[:-1]:
        log.info("run it with: %s", hint)


def write_model(checkpoint: Checkpoint, request: ExportRequest[GgufOptions], folder: Path) -> Contents:
    """Write FOLDER/model.gguf and verify it, for this target and others that ship the file."""
    options, types = request.options, FileTypes.resolve(checkpoint, request)
    name = types.name
    plan = plan_layout(checkpoint, row_multiple(name) if options.pad == "auto" else 1)
    for note in plan.notes:
        request.say(note)
    if window := plan.window(checkpoint):
        checkpoint.context_limit = window
        request.say(f"llama.cpp's {plan.name} has no windows: the context ends at the model's window, {window} tokens")
    _check_blocks(options, plan.architecture)
    name_losses(checkpoint, request)
    target, exact = folder / MODEL_FILE, folder / (MODEL_FILE if name == "f32" else "exact.gguf")
    request.clock.begin("writing")
    write_gguf(checkpoint, plan, exact)
    if exact != target:
        request.clock.begin("quantising")
        if types.are_trained and options.calibrate:
            request.say(f"--calibrate changes nothing: the weights are on the grid of {name} already")
        calibrates = options.calibrate and not types.are_trained
        importance = _importance(checkpoint, request, plan, folder) if calibrates else None
        fallbacks = quantize_gguf(exact, target, types, importance)
        if importance is not None:
            importance.unlink()
        for sentence in describe_fallbacks(fallbacks, options.pad == "auto"):
            request.say(sentence)
    check_rows(target)
    if types.are_trained:
        check_kept(exact, target, name)
        request.say(f"every weight is the trained one to the bit: the checkpoint was trained for {name}")
    weight_bytes = tensor_bytes(target)
    verification = _verify(checkpoint, request, plan, exact, target, name) if options.verify else {}
    if exact != target:
        exact.unlink()
    return Contents(
        engine="llama.cpp",
        files=[MODEL_FILE],
        quantization=name,
        weight_bytes=weight_bytes,
        layout=f"llama.cpp architecture {plan.name}",
        verification=verification,
    )


def _check_blocks(options: GgufOptions, shape: Architecture) -> None:
    """Raise UsageError for a requested type whose blocks do not divide the rows. llama.cpp has no other type then."""
    output = "" if shape.tie_word_embeddings else options.output_type
    for flag, name in (("--output-type", output), ("--embedding-type", options.embedding_type)):
        kind = tensor_type(flag, name)
        weights = 1 if kind is None else block_of(kind)[0]
        if shape.hidden_size % weights:
            others = "f16" if shape.hidden_size % BLOCK else f"one with blocks of {BLOCK}, such as q8_0"
            raise UsageError(
                f"{flag} {name} stores rows in blocks of {weights} weights, and the rows of this file have "
                f"{shape.hidden_size}; choose {others}"
            )


EXPORTER = Exporter(GgufOptions, export_gguf, check_gguf)


def _importance(checkpoint: Checkpoint, request: ExportRequest[GgufOptions], plan: GgufPlan, folder: Path) -> Path:
    """Collect the importance matrix and write it under llama.cpp's tensor names."""
    path = folder / "importance.npz"
    importance = column_importance(checkpoint, request.options.calibrate)
    if plan.fuses_qkv:  # one tensor, one input
        fused = (".k_proj.weight", ".v_proj.weight")
        importance = {name: value for name, value in importance.items() if not name.endswith(fused)}
    before, after = checkpoint.architecture, plan.architecture
    if before.tie_word_embeddings and not after.tie_word_embeddings:
        importance[HEAD] = importance.pop(EMBEDDING)
    pad = partial(pad_inputs, before=before, after=after)
    save_for_gguf(importance, partial(gguf_name, plan=plan), pad, path)
    request.say(f"importance matrix from {request.options.calibrate} for {len(importance)} tensors")
    return path


def run_hints(folder: Path, context_length: int, head_dim: int) -> list[str]:
    """Return commands that run the file in our server, llama.cpp's and Ollama."""
    context = min(context_length, MAX_CONTEXT)
    # flash attention over fp16 is slow on many CPUs; Q8_0 has blocks of 32
    attention = "-fa off" if head_dim % 32 else "-fa on -ctk q8_0 -ctv q8_0"
    return [
        f"efficientllm serve {shlex.quote(str(folder))}",
        f"llama-server -m {shlex.quote(str(folder / MODEL_FILE))} -c {context} {attention}",
        f"ollama create {shlex.quote(folder.absolute().name)} -f {shlex.quote(str(folder / OLLAMA_FILE))}",
    ]


def _verify(
    checkpoint: Checkpoint, request: ExportRequest[GgufOptions], plan: GgufPlan, exact: Path, target: Path, name: str
) -> dict[str, dict[str, object]]:
    """Compare the F32 file with torch, its tokens with tokenizer.json, and the file with its own weights in torch."""
    request.clock.begin("verifying")
    # a quantised file is run in all ways itself, so its F32 file needs one run
    agreement, sample = _verify_exact(checkpoint, request, exact, RUNS if target == exact else RUNS[:1])
    results = {"exact": agreement.to_dict()}
    if target != exact:
        results |= _verify_quantized(checkpoint, request, plan, target, name, sample)
    return results


def _verify_exact(
    checkpoint: Checkpoint, request: ExportRequest[GgufOptions], file: Path, runs: Sequence[Run]
) -> tuple[Agreement, Sample]:
    """Return the agreement of the F32 file with torch, and the logits of the file's first run."""
    activation = _activation(checkpoint)
    reference = torch_sample(checkpoint, activation=activation, multiplies_angles=True)
    tokens = reference.tokens
    own_logits, most, own_error = reference.logits, MAX_EXACT_DIFFERENCE, reference.own_error
    if activation is not None:
        own_logits = torch_sample(checkpoint).logits
        # torch's table and ggml's may differ in the last place, which matters by as much as the model is sensitive
        effect_of_table = float(np.abs(own_logits - reference.logits).max())
        most, own_error = max(MAX_TABLE_DIFFERENCE, effect_of_table), lambda: 0.0
    found = probe(file, tokens, sample_texts(checkpoint), runs)
    check_tokens(checkpoint, request, found.token_ids, found.end_ids)
    agreements = [compare_logits(reference.logits, logits, tokens) for logits in found.logits]
    for agreement in agreements:
        check_exact(agreement, reference.logits, "gguf", most, own_error)
    agreement = max(agreements, key=lambda each: each.max_logit_difference)
    request.say(
        f"verified f32 file against torch: max |logit difference| {agreement.max_logit_difference:.1e}, "
        f"same argmax {agreement.argmax_agreement:.1%}, {agreement.tokens} tokens"
    )
    if activation is not None:
        agreement = compare_logits(own_logits, found.logits[0], tokens)
        request.say(
            f"llama.cpp's GELU is a table of fp16 numbers (the reference above is torch with that table): from the "
            f"model's own {checkpoint.architecture.parts.activation}, max |logit difference| "
            f"{agreement.max_logit_difference:.1e}, mean KL {agreement.mean_kl:.1e}"
        )
    return agreement, Sample(tokens, found.logits[0])


def _verify_quantized(
    checkpoint: Checkpoint, request: ExportRequest[GgufOptions], plan: GgufPlan, file: Path, name: str, exact: Sample
) -> dict[str, dict[str, object]]:
    """Compare a quantised file with torch on its own weights, and with the logits `exact` of the F32 file."""
    with extra("train"):
        from ..parity import check_runs, check_weights, reference_logits
    stored = read_weights(file, checkpoint, plan)
    norm, stored_norm = checkpoint.architecture.parts.norm, plan.architecture.parts.norm
    is_centred = norm.takes_mean and not stored_norm.takes_mean
    source = padded_tensors(checkpoint, plan.architecture, plan.scales, is_centred)
    weights = check_weights(source, stored, "gguf")
    found = probe(file, exact.tokens, runs=RUNS)
    positions = list(range(len(exact.tokens)))
    runs = [EngineRun(run.title, positions, logits) for run, logits in zip(RUNS, found.logits, strict=True)]
    # against its own weights, so that the limit does not depend on how much the type rounds
    own_weights = reference_logits(checkpoint, stored, exact.tokens, _activation(checkpoint))
    codes = check_runs(own_weights, runs, stored.origin, "gguf")
    quantized = compare_logits(exact.logits, found.logits[0], exact.tokens)
    check_distance(quantized, request.options.max_kl, "gguf")
    request.say(
        f"verified {name} file against torch on the file's own weights, {len(runs)} runs; from f32: mean KL "
        f"{quantized.mean_kl:.4f}, same argmax {quantized.argmax_agreement:.1%}, perplexity "
        f"x{quantized.perplexity_ratio:.3f}"
    )
    return {"weights": weights, "codes": codes, "quantized": quantized.to_dict()}


def _activation(checkpoint: Checkpoint) -> Activation | None:
    """Return ggml's activation if it differs from the model's by more than rounding, else None."""
    return table_gelu if checkpoint.architecture.parts.activation.startswith("gelu") else None


def table_gelu(x: Any) -> Any:
    """Compute GELU as ggml does on a CPU: the tanh formula of fp16 numbers, rounded to fp16."""
    import torch

    rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    # the table ends at 10: beyond it ggml returns x itself, and 0 on the negative side
    large = torch.where(x >= 10, x, rounded)
    return torch.where(x <= -10, torch.zeros_like(x), large)
