"""Read, check and write the small files of a Hugging Face folder.

Every file is checked before a library reads it, and a failed check raises a ModelError that names the file.
transformers 5 moved settings and renamed its tokenizer base class, and it still reads the old names. Older releases,
mlx-lm and others read only the old names and silently use a default otherwise. Both are therefore written. Imports no
torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...runtime.base.errors import ModelError
from ...runtime.base.model_names import ADAPTER_FILE

JSON_FILES = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "training.json")
"""Files that a folder may lack."""
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_SETTINGS = "tokenizer_config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl")
READABLE_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of weights, by safetensors' names."""
REMEDY = "copy or download it again"


def check_folder(folder: Path) -> None:
    """Check the small files: configuration, tokenizer, chat template, index of the shards."""
    _check_links(folder)
    if (folder / ADAPTER_FILE).is_file():  # transformers would add it to the model, and a reader of the weights not
        raise ModelError(
            f"{folder} holds a model and an adapter of it ({ADAPTER_FILE}); move the adapter's files into another "
            "folder and give that as --adapter to merge it"
        )
    read_json(folder / "config.json")
    settings = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).is_file()}
    for name in ("bos", "eos", "unk", "pad"):
        _check_special_token(settings.get("tokenizer_config.json", {}), name, folder)
    read_template(folder)
    if (folder / "tokenizer.json").is_file():
        read_tokenizer(folder)
    weight_files(folder)


def _check_links(folder: Path) -> None:
    """Raise ModelError for a link out of the folder, unless it is a weight file or in the hub's cache.

    The small files are copied into exports. A downloaded folder could carry a private file there.
    """
    real = folder.resolve()
    homes = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    for path in folder.iterdir():
        target = Path(os.path.realpath(path))  # it has no error for a circle of links
        is_small = path.suffix not in WEIGHT_SUFFIXES and not path.is_dir()
        if is_small and not any(target.is_relative_to(home) for home in homes):
            raise ModelError(f"{path} is a link out of the folder, to {target}; copy the file into the folder")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is damaged: not UTF-8 at byte {error.start}; {REMEDY}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: not JSON ({error}); {REMEDY}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: a {type(value).__name__} where an object should be; {REMEDY}")
    return value


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read FOLDER/tokenizer.json. Raises ModelError if it is missing or damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json; save it with a fast tokenizer")
    text = read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more special
        raise ModelError(f"{path} is damaged: {error}; {REMEDY}") from error


def check_token_ids(vocab: Mapping[str, int], vocab_size: int, called: str) -> None:
    """Raise ModelError if a token id of the tokenizer has no row in an embedding of `vocab_size` rows."""
    beyond = {token: index for token, index in vocab.items() if index >= vocab_size}
    if beyond:
        token = min(beyond, key=lambda each: beyond[each])
        raise ModelError(
            f"{called}: token {token!r} has id {beyond[token]}, but the embedding has {vocab_size} rows ({len(beyond)} "
            "such tokens); resize the model's embedding (resize_token_embeddings) or remove them from the tokenizer"
        )


def read_template(folder: Path) -> str | None:
    """Return the chat template from its own file or from tokenizer_config.json; None for a list of named templates."""
    path = folder / TEMPLATE_FILE
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    if path.is_file():
        template: Any = read_text(path)
    else:
        path, template = settings_path, settings.get("chat_template")
    if template is None or isinstance(template, list):
        return None
    if not isinstance(template, str) or not template.strip():
        raise ModelError(f"{path} is damaged: the chat template is {template!r}, which is not text; {REMEDY}")
    return template


def weight_files(folder: Path, single: str = WEIGHTS_FILE) -> list[Path]:
    """Return the weight files that transformers would load: the `single` one, or those of its index."""
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return []
    values = read_json(index)
    names = values.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} is damaged: no weight_map of tensor names to file names; {REMEDY}")
    if "metadata" not in values:  # transformers ends in a KeyError
        raise ModelError(f'{index} has no metadata, which transformers reads; add "metadata": {{}}')
    outside = next((name for name in names.values() if Path(name).is_absolute() or ".." in Path(name).parts), None)
    if outside is not None:
        raise ModelError(f"{index} is damaged: {outside} is outside the folder; {REMEDY}")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, which {index.name} names ({len(missing)} missing); {REMEDY}")
    return files


def pickles(folder: Path) -> list[Path]:
    """Return the files of a folder whose names are those of pickled weights."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES[1:])


@dataclass(frozen=True)
class TensorHeader:
    """Place, shape and type of a tensor in a folder."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Type by safetensors' names."""

    def check_type(self, name: str) -> None:
        """Raise ModelError if tensor `name` is stored in a type that cannot be read."""
        if self.dtype not in READABLE_TYPES:
            raise ModelError(
                f"{self.file}: tensor {name} is stored as {self.dtype}; only {', '.join(READABLE_TYPES)} can be read: "
                "give the model in one of them"
            )


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return {tensor name: header} of a folder's .safetensors files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="np") as stream:
                for name in stream.keys():  # noqa: SIM118  it is no mapping
                    if name in found:
                        raise ModelError(f"tensor {name} is in {found[name].file} and in {file}; remove the wrong one")
                    tensor = stream.get_slice(name)
                    found[name] = TensorHeader(file, tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged: {error}; {REMEDY}") from error
    return found


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Return {tensor name: file} of a folder's .safetensors files, after checking their types."""
    headers = tensor_headers(folder)
    for name, header in headers.items():
        header.check_type(name)
    return {name: header.file for name, header in headers.items()}


def refuse_quantized(config: Mapping[str, Any], called: str) -> None:
    """Raise ModelError if config.json says that the weights are quantised."""
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
        raise ModelError(
            f"{called}: the weights are quantised ({method}), which cannot be read; give the model in bfloat16, "
            "float16 or float32 that they were made from"
        )


def whole_number(values: Mapping[str, Any], name: str, default: Any = None, least: int = 0) -> int:
    """Return setting `name` of config.json, or `default` if it is absent or null. Raises ModelError below `least`."""
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelError(f"config.json: {name} is {_shown(value)}, but must be a whole number of at least {least}")
    return value


def positive_number(values: Mapping[str, Any], name: str, default: Any = None) -> float:
    """Return setting `name` of config.json or of its rope parameters, or `default` if it is absent or null."""
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelError(f"config.json: {name} is {_shown(value)}, but must be a positive number")
    return float(value)


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)


def _check_special_token(settings: Mapping[str, Any], name: str, folder: Path) -> None:
    value = settings.get(f"{name}_token")
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        path = folder / "tokenizer_config.json"
        raise ModelError(f"{path} is damaged: {name}_token is {value!r}, which is not text; {REMEDY}")


OLD_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Tokenizer class for any tokenizer.json that transformers 4 also has."""

LOADING_NOTES = ("backend", "is_local", "local_files_only")
"""Fields of tokenizer_config.json in which transformers 5 notes how the tokenizer was loaded."""


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json in which every moved value stands in its old and its new place."""
    rope = dict(config.get("rope_parameters") or {})
    old: dict[str, Any] = {}
    if "full_attention" in rope:  # Gemma: one for each kind of layer
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if "rope_theta" in rope:
        old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:  # GPT-NeoX
        old |= {"rotary_pct": rope.pop("partial_rotary_factor"), "rotary_emb_base": old["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = rope
    if "dtype" in config:
        old["torch_dtype"] = config["dtype"]
    return {**config, **old}


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write FOLDER/config.json for every reader. A folder with its own modeling file gets only the new names."""
    # there, AutoTokenizer without remote code fails on the old name of a scaled rope (transformers 5.24)
    text = json.dumps(dict(config) if "auto_map" in config else with_old_names(config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def mend_tokenizer_config(folder: Path) -> None:
    """Name a tokenizer class in FOLDER/tokenizer_config.json that older releases have."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = OLD_TOKENIZER_CLASS
    settings = {name: value for name, value in settings.items() if name not in LOADING_NOTES}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
