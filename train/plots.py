"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .model.architecture import Architecture

SOURCE_COLOUR, KEPT_COLOUR, GROUP_COLOUR = "#d5dae3", "#2f6db3", "#e08a3c"


def plot_architecture(source: Architecture, final: Architecture, path: Path) -> None:
    """FFN width and heads per layer, what remains in front of what the source had."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = range(len(source.layers))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    ffn, heads = figure.subplots(2, 1, sharex=True)
    ffn.bar(layers, [layer.intermediate_size for layer in source.layers], color=SOURCE_COLOUR, label="source")
    ffn.bar(layers, [layer.intermediate_size for layer in final.layers], color=KEPT_COLOUR, label="kept")
    ffn.set_ylabel("FFN channels")
    heads.bar(layers, [layer.num_attention_heads for layer in source.layers], color=SOURCE_COLOUR, label="source")
    heads.bar(
        layers, [layer.num_attention_heads for layer in final.layers], color=KEPT_COLOUR, label="query heads kept"
    )
    heads.bar(
        layers,
        [layer.num_key_value_heads for layer in final.layers],
        width=0.4,
        color=GROUP_COLOUR,
        label="KV heads kept",
    )
    heads.set_ylabel("attention heads")
    heads.set_xlabel("layer")
    heads.yaxis.get_major_locator().set_params(integer=True)
    for axes in (ffn, heads):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    ratio = final.num_parameters / source.num_parameters
    figure.suptitle(
        f"{source.num_parameters / 1e6:.1f}M to {final.num_parameters / 1e6:.1f}M parameters ({ratio:.0%}), "
        f"hidden size {source.hidden_size} to {final.hidden_size}"
    )
    figure.savefig(path, dpi=110)


KIND_COLOURS = {"ffn": "#2f6db3", "kv_group": "#e08a3c", "query_head": "#b5495b", "stem": "#4f9d69"}
KIND_NAMES = {
    "ffn": "FFN channels",
    "kv_group": "key/value groups",
    "query_head": "query heads",
    "stem": "stem channels",
}


def _new_figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("tokens")
    return figure, axes


def plot_training(records: list[dict[str, Any]], path: Path) -> None:
    """Loss and parameters against tokens."""
    steps = [record for record in records if "loss" in record]
    tokens = [record["tokens"] for record in steps]
    figure, (loss, parameters) = _new_figure(2)
    loss.plot(tokens, [record["loss"] for record in steps], color="#2f6db3", linewidth=1)
    loss.set_ylabel("loss (nats per token)")
    parameters.plot(tokens, [record["parameters"] / 1e6 for record in steps], color="#e08a3c")
    parameters.set_ylabel("parameters (millions)")
    figure.savefig(path, dpi=110)


def plot_pruning(records: list[dict[str, Any]], source: Architecture, path: Path) -> None:
    """Share of each group type that is gone, and saliency of the next to go, against tokens (the paper's figure A0)."""
    totals = {
        "ffn": sum(layer.intermediate_size for layer in source.layers),
        "kv_group": sum(layer.num_key_value_heads for layer in source.layers),
        "query_head": sum(layer.num_attention_heads for layer in source.layers),
        "stem": source.hidden_size,
    }
    steps = [record for record in records if "loss" in record]
    gone = dict.fromkeys(totals, 0)
    curves: dict[str, list[float]] = {kind: [] for kind in totals}
    for record in steps:
        for kind, _, positions in record.get("removed", []):
            gone[kind] += len(positions)
        for kind, total in totals.items():
            curves[kind].append(gone[kind] / total if total else 0.0)
    tokens = [record["tokens"] for record in steps]
    figure, (ratio, saliency) = _new_figure(2)
    for kind, curve in curves.items():
        if gone[kind]:
            ratio.plot(tokens, curve, color=KIND_COLOURS[kind], label=KIND_NAMES[kind], drawstyle="steps-post")
        events = [
            (record["tokens"], record["next_saliency"].get(kind)) for record in steps if "next_saliency" in record
        ]
        points = [(at, value) for at, value in events if value]
        if points:
            saliency.plot(*zip(*points, strict=True), color=KIND_COLOURS[kind], label=KIND_NAMES[kind])
    ratio.set_ylabel("share removed by unit")
    saliency.set_ylabel("saliency per parameter\nof the next unit")
    saliency.set_yscale("log")
    for axes in (ratio, saliency):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=110)
