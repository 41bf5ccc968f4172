"""Text and picture of the law of tokens."""

from __future__ import annotations

import io
import math
from pathlib import Path

from ...runtime.base.files import write_bytes_atomically
from ...runtime.base.quantities import format_count, format_duration, markdown_table
from .token_law import GPU_UTILISATION, TokenLaw

MEASURED, WANTED = "#2f6db3", "#e08a3c"
FURTHEST = 1000
"""Largest multiple of the longest run with a prediction."""


def law_lines(law: TokenLaw, within: float, tflops: float) -> list[str]:
    """Return lines on the runs, the law, and the tokens for a perplexity of `within` times the source's."""
    last = law.points[-1]
    rows = [["run", "tokens", "parameters", "perplexity / source", "by the law"]]
    for point in law.points:
        measured = f"x{math.exp(point.gap):.3f} ± {math.exp(point.gap) * point.gap_error:.3f}"
        expected = f"x{math.exp(law.gap(point.tokens)):.3f}"
        size = f"{format_count(point.parameters)} ({point.share:.0%})"
        rows.append([point.folder, format_count(point.tokens), size, measured, expected])
    formula = f"gap = {math.exp(law.log_scale):.3g} * tokens ^ -{law.exponent:.3f} nats per token"
    return [markdown_table(rows), "", formula, _answer(law, within, tflops, last.seconds_per_token)]


def _answer(law: TokenLaw, within: float, tflops: float, seconds_per_token: float) -> str:
    last = law.points[-1]
    tokens = law.tokens(math.log(within))
    if tokens > FURTHEST * last.tokens:
        reached = f"x{math.exp(law.gap(FURTHEST * last.tokens)):.3f}"
        return (
            f"x{within:g} is more than {FURTHEST} times the longest run away, where this law says nothing "
            f"({format_count(FURTHEST * last.tokens)} tokens would give {reached})"
        )
    answer = f"x{within:g}: about {format_count(round(tokens))} tokens, {format_duration(tokens * seconds_per_token)} "
    answer += "on the machine of the longest run"
    if tflops:
        seconds = tokens * last.flops_per_token / (tflops * 1e12 * GPU_UTILISATION)
        answer += f", {format_duration(seconds)} on a GPU of {tflops:g} TFLOP/s at {GPU_UTILISATION:.0%} of its peak"
    if tokens > last.tokens:
        answer += f"; {tokens / last.tokens:.0f} times the longest run: an extrapolation"
    return answer


def draw_law(law: TokenLaw, within: float, path: Path) -> None:
    """Draw gap against tokens on logarithmic axes: the runs with their errors, the law, and the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first, last = law.points[0].tokens, law.points[-1].tokens
    wanted = math.log(within)
    end = min(max(last, law.tokens(wanted)) * 1.5, FURTHEST * last)
    axes.plot([first, last], [law.gap(first), law.gap(last)], color=MEASURED, linewidth=1, label="law")
    axes.plot([last, end], [law.gap(last), law.gap(end)], "--", color=MEASURED, linewidth=1, label="extrapolated")
    axes.errorbar(
        [point.tokens for point in law.points],
        [point.gap for point in law.points],
        yerr=[point.gap_error for point in law.points],
        fmt="o",
        color=MEASURED,
        label="runs",
    )
    axes.axhline(wanted, color=WANTED, linewidth=1, label=f"{within:g} times the source's perplexity")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the run")
    axes.set_ylabel("gap to the source, nats per token\non six kinds of untrained text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    write_bytes_atomically(path, picture.getvalue())
