"""Child process that loads a new GGUF with llama.cpp, so that an assert of ggml cannot end the user's process.

`python -m efficientllm.export.gguf.probe REQUEST.json` writes logits [S, V] (fp32 .npy) and token ids (.json) to the
paths in the request.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.base.child import run_python
from ...runtime.base.errors import ArtefactError


@dataclass(frozen=True)
class Probe:
    """Results of llama.cpp for a file."""

    logits: np.ndarray
    """fp32 [S, V]"""
    token_ids: list[list[int]]
    """Ids of each text."""


def probe(path: Path, tokens: list[int], texts: list[str]) -> Probe:
    """Load `path`, evaluate `tokens` with an F32 cache and tokenise `texts`.

    Raises ArtefactError if llama.cpp fails.
    """
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as name:
        folder = Path(name)
        request = {"path": str(path), "tokens": tokens, "texts": texts, "output": str(folder)}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        done = run_python("-m", __spec__.name, str(folder / "request.json"))
        if done.code:
            complaints = (line for line in done.errors.splitlines() if "error" in line.lower() or "GGML_ASSERT" in line)
            raise ArtefactError(f"llama.cpp cannot run {path.name}: {next(complaints, done.last_error).strip()}")
        token_ids = json.loads((folder / "token_ids.json").read_text(encoding="utf-8"))
        return Probe(np.load(folder / "logits.npy"), token_ids)


def _main(request_path: str) -> None:
    import llama_cpp

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    tokens = request["tokens"]
    model = llama_cpp.Llama(
        request["path"],
        n_ctx=max(len(tokens), 32),
        n_batch=max(len(tokens), 32),
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,  # exact, where the default F16 moves logits by up to 0.07
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=True,  # its log is where the reason of a failure stands
    )
    model.eval(tokens)
    output = Path(request["output"])
    np.save(output / "logits.npy", model.scores[: len(tokens)].astype(np.float32))
    ids = [model.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in request["texts"]]
    (output / "token_ids.json").write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1])
