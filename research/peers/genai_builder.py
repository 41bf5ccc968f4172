"""onnxruntime-genai's own model builder: `python -m research.peers.genai_builder CHECKPOINT FOLDER`.

Writes an int4 (or fp32) CPU model and a manifest, so that `efficientllm-bench FOLDER` measures it in genai's runtime.
The checkpoint must be uniform.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from efficientllm.export.checkpoint import open_checkpoint
from efficientllm.export.manifest import TOKENIZER_FILES, Contents, foreign_files, write_manifest
from efficientllm.export.request import ExportRequest, VerifyOptions
from efficientllm.runtime.base import flags
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError, UsageError
from efficientllm.runtime.base.output import check_output


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(prog="python -m research.peers.genai_builder", description=__doc__)
    parser.add_argument("checkpoint", help="as for efficientllm-export; a uniform model")
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--quantize", default="int4", choices=("int4", "f32"), help="weight type [int4]")
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
            engine="onnxruntime-genai",
            files=["model.onnx", "model.onnx.data", "genai_config.json", *present],
            quantization=name,
            weight_bytes=(folder / "model.onnx.data").stat().st_size,
            layout="onnxruntime-genai's builder",
            verification={},
        )
        write_manifest(checkpoint, ExportRequest(VerifyOptions(), folder), folder, contents)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
