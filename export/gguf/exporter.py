"""`--target gguf`: write, quantise, verify, describe."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ...runtime.base.errors import ArtefactError
from ...runtime.chat_template import render_chat
from ...train.model.tensors import tensor_shape
from ..calibration import column_importance, save_for_gguf
from ..checkpoint import Checkpoint
from ..manifest import bits_per_weight, describe_artefact
from ..request import ExportRequest
from ..verification import (
    Agreement,
    check_exact,
    check_quantized,
    compare_logits,
    sample_text,
    sample_tokens,
    torch_logits,
)
from .probe import probe
from .quantize import (
    ROW_MULTIPLE,
    describe_fallbacks,
    file_type,
    quantize_gguf,
    require_llama_cpp,
    tensor_bytes,
    tensor_type,
)
from .writer import GgufPlan, gguf_name, plan_layout, write_gguf

MODEL_FILE = "model.gguf"
DEFAULT = "f16"


def export_gguf(checkpoint: Checkpoint, request: ExportRequest, folder: Path) -> None:
    """Write FOLDER/model.gguf and its manifest; raises before anything is left behind."""
    require_llama_cpp()
    options = request.options
    name = options.quantize or DEFAULT
    file_type(name)
    output_type = tensor_type("--output-type", options.output_type)
    embedding_type = tensor_type("--embedding-type", options.embedding_type)
    row_multiple = ROW_MULTIPLE.get(name, 32) if options.pad == "auto" else 1
    plan = plan_layout(checkpoint, row_multiple)
    for note in plan.notes:
        request.say(note)
    exact = folder / "exact.gguf"
    target = folder / MODEL_FILE
    write_gguf(checkpoint, plan, exact)
    if name == "f32":
        exact.rename(target)
        exact = target
    else:
        importance = _importance(checkpoint, request, plan, folder) if options.calibrate else None
        fallbacks = quantize_gguf(exact, target, name, output_type, embedding_type, importance)
        if importance is not None:
            importance.unlink()
        for sentence in describe_fallbacks(fallbacks):
            request.say(sentence)
    weight_bytes = tensor_bytes(target)
    bits = bits_per_weight(checkpoint, weight_bytes)
    verification = _verify(checkpoint, request, exact, target, bits) if request.verify else {}
    if exact != target:
        exact.unlink()
    describe_artefact(
        checkpoint,
        request,
        folder,
        engine="llama.cpp",
        files=[MODEL_FILE],
        quantization=name,
        weight_bytes=weight_bytes,
        layout=f"llama.cpp architecture {plan.name}",
        verification=verification,
    )
    for hint in run_hints(request.output, checkpoint.context_length):
        request.print_line(f"run it with: {hint}")


def _importance(checkpoint: Checkpoint, request: ExportRequest, plan: GgufPlan, folder: Path) -> Path:
    """Collect the importance matrix and write it under llama.cpp's tensor names."""
    path = folder / "importance.npz"
    importance = column_importance(checkpoint, request.options.calibrate)
    if plan.fuses_qkv:  # one tensor, one input
        fused = (".k_proj.weight", ".v_proj.weight")
        importance = {name: value for name, value in importance.items() if not name.endswith(fused)}

    def rename(name: str) -> str:
        return gguf_name(name).replace("attn_q.", "attn_qkv.") if plan.fuses_qkv else gguf_name(name)

    save_for_gguf(importance, rename, lambda name: tensor_shape(plan.architecture, name)[1], path)
    request.say(f"importance matrix from {request.options.calibrate} for {len(importance)} tensors")
    return path


def run_hints(folder: Path, context_length: int) -> list[str]:
    """How other programs run the file: llama.cpp's server, Ollama."""
    context = min(context_length, 4096)
    modelfile = f"FROM ./{MODEL_FILE}\\nPARAMETER num_ctx {context}\\n"
    return [
        f"llama-server -m {folder / MODEL_FILE} -c {context} -fa on",
        f"printf '{modelfile}' > {folder / 'Modelfile'} && ollama create {folder.name} -f {folder / 'Modelfile'}",
    ]


def _verify(
    checkpoint: Checkpoint, request: ExportRequest, exact: Path, target: Path, bits: float
) -> dict[str, dict[str, object]]:
    """F32 file against torch, tokenizer against tokenizer.json, quantised file against the F32 one."""
    tokens = sample_tokens(checkpoint)
    texts = [sample_text(), *sample_text().splitlines(), *_rendered_chat(checkpoint)]
    reference = torch_logits(checkpoint.folder, tokens)
    first = probe(exact, tokens, texts)
    _check_token_ids(checkpoint, texts, first.token_ids)
    agreement = compare_logits(reference, first.logits, tokens)
    check_exact(agreement, reference, "gguf")
    request.say(
        f"verified f32 file against torch: max |logit difference| {agreement.max_logit_difference:.1e}, "
        f"same argmax {agreement.argmax_agreement:.1%}, {agreement.tokens} tokens"
    )
    results: dict[str, Agreement] = {"exact": agreement}
    if target != exact:
        quantized = compare_logits(first.logits, probe(target, tokens, []).logits, tokens)
        check_quantized(quantized, bits, request.options.max_kl, "gguf")
        request.say(
            f"{request.options.quantize or DEFAULT} against f32: mean KL {quantized.mean_kl:.4f}, same argmax "
            f"{quantized.argmax_agreement:.1%}, perplexity x{quantized.perplexity_ratio:.3f}"
        )
        results["quantized"] = quantized
    return {stage: result.to_dict() for stage, result in results.items()}


def _rendered_chat(checkpoint: Checkpoint) -> list[str]:
    """A chat under the checkpoint's template, with its control tokens; nothing where there is no template."""
    if checkpoint.chat_template is None:
        return []
    messages = [{"role": "user", "content": sample_text()[:300]}, {"role": "assistant", "content": "Ça va 🙂"}]
    special = checkpoint.json_file("tokenizer_config.json")
    bos, eos = (special.get(f"{name}_token") or "" for name in ("bos", "eos"))
    names = [token["content"] if isinstance(token, dict) else token for token in (bos, eos)]
    return [render_chat(checkpoint.chat_template, [*messages, messages[0]], *names)]


def _check_token_ids(checkpoint: Checkpoint, texts: list[str], token_ids: list[list[int]]) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    for text, ids in zip(texts, token_ids, strict=True):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != expected:
            place = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
            raise ArtefactError(
                f"gguf: llama.cpp tokenises the sample differently from tokenizer.json (token {place} of "
                f"{text[:40]!r}); this tokenizer has no equivalent in llama.cpp"
            )
