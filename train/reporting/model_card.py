"""The README.md of a trained model, in the form model hubs show. Imports no torch.

What the card of a source says that its descendants must say, too: the licence, and which model they come from.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...runtime.base import flags
from ...runtime.base.quantities import display_name, format_count, markdown_table
from ...runtime.engines.contract_text import contract_rows
from ..config import TrainConfig
from ..data.documents import DataSpec
from ..model.architecture import Architecture
from ..model.source import hub_answers, may_be_hub_id

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


def command_line(config: TrainConfig) -> str:
    """The `efficientllm-train` command of a configuration: every setting that is not a default, absolute paths without
    their folders."""
    words = ["efficientllm-train"]
    defaults = TrainConfig()
    for section in fields(TrainConfig):
        values, standard = getattr(config, section.name), getattr(defaults, section.name)
        for item in fields(values):
            value = getattr(values, item.name)
            if value == getattr(standard, item.name) or item.name in ("overwrite", "resume"):
                continue
            name = flags.flag_name(item.name)
            if isinstance(value, bool):
                words.append(name if value else name.replace("--", "--no-", 1))
            elif isinstance(value, tuple) and not item.metadata.get("comma_separated"):
                words += [word for each in value for word in (name, display_name(str(each)))]
            else:
                words += [name, ",".join(value) if isinstance(value, tuple) else display_name(str(value))]
    return shlex.join(words)


def _is_on_hub(name: str) -> bool:
    """Whether a corpus that was read came from a hub: nothing here has its name."""
    return name != "demo" and not Path(name).exists()


def _quality(summary: dict[str, Any]) -> list[str]:
    """The quality contract, where it was measured."""
    if not summary.get("quality"):
        return []
    note = "Measured on texts, chats and questions that ship with efficientllm and that no run trains on, in the "
    note += "precision of training; ± is one standard error over documents, paired with the source."
    return ["## Quality", "", markdown_table(contract_rows(summary["quality"])), "", note, "", "## Training", ""]


def _latency(summary: dict[str, Any]) -> list[str]:
    """What the device that the run pruned for takes, where there was one."""
    found = summary.get("latency")
    if not found:
        return []
    on, error = found["of"], max((error["median"] for error in found["errors"]), default=None)
    accuracy = f"; its median error on irregular models is {error:.1%}" if error is not None else ""
    return [
        f"Pruned for {on['device']} ({on['cpu']}, {on['engine']} {on['quantization']}, threads: {on['threads']}): "
        f"{found['workload']} took the source {found['source_ms']:.2f} ms and takes this model {found['ms']:.2f} ms "
        f"({found['ms'] / found['source_ms']:.2f}x), as the device's profile predicts{accuracy}.",
        "",
    ]


def _loading(final: Architecture) -> list[str]:
    return [
        "## Loading",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=False)',
        "```",
        "",
        *(() if final.is_uniform else ("Layers of their own width need transformers 5.14 or newer.", "")),
    ]


def model_card(config: TrainConfig, summary: dict[str, Any], source: Architecture, final: Architecture) -> str:
    """Markdown with a YAML header: source, data, tokens, command, widths, perplexities."""
    theirs = source_card(config.source.source)
    corpora = [DataSpec.parse(text).path for text in config.source.data]
    datasets = [corpus.partition("@")[0] for corpus in corpora if _is_on_hub(corpus)]
    header = [
        "---",
        *([f"license: {theirs.license}"] if theirs.license else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [efficientllm, pruned]",
        *([f"base_model: {theirs.base_model}"] if theirs.base_model else []),
        *([f"datasets: [{', '.join(datasets)}]"] if datasets else []),
        "---",
    ]
    how = "trained from scratch in the shape of" if config.source.init == "random" else "pruned while training from"
    perplexities = [[f"held-out perplexity ({summary['held_out_tokens']:,} tokens of the training corpora)", ""]]
    bits = summary.get("bits_per_byte", {})
    for stage, value in summary["perplexity"].items():
        said = f" ({bits[stage]:.3f} bits per byte)" if stage in bits else ""
        perplexities.append([stage.replace("_", " "), f"{value:.2f}{said}"])
    widths = [["layer", "query heads", "key/value heads", "FFN channels"]]
    for index, layer in enumerate(final.layers):
        sizes = (index, layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size)
        widths.append([str(size) for size in sizes])
    license_line = (
        f"The source's licence, {theirs.license}, applies."
        if theirs.license
        else "The source's licence applies: see the source model's own card."
    )
    return "\n".join(
        [
            *header,
            "",
            f"# {format_count(final.num_parameters)} parameters, {how} {display_name(config.source.source)}",
            "",
            f"{source.num_parameters:,} parameters became {final.num_parameters:,} over {summary['tokens']:,} tokens "
            f"of {', '.join(summary['data'])} ({summary['seconds']:.0f} s of training).",
            "",
            *_latency(summary),
            "![widths per layer](architecture.png)",
            "",
            "```bash",
            command_line(config),
            "```",
            "",
            *_quality(summary),
            markdown_table(perplexities),
            "",
            f"Hidden size {final.hidden_size} (source {source.hidden_size}), head_dim {final.head_dim}, "
            f"{final.vocab_size:,} tokens (source {source.vocab_size:,}).",
            "",
            markdown_table(widths, left=()),
            "",
            *_loading(final),
            f"## Licence\n\n{license_line}",
            "",
        ]
    )
