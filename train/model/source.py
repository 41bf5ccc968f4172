"""Loading models: the source of a run as its irregular class, or any folder of ours for inference."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ...runtime.base.errors import EfficientLLMError, ModelError, UsageError
from .folder_files import check_folder, check_token_ids, locate_tensors, refuse_quantized
from .gguf_source import restore_pre_tokenizer, tie_what_is_stored_twice
from .hub import hub_answers, may_be_hub_id
from .installed_files import source_path
from .irregular import architecture_of, to_irregular

WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
"""Patterns of what transformers loads of a hub's model."""


def load_source(source: str, called: str = "") -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Load `source` (demo, a .gguf file, a folder or a hub id) as its irregular class in fp32, with its tokenizer.

    `called`: what messages call it, `--source NAME` unless told otherwise. Raises UsageError when nothing is found
    there and ModelError when the family is not supported.
    """
    called = called or f"--source {source}"
    path = source_path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{called}: no such file")
        folder, options = str(path.parent), _gguf_options(path.name)
    else:
        if path.is_dir() and not (path / "config.json").is_file():
            raise UsageError(f"{called}: the folder has no config.json; give a Hugging Face model folder")
        if not path.is_dir() and not may_be_hub_id(source):
            raise UsageError(f"{called}: no such folder, and not a hub id (owner/name); 'demo' is the built-in source")
        folder, options = source, {}
        if not path.is_dir() and not hub_answers("model", source):
            options = {"local_files_only": True}  # what was downloaded before, without asking for something newer
    if path.is_dir():
        check_folder(path)
        locate_tensors(path)
    with loading(called):
        if path.suffix != ".gguf":  # look at the family before gigabytes of weights are read
            config = AutoConfig.from_pretrained(folder, **options)
            refuse_quantized(config.to_dict(), called)
            architecture_of(config)
            if not path.is_dir() and not options and sys.stderr.isatty():
                snapshot_download(source, allow_patterns=WEIGHT_FILES)  # apart, so that the hub's bars are seen
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer_options = {name: value for name, value in options.items() if name != "quantization_config"}
        tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_options)
    check_token_ids(tokenizer.get_vocab(), model.config.vocab_size, called)
    if path.suffix == ".gguf":  # the file's own name and storage type mean nothing in a converted model
        model.config._name_or_path = source
        restore_pre_tokenizer(tokenizer, path)
        tie_what_is_stored_twice(model, path)
        if tokenizer.model_max_length > 1e9:
            tokenizer.model_max_length = model.config.max_position_embeddings
    return to_irregular(model), tokenizer


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' progress bars and chatter off stderr; what matters is raised."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def loading(called: str) -> Iterator[None]:
    """A ModelError where transformers raises anything while it loads what messages call `called`."""
    try:
        yield
    except (EfficientLLMError, MemoryError):
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise what they like
        raise ModelError(f"{called}: cannot be loaded: {_first_line(error)}") from error


def _gguf_options(file_name: str) -> dict[str, Any]:
    from transformers import GgufConfig  # absent before 5.x

    return {"gguf_file": file_name, "quantization_config": GgufConfig(dequantize=True)}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_for_inference(folder: Path) -> Any:
    """A Hugging Face folder of a supported family in fp32, in eval mode, with eager attention.

    Raises ModelError where transformers cannot load it.
    """
    with loading(str(folder)), quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def content_key(model: Any) -> str:
    """Of what a cache holds about a model: a hash of its weights' bytes and of all settings but where it came from."""
    settings = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
