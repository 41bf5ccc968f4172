"""Load models: the source of a run as its irregular class, or a folder for inference.

A source is a Hugging Face folder, a hub id, a GGUF file or the built-in demo. transformers 5.24 gives every byte-level
BPE of a Llama-architecture GGUF the splitting of GPT-2, although the file names another. Some writers store a tied
table twice in two types, which transformers reads as two tables. Both are corrected here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ...runtime.base.errors import EfficientLLMError, ModelError, UsageError, first_line
from ...runtime.base.extras import extra
from ...runtime.base.model_names import check_adapter, check_source, hub_answers, source_path
from .file_types import build_pre_tokenizer
from .folder_files import check_folder, check_token_ids, locate_tensors, read_json, refuse_quantized
from .foreign_configs import DEFAULTS, ImportOptions, is_foreign
from .gguf_source import header_of
from .importing import Imported, import_folder
from .irregular import architecture_of, build, to_irregular
from .tensors import BUFFERS

SAME_TABLE = 0.3
"""Relative difference of embedding and head below which they are one table, rounded twice. Rounding to 4 bits gives
about 0.1, separate training above 1."""


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a tokenizer from a GGUF file the pre-tokenizer that the file names. Unknown names change nothing."""
    name = header_of(path).values.get("tokenizer.ggml.pre", "")
    pre_tokenizer = build_pre_tokenizer(name)
    if pre_tokenizer is not None:
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizer
        backend.model.ignore_merges = name == "llama-bpe"


def tie_what_is_stored_twice(model: Any, path: Path) -> None:
    """Tie embedding and head of a GGUF that stores one table in two roundings. The finer one stays."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings or head.shape != embedding.shape:
        return
    with torch.no_grad():
        parts = zip(head.split(4096), embedding.split(4096), strict=True)  # no third table beside the two
        difference = sum(float((h - e).square().sum()) for h, e in parts)
        if difference > SAME_TABLE**2 * float(embedding.norm()) ** 2:
            return
    with extra("train"):
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    blocks = {each.name: GGML_QUANT_SIZES[GGMLQuantizationType(each.kind)] for each in header_of(path).tensors}
    bits = {name: num_bytes / weights for name, (weights, num_bytes) in blocks.items()}
    if bits["output.weight"] > bits["token_embd.weight"]:
        embedding.data = head.data
    model.config.tie_word_embeddings = True
    model.tie_weights()


_log = logging.getLogger("efficientllm.train")

GGUF_FILE_TYPES = {0: torch.float32, 1: torch.float16}
"""`general.file_type` of GGUF files (llama.cpp's LLAMA_FTYPE) with fp32 or fp16 matrices."""


def stored_dtype(source: str) -> torch.dtype:
    """Return the stored dtype of a source that `load_source` has loaded. A quantised GGUF file counts as bf16."""
    path = source_path(source)
    if path.suffix == ".gguf":
        # bf16 is the type in which models are published. It rounds a weight by at most 1/512 of itself, and a block of
        # 4 or 5 bits by 1/32 of the largest weight of the block.
        return GGUF_FILE_TYPES.get(int(header_of(path).values.get("general.file_type", -1)), torch.bfloat16)
    if path.is_dir():
        values = read_json(path / "config.json")
        dtype = getattr(torch, str(values.get("dtype") or values.get("torch_dtype")), None)
    else:
        dtype = AutoConfig.from_pretrained(str(path), trust_remote_code=False).dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
"""Patterns of the weight files that transformers loads from a hub."""


def load_source(
    source: str, called: str = "", foreign: ImportOptions = DEFAULTS
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Load `source` (demo, a .gguf file, a folder or a hub id) as its irregular class in fp32, with its tokenizer.

    `called` is the name in messages, by default `--source NAME`. `foreign` applies to folders of other pruning tools
    (see `is_foreign`) and has the adapter to merge. Raises UsageError if nothing is found and ModelError if the family
    is not supported.
    """
    called = called or f"--source {source}"
    path = check_source(source, called)
    if is_foreign(path):
        if foreign.adapter:
            raise UsageError(
                f"--adapter {foreign.adapter}: {called} was pruned by another tool; merge the adapter there"
            )
        imported, tokenizer = load_foreign(path, called, foreign)
        return imported.model, tokenizer
    folder, options = _located(source, path, called)
    with loading(called):
        if path.suffix != ".gguf":  # look at the family before gigabytes of weights are read
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
            refuse_quantized(config.to_dict(), called)
            architecture_of(config)
            if path.is_dir():
                locate_tensors(path)
            if not path.is_dir() and not options and sys.stderr.isatty():
                snapshot_download(source, allow_patterns=WEIGHT_FILES)  # apart, so that the hub's bars are seen
        with quiet_loading():
            model = _load(folder, called, **options)
    tokenizer = _tokenizer(path, folder, options, called)
    check_token_ids(tokenizer.get_vocab(), model.config.vocab_size, called)
    if path.suffix == ".gguf":  # the file's own name and storage type mean nothing in a converted model
        model.config._name_or_path = source
        tie_what_is_stored_twice(model, path)
        if tokenizer.model_max_length > 1e9:
            tokenizer.model_max_length = model.config.max_position_embeddings
    if foreign.adapter:
        model = merge_adapter(model, foreign.adapter)
    return to_irregular(model), tokenizer


def weights_folder(source: str, called: str = "") -> Path | None:
    """Return the folder of a source's .safetensors files, downloaded if needed. None for every other kind of source."""
    called = called or f"--source {source}"
    path = check_source(source, called)
    if path.suffix == ".gguf" or is_foreign(path):
        return None
    if path.is_dir():
        check_folder(path)
    else:
        _, options = _located(source, path, called)
        path = Path(snapshot_download(source, allow_patterns=[*WEIGHT_FILES, "*.json"], **options))
    return path if locate_tensors(path) else None


def shape_model(folder: Path, called: str) -> Any:
    """Return the model of a `weights_folder` as its irregular class on the meta device, without values."""
    with loading(called):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_quantized(config.to_dict(), called)
        config.dtype = torch.float32
        with torch.device("meta"):
            model: Any = build(config, architecture_of(config))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def merge_adapter(model: Any, folder: str) -> Any:
    """Return `model` with the weights of a PEFT adapter added. Raises UsageError or ModelError."""
    called = check_adapter(folder)
    with extra("adapters"):
        from peft import PeftModel
    with loading(called), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about weights that do not fit
        adapted: Any = PeftModel.from_pretrained(model, folder)
        if adapted.active_peft_config.is_prompt_learning:
            kind = adapted.active_peft_config.peft_type.value
            raise ModelError(f"{called} is an adapter of type {kind}, which adds tokens and no weights to merge")
        return adapted.merge_and_unload()


def load_tokenizer(source: str, flag: str = "--source") -> PreTrainedTokenizerBase:
    """Load the tokenizer of `source` as `load_source` does, but no weights. Raises UsageError or ModelError."""
    called = f"{flag} {source}"
    path = check_source(source, called)
    folder, options = _located(source, path, called)
    return _foreign_tokenizer(path, called) if is_foreign(path) else _tokenizer(path, folder, options, called)


def _located(source: str, path: Path, called: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub id of a source at `path`, and transformers' options to load it.

    Without an answer of the hub, what was downloaded before is used. Raises ModelError if nothing was.
    """
    if path.suffix == ".gguf":
        from transformers import GgufConfig  # absent before 5.x

        return str(path.parent), {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    if path.is_dir():
        check_folder(path)
        return str(path), {}
    if hub_answers("model", source):
        return source, {}
    if not isinstance(try_to_load_from_cache(source, "config.json"), str):
        raise ModelError(
            f"{called}: no such folder, not downloaded before, and the hub does not answer; check the name"
        )
    return source, {"local_files_only": True}


def _foreign_tokenizer(path: Path, called: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a foreign folder or GGUF, whose model transformers may refuse.

    A tokenizer.json is read as it is, as the exporters do. The class that tokenizer_config.json names may change it.
    """
    if (path / "tokenizer.json").is_file():
        with loading(called):
            return PreTrainedTokenizerFast.from_pretrained(path)
    return _tokenizer(path, str(path), {"config": PreTrainedConfig()}, called)


def _tokenizer(path: Path, folder: str, options: dict[str, Any], called: str) -> PreTrainedTokenizerBase:
    own = {name: value for name, value in options.items() if name != "quantization_config"}
    with loading(called):
        if path.suffix != ".gguf":
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **own)
        # AutoTokenizer (transformers 5.24) reads the whole file ten times as long, and invents a <mask> for Gemma
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    restore_pre_tokenizer(tokenizer, path)
    return tokenizer


def load_foreign(path: Path, called: str, options: ImportOptions) -> tuple[Imported, PreTrainedTokenizerBase]:
    """Import the folder of another tool. Reports its shape and the comparison with its original."""
    if path.is_dir():
        check_folder(path)
    with loading(called), quiet_loading():
        imported = import_folder(path, called, options)
    tokenizer = _foreign_tokenizer(path, called)
    check_token_ids(tokenizer.get_vocab(), imported.model.config.vocab_size, called)
    for line in (*imported.table, imported.comparison, *imported.notes):
        _log.info(line)
    return imported, tokenizer


_LOADING = threading.RLock()
"""Held by the thread that loads a model. transformers' loading changes the process, and ties no head meanwhile."""


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Load one model at a time, without transformers' progress bars and notes on stderr. Errors are raised."""
    with _LOADING:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def loading(called: str) -> Iterator[None]:
    """Convert everything that transformers raises during loading to a ModelError about `called`."""
    try:
        yield
    except (EfficientLLMError, MemoryError):
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise what they like
        raise ModelError(f"{called}: cannot be loaded: {first_line(error)}") from error


def load_for_inference(folder: Path) -> Any:
    """Load a Hugging Face folder in fp32, in eval mode, with eager attention.

    Raises ModelError if transformers cannot load it.
    """
    with loading(str(folder)), quiet_loading():
        return _load(str(folder), str(folder), attn_implementation="eager").eval()


def _load(folder: str, called: str, **options: Any) -> Any:
    """Load a folder or hub id in fp32. Raises ModelError for tensors that its class lacks or does not have."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
    )
    model, info = loaded
    unexpected = [name for name in info["unexpected_keys"] if not BUFFERS.search(name)]
    for problem, names in {"has no": unexpected, "needs": info["missing_keys"]}.items():
        if names:  # transformers only warns, and starts with random numbers
            name = type(model).__name__
            raise ModelError(
                f"{called}: {name} {problem} tensor {min(names)} ({len(names)} such); is it another model?"
            )
    return model


def content_key(model: Any) -> str:
    """Return a cache key of a model: a hash of its weights and of all settings except its origin."""
    settings = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        values = parameter.detach().cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy())  # bytes, as numpy has no bfloat16
    return digest.hexdigest()[:16]
