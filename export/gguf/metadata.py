"""general.*: what a GGUF says of itself, by the class that llama.cpp's own converter says it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint


def add_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    """Type, name, size and what the header of the checkpoint's README.md tells: licence, tags, base model, data sets.

    The folder's own name is left out, from which the converter guesses where there is no card: ours may be temporary.
    """
    import gguf
    import yaml

    parameters = checkpoint.architecture.num_parameters
    try:
        card = gguf.Metadata.load_model_card(checkpoint.folder)
    except (yaml.YAMLError, UnicodeDecodeError):  # anybody's text, and not what the weights depend on
        card = {}
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, total_params=parameters)
    metadata.name = Path(checkpoint.name).name
    metadata.size_label = metadata.size_label or gguf.size_label(parameters, 0, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
