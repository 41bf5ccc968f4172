"""What the card of a source says that its descendants must say, too: the licence, and which model they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .hub import hub_answers, may_be_hub_id

CARD = "README.md"


@dataclass(frozen=True)
class SourceCard:
    """What is not known is empty."""

    license: str = ""
    """As model hubs name it."""
    base_model: str = ""
    """The source's own name on a hub."""


DEMO = SourceCard("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Of the built-in source, whose file brings no card."""


def source_card(source: str) -> SourceCard:
    """Of a source as `--source` names it; a card that cannot be read says nothing."""
    if source == "demo":
        return DEMO
    path = Path(source)
    if path.exists():
        return SourceCard(_license(path / CARD if path.is_dir() else path.parent / CARD))
    if not may_be_hub_id(source):
        return SourceCard()
    found = _hub_file(source)
    return SourceCard(_license(found) if found else "", source)


def _hub_file(source: str) -> Path | None:
    """The card as it was downloaded before, or now."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, CARD, local_files_only=not hub_answers("model", source)))
    except Exception:  # what its library for HTTP raises changes from release to release; a card is worth no failure
        return None


def _license(card: Path) -> str:
    from huggingface_hub.repocard import metadata_load

    try:
        header = metadata_load(card) or {}
    except Exception:  # anybody's text: no file, no UTF-8, no YAML, YAML that is no mapping
        return ""
    name = header.get("license")
    return name if isinstance(name, str) and name.isprintable() else ""
