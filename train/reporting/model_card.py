"""Write the README.md of a trained model as a model card of a hub. Imports no torch.

The card repeats two facts of its source's card: the licence and the name of the base model.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...runtime.base import flags
from ...runtime.base.files import fill_template
from ...runtime.base.model_names import hub_answers, may_be_hub_id
from ...runtime.base.quantities import display_name, format_count, markdown_table
from ...runtime.engines.contract_text import contract_rows, jobs_section
from ..config.sections import TrainConfig
from ..data.documents import DataSpec
from ..model.architecture import Architecture

CORPUS_NAMES = {"demo": "Wikipedia summaries", "self-chat": "chats of the source with itself"}
"""`--data` value -> its name in the card."""

CARD = "README.md"
TEMPLATE = "model_card.md.jinja"


@dataclass(frozen=True)
class SourceCard:
    """Facts of a source's card. Unknown ones are empty."""

    license: str = ""
    """Licence as model hubs name it."""
    base_model: str = ""
    """Name of the source on a hub."""


DEMO = SourceCard("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Card of the built-in source, whose file has none."""


def source_card(source: str) -> SourceCard:
    """Return the card of a source as `--source` names it. A card that cannot be read gives an unknown licence."""
    if source == "demo":
        return DEMO
    path = Path(source)
    if path.exists():
        return SourceCard(_license(path / CARD if path.is_dir() else path.parent / CARD))
    if not may_be_hub_id(source):
        return SourceCard()
    card = _hub_file(source)
    return SourceCard(_license(card) if card else "", source)


def _hub_file(source: str) -> Path | None:
    """Return the card of a hub's model, downloaded or from the cache, or None if there is none."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, CARD, local_files_only=not hub_answers("model", source)))
    except Exception:  # errors of its HTTP library differ between releases, and a missing card must not end a run
        return None


def _license(card: Path) -> str:
    from huggingface_hub.repocard import metadata_load

    try:
        header = metadata_load(card) or {}
    except Exception:  # a user's text: no file, no UTF-8, no YAML, or YAML that is not a mapping
        return ""
    name = header.get("license")
    return name if isinstance(name, str) and name.isprintable() else ""


def command_line(config: TrainConfig) -> str:
    """Return the `efficientllm-train` command of a configuration: every setting that differs from its default.

    Absolute paths are shortened to their last part.
    """
    words = ["efficientllm-train"]
    defaults = TrainConfig()
    for section in fields(TrainConfig):
        values, standard = getattr(config, section.name), getattr(defaults, section.name)
        for item in fields(values):
            value = getattr(values, item.name)
            if value == getattr(standard, item.name) or item.name in ("overwrite", "resume", "branch_of"):
                continue
            name = flags.flag_name(item.name)
            if isinstance(value, bool):
                words.append(name if value else name.replace("--", "--no-", 1))
            elif isinstance(value, tuple) and not item.metadata.get("comma_separated"):
                words += [word for each in value for word in (name, display_name(str(each)))]
            else:
                words += [name, ",".join(value) if isinstance(value, tuple) else display_name(str(value))]
    return shlex.join(words)


def corpora_in_words(data: Sequence[str]) -> str:
    """Return the corpora of `--data` values by name, with their shares if there are several."""
    specs = [DataSpec.parse(text) for text in data]
    total = sum(spec.weight for spec in specs)
    names = [CORPUS_NAMES.get(spec.path, display_name(spec.path).partition(".")[0]) for spec in specs]
    shares = [f"{spec.weight / total:.0%} {name}" for spec, name in zip(specs, names, strict=True)]
    return ", ".join(shares) if len(shares) > 1 else names[0]


def model_card(config: TrainConfig, summary: dict[str, Any], source: Architecture, final: Architecture) -> str:
    """Return the card as Markdown with a YAML header. `summary` holds the values of training.json."""
    corpora = [DataSpec.parse(text).path for text in config.source.data]
    from_hub = [corpus for corpus in corpora if corpus != "demo" and not Path(corpus).exists()]
    perplexities = [[f"held-out perplexity ({summary['held_out_tokens']:,} tokens of the training corpora)", ""]]
    bits = summary.get("bits_per_byte", {})
    for stage, value in summary["perplexity"].items():
        per_byte = f" ({bits[stage]:.3f} bits per byte)" if stage in bits else ""
        perplexities.append([stage.replace("_", " "), f"{value:.2f}{per_byte}"])
    widths = [["layer", "query heads", "key/value heads", "FFN channels"]]
    for index, layer in enumerate(final.layers):
        sizes = (index, layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size)
        widths.append([str(size) for size in sizes])
    is_random = config.source.init == "random"
    return fill_template(
        str(__package__),
        TEMPLATE,
        license=summary.get("license"),
        base_model=summary.get("base_model"),
        datasets=[corpus.partition("@")[0] for corpus in from_hub],
        origin="trained from scratch in the shape of" if is_random else "pruned while training from",
        source_name=display_name(config.source.source),
        source=source,
        final=final,
        summary={"latency": None, "quality": None, "score": None, **summary},
        command=command_line(config),
        corpora=corpora_in_words(config.source.data),
        perplexities=perplexities,
        widths=widths,
        format_count=format_count,
        markdown_table=markdown_table,
        contract_rows=contract_rows,
        jobs_section=jobs_section(summary.get("jobs", ())),
    )
