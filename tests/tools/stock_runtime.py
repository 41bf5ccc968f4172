"""What a stock runtime makes of an artefact, by its own package alone, without efficientllm:

python tests/tools/stock_runtime.py RUNTIME ARTEFACT TOKENS

TOKENS is JSON, windows of token ids [B, S]. Prints JSON: {"runtime": name and version, "next": the likeliest next token
at each position [B, S]}. RUNTIME is a key of RUNTIMES; each reads a window token by token, as it generates.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Next = list[int]


def llama_cpp_python(artefact: Path) -> Callable[[Next], Next]:
    import llama_cpp

    model = llama_cpp.Llama(str(artefact / "model.gguf"), n_ctx=512, n_threads=1, logits_all=True, verbose=False)

    def read(window: Next) -> Next:
        model.reset()
        for token in window:
            model.eval([token])
        return model.scores[: len(window)].argmax(-1).tolist()

    return read


def llama_cpp_py_sync(artefact: Path) -> Callable[[Next], Next]:
    import llama_cpp_py_sync

    greedy = {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "repeat_last_n": 0}

    def read(window: Next) -> Next:
        model = llama_cpp_py_sync.Llama(str(artefact / "model.gguf"), n_ctx=512, n_threads=1, verbose=False)
        model._configure_generation_sampler(**greedy, seed=0)
        found, past = [], 0
        for token in window:
            past = model._eval_tokens([token], past)
            found.append(int(model._sample_token()))
        return found

    return read


def read_onnx(
    pasts: dict[str, tuple[int, int]], run: Callable[[list[str], dict[str, np.ndarray]], list[np.ndarray]]
) -> Callable[[Next], Next]:
    """Return a reader. `pasts` are {input of a cache: (heads, width)}, and `run` returns outputs by name."""

    def read(window: Next) -> Next:
        feeds: dict[str, Any] = {
            name: np.zeros((1, heads, 0, width), np.float32) for name, (heads, width) in pasts.items()
        }
        found = []
        for position, token in enumerate(window):
            feeds["input_ids"] = np.array([[token]])
            feeds["attention_mask"] = np.ones((1, position + 1), np.int64)
            names = ["logits", *(name.replace("past_key_values", "present") for name in pasts)]
            logits, *caches = run(names, feeds)
            feeds |= dict(zip(pasts, caches, strict=True))
            found.append(int(logits.argmax()))
        return found

    return read


def onnxruntime(artefact: Path) -> Callable[[Next], Next]:
    import onnxruntime as ort

    session = ort.InferenceSession(artefact / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    pasts = {name: (shape[1], shape[3]) for name, shape in inputs.items() if name.startswith("past_key_values.")}
    return read_onnx(pasts, lambda names, feeds: [np.asarray(value) for value in session.run(names, feeds)])


def openvino(artefact: Path) -> Callable[[Next], Next]:
    import openvino as ov  # type: ignore[import-not-found]

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model: Any = ov.Core().compile_model(artefact / "model.onnx", "CPU", exact)
    shapes = {one.any_name: one.partial_shape for one in model.inputs if one.any_name.startswith("past_key_values.")}
    pasts = {name: (shape[1].get_length(), shape[3].get_length()) for name, shape in shapes.items()}

    def run(names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = model(feeds)
        return [found[name] for name in names]

    return read_onnx(pasts, run)


def onnxruntime_genai(artefact: Path) -> Callable[[Next], Next]:
    genai: Any = importlib.import_module("onnxruntime_genai")  # without types
    model = genai.Model(str(artefact))

    def read(window: Next) -> Next:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(window) + 1, do_sample=False)
        generator, found = genai.Generator(model, parameters), []
        for token in window:
            generator.append_tokens([token])
            found.append(int(np.asarray(generator.get_logits()).argmax()))
        return found

    return read


def executorch(artefact: Path) -> Callable[[Next], Next]:
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  # its runner has these operators built in
    from executorch.kernels import quantized  # noqa: F401
    from executorch.runtime import Runtime

    forward: Any = Runtime.get().load_program(artefact / "model.pte").load_method("forward")

    def read(window: Next) -> Next:
        return [
            int(forward.execute([torch.tensor([[token]]), torch.tensor([position])])[0].argmax())
            for position, token in enumerate(window)
        ]

    return read


def transformers(artefact: Path) -> Callable[[Next], Next]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(artefact, trust_remote_code=True, dtype=torch.float32).eval()

    def read(window: Next) -> Next:
        past, found = None, []
        with torch.inference_mode():
            for token in window:
                output = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
                past = output.past_key_values
                found.append(int(output.logits.argmax()))
        return found

    return read


def mlx_lm(artefact: Path) -> Callable[[Next], Next]:
    import mlx.core as mx  # type: ignore[import-not-found]
    from mlx_lm.models.cache import make_prompt_cache  # type: ignore[import-not-found]
    from mlx_lm.utils import load_model  # type: ignore[import-not-found]

    mx.set_default_device(mx.cpu)
    model: Any = load_model(artefact, trust_remote_code=True)[0]

    def read(window: Next) -> Next:
        cache = make_prompt_cache(model)
        return [int(model(mx.array([[token]]), cache=cache).argmax()) for token in window]

    return read


RUNTIMES: dict[str, tuple[str, Callable[[Path], Callable[[Next], Next]]]] = {
    "llama.cpp": ("llama-cpp-python", llama_cpp_python),
    "llama.cpp, another build": ("llama-cpp-py-sync", llama_cpp_py_sync),
    "onnxruntime": ("onnxruntime", onnxruntime),
    "OpenVINO": ("openvino", openvino),
    "onnxruntime-genai": ("onnxruntime-genai", onnxruntime_genai),
    "ExecuTorch": ("executorch", executorch),
    "transformers": ("transformers", transformers),
    "mlx-lm": ("mlx-lm", mlx_lm),
}
"""Name -> (distribution, what makes a reader of an artefact)."""


def main(name: str, artefact: Path, windows: list[Next]) -> None:
    package, make = RUNTIMES[name]
    read = make(artefact)
    found = [read(window) for window in windows]
    assert not any(module.split(".")[0] == "efficientllm" for module in sys.modules)
    print(json.dumps({"runtime": f"{package} {importlib.metadata.version(package)}", "next": found}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
