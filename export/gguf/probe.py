"""Child process that loads a new GGUF with llama.cpp, so that an assert of ggml cannot end the user's process.

`python -m efficientllm.export.gguf.probe REQUEST.json` writes the logits of each run [S, V] (fp32 .npy), and token
ids with end tokens (tokens.json), to the folder in the request.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.child import run_python
from ...runtime.base.errors import ArtefactError


@dataclass(frozen=True)
class Run:
    """A pass of the sample through llama.cpp."""

    chunks: tuple[int, ...]
    """Tokens of the passes, repeated until the sample ends."""
    extra_buffers: bool = True
    """True if weights may be repacked for this CPU, or multiplied by AMX."""

    @property
    def title(self) -> str:
        how = "with" if self.extra_buffers else "without"
        return f"in chunks of {', '.join(map(str, self.chunks))} {how} extra buffers"


WHOLE = Run((512,))
RUNS = (WHOLE, Run((33, 1, 64, 7, 2)), Run((512,), extra_buffers=False))
"""Kernels for one token and for many, which quantise and tile differently, and without the CPU's own formats."""


@dataclass(frozen=True)
class Probe:
    """Results of llama.cpp for a file."""

    logits: list[np.ndarray]
    """fp32 [S, V] of each run"""
    token_ids: list[list[int]]
    """Ids of each text."""
    end_ids: set[int]
    """Tokens that end an answer."""


def probe(path: Path, tokens: list[int], texts: Sequence[str] = (), runs: Sequence[Run] = (WHOLE,)) -> Probe:
    """Load `path`, evaluate `tokens` with an F32 cache in every run, and tokenise `texts`.

    Raises ArtefactError if llama.cpp fails.
    """
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as name:
        folder = Path(name)
        request = {
            "path": str(path),
            "tokens": tokens,
            "texts": list(texts),
            "runs": [asdict(run) for run in runs],
            "output": str(folder),
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        done = run_python("-m", __spec__.name, str(folder / "request.json"))
        if done.code:
            complaints = (line for line in done.errors.splitlines() if "error" in line.lower() or "GGML_ASSERT" in line)
            raise ArtefactError(f"llama.cpp cannot run {path.name}: {next(complaints, done.last_error).strip()}")
        token_ids, ends = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        return Probe([np.load(folder / f"{index}.npy") for index in range(len(runs))], token_ids, set(ends))


def _main(request_path: str) -> None:
    import llama_cpp

    from ...runtime.base.cpu_load import FreeCores
    from ...runtime.engines.llama_context import AttentionSettings, LlamaContext
    from ...runtime.engines.protocol import Chunk

    free_cores = FreeCores.where_known(os.cpu_count() or 1)
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    tokens, output = request["tokens"], Path(request["output"])
    runs = [Run(tuple(each["chunks"]), each["extra_buffers"]) for each in request["runs"]]
    # Extra buffers are a setting of the loaded model, so neighbouring runs with the same setting share one.
    for extra_buffers, group in itertools.groupby(enumerate(runs), lambda item: item[1].extra_buffers):
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = extra_buffers
        model = llama_cpp.llama_model_load_from_file(request["path"].encode(), parameters)
        if not model:
            sys.exit(1)  # its log is where the reason stands
        for index, run in group:
            # an F32 cache is exact, where the default F16 moves logits by up to 0.07
            attention = AttentionSettings("f32", flash=False)
            context = LlamaContext(model, os.cpu_count() or 1, attention, len(tokens), 1)
            context.free_cores = free_cores
            rows = [context.extend([Chunk(0, each, True, len(each) - 1)])[0] for each in _chunks(tokens, run.chunks)]
            np.save(output / f"{index}.npy", np.vstack(rows))
            context.close()
        if extra_buffers:
            vocab: Any = llama_cpp.llama_model_get_vocab(model)
            ids = [_tokenize(vocab, text.encode("utf-8")) for text in request["texts"]]
            count = llama_cpp.llama_vocab_n_tokens(vocab)
            ends = [token for token in range(count) if llama_cpp.llama_vocab_is_eog(vocab, token)]
            (output / "tokens.json").write_text(json.dumps([ids, ends]), encoding="utf-8")
        llama_cpp.llama_model_free(model)


def _chunks(tokens: list[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(tokens):
            return
        yield tokens[start : start + size]
        start += size


def _tokenize(vocab: Any, text: bytes) -> list[int]:
    import llama_cpp

    room = (llama_cpp.llama_token * (len(text) + 2))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), False, True)
    return room[:count]


if __name__ == "__main__":
    _main(sys.argv[1])
