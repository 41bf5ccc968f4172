"""`--target openvino`: a folder that stock OpenVINO GenAI runs, verified.

The matrices have the codes of `--target onnx`. The written model is compared with torch on them. OpenVINO GenAI must
then tokenize as the checkpoint does, and generate the model's greedy tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base import flags
from ...runtime.base.errors import ArtefactError, ModelError, first_line
from ...runtime.base.extras import extra, require_extra
from ...runtime.base.files import require_room, writing
from ...runtime.base.quantities import unknown_name
from ...train.model.target_rules import check_target
from ..checkpoint import Checkpoint, choose_type
from ..manifest import Contents, write_manifest
from ..onnx.exporter import DEFAULT, MODEL_FILE, OnnxOptions, generation_config, write_json, write_model
from ..onnx.quantize import PRESETS
from ..request import ExportRequest, RoundingOptions, log
from ..targets import Exporter
from ..verification import (
    MAX_EXACT_DIFFERENCE,
    REPORT,
    EngineRun,
    StoredWeights,
    Written,
    run_chunks,
    sample_text,
    size_of,
    step_through,
    torch_sample,
)

NAMES = ("openvino_model", "openvino_tokenizer", "openvino_detokenizer")
"""Each is a graph, .xml, and its arrays, .bin."""
FILES = [f"{name}{suffix}" for name in NAMES for suffix in (".xml", ".bin")]
SETTINGS = "generation_config.json"
TYPES = ("f32", "int8", "mixed", "int4")

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
"""OpenVINO's settings for fp32 throughout. By default it rounds activations and caches to 8 bits."""


@dataclass(frozen=True)
class OpenvinoOptions(RoundingOptions):
    """--target openvino."""

    quantize: str = flags.type_name()
    """Weight type: f32, int8, mixed, int4; default: the type trained for onnx (--qat), else int8."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        _check_type(self.quantize or DEFAULT)


def _check_type(name: str) -> None:
    if name not in TYPES:
        raise unknown_name("--quantize", name, TYPES, of=" for openvino")


def check_openvino(options: OpenvinoOptions) -> None:
    """Raise MissingExtraError without the writer of the graph or without OpenVINO GenAI."""
    require_extra("openvino", "onnx", "onnx_ir", "onnxruntime", "openvino", "openvino_tokenizers", "openvino_genai")


def export_openvino(checkpoint: Checkpoint, request: ExportRequest[OpenvinoOptions], folder: Path) -> None:
    """Write the model with states, the tokenizer as two models, the settings and the manifest."""
    with extra("openvino"):
        from ..onnx.reader import read_weights
        from .conversion import stateful_decoder
    options = request.options
    check_target("openvino", checkpoint.config, checkpoint.architecture)
    name = choose_type(checkpoint, request, "onnx", options.quantize, DEFAULT)
    _check_type(name)
    request.clock.begin("writing")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        graph = Path(work) / MODEL_FILE
        with writing(folder):  # a full disk is recognised before the graph is removed from it
            write_model(checkpoint, OnnxOptions(calibrate=options.calibrate, logits="all"), PRESETS[name], graph.parent)
        _save(stateful_decoder(graph), folder / FILES[0])
        # OpenVINO is compared with fp32 activations
        stored = None if name == "f32" else replace(read_weights(graph, checkpoint, PRESETS[name]), roundings={})
    _write_tokenizer(checkpoint, folder)
    write_json(folder / SETTINGS, generation_config(checkpoint))
    contents = Contents(
        engine="openvino-genai",  # no engine of ours: chat, server and bench say so
        files=[*FILES, SETTINGS],
        quantization=name,
        weight_bytes=(folder / FILES[1]).stat().st_size,
        layout="OpenVINO",
        verification=_verify(checkpoint, request, folder, name, stored) if options.verify else {},
    )
    write_manifest(checkpoint, request, folder, contents)
    log.info("run it with: openvino_genai.LLMPipeline(%r, 'CPU').generate(PROMPT)", str(request.output))


EXPORTER = Exporter(OpenvinoOptions, export_openvino, check_openvino)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's tokenizer and chat template as two models of OpenVINO."""
    import openvino_tokenizers  # type: ignore[import-not-found]
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint.folder)
    try:
        models: Any = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # it raises what it likes for a tokenizer that it does not know
        raise ModelError(f"openvino: cannot hold the tokenizer: {first_line(error)}; choose gguf or onnx") from error
    for name, model in zip(NAMES[1:], models, strict=True):
        _save(model, folder / f"{name}.xml")


def _save(model: Any, path: Path) -> None:
    """Write a model of OpenVINO, which removes what it has written if the disk is full and does not name the cause."""
    import openvino

    nodes = model.get_ordered_ops()
    arrays = sum(node.get_byte_size() for node in nodes if node.get_type_name() == "Constant")
    require_room(path.parent, arrays + 1024 * len(nodes))  # a graph takes about 470 bytes an operation
    openvino.save_model(model, path, compress_to_fp16=False)


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restore the signal stack of the calling thread after the block, on Linux.

    OpenVINO 2026.4's CPU plug-in gives the thread a signal stack of its own. If two plug-ins are unloaded in the order
    in which they were loaded, the thread keeps a stack that is freed, and its next signal ends the process.
    """
    if sys.platform != "linux":
        yield
        return
    libc, stack = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # longer than C's stack_t
    # the C function, as Python's signal module has none for it
    libc.sigaltstack(None, stack)
    try:
        yield
    finally:
        libc.sigaltstack(stack, None)


@kept_signal_stack()
def _verify(
    checkpoint: Checkpoint,
    request: ExportRequest[OpenvinoOptions],
    folder: Path,
    name: str,
    stored: StoredWeights | None,
) -> dict[str, dict[str, object]]:
    """Compare three runs of the model with torch, and OpenVINO GenAI with this model."""
    request.clock.begin("verifying")
    with extra("train"):
        from ..parity import check_written
    sample = torch_sample(checkpoint)
    decoders = (OpenvinoDecoder(folder / FILES[0]) for _ in range(3))
    ways = (step_through, run_chunks, run_padded_batch)
    runs = [run(decoder, sample.tokens) for run, decoder in zip(ways, decoders, strict=True)]
    written = Written("openvino", "model", name, doubtful=0.2)
    results = check_written(checkpoint, request, written, sample, runs, stored)
    check_tokenizer(folder, checkpoint)
    count = check_greedy_tokens(folder, sample.tokens[:PROMPT_TOKENS])
    request.say(f"OpenVINO GenAI itself tokenizes as the checkpoint, and its {count} greedy tokens are this model's")
    return {**results, "openvino_genai": {"same_tokens": count}}


class OpenvinoDecoder:
    """One sequence, or one batch, in a written model, in fp32 throughout."""

    def __init__(self, path: Path) -> None:
        import openvino

        self._request: Any = openvino.Core().compile_model(path, "CPU", EXACT).create_infer_request()
        self._names = [value.get_any_name() for value in self._request.model_inputs]
        self._tokens: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Continue with `tokens` if they begin with the known ones, else start. Return the last logits, fp32 [V]."""
        if list(tokens[: len(self._tokens)]) != self._tokens:
            self._request.reset_state()
            self._tokens = []
        return self._append(list(tokens[len(self._tokens) :]))

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits, fp32 [V]."""
        return self._append([token])

    def _append(self, tokens: list[int]) -> np.ndarray:
        self._tokens += tokens
        mask = np.ones((1, len(self._tokens)), np.int64)
        return self.evaluate(np.array([tokens]), mask)[0]

    def evaluate(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the last logits [B, V] after ids [B, S], with the attention mask [B, T]."""
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :],
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
        results = self._request.infer({name: feeds[name] for name in self._names})
        return results["logits"][:, -1].copy()  # the next call writes into the same memory

    def close(self) -> None:
        """Free the model."""
        self._request = None


def run_padded_batch(decoder: OpenvinoDecoder, tokens: list[int]) -> EngineRun:
    """Run two beginnings of the sample, the shorter one padded on the left, and then the next token of each."""
    lengths = np.array([max(1, len(tokens) // 3), max(1, len(tokens) // 2)])
    ids = np.stack([np.pad(tokens[:length], (lengths[1] - length, 0)) for length in lengths])
    mask = (np.arange(lengths[1]) >= lengths[1] - lengths[:, None]).astype(np.int64)
    rows = [decoder.evaluate(ids, mask)]
    next_ids = np.array(tokens)[lengths][:, None]
    longer_mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    rows.append(decoder.evaluate(next_ids, longer_mask))
    decoder.close()
    title = "a batch of two prompts of unequal lengths, padded on the left, and their next tokens"
    return EngineRun(title, [*(lengths - 1).tolist(), *lengths.tolist()], np.concatenate(rows))


PROMPT_TOKENS = 32
ANSWER_TOKENS = 24


def check_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Raise ArtefactError if OpenVINO GenAI tokenizes the sample text differently."""
    import openvino_genai

    text = sample_text()
    tokenizer = openvino_genai.Tokenizer(str(folder))
    found = tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
    expected = checkpoint.tokenizer.encode(text, add_special_tokens=False).ids
    if found != expected:
        pairs = zip(found, expected, strict=False)
        place = next((place for place, (one, other) in enumerate(pairs) if one != other), "the end")
        raise ArtefactError(
            f"openvino: its tokenizer gives other tokens than the checkpoint's from token {place} of a text; {REPORT}"
        )


def check_greedy_tokens(folder: Path, prompt: list[int]) -> int:
    """Return the number of greedy tokens of OpenVINO GenAI after a prompt.

    Raises ArtefactError if one is not the likeliest, up to rounding, in the written model.
    """
    import openvino
    import openvino_genai  # type: ignore[import-not-found]

    properties: dict[str, Any] = {**EXACT}
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **properties)
    config = openvino_genai.GenerationConfig(max_new_tokens=ANSWER_TOKENS, ignore_eos=True, do_sample=False)
    answer = pipeline.generate(openvino.Tensor(np.array([prompt])), config).tokens[0]
    decoder = OpenvinoDecoder(folder / FILES[0])
    logits = decoder.prefill(prompt)
    for token in answer:
        rounding = MAX_EXACT_DIFFERENCE * size_of(logits)
        # of two nearly equal logits, the other engine's sums may order the second one first
        if logits[token] < logits.max() - rounding:
            likeliest = logits.argmax()
            raise ArtefactError(
                f"openvino: OpenVINO GenAI continues with token {token}, its model with {likeliest}; {REPORT}"
            )
        logits = decoder.decode(token)
    return len(answer)
