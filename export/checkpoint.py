"""Reading a checkpoint for export: config, tokenizer files and tensors as numpy. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import ModelError, UsageError
from ..runtime.base.extras import extra
from ..runtime.chat_template import render_chat
from ..runtime.engines.hf_tokenizer import read_settings, special_token
from ..runtime.sampling import LLAMA_CPP_DEFAULTS, SamplingOptions
from ..train.model.architecture import Architecture
from ..train.model.folder_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    check_folder,
    check_token_ids,
    locate_tensors,
    positive_number,
    read_json,
    read_template,
    read_tokenizer,
    refuse_quantized,
    whole_number,
)
from ..train.model.tensors import tensor_names, tensor_shape

QUESTION = {"role": "user", "content": "Hello"}
"""What a chat template must be able to render."""

LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Parameters of Llama 3's rope."""


class Checkpoint:
    """A Hugging Face folder of a supported family, irregular or plain."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name` is what the user called it. Raises ModelError for an unsupported or damaged folder."""
        self.folder = folder
        self.name = name
        check_folder(folder)
        self.config = read_json(folder / "config.json")
        refuse_quantized(self.config, name)
        self.architecture = Architecture.from_hf_config(self.config)
        self.tokenizer = read_tokenizer(folder)
        check_token_ids(self.tokenizer.get_vocab(), self.architecture.vocab_size, name)
        self.chat_template = read_template(folder)
        self._check_settings()
        self._location = self._locate_tensors()

    def _check_settings(self) -> None:
        """Everything else that a target reads is there and of its type, whatever the target."""
        _ = self.rms_norm_eps, self.qk_norm_eps, self.context_length, self.rope, self.bos_id, self.end_of_generation_ids
        if self.chat_template is not None:
            _check_template(self.chat_template, self.folder)

    def _locate_tensors(self) -> dict[str, Path]:
        with extra("export"):
            import ml_dtypes  # noqa: F401  numpy knows bfloat16 where it is imported, and most models are stored so
            import safetensors  # noqa: F401
        location = locate_tensors(self.folder)
        if not location:
            raise ModelError(
                f"{self.folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}; save the model with safetensors"
            )
        missing = [name for name in tensor_names(self.architecture) if name not in location]
        if missing:
            raise ModelError(
                f"{self.folder} lacks tensor {missing[0]} ({len(missing)} missing); is the checkpoint complete?"
            )
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
        return positive_number(self.config, "qk_norm_eps", self.rms_norm_eps)

    @property
    def rms_norm_eps(self) -> float:
        return positive_number(self.config, "rms_norm_eps")

    @property
    def context_length(self) -> int:
        """Tokens over which all runtimes agree: up to the sliding window (Mistral), which not all of them implement."""
        positions = whole_number(self.config, "max_position_embeddings", least=1)
        return min(positions, whole_number(self.config, "sliding_window", sys.maxsize) or sys.maxsize)

    @property
    def rope(self) -> dict[str, Any]:
        """RoPE parameters: rope_theta, rope_type and, where scaled, factor and the rest."""
        values = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(values, dict):
            raise ModelError(f"config.json: rope_parameters is {values!r}, but must be an object")
        kind = values.get("rope_type", values.get("type", "default"))
        theta = positive_number(values, "rope_theta", self.config.get("rope_theta", 10000.0))
        scaling = {name: positive_number(values, name) for name in (LLAMA3_SCALING if kind == "llama3" else ())}
        return {**values, **scaling, "rope_theta": theta, "rope_type": kind}

    def json_file(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, {} where it is absent."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @property
    def tokenizer_data(self) -> dict[str, Any]:
        """tokenizer.json, whatever its age, as the tokenizers library would write it today."""
        return json.loads(self.tokenizer.to_str())

    @property
    def bos_id(self) -> int | None:
        """Token id that begins a text, from config.json."""
        return next(iter(self._token_ids(self.config, "bos_token_id")), None)

    @property
    def end_of_generation_ids(self) -> list[int]:
        """Token ids that end an answer, from generation_config.json or config.json."""
        settings = self.json_file("generation_config.json")
        return self._token_ids(settings if "eos_token_id" in settings else self.config, "eos_token_id")

    @property
    def sampling(self) -> dict[str, float]:
        """How generation_config.json samples, as fields of SamplingOptions; what is no such value is left out."""
        settings, found = self.json_file("generation_config.json"), {}
        for name in LLAMA_CPP_DEFAULTS:
            with contextlib.suppress(ValueError):
                if settings.get(name) is not None:
                    SamplingOptions(**{name: settings[name]})
                    found[name] = settings[name]
        return found

    def _token_ids(self, settings: Mapping[str, Any], name: str) -> list[int]:
        value = settings.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        vocab_size = self.architecture.vocab_size
        if not all(isinstance(each, int) and 0 <= each < vocab_size for each in ids):
            raise ModelError(f"{self.folder}: {name} is {value!r}, but the model has tokens 0 to {vocab_size - 1}")
        return ids


def _check_template(template: str, folder: Path) -> None:
    """ModelError where a chat template cannot be rendered; it may refuse the messages, which is its right."""
    settings = read_settings(folder)
    try:
        render_chat(template, [QUESTION], special_token(settings, "bos"), special_token(settings, "eos"))
    except UsageError:
        pass
    except Exception as error:  # a template raises what Python does
        reason = str(error) or type(error).__name__
        raise ModelError(f"{folder}: the chat template cannot be rendered: {reason}") from error


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
