"""Export generated models and compare stock engines with transformers, independently of the exporter's verification:

    python -m tests.tools.export_cases --target gguf|onnx|executorch [--cases 2000] [--seed 1]

A case fills its matrices in one of three ways. Codes are numbers that its type stores exactly: transformers' logits of
the checkpoint are then what the file has to compute. Magnitudes are rows of zeros and one value, which every type
stores exactly. Random numbers are rounded in torch to the bits of the type, to find the size of that rounding. The
limit is the effect of rounded weights and activations in torch, and no code of the exporter has a part in it.

Prints a line to reproduce each failure, and a summary as one line of JSON: the number of cases by outcome,
by family and type, and of refusals by cause. With --misread, the exporter misreads one setting of each case (see
MISREADINGS), and a case that is verified is wrong. Target hf-uniform exists only there.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import stock_logits
from tiny import LLAMA3_ROPE, tiny_architecture, tiny_model, tiny_tokenizer

from efficientllm.export.checkpoint import Checkpoint
from efficientllm.export.cli import export
from efficientllm.export.verification import sample_text
from efficientllm.runtime.base.errors import ArtefactError, EfficientLLMError
from efficientllm.train.model.architecture import FAMILIES, LayerShape
from efficientllm.train.model.attention import LayerAttention, layer_attention, rope_parameters
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.rescaling import Scales
from efficientllm.train.model.source import load_for_inference

BITS = {
    "gguf": {
        **{"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8, "q6_k": 6, "q5_k_m": 5, "q5_k_s": 5, "q5_1": 5, "q5_0": 5},
        **{"q4_k_m": 4, "q4_k_s": 4, "q4_1": 4, "q4_0": 4, "iq4_nl": 4, "iq4_xs": 4, "q3_k_m": 3, "q2_k": 2},
    },
    "onnx": {"f32": 32, "f16": 16, "int8": 8, "mixed": 4, "int4": 4, "web": 8},
    "executorch": {"f32": 32, "f16": 16, "int8": 8, "8da4w": 4},
}
"""Target -> type -> bits of most of its weights."""
BYTE = (-127, 127)
CODES = {
    "gguf": {
        **{"f32": BYTE, "f16": BYTE, "bf16": BYTE, "q8_0": BYTE, "q5_1": (-10, 21), "q5_0": (-16, 15)},
        **{"q4_1": (-5, 10), "q4_0": (-8, 7)},
    },
    "onnx": {"f32": BYTE, "f16": BYTE, "int8": BYTE, "mixed": BYTE, "int4": (-8, 7), "web": BYTE},
    "executorch": {"f32": BYTE, "f16": BYTE, "int8": BYTE, "8da4w": (-7, 7)},
}
"""Target -> type -> lowest and highest code, if a row of such codes is stored exactly."""
ROW_SCALES = ("web", "int8 executorch", "8da4w executorch")
"""Types, or types of a target, whose blocks are longer than BLOCK."""
BLOCK = 32
HEAD_DIMS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
HIDDEN_SIZES = (48, 64, 75, 76, 96, 149, 256)
HEADS = ((0, 0), (1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (6, 2))
WIDTHS = (0, 33, 64, 75, 96, 128, 256)
VOCABULARIES = (400, 400, 417, 512)
LENGTH = 80
"""Tokens of a comparison, past the windows of the generated models."""
CONTEXT = 256
"""--max-context of targets with caches of a fixed size."""
FACTOR, FLOOR, DRAWS = 3.0, 5e-3, 4
"""Allowed distance: FACTOR largest effects of rounding in DRAWS, and FLOOR standard deviations of the logits."""


@dataclass(frozen=True)
class Case:
    """A generated model and its export."""

    family: str
    head_dim: int
    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    tied: bool
    settings: dict[str, Any]
    weights: str
    """codes, magnitudes or random"""
    quantize: str
    flags: dict[str, Any]
    """Further options of the export."""
    chunks: tuple[int, ...]
    seed: int
    is_calibrated: bool
    """True if text guides the rounding."""


def generate(target: str, seed: int, index: int) -> Case:
    """Return a case, which depends on nothing but the arguments."""
    dice = random.Random(f"{target} {seed} {index}")
    family = dice.choice(sorted(FAMILIES))
    count = dice.randint(1, 4 if target in ("gguf", "onnx") else 2)
    layers = tuple(LayerShape(*dice.choice(HEADS), dice.choice(WIDTHS)) for _ in range(count))
    if dice.random() < 0.2:
        layers = (LayerShape(*dice.choice(HEADS[1:]), dice.choice(WIDTHS[1:])),) * count
    kind = dice.choice(sorted(BITS[target]))
    # centring changes the weights in a GGUF of a family with LayerNorm, so that few bits are not exact
    can_be_centred = target == "gguf" and FAMILIES[family].norm.takes_mean
    is_centred = can_be_centred and kind not in ("f32", "f16", "q8_0")
    # IQ4's table of values has no zero
    exact = [*(["magnitudes"] if "iq4" not in kind else []), *(["codes"] if kind in CODES[target] else [])]
    weights = "random" if is_centred or not exact or dice.random() < 0.25 else dice.choice(exact)
    hidden_size = dice.choice(HIDDEN_SIZES)
    case = Case(
        family,
        dice.choice(HEAD_DIMS),
        layers,
        hidden_size,
        dice.choice(VOCABULARIES),
        dice.random() < 0.5,
        _settings(dice, family),
        weights,
        kind,
        _flags(dice, target, kind, hidden_size),
        tuple(dice.choice((1, 2, 3, 7, 16, 31, 32, 33, 64)) for _ in range(3)),
        dice.randrange(2**31),
        weights == "random" and BITS[target][kind] < 8 and dice.random() < 0.3,
    )
    return replace(case, weights="random") if can_be_centred and fewest_bits(target, case) < 8 else case


def fewest_bits(target: str, case: Case) -> int:
    """Return the bits of the smallest type of a case, that of its head or embedding included."""
    types = {case.quantize, *(case.flags.get(name, case.quantize) for name in ("output_type", "embedding_type"))}
    return min(BITS[target].get(each, 4) for each in types)


def _settings(dice: random.Random, family: str) -> dict[str, Any]:
    """Return settings of config.json: ropes, windows and what else a family has."""
    ropes: list[dict[str, Any]] = [
        {"rope_type": "default", "rope_theta": dice.choice((500.0, 10000.0, 1e6))},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": dice.choice((2.0, 8.0))},
        LLAMA3_ROPE,
    ]
    # few architectures of llama.cpp have llama3's rope
    is_common = family in ("llama", "llama_bias", "mistral", "qwen2")
    rope = dice.choices(ropes, (6, 2, 2 if is_common else 0.2))[0]
    if family == "gemma3_text":
        local = dice.choice((ropes[0], {**ropes[0], "rope_theta": 777.0}))
        return {
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            "sliding_window": dice.choice((8, 16, 33)),
            "sliding_window_pattern": dice.randint(1, 4),
            "query_pre_attn_scalar": dice.choice((8, 20, 64)),
        }
    if family == "gpt_neox":
        return {"rope_parameters": {**rope, "partial_rotary_factor": dice.choice((0.5, 1.0))}}
    settings: dict[str, Any] = {"rope_parameters": rope}
    if family == "mistral" and dice.random() < 0.3:
        settings["sliding_window"] = 24
    if family == "smollm3":
        settings |= {"no_rope_layer_interval": dice.choice((2, 4, 4, 4)), "pad_token_id": 2}
    if family in ("qwen2", "qwen3") and dice.random() < 0.3:
        settings |= {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": dice.randint(0, 2)}
    return settings


def _flags(dice: random.Random, target: str, kind: str, hidden_size: int) -> dict[str, Any]:
    """Return options of an export beside its type, most often none."""
    is_rounded = BITS[target][kind] < 16
    if target == "gguf" and is_rounded and dice.random() < 0.3:
        name = dice.choice(("output_type", "embedding_type"))
        return {name: dice.choice(("q8_0", "q4_0", "f16", *(["q6_k"] if hidden_size == 256 else [])))}
    if target != "executorch":
        return {}
    flags: dict[str, Any] = {"max_context": CONTEXT, "custom_ops": dice.random() < 0.8}
    if kind == "8da4w":
        flags["group_size"] = dice.choice((32, 64, 128))
    if is_rounded and dice.random() < 0.3:
        flags[dice.choice(("output_type", "embedding_type"))] = dice.choice(("int8", "int4"))
    return flags


def build(target: str, case: Case) -> Any:
    """Return the model of a case."""
    shape = tiny_architecture(case.family, case.layers, case.hidden_size, case.tied, case.head_dim)
    model = tiny_model(replace(shape, vocab_size=case.vocab_size), seed=case.seed, **case.settings)
    dice = np.random.default_rng(case.seed)
    kinds = (case.quantize, f"{case.quantize} {target}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim != 2:
                continue
            rows, columns = parameter.shape
            if case.weights == "random":
                values = dice.standard_normal((rows, columns)) / math.sqrt(columns)
            elif case.weights == "magnitudes" or name.endswith(("embed_tokens.weight", "lm_head.weight")):
                values = _magnitudes(dice, rows, columns)
            else:
                low, high = CODES[target][case.quantize]
                if case.quantize == "mixed" and name.endswith(("gate_proj.weight", "up_proj.weight", "h_to_4h.weight")):
                    low, high = CODES[target]["int4"]
                # padded heads move within the rows of o_proj, so that its blocks have no scales of their own
                moves = name.endswith(("o_proj.weight", "attention.dense.weight"))
                has_row_scales = moves or not set(kinds).isdisjoint(ROW_SCALES)
                values = _codes(dice, rows, columns, low, high, 4 if moves else BLOCK, has_row_scales)
            parameter.copy_(torch.from_numpy(values))
    return model


def _magnitudes(dice: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return rows of zeros and one value, of either sign. The value over 7 is a power of two."""
    signs = dice.choice((-1.0, 1.0), (rows, 1))
    sizes = 7 * 2.0 ** (dice.integers(-2, 1, (rows, 1)) - 3 - round(math.log2(columns) / 2))
    return (dice.random((rows, columns)) < 0.5) * signs * sizes


def _codes(
    dice: np.random.Generator, rows: int, columns: int, low: int, high: int, piece: int, has_row_scales: bool
) -> np.ndarray:
    """Return codes times powers of two. Each piece of a row has the lowest code, and the highest if it has two."""
    codes = dice.integers(low, high + 1, (rows, columns))
    for start in range(0, columns, piece):
        end = min(start + piece, columns)
        codes[:, start] = low
        if end > start + 1:
            codes[:, dice.integers(start + 1, end)] = high
    exponents = dice.integers(-2, 1, (rows, 1 if has_row_scales else -(-columns // BLOCK)))
    scales = np.repeat(2.0**exponents, columns if has_row_scales else BLOCK, axis=1)[:, :columns]
    return codes * scales * 2.0 ** -round(math.log2((high - low) / 3.5 * math.sqrt(columns)))


def expected_logits(target: str, case: Case, folder: Path, tokens: list[int]) -> tuple[np.ndarray, float]:
    """Return transformers' logits fp32 [S, V], and the allowed root mean square of a row's differences."""
    model: Any = load_for_inference(folder)
    dice = torch.Generator().manual_seed(0)

    def disturb(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (x,) = inputs
        # web rounds all activations of a product with one scale, the other types each row with its own
        largest = x.abs().amax() if case.quantize == "web" else x.abs().amax(-1, keepdim=True)
        error = (torch.rand(x.shape, generator=dice) - 0.5) * largest / 127
        return (x + error,)

    with torch.inference_mode():
        exact = model(torch.tensor([tokens])).logits[0].numpy()
        if case.weights == "random":
            for parameter in {id(each): each for each in model.parameters() if each.ndim == 2}.values():
                parameter.copy_(_rounded(parameter, fewest_bits(target, case), case.flags.get("group_size", BLOCK)))
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(disturb)
        # a rounding may decide an attention, so the largest of several effects counts
        effect = max(_distance(exact, model(torch.tensor([tokens])).logits[0].numpy()) for _ in range(DRAWS))
    return exact, FACTOR * effect + FLOOR * float(exact.std())


def _rounded(weight: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Return a matrix rounded to a number of bits, with a scale for each block of a row, or for a row of 8 bits."""
    if bits >= 16:
        return weight.bfloat16().float() if bits == 16 else weight
    block = weight.shape[1] if bits == 8 else block
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    scale = (blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
    return ((blocks / scale).round() * scale).flatten(1)[:, : weight.shape[1]]


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(np.square(first - second).mean(-1)).max())


def _with_rope(checkpoint: Checkpoint, name: str, factor: float) -> Any:
    """Return the attention of each layer with one setting of the rope multiplied."""
    ropes = ({**each.rope, name: each.rope[name] * factor} for each in _attention(checkpoint) if each.rope)
    return tuple(replace(each, rope=each.rope and next(ropes)) for each in _attention(checkpoint))


def _attention(checkpoint: Checkpoint) -> tuple[LayerAttention, ...]:
    return layer_attention(checkpoint.config, checkpoint.architecture)


def _each_layer(**changes: Callable[[LayerAttention], Any]) -> Callable[[Checkpoint], Any]:
    def changed(checkpoint: Checkpoint) -> Any:
        return tuple(
            replace(each, **{name: change(each) for name, change in changes.items()}) for each in _attention(checkpoint)
        )

    return changed


def _rolled(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return a tensor with every query head in the place of the next one."""
    array = _tensor(checkpoint, name)
    return np.roll(array, checkpoint.architecture.head_dim, axis=0) if name.endswith("q_proj.weight") else array


def _without_last_layer(checkpoint: Checkpoint, *arguments: Any, **more: Any) -> None:
    _initialise(checkpoint, *arguments, **more)
    shape = checkpoint.architecture
    checkpoint.architecture = replace(shape, layers=shape.layers[:-1])


_tensor, _initialise = Checkpoint.tensor, Checkpoint.__init__


def _scales(checkpoint: Checkpoint) -> Scales:
    return Scales.of(checkpoint.config, checkpoint.architecture)


def _rope(name: str) -> dict[str, Any]:
    """Return the misreading of one setting of the rope."""

    def changed(checkpoint: Checkpoint) -> dict[str, Any]:
        rope = rope_parameters(checkpoint.config)
        return {**rope, name: rope[name] * 1.5}

    return {"attention": property(lambda self: _with_rope(self, name, 1.5)), "rope": property(changed)}


def _scale(name: str, factor: float) -> dict[str, Any]:
    return {"scales": property(lambda self: replace(_scales(self), **{name: factor * getattr(_scales(self), name)}))}


MISREADINGS: dict[str, dict[str, Any]] = {
    "theta": _rope("rope_theta"),
    "factor": _rope("factor"),
    "rotated channels": {"attention": property(_each_layer(rotary_dim=lambda each: each.rotary_dim - 2))},
    "no rope": {"attention": property(_each_layer(rope=lambda each: None, rotary_dim=lambda each: 0))},
    "window": {"attention": property(_each_layer(window=lambda each: each.window and each.window + 4))},
    "no window": {"attention": property(_each_layer(window=lambda each: 0))},
    "scale": {"attention": property(_each_layer(scale=lambda each: each.scale * 1.05))},
    "eps": _scale("stem_eps", 2),
    "eps of q and k": _scale("qk_eps", 2),
    "factor of the embedding": _scale("embedding", 1.05),
    "head order": {"tensor": _rolled},
    "layer count": {"__init__": _without_last_layer},
}
"""Name -> {attribute of Checkpoint: what it becomes}."""


def possible_misreadings(checkpoint: Checkpoint) -> list[str]:
    """Return the misreadings that change the function of a checkpoint."""
    shape, parts = checkpoint.architecture, checkpoint.architecture.parts
    used = [each for each, layer in zip(checkpoint.attention, shape.layers, strict=True) if layer.num_attention_heads]
    ropes = [each.rope for each in used if each.rope]
    applies = {
        "theta": ropes,
        "factor": ropes and all("factor" in rope for rope in ropes),
        "rotated channels": [each for each in used if each.rotary_dim > 2],
        "no rope": ropes,
        "window": [each for each in used if each.window],
        "no window": [each for each in used if each.window],
        "scale": used,
        "eps": True,
        "eps of q and k": used and parts.qk_norm,
        "factor of the embedding": parts.scales_embedding,
        "head order": any(layer.num_attention_heads > 1 for layer in shape.layers),
        "layer count": len(shape.layers) > 1,
    }
    return [name for name in MISREADINGS if applies[name]]


def misread(target: str, case: Case, folder: Path, name: str = "") -> Outcome:
    """Export a case while the exporter misreads a setting, by default one of those that matter."""
    save_checkpoint(build(_like(target), case), tiny_tokenizer(), folder / "checkpoint")
    possible = possible_misreadings(Checkpoint(folder / "checkpoint", "checkpoint"))
    name = name or random.Random(case.seed).choice(possible)
    flags = {} if target == "hf-uniform" else {**case.flags, "quantize": case.quantize}
    try:
        with mock.patch.multiple(Checkpoint, **MISREADINGS[name]):
            export(folder / "checkpoint", target, folder / "out", **flags)
    except EfficientLLMError as error:
        is_found = isinstance(error, ArtefactError) or name == "layer count"
        return Outcome("right" if is_found else "refused", str(error))
    except Exception:
        return Outcome("traceback", traceback.format_exc())
    return Outcome("wrong", f"verified with another {name}")


@dataclass(frozen=True)
class Outcome:
    """Result of a case."""

    kind: str
    """right, wrong, refused or traceback."""
    detail: str = ""


def run_case(target: str, case: Case, folder: Path) -> Outcome:
    """Export a case and compare the file."""
    save_checkpoint(build(target, case), tiny_tokenizer(), folder / "checkpoint")
    (folder / "text.txt").write_text(sample_text() * 4, encoding="utf-8")
    flags: dict[str, Any] = {**case.flags, "quantize": case.quantize}
    if case.is_calibrated:
        flags["calibrate"] = str(folder / "text.txt")
    try:
        export(folder / "checkpoint", target, folder / "out", **flags)
    except EfficientLLMError as error:
        return Outcome("refused", str(error))
    except Exception:
        return Outcome("traceback", traceback.format_exc())
    context = json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))["context_length"]
    tokens = torch.randint(3, 400, (LENGTH,), generator=torch.Generator().manual_seed(case.seed)).tolist()[:context]
    exact, limit = expected_logits(target, case, folder / "checkpoint", tokens)
    for positions, logits in stock_logits.READERS[target](folder / "out", tokens, case.chunks):
        distance = _distance(exact[positions], logits)
        if not distance <= limit:  # NaN is no distance
            return Outcome("wrong", f"differs by {distance:.2e}, limit {limit:.2e}")
    return Outcome("right")


def command(target: str, seed: int, index: int) -> str:
    """Return the command that runs a case alone."""
    return f"python -m tests.tools.export_cases --target {target} --seed {seed} --first {index} --cases 1"


def cause(message: str) -> str:
    """Return a refusal's message without its numbers."""
    return re.sub(r"\d[\d.e+-]*", "N", message)


def _like(target: str) -> str:
    """Return the target whose generated cases another one shares."""
    return "onnx" if target == "hf-uniform" else target


def run_cases(
    target: str, seed: int, indices: Sequence[int], run: Callable[[str, Case, Path], Outcome]
) -> Iterator[tuple[int, Case, Outcome]]:
    """Yield each case with its outcome."""
    for index in indices:
        case = generate(_like(target), seed, index)
        with tempfile.TemporaryDirectory(prefix="export-case-") as folder:
            yield index, case, run(target, case, Path(folder))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[*sorted(BITS), "hf-uniform"], required=True)
    parser.add_argument("--misread", action="store_true")
    for name, value in (("cases", 2000), ("seed", 1), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(argv)
    logging.getLogger("efficientllm").setLevel(logging.ERROR)
    kinds: collections.Counter[str] = collections.Counter()
    causes: collections.Counter[str] = collections.Counter()
    table: dict[str, dict[str, collections.Counter[str]]] = {}
    indices = range(options.first, options.first + options.cases)
    run = misread if options.misread else run_case
    for index, case, outcome in run_cases(options.target, options.seed, indices, run):
        kinds[outcome.kind] += 1
        row = table.setdefault(case.family, {})
        row.setdefault(case.quantize, collections.Counter())[outcome.kind] += 1
        if outcome.kind == "refused":
            causes[cause(outcome.detail)] += 1
        if outcome.kind != "right":
            again = command(options.target, options.seed, index)
            print(f"{outcome.kind}: {again}\n  {case}\n  {outcome.detail.strip()}", flush=True)
    print(json.dumps({"cases": options.cases, **kinds, "causes": causes, "by": table}, ensure_ascii=False))
    return int(bool(kinds["wrong"] or kinds["traceback"]))


if __name__ == "__main__":
    sys.exit(main())
