"""Export generated models and compare stock engines with transformers, independently of the exporter's verification:

    python -m tests.tools.export_cases --target gguf|onnx [--cases 2000] [--seed 1] [--first 0]

Every matrix of a generated model is zero or one value in each row, of either sign. Every block format stores such rows
exactly, so transformers' logits of the checkpoint itself are what the file has to compute. The limit is the effect of
errors of the size of 8-bit activations, measured in torch. Prints a line to reproduce each failure, and a summary as
one line of JSON: the number of cases by outcome, and of refusals by cause.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import logging
import math
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))
from tiny import LLAMA3_ROPE, tiny_architecture, tiny_model, tiny_tokenizer

from efficientllm.export.cli import export
from efficientllm.runtime.base.errors import EfficientLLMError
from efficientllm.train.model.architecture import FAMILIES, LayerShape
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.source import load_for_inference

TYPES = {
    "gguf": ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "q4_k_m", "q2_k"),
    "onnx": ("f32", "f16", "int8", "mixed", "int4", "web"),
}
CENTRED_TYPES = ("f32", "f16", "q8_0")
"""GGUF types of families with LayerNorm, whose weights are centred in the file, so that few bits are not exact."""
HEAD_DIMS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
HIDDEN_SIZES = (48, 64, 75, 76, 96, 149)
HEADS = ((0, 0), (1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (6, 2))
WIDTHS = (0, 33, 64, 75, 96, 128)
LENGTH = 80
"""Tokens of a comparison, past the windows of the generated models."""
FACTOR, FLOOR = 4.0, 5e-3
"""Allowed distance: FACTOR effects of rounded activations, and FLOOR standard deviations of the logits."""


@dataclass(frozen=True)
class Case:
    """A generated model and its export."""

    family: str
    head_dim: int
    layers: tuple[LayerShape, ...]
    hidden_size: int
    tied: bool
    settings: dict[str, Any]
    quantize: str
    chunks: tuple[int, ...]
    seed: int


def generate(target: str, seed: int, index: int) -> Case:
    """Return a case, which depends on nothing but the arguments."""
    dice = random.Random(f"{target} {seed} {index}")
    family = dice.choice(sorted(FAMILIES))
    count = dice.randint(1, 4)
    layers = tuple(LayerShape(*dice.choice(HEADS), dice.choice(WIDTHS)) for _ in range(count))
    if dice.random() < 0.2:
        layers = (LayerShape(*dice.choice(HEADS[1:]), dice.choice(WIDTHS[1:])),) * count
    is_centred = target == "gguf" and FAMILIES[family].norm.takes_mean
    return Case(
        family,
        dice.choice(HEAD_DIMS),
        layers,
        dice.choice(HIDDEN_SIZES),
        dice.random() < 0.5,
        _settings(dice, family),
        dice.choice(CENTRED_TYPES if is_centred else TYPES[target]),
        tuple(dice.choice((1, 2, 3, 7, 16, 31, 32, 33, 64)) for _ in range(3)),
        dice.randrange(2**31),
    )


def _settings(dice: random.Random, family: str) -> dict[str, Any]:
    """Return settings of config.json: ropes, windows and what else a family has."""
    ropes: list[dict[str, Any]] = [
        {"rope_type": "default", "rope_theta": dice.choice((500.0, 10000.0, 1e6))},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": dice.choice((2.0, 8.0))},
        LLAMA3_ROPE,
    ]
    is_common = family in ("llama", "mistral", "qwen2")  # few architectures of llama.cpp have llama3's rope
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
    if family == "smollm3":
        settings |= {"no_rope_layer_interval": dice.choice((2, 4, 4, 4)), "pad_token_id": 2}
    if family in ("qwen2", "qwen3") and dice.random() < 0.3:
        settings |= {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": dice.randint(0, 2)}
    return settings


def build(case: Case) -> Any:
    """Return the model, with one magnitude in each row of every matrix."""
    shape = tiny_architecture(case.family, case.layers, case.hidden_size, case.tied, case.head_dim)
    model = tiny_model(shape, seed=case.seed, **case.settings)
    dice = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                rows, columns = parameter.shape
                chosen = torch.rand(rows, columns, generator=dice) < 0.5
                sign = torch.randint(0, 2, (rows, 1), generator=dice) * 2 - 1
                size = 2.0 ** (torch.randint(-1, 2, (rows, 1), generator=dice) - round(math.log2(columns) / 2))
                parameter.copy_(chosen * sign * size)
    return model


def expected_logits(folder: Path, tokens: list[int]) -> tuple[np.ndarray, float]:
    """Return transformers' logits fp32 [S, V], and the allowed root mean square of a row's differences."""
    model: Any = load_for_inference(folder)
    dice = torch.Generator().manual_seed(0)

    def disturb(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (x,) = inputs
        error = (torch.rand(x.shape, generator=dice) - 0.5) * x.abs().amax(-1, keepdim=True) / 127
        return (x + error,)

    with torch.inference_mode():
        exact = model(torch.tensor([tokens])).logits[0].numpy()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(disturb)
        disturbed = model(torch.tensor([tokens])).logits[0].numpy()
    return exact, FACTOR * _distance(exact, disturbed) + FLOOR * float(exact.std())


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(np.square(first - second).mean(-1)).max())


def gguf_logits(folder: Path, tokens: list[int], chunks: Sequence[int]) -> list[tuple[list[int], np.ndarray]]:
    """Return (positions, logits) of llama.cpp, with passes of the chunks' first size and of all tokens."""
    import llama_cpp

    found = []
    for size in (chunks[0], len(tokens)):
        path = str(folder / "model.gguf")
        model = llama_cpp.Llama(path, n_ctx=256, n_batch=size, n_ubatch=size, logits_all=True, verbose=False)
        model.eval(tokens)
        found.append((list(range(len(tokens))), np.array(model.scores[: len(tokens)])))
        model.close()
    return found


def onnx_logits(folder: Path, tokens: list[int], chunks: Sequence[int]) -> list[tuple[list[int], np.ndarray]]:
    """Return (positions, logits) of onnxruntime, in the chunks and in a padded batch of two with a step after it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    caches = {value.name: value for value in session.get_inputs()[2:]}
    names = [value.name for value in session.get_outputs()]

    def call(rows: list[list[int]], mask: list[list[int]], past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        feeds: dict[str, Any] = {"input_ids": np.array(rows), "attention_mask": np.array(mask)}
        for name, value in caches.items():
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[name] = past.get(name, np.zeros((len(rows), value.shape[1], 0, value.shape[3]), dtype))
        outputs: dict[str, Any] = dict(zip(names, session.run(names, feeds), strict=True))
        logits = outputs.pop("logits")[:, 0]
        return logits, {name.replace("present", "past_key_values"): each for name, each in outputs.items()}

    ends, rows, past, start = [], [], {}, 0
    for size in itertools.cycle(chunks):
        end = min(start + size, len(tokens))
        logits, past = call([tokens[start:end]], [[1] * end], past)
        ends.append(end - 1)
        rows.append(logits[0])
        start = end
        if start == len(tokens):
            break
    short, whole = len(tokens) // 3, len(tokens) - 1
    mask = [[1] * short + [0] * (whole - short), [1] * whole]
    first, past = call([tokens[:short] + [0] * (whole - short), tokens[:whole]], mask, {})
    second, _ = call([[tokens[short]], [tokens[whole]]], [[*row, 1] for row in mask], past)
    batch = [short - 1, whole - 1, short, whole], np.concatenate([first, second])
    return [(ends, np.stack(rows)), batch]


LOGITS = {"gguf": gguf_logits, "onnx": onnx_logits}


@dataclass(frozen=True)
class Outcome:
    """Result of a case."""

    kind: str
    """right, wrong, refused or traceback."""
    detail: str = ""


def run_case(target: str, case: Case, folder: Path) -> Outcome:
    """Export a case and compare the file."""
    save_checkpoint(build(case), tiny_tokenizer(), folder / "checkpoint")
    try:
        export(folder / "checkpoint", target, folder / "out", quantize=case.quantize)
    except EfficientLLMError as error:
        return Outcome("refused", str(error))
    except Exception:
        return Outcome("traceback", traceback.format_exc())
    context = json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))["context_length"]
    tokens = torch.randint(3, 400, (LENGTH,), generator=torch.Generator().manual_seed(case.seed)).tolist()[:context]
    exact, limit = expected_logits(folder / "checkpoint", tokens)
    for positions, logits in LOGITS[target](folder / "out", tokens, case.chunks):
        distance = _distance(exact[positions], logits)
        if not distance <= limit or math.isnan(distance):
            return Outcome("wrong", f"differs by {distance:.2e}, limit {limit:.2e}")
    return Outcome("right")


def command(target: str, seed: int, index: int) -> str:
    """Return the command that runs a case alone."""
    return f"python -m tests.tools.export_cases --target {target} --seed {seed} --first {index} --cases 1"


def cause(message: str) -> str:
    """Return a refusal's message without its numbers."""
    return re.sub(r"\d[\d.e+-]*", "N", message)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(LOGITS), required=True)
    for name, value in (("cases", 2000), ("seed", 1), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(argv)
    logging.getLogger("efficientllm").setLevel(logging.ERROR)
    kinds: collections.Counter[str] = collections.Counter()
    causes: collections.Counter[str] = collections.Counter()
    for index in range(options.first, options.first + options.cases):
        case = generate(options.target, options.seed, index)
        with tempfile.TemporaryDirectory(prefix="export-case-") as folder:
            outcome = run_case(options.target, case, Path(folder))
        kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            causes[cause(outcome.detail)] += 1
        elif outcome.kind != "right":
            again = f"--target {options.target} --seed {options.seed} --first {index} --cases 1"
            print(
                f"{outcome.kind}: python -m tests.tools.export_cases {again}\n  {case}\n  {outcome.detail}", flush=True
            )
    print(json.dumps({"cases": options.cases, **kinds, "causes": causes}, ensure_ascii=False))
    return int(bool(kinds["wrong"] or kinds["traceback"]))


if __name__ == "__main__":
    sys.exit(main())
