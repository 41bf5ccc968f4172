"""Read a checkpoint for export: config, tokenizer files and tensors as numpy.

Also choose the type to export in: a checkpoint trained with `--qat` is on the grid of its type. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import ModelError, UsageError
from ..runtime.base.extras import extra
from ..runtime.base.files import require_room
from ..runtime.base.model_names import check_source
from ..runtime.chat_template import render_chat
from ..runtime.engines.hf_tokenizer import read_settings, special_token
from ..runtime.sampling import LLAMA_CPP_DEFAULTS, SamplingOptions
from ..runtime.tool_format import JOB_MARK, LEARNED_MARKS
from ..train.model.architecture import Architecture
from ..train.model.attention import LayerAttention, context_length, layer_attention, rope_parameters
from ..train.model.folder_files import (
    INDEX_FILE,
    TEMPLATE_FILE,
    TOKENIZER_SETTINGS,
    WEIGHT_SUFFIXES,
    WEIGHTS_FILE,
    check_folder,
    check_token_ids,
    locate_tensors,
    read_json,
    read_template,
    read_tokenizer,
    refuse_quantized,
)
from ..train.model.foreign_configs import DEFAULTS, ImportOptions, is_foreign
from ..train.model.rescaling import Scales
from ..train.model.tensors import StockTensor, locate, tensor_names, tensor_shape
from .request import ExportRequest

QUESTION = {"role": "user", "content": "Hello"}
"""Message that a chat template must be able to render."""


class Checkpoint:
    """A Hugging Face folder of a supported family, irregular or plain."""

    def __init__(self, folder: Path, name: str, notes: tuple[str, ...] = (), doubts: tuple[str, ...] = ()) -> None:
        """Check and open the folder.

        `name` is the user's name of it, and `notes` are lines about its import for the manifest. `doubts` are those
        that say what was not verified. Raises ModelError if it is unsupported or damaged.
        """
        self.folder = folder
        self.name = name
        self.notes, self.doubts = notes, doubts
        self.context_limit: int | None = None
        """Tokens at which the context ends if the target cannot store a window of the model."""
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
        """Check that all other settings of any target exist and have the right type."""
        _ = self.scales, self.context_length, self.attention, self.bos_id, self.end_of_generation_ids
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
        names = tensor_names(self.architecture)
        missing = [name for name in names if locate(self.architecture, name, location).name not in location]
        if missing:
            raise ModelError(
                f"{self.folder} lacks tensor {missing[0]} ({len(missing)} missing); is the checkpoint complete?"
            )
        return location

    def tensor(self, name: str) -> np.ndarray:
        """Return one tensor as fp32, a gain with its offset added.

        Raises ModelError if its shape disagrees with the config, or a number is not finite.
        """
        from safetensors import safe_open

        stored = self._stored(name)
        with safe_open(self._location[stored.name], framework="np") as stream:
            array = stored.take(stream.get_tensor(stored.name), self.architecture.head_dim)
        array = array.astype(np.float32, copy=False)
        expected = tensor_shape(self.architecture, name)
        if array.shape != expected:
            raise ModelError(f"{self.folder}: tensor {name} has shape {array.shape}, the config says {expected}")
        if not np.isfinite(array).all():
            raise ModelError(f"{self.folder}: tensor {name} holds NaN or infinite numbers; no file can compute with it")
        return array + self.architecture.parts.norm.gain_offset if name.endswith("norm.weight") else array

    def has_tensor(self, name: str) -> bool:
        return self._stored(name).name in self._location

    def _stored(self, name: str) -> StockTensor:
        """Return the location of one of our tensors in the files."""
        return locate(self.architecture, name, self._location)

    @property
    def scales(self) -> Scales:
        """Return eps of the norms and the other numbers that change with the widths."""
        return Scales.of(self.config, self.architecture)

    @property
    def attention(self) -> tuple[LayerAttention, ...]:
        """Return the attention settings of each layer."""
        return layer_attention(self.config, self.architecture)

    @property
    def context_length(self) -> int:
        """Return the number of tokens over which all runtimes agree."""
        length = context_length(self.config, self.architecture)
        return min(length, self.context_limit or length)

    @property
    def rope(self) -> dict[str, Any]:
        """Return the RoPE parameters of layers without a window: rope_theta, rope_type and scaling."""
        return rope_parameters(self.config)

    def json_file(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the folder, {} if it is absent."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @property
    def tokenizer_data(self) -> dict[str, Any]:
        """Return tokenizer.json in the current format of the tokenizers library."""
        return json.loads(self.tokenizer.to_str())

    @property
    def bos_id(self) -> int | None:
        """Return the token id that begins a text, from config.json."""
        return next(iter(self._token_ids(self.config, "bos_token_id")), None)

    @property
    def end_of_generation_ids(self) -> list[int]:
        """Return the token ids that end an answer, from generation_config.json or config.json."""
        settings = self.json_file("generation_config.json")
        return self._token_ids(settings if "eos_token_id" in settings else self.config, "eos_token_id")

    @property
    def sampling(self) -> dict[str, float]:
        """Return the sampling settings of generation_config.json as fields of SamplingOptions.

        Invalid values are left out. A model of one job answers greedily, as its score is measured.
        """
        is_job = (self.chat_template or "").startswith(LEARNED_MARKS)
        settings, found = self.json_file("generation_config.json"), dict(GREEDY if is_job else {})
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
    """Raise ModelError if a chat template cannot be rendered. A template may refuse the messages."""
    settings = read_settings(folder)
    try:
        render_chat(template, [QUESTION], special_token(settings, "bos"), special_token(settings, "eos"))
    except UsageError:
        pass
    except Exception as error:  # a template raises what Python does
        reason = str(error) or type(error).__name__
        raise ModelError(f"{folder}: the chat template cannot be rendered: {reason}") from error


GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}


@contextlib.contextmanager
def open_checkpoint(name: str, foreign: ImportOptions = DEFAULTS, chat_template: str = "") -> Iterator[Checkpoint]:
    """Open a run folder, a Hugging Face folder, or any `--source` of efficientllm-train.

    `chat_template` replaces the folder's, unless it is "". Folders of other pruning tools, and sources that are no
    local folders, are loaded with torch into a temporary folder, and so is one with an adapter. `foreign` has the
    options of both.
    """
    with _open_folder(name, foreign) as checkpoint:
        if not chat_template:
            yield checkpoint
            return
        is_job = (checkpoint.chat_template or "").startswith(LEARNED_MARKS)
        with tempfile.TemporaryDirectory(prefix="efficientllm-") as folder:
            _link_with_template(checkpoint.folder, Path(folder), (JOB_MARK if is_job else "") + chat_template)
            yield Checkpoint(Path(folder), name, checkpoint.notes, checkpoint.doubts)


def _link_with_template(source: Path, folder: Path, template: str) -> None:
    """Fill `folder` with links to the weights of `source`, its other files, and another chat template."""
    for path in source.iterdir():
        if path.name not in (TEMPLATE_FILE, TOKENIZER_SETTINGS):
            if path.is_dir() or path.suffix in WEIGHT_SUFFIXES:
                (folder / path.name).symlink_to(path.resolve(), path.is_dir())
            else:
                shutil.copy(path, folder)
    settings = {name: value for name, value in read_settings(source).items() if name != "chat_template"}
    (folder / TOKENIZER_SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


@contextlib.contextmanager
def _open_folder(name: str, foreign: ImportOptions) -> Iterator[Checkpoint]:
    path = check_source(name, name)
    is_imported = is_foreign(path)
    if path.is_dir():
        check_folder(path)
        if not is_imported and not foreign.adapter:
            yield Checkpoint(path, name)
            return
    if path.is_file():  # at least its bytes, which is known before the seconds of loading
        require_room(Path(tempfile.gettempdir()), path.stat().st_size)
    with extra("train"):
        from ..train.model.irregular import save_checkpoint
        from ..train.model.source import load_foreign, load_source
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    if is_imported and not foreign.adapter:
        imported, tokenizer = load_foreign(path, name, foreign)
        model, doubts = imported.model, imported.doubts
        notes = (imported.table[0], imported.comparison)
    else:
        model, tokenizer = load_source(name, name, foreign)
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as folder:
        save_checkpoint(model, tokenizer, Path(folder))
        yield Checkpoint(Path(folder), name, notes, doubts)


NAMES = {"int4-block32": "int4"}
"""--qat -> the target's --quantize, if the names differ."""


@dataclass(frozen=True)
class TrainedType:
    """Trained type of a checkpoint, from training.json."""

    kind: str
    """The target's --quantize."""
    head: str
    """Type of embedding and LM head in a GGUF."""
    target: str
    """Export target whose files have this type."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TrainedType | None:
        """Read the trained type; None for a checkpoint without one."""
        values = checkpoint.json_file("training.json").get("quantisation")
        if not isinstance(values, dict):
            return None
        kind, head, target = (str(values.get(name, "")) for name in ("type", "head", "target"))
        return cls(NAMES.get(kind, kind), head, target)


def choose_type(checkpoint: Checkpoint, request: ExportRequest[Any], target: str, asked: str, default: str) -> str:
    """Return the requested type, or the trained one. Reports a difference."""
    trained = TrainedType.of(checkpoint)
    if trained is None:
        return asked or default
    own = trained.kind if trained.target == target else ""
    chosen = asked or own or default
    if chosen not in (own, "f32"):
        remedy = f"--quantize {own}" if own else f"--target {trained.target} --quantize {trained.kind}"
        request.say(
            f"the checkpoint was trained for {trained.kind}, {chosen} is another grid: {remedy} keeps it exactly"
        )
    return chosen
