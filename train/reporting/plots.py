"""Plots of a run: widths per layer, pruning, and sizes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ...runtime.base.files import write_bytes_atomically
from ..model.architecture import Architecture
from ..model.groups import BLOCKS, KINDS, counts

SOURCE_COLOR, KEPT_COLOR, GROUP_COLOR = "#d5dae3", "#2f6db3", "#e08a3c"


def plot_architecture(source: Architecture, final: Architecture, path: Path) -> None:
    """Plot the FFN channels and heads of each layer of the final model in front of those of the source."""
    layers = range(len(source.layers))
    figure, (ffn, heads) = _new_figure(2, "layer")
    ffn.bar(layers, [layer.intermediate_size for layer in source.layers], color=SOURCE_COLOR, label="source")
    ffn.bar(layers, [layer.intermediate_size for layer in final.layers], color=KEPT_COLOR, label="kept")
    ffn.set_ylabel("FFN channels")
    heads.bar(layers, [layer.num_attention_heads for layer in source.layers], color=SOURCE_COLOR, label="source")
    heads.bar(layers, [layer.num_attention_heads for layer in final.layers], color=KEPT_COLOR, label="query heads kept")
    key_value_heads = [layer.num_key_value_heads for layer in final.layers]
    heads.bar(layers, key_value_heads, width=0.4, color=GROUP_COLOR, label="KV heads kept")
    heads.set_ylabel("attention heads")
    heads.yaxis.get_major_locator().set_params(integer=True)
    for axes in (ffn, heads):
        _add_legend(axes)
    ratio = final.num_parameters / source.num_parameters
    rows = f", {source.vocab_size:,} to {final.vocab_size:,} tokens" if final.vocab_size != source.vocab_size else ""
    figure.suptitle(
        f"{source.num_parameters / 1e6:.1f}M to {final.num_parameters / 1e6:.1f}M parameters ({ratio:.0%}), "
        f"hidden size {source.hidden_size} to {final.hidden_size}{rows}"
    )
    save_figure(figure, path)


def _new_figure(rows: int, x_label: str) -> tuple[Any, Any]:
    """Return a figure and its panels from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(x_label)
    return figure, panels


def _add_legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    write_bytes_atomically(path, picture.getvalue())


def plot_sizes(sizes: list[dict[str, Any]], path: Path) -> None:
    """Plot the score of the job, or else the held-out loss, of each size of a run against its bytes or parameters."""
    if all(size["bytes"] is not None for size in sizes):
        place_name, place_label = "bytes", "MB of the exported file"
    else:
        place_name, place_label = "parameters", "parameters (millions)"
    # one measure for all points: a size without a score cannot be compared with one that has it
    measured = ("score", "bits_per_byte", "perplexity")
    name = next(name for name in measured if all(size[name] is not None for size in sizes))
    places = [size[place_name] / 1e6 for size in sizes]
    values = [size[name] for size in sizes]
    figure, (axes,) = _new_figure(1, place_label)
    if name == "score":
        errors, label = [size["stderr"] for size in sizes], "score of the job"
    else:
        errors, label = None, f"held-out {name.replace('_', ' ')}"
    axes.errorbar(places, values, errors, fmt="o", color=KEPT_COLOR, capsize=3)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0 if name == "score" else None)
    axes.margins(x=0.15, y=0.15)
    for place, value, size in zip(places, values, sizes, strict=True):
        axes.annotate(size["size"], (place, value), xytext=(6, 4), textcoords="offset points", fontsize=8)
    save_figure(figure, path)


def plot_pruning(records: list[dict[str, Any]], source: Architecture, path: Path) -> None:
    """Plot the removed share of each kind of group and the saliency of its next group against tokens.

    This is figure A0 of the paper.
    """
    steps = [record for record in records if "loss" in record]
    tokens = [record["tokens"] for record in steps]
    figure, (ratio, saliency) = _new_figure(2, "tokens")
    totals = {name: sum(counts(name, source)) for name in KINDS}
    layers = range(len(source.layers))
    totals |= {name: sum(block.is_in(source, layer) for layer in layers) for name, block in BLOCKS.items()}
    for name, kind in {**KINDS, **BLOCKS}.items():
        style = {"color": kind.color, "label": kind.title}
        shares = _removed_shares(steps, name, totals[name])
        if any(shares):
            ratio.plot(tokens, shares, drawstyle="steps-post", **style)
        points = [(record["tokens"], record.get("next_saliency", {}).get(name)) for record in steps]
        points = [(at, value) for at, value in points if value]
        if points:
            at_tokens, values = zip(*points, strict=True)
            saliency.plot(at_tokens, values, **style)
    ratio.set_ylabel("share removed by unit")
    cost = next((record["cost"] for record in steps if "cost" in record), "freed amount")
    saliency.set_ylabel(f"score of the next unit\nby {cost}")
    saliency.set_yscale("log")
    for axes in (ratio, saliency):
        if axes.get_legend_handles_labels()[0]:
            _add_legend(axes)
    save_figure(figure, path)


def _removed_shares(steps: list[dict[str, Any]], name: str, total: int) -> list[float]:
    """Return the share of the groups of a kind that has been removed after each step."""
    shares, count = [], 0
    for step in steps:
        for kind, _, positions in step.get("removed", []):
            if kind == name:
                count += len(positions)
        shares.append(count / total if total else 0.0)
    return shares
