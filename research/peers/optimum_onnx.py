"""Compare optimum-onnx with our ONNX engine: `python -m research.peers.optimum_onnx CHECKPOINT ARTEFACT`.

optimum-onnx pins an older transformers, so it needs a separate environment, in which this package needs no extra:
`pip install efficientllm 'optimum-onnx[onnxruntime]'`. CHECKPOINT is a uniform Hugging Face folder (`--target
hf-uniform`), which optimum exports in fp32 with a KV cache. ARTEFACT is our export of the same model. Both run in that
environment's onnxruntime.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from efficientllm.devices.device import DeviceOptions
from efficientllm.devices.local import LocalDevice, parse_measurement
from efficientllm.devices.measure import measure_engine
from efficientllm.devices.results import BenchOptions, Measurement, Run, summarize
from efficientllm.devices.run_table import markdown
from efficientllm.runtime.base import flags
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.memory import memory_bytes

EXPORT = """
import sys
from optimum.onnxruntime import ORTModelForCausalLM
ORTModelForCausalLM.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""
MEASURE = f"import sys; from {__spec__.name} import print_measurement; print_measurement(*sys.argv[1:])"


class OptimumEngine:
    """A `measure.Decoder` over ORTModelForCausalLM."""

    def __init__(self, folder: str, options: BenchOptions) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]

        start = time.perf_counter()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        self._model: Any = ORTModelForCausalLM.from_pretrained(folder, session_options=settings)
        self.context_length = options.context
        self.vocab_size = int(self._model.config.vocab_size)
        self.kv_cache_bytes, self.settings = 0, ""
        self._past: Any = None
        self._count = 0
        self.load_ms = (time.perf_counter() - start) * 1e3

    def _evaluate(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        self._count += len(tokens)
        mask = torch.ones(1, self._count, dtype=torch.long)
        out = self._model(torch.tensor([tokens]), attention_mask=mask, past_key_values=self._past, use_cache=True)
        self._past = out.past_key_values
        return out.logits[0, -1].numpy()

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self._past, self._count = None, 0
        return self._evaluate(list(tokens))

    def decode(self, token: int) -> np.ndarray:
        return self._evaluate([token])

    def close(self) -> None:
        del self._model


def print_measurement(folder: str, options_json: str) -> None:
    """Measure an exported folder and print a Measurement as JSON, in a child process."""
    options = BenchOptions.from_json(json.loads(options_json))
    baseline_rss_bytes = memory_bytes().get("rss_bytes", 0)
    engine: Any = OptimumEngine(folder, options)
    print(json.dumps(asdict(measure_engine(engine, options, "optimum-onnx", baseline_rss_bytes))))


def measure_peer(folder: str, options: BenchOptions) -> Measurement:
    """Return the measurement of a child process that runs optimum-onnx."""
    return parse_measurement(folder, run_python("-c", MEASURE, folder, json.dumps(asdict(options))))


def export_peer(checkpoint: str, folder: str) -> None:
    """Export the checkpoint with optimum, and print time and memory."""
    start = time.perf_counter()
    finished = run_python("-c", EXPORT, checkpoint, folder)
    if finished.code:
        raise ArtefactError(f"optimum-onnx failed: {finished.last_error}")
    import resource  # absent on Windows

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"export: {time.perf_counter() - start:.0f} s, {used.ru_utime:.0f} s CPU, peak {used.ru_maxrss / 1e6:.2f} GB")


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(prog="python -m research.peers.optimum_onnx", description=__doc__)
    parser.add_argument("checkpoint", help="uniform Hugging Face folder")
    parser.add_argument("artefact", help="our export of the same model, --target onnx --quantize f32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--rounds", type=int, default=3, help="processes per engine, in turn [3]")
    arguments = parser.parse(argv)
    rounds, threads = arguments["rounds"], arguments["threads"]
    # Without huge pages, which optimum does not use.
    options = BenchOptions((128,), (64,), (), 2, rounds, threads, huge_pages=False)
    ours, device = Artefact.open(arguments["artefact"]), LocalDevice(DeviceOptions(), print)
    measurements: dict[str, list[Measurement]] = {"optimum-onnx": [], ours.path.name: []}
    with tempfile.TemporaryDirectory() as folder:
        export_peer(arguments["checkpoint"], folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        for _ in range(options.rounds):
            measurements["optimum-onnx"].append(measure_peer(folder, options))
            measurements[ours.path.name].append(device.measure(ours, options))
    sizes = {"optimum-onnx": size, ours.path.name: ours.file_bytes}
    results = [summarize(name, "", "onnxruntime", sizes[name], {}, runs) for name, runs in measurements.items()]
    print(markdown(Run(device.describe(), options, results)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
