"""Draw what thresholds cost: `python -m research.confidence_picture PICTURE ARTEFACT...`.

Each artefact was scored with `efficientllm-eval --task ... --metric call --write`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.train.reporting.plots import save_figure


def draw(artefacts: Sequence[Path], path: Path) -> None:
    """Draw a line for each artefact: the requests that are acted on against the wrong calls, both in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for each in artefacts:
        for key, calibration in Artefact.open(each).calibrations.items():
            _, acted, wrong = zip(*calibration.curve, strict=True)
            label = ", ".join(filter(None, (each.name, *key)))
            axes.step([100 * one for one in wrong], [100 * one for one in acted], where="post", label=label)
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 102)
    axes.set_xlabel("wrong calls among all requests, %")
    axes.set_ylabel("acted on, of the requests for calls, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    save_figure(figure, path)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Draw the requests that are acted on against wrong calls.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("artefacts", type=Path, nargs="+")
    arguments = parser.parse_args()
    draw(arguments.artefacts, arguments.picture)


if __name__ == "__main__":
    main()
