"""onnxruntime-genai's own model builder: `python -m research.peers.genai_builder CHECKPOINT FOLDER`.

Writes an int4 (or fp32) CPU model and a manifest, so that `efficientllm-bench FOLDER` measures it in our ONNX engine.
The checkpoint must be uniform. `--measure` then measures the folder in genai's own runtime, too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from efficientllm.devices.measure import measure_engine
from efficientllm.devices.results import BenchOptions
from efficientllm.export.checkpoint import open_checkpoint
from efficientllm.export.manifest import TOKENIZER_FILES, Contents, foreign_files, write_manifest
from efficientllm.export.request import ExportRequest, VerifyOptions
from efficientllm.runtime.base import flags
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError, UsageError
from efficientllm.runtime.base.output import check_output
from efficientllm.runtime.engines.artefact import GENAI_CONFIG, GenaiConfig
from efficientllm.runtime.engines.engine import EngineOptions, context_length
from efficientllm.runtime.engines.manifest import manifest_cache_bytes
from efficientllm.runtime.engines.memory import huge_pages, memory_bytes, trim_heap
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.engines.stepwise import StepwiseEngine


class GenaiEngine(StepwiseEngine):
    """A model of onnxruntime-genai, see `runtime.engines.protocol.Engine`."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        genai: Any = importlib.import_module("onnxruntime_genai")  # it has no stubs
        began = time.perf_counter()
        folder = path.parent
        config = GenaiConfig.read(folder)
        if not config.vocab_size:
            raise ArtefactError(f"{folder / GENAI_CONFIG} has no vocab_size; export the model again")
        session = {"session_options": {"intra_op_num_threads": options.threads or os.cpu_count() or 1}}
        try:
            with huge_pages(options.huge_pages):
                settings = genai.Config(str(folder))
                settings.overlay(json.dumps({"model": {"decoder": session}}))
                self._model = genai.Model(settings)
        except Exception as error:  # its exceptions have no common base
            raise ArtefactError(f"{folder}: onnxruntime-genai cannot load it: {str(error).splitlines()[0]}") from error
        self.context_length = context_length(options.context, config.context_length)
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self.context_length, do_sample=False)
        self._generator: Any = genai.Generator(self._model, parameters)
        super().__init__(folder)
        self.vocab_size, self.end_ids = config.vocab_size, config.end_ids
        self.kv_cache_bytes = manifest_cache_bytes(folder, self.context_length)
        self.load_ms = (time.perf_counter() - began) * 1e3

    def _truncate(self, length: int) -> None:
        if length < len(self._tokens):
            self._generator.rewind_to(length)

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        self._generator.append_tokens(np.asarray(tokens, dtype=np.int32))
        self._tokens += tokens
        return self._generator.get_logits().reshape(-1, self.vocab_size)[-1].astype(np.float32)

    def close(self) -> None:
        del self._generator, self._model
        trim_heap()


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(prog="python -m research.peers.genai_builder", description=__doc__)
    parser.add_argument("checkpoint", help="as for efficientllm-export; a uniform model")
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--quantize", default="int4", choices=("int4", "f32"), help="weight type [int4]")
    parser.add_argument("--measure", action="store_true", help="print a measurement in genai's runtime as JSON")
    arguments = parser.parse(argv)
    folder, name = Path(arguments["folder"]), arguments["quantize"]
    check_output(folder, False, foreign_files, [arguments["checkpoint"]], "give another folder")
    with open_checkpoint(arguments["checkpoint"]) as checkpoint, tempfile.TemporaryDirectory() as cache:
        if not checkpoint.architecture.is_uniform:
            raise UsageError("genai's builder knows one head count and one FFN width: give a uniform model")
        precision = {"int4": "int4", "f32": "fp32"}[name]
        command = [
            *("-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint.folder)),
            *("-o", str(folder), "-p", precision, "-e", "cpu", "-c", cache),
        ]
        done = run_python(*command)
        if done.code or not (folder / "model.onnx").is_file():
            raise ArtefactError(f"genai's builder failed: {done.last_error}")
        present = [file for file in TOKENIZER_FILES if (folder / file).is_file()]
        contents = Contents(
            engine="onnxruntime",
            files=["model.onnx", "model.onnx.data", "genai_config.json", *present],
            quantization=name,
            weight_bytes=(folder / "model.onnx.data").stat().st_size,
            layout="onnxruntime-genai's builder",
            verification={},
        )
        write_manifest(checkpoint, ExportRequest(VerifyOptions(), folder), folder, contents)
    if arguments["measure"]:
        options, baseline_rss_bytes = BenchOptions(threads=1), memory_bytes().get("rss_bytes", 0)
        engine = EngineScheduler(GenaiEngine(folder / "model.onnx", EngineOptions(threads=1)))
        print(json.dumps(asdict(measure_engine(engine, options, "onnxruntime-genai", baseline_rss_bytes))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
