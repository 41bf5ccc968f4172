"""`--target litert`: a .litertlm that stock LiteRT-LM runs, verified.

The .tflite inside runs in LiteRT's interpreter and is compared with torch on the checkpoint (f32) or on its own codes.
LiteRT-LM then runs the finished file and must write the same text. T tokens of a prefill signature, C slots of the
caches, V vocabulary. Imports no torch until it runs.
"""

from __future__ import annotations

import mmap
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base import flags
from ...runtime.base.errors import ArtefactError
from ...runtime.base.extras import extra, require_extra
from ...train.model.target_rules import check_target
from ...train.model.tensors import EMBEDDING
from ..checkpoint import Checkpoint
from ..manifest import Contents, write_manifest
from ..padding import padded_tensors
from ..request import ExportRequest, RoundingOptions, log
from ..targets import Exporter
from ..verification import REPORT, StoredWeights, Written, run_chunks, step_through, torch_sample

MODEL_FILE = "model.litertlm"

RECIPES = {"f32": "none", "int8": "dynamic_wi8_afp32"}
"""--quantize -> ai-edge-quantizer's recipe: int8 weights, activations rounded dynamically."""

PREFILL_LENGTHS = (16, 128)
"""Prompt tokens of one call; LiteRT-LM cuts and pads prompts to these."""


@dataclass(frozen=True)
class LitertOptions(RoundingOptions):
    """--target litert."""

    quantize: str = flags.type_name("int8")
    """Weight type: int8 or f32."""
    max_context: int = flags.count(2048, at_least=max(PREFILL_LENGTHS) + 1)
    """Slots of the key/value caches, at most the model's context."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "quantize", self.quantize in RECIPES, f"must be one of {', '.join(RECIPES)}")
        flags.require(self, "calibrate", not self.calibrate, "LiteRT's recipes round without text; remove it")


def export_litert(checkpoint: Checkpoint, request: ExportRequest[LitertOptions], folder: Path) -> None:
    """Write FOLDER/model.litertlm (tokenizer, template and defaults inside) and the manifest."""
    from .conversion import convert

    check_target("litert", checkpoint.config, checkpoint.architecture)
    options = request.options
    context = min(options.max_context, checkpoint.context_length)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        request.clock.begin("converting")
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
    """Compare the program with torch on its own weights, and LiteRT-LM's greedy text with the program's."""
    request.clock.begin("verifying")
    with extra("train"):
        from ..parity import check_written
    quantize = request.options.quantize
    sample = torch_sample(checkpoint, request.options.max_context)
    short, long = PREFILL_LENGTHS  # every signature of the file runs in one of them
    in_chunks = run_chunks(TfliteDecoder(tflite, short), sample.tokens)
    stepwise = step_through(TfliteDecoder(tflite, long), sample.tokens)
    stored = None if quantize == "f32" else read_weights(tflite, checkpoint)
    written = Written("litert", "program", quantize)
    results = check_written(checkpoint, request, written, sample, [stepwise, in_chunks], stored)
    with (folder / MODEL_FILE).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bundle:
        if bundle.find(tflite.read_bytes()) < 0:
            raise ArtefactError(f"litert: {MODEL_FILE} does not hold the program that was verified")
    last = TfliteDecoder(tflite, PREFILL_LENGTHS[-1])
    characters = check_greedy_text(folder / MODEL_FILE, last, checkpoint.tokenizer)
    request.say(f"LiteRT-LM itself writes the same {characters} characters after a prompt as this program does")
    return {**results, "litert_lm": {"same_characters": characters}}


def check_litert(options: LitertOptions) -> None:
    """Raise MissingExtraError without Google's exporter, or without the runtime that verifies its file."""
    modules = ["litert_torch"]
    if options.verify:
        modules += ["ai_edge_litert", "litert_lm"]
    require_extra("litert", *modules)


EXPORTER = Exporter(LitertOptions, export_litert, check_litert)


NEAREST = 0.501
"""Largest distance of a weight from its code, in scales: a half, and the rounding of a division."""


def read_weights(path: Path, checkpoint: Checkpoint) -> StoredWeights:
    """Return the weights of the program at `path`, which has no names of ours: matrices are found by their contents.

    Raises ArtefactError for a matrix that is none of the checkpoint's, and for one that the program does not hold.
    """
    architecture = replace(checkpoint.architecture, tie_word_embeddings=False)
    tensors = dict(padded_tensors(checkpoint, architecture))
    source = {name: array for name, array in tensors.items() if array.ndim > 1}
    for codes, scales in _matrices(path):
        names = [name for name, array in source.items() if _holds(codes, scales, array)]
        if not names:
            raise _fault(f"a matrix of {len(codes)} rows is none of the checkpoint's, rounded to the nearest codes")
        tensors |= dict.fromkeys(names, codes.astype(np.float32) * scales)
    missing = next((name for name, array in source.items() if tensors[name] is array), None)
    if missing is not None:
        raise _fault(f"{missing} is missing")
    roundings = dict.fromkeys(source.keys() - {EMBEDDING}, "int8 per token")
    return StoredWeights(architecture, checkpoint.scales, tensors, roundings, "codes of the program, by LiteRT")


def _fault(fault: str) -> ArtefactError:
    return ArtefactError(f"litert: in the written program {fault}; {REPORT}")


def _matrices(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (codes int8 [N, K], scales fp32 [N, 1]) of the program's matrices."""
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    interpreter: Any = Interpreter(str(path), num_threads=1)
    for graph in range(interpreter.num_subgraphs()):  # decoding and prefills of each length, which need fewer matrices
        for entry in interpreter.get_tensor_details(graph):
            scales = entry["quantization_parameters"]["scales"]
            if len(entry["shape"]) == 2 and entry["dtype"] == np.int8 and len(scales) == entry["shape"][0]:
                yield interpreter.get_tensor(entry["index"], graph), scales[:, None]


def _holds(codes: np.ndarray, scales: np.ndarray, array: np.ndarray) -> bool:
    """Tell whether codes are those of `array`. The first row rules most others out."""

    def agree(part: slice) -> bool:
        errors = np.abs(codes[part] * scales[part] - array[part])
        return bool((errors <= NEAREST * scales[part]).all())

    return codes.shape == array.shape and agree(slice(1)) and agree(slice(None))


MASKED = -1e9


class TfliteDecoder:
    """One sequence in a program with the signatures `prefill_T`, of which it calls one, and `decode`."""

    def __init__(self, path: Path, prefill_length: int) -> None:
        from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

        self._interpreter: Any = Interpreter(str(path), num_threads=1)
        self.prefill_length = prefill_length
        self._prefill = self._interpreter.get_signature_runner(f"prefill_{self.prefill_length}")
        self._decode = self._interpreter.get_signature_runner("decode")
        inputs = self._decode.get_input_details()
        self._slots = int(inputs["mask"]["shape"][-1])
        self._caches = {
            name: np.zeros(entry["shape"], dtype=entry["dtype"])
            for name, entry in inputs.items()
            if name.startswith("kv_cache")
        }
        self._length = 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Start with `tokens` and return the last one's logits, fp32 [V]."""
        self._length = 0
        for start in range(0, len(tokens) - 1, self.prefill_length):
            part = tokens[start : min(start + self.prefill_length, len(tokens) - 1)]
            padded = np.zeros((1, self.prefill_length), dtype=np.int32)
            padded[0, : len(part)] = part
            self._run(self._prefill, padded)
            self._length += len(part)  # what the padding left behind that is written over before it is seen
        return self.decode(tokens[-1])

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits, fp32 [V]."""
        found = self._run(self._decode, np.array([[token]], dtype=np.int32))
        self._length += 1
        return np.asarray(found["logits"], dtype=np.float32).reshape(-1)

    def _run(self, signature: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Call the program once and keep the caches that it returns."""
        positions = np.arange(self._length, self._length + tokens.shape[1], dtype=np.int32)
        is_hidden = np.arange(self._slots)[None] > positions[:, None]
        mask = np.where(is_hidden, np.float32(MASKED), np.float32(0))[None, None]
        found = signature(tokens=tokens, input_pos=positions, mask=mask, **self._caches)
        self._caches = {name: found[name] for name in self._caches}
        return found

    def close(self) -> None:
        """Free the model."""
        self._prefill = self._decode = self._interpreter = None


PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived an old fisherman who every morning",
    "The three largest cities of the country are",
)
"""Prompts; the second is used if nothing follows the first."""
TOKENS = 24


def check_greedy_text(model: Path, decoder: TfliteDecoder, tokenizer: Any) -> int:
    """Return the number of characters that LiteRT-LM writes greedily after a prompt.

    Raises ArtefactError if `decoder`, which is closed, continues differently.
    """
    import litert_lm  # type: ignore[import-not-found]

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    with tempfile.TemporaryDirectory() as folder:  # it leaves a cache of packed weights beside its file
        link = Path(folder) / model.name
        link.symlink_to(model.resolve())
        engine = litert_lm.Engine(str(link), backend=litert_lm.Backend.CPU(thread_count=1), max_num_tokens=256)
        greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=1)
        begin = [engine.bos_token_id] if engine.bos_token_id is not None else []
        ends = {ids[0] for ids in engine.eos_token_ids if len(ids) == 1}
        text = ""
        for prompt in PROMPTS:
            with engine.create_session(
                apply_prompt_template=False, sampler_config=greedy, max_output_tokens=TOKENS
            ) as session:
                session.run_prefill([prompt])
                text = "".join(part for answer in session.run_decode_async() for part in answer.texts)
            tokens = [*begin, *tokenizer.encode(prompt, add_special_tokens=False).ids]
            spoken = _texts(decoder, tokenizer, tokens, ends)
            if text not in spoken:
                raise ArtefactError(
                    f"litert: LiteRT-LM continues with {text!r}, the program in its file with {min(spoken)!r}; {REPORT}"
                )
            if text:
                break
        else:
            log.warning("the model ends every answer at once, in LiteRT-LM as in the program: no text was compared")
    decoder.close()
    return len(text)


def _texts(decoder: TfliteDecoder, tokenizer: Any, prompt: list[int], ends: set[int]) -> set[str]:
    """Return the program's greedy texts after a prompt, with and without special tokens."""
    answer: list[int] = []
    logits = decoder.prefill(prompt)
    while len(answer) < TOKENS and int(logits.argmax()) not in ends:
        answer.append(int(logits.argmax()))
        logits = decoder.decode(answer[-1])
    return {tokenizer.decode(answer, skip_special_tokens=skip) for skip in (True, False)}
