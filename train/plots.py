"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from .architecture import Architecture

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
