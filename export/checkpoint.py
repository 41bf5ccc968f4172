"""Reading a checkpoint for export: config, tokenizer files and tensors as numpy. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import ModelError, UsageError
from ..runtime.base.extras import extra
from ..runtime.engines.hf_tokenizer import read_chat_template
from ..train.model.architecture import Architecture
from ..train.model.tensors import tensor_names, tensor_shape


class Checkpoint:
    """A Hugging Face folder of a supported family, irregular or plain."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name` is what the user called it. Raises ModelError for an unsupported or damaged folder."""
        self.folder = folder
        self.name = name
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
        self.architecture = Architecture.from_hf_config(self.config)
        self._location = self._index_tensors()
        missing = [name for name in tensor_names(self.architecture) if name not in self._location]
        if missing:
            raise ModelError(
                f"{folder} lacks tensor {missing[0]} ({len(missing)} missing); is the checkpoint complete?"
            )

    def _index_tensors(self) -> dict[str, Path]:
        with extra("export"):
            import ml_dtypes  # noqa: F401  numpy knows bfloat16 where it is imported, and most models are stored so
            from safetensors import SafetensorError, safe_open

        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{self.folder} has no .safetensors file; save the model with safetensors")
        location: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="np") as stream:
                    location |= dict.fromkeys(stream.keys(), file)
            except SafetensorError as error:
                raise ModelError(f"{file} is damaged: {error}") from error
        return location

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as fp32; ModelError where its shape disagrees with the config."""
        from safetensors import safe_open

        with safe_open(self._location[name], framework="np") as stream:
            array = stream.get_tensor(name).astype(np.float32, copy=False)
        expected = tensor_shape(self.architecture, name)
        if array.shape != expected:
            raise ModelError(f"{self.folder}: tensor {name} has shape {array.shape}, the config says {expected}")
        return array

    def has_tensor(self, name: str) -> bool:
        return name in self._location

    @property
    def qk_norm_eps(self) -> float:
        """eps of Qwen3's per-head norms."""
        return float(self.config.get("qk_norm_eps") or self.rms_norm_eps)

    @property
    def rms_norm_eps(self) -> float:
        return float(self.config["rms_norm_eps"])

    @property
    def context_length(self) -> int:
        """Tokens over which all runtimes agree: up to the sliding window (Mistral), which not all of them implement."""
        return min(int(self.config["max_position_embeddings"]), int(self.config.get("sliding_window") or sys.maxsize))

    @property
    def rope(self) -> dict[str, Any]:
        """RoPE parameters: rope_theta, rope_type and, where scaled, factor and the rest."""
        values = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        values.setdefault("rope_theta", self.config.get("rope_theta", 10000.0))
        values.setdefault("rope_type", values.get("type", "default"))
        return values

    def json_file(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, {} where it is absent."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def chat_template(self) -> str | None:
        return read_chat_template(self.folder)

    @property
    def end_of_generation_ids(self) -> list[int]:
        """Token ids that end an answer, from generation_config.json or config.json."""
        value = self.json_file("generation_config.json").get("eos_token_id", self.config.get("eos_token_id"))
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]


@contextlib.contextmanager
def open_checkpoint(name: str) -> Iterator[Checkpoint]:
    """Open a run folder, a Hugging Face folder, or anything `efficientllm-train --source` takes.

    What is not a local folder is loaded with torch and held in a temporary folder meanwhile.
    """
    path = Path(name)
    if (path / "model" / "config.json").is_file():
        path = path / "model"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name}: the folder has no config.json; give a run or a Hugging Face model folder")
        yield Checkpoint(path, name)
        return
    with extra("train"):
        from ..train.model.irregular import save_checkpoint
        from ..train.model.source import load_source
    model, tokenizer = load_source(name, name)
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as folder:
        save_checkpoint(model, tokenizer, Path(folder))
        yield Checkpoint(Path(folder), name)
