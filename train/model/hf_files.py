"""What the files of a Hugging Face folder must say so that older and other readers understand it. Imports no torch.

transformers 5 moved settings and gave its tokenizer base class a new name; it still reads the old ones. Releases before
it, mlx-lm and others read only the old ones and take a default where they find none: nobody notices a wrong base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OLD_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Any tokenizer.json, by the name that transformers 4 has, too."""

LOADING_NOTES = ("backend", "is_local", "local_files_only")
"""What transformers 5 writes into tokenizer_config.json about how the tokenizer was loaded."""


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in which every value that has an old and a new home stands in both."""
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
    """Write FOLDER/config.json for every reader; what has its own modeling file needs a release with the new names.

    AutoTokenizer, where it must not run that file, fails on the old name of a scaled rope (transformers 5.24).
    """
    text = json.dumps(dict(config) if "auto_map" in config else with_old_names(config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def mend_tokenizer_config(folder: Path) -> None:
    """Let FOLDER/tokenizer_config.json, where there is one, name a class that older releases know."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = OLD_TOKENIZER_CLASS
    settings = {name: value for name, value in settings.items() if name not in LOADING_NOTES}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
