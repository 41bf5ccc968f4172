"""genai_config.json: how onnxruntime-genai describes a model folder. Its builder writes it, our ONNX exporter too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import ArtefactError

GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class GenaiConfig:
    """What the engines read of it; a folder without the file has the defaults."""

    model_file: str = ""
    context_length: int = 0
    """Tokens, prompt and answer together; 0 where it is not said."""
    vocab_size: int = 0
    end_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Sizes and names of the graph's inputs and outputs."""
    shares_cache: bool = True
    """Whether the attention operator writes into the past in place."""

    @classmethod
    def read(cls, folder: Path) -> GenaiConfig:
        """ArtefactError where FOLDER/genai_config.json is there and malformed."""
        path = folder / GENAI_CONFIG
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            model, search = values.get("model", {}), values.get("search", {})
            decoder, end_ids = model.get("decoder", {}), model.get("eos_token_id", [])
            return cls(
                decoder.get("filename", ""),
                int(model.get("context_length", 0)),
                int(model.get("vocab_size", 0)),
                frozenset(end_ids if isinstance(end_ids, list) else [end_ids]),
                decoder,
                search.get("past_present_share_buffer", True),
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path} is malformed: {error}") from error
