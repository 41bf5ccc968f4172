"""Tables of benchmark results, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..runtime.quantities import format_bytes, format_count
from .local import BenchOptions, Figure, Result


def _figure(figure: Figure) -> str:
    return f"{figure.median:.0f} ({figure.low:.0f}-{figure.high:.0f})"


def _parameters(result: Result) -> str:
    architecture = result.manifest.get("architecture", {})
    return format_count(architecture["num_parameters"]) if architecture else "?"


def perplexity_line(results: Sequence[Result]) -> str | None:
    """Held-out perplexities of the one trained model among the results, None where there is none."""
    for result in results:
        training = result.manifest.get("training") or {}
        values = training.get("perplexity")
        if values:
            stages = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in values.items())
            return (
                f"held-out perplexity ({training['held_out_tokens']:,} tokens): {stages}; "
                f"trained on {training['tokens']:,} tokens in {training['seconds']:.0f} s"
            )
    return None


def rows(results: Sequence[Result], options: BenchOptions) -> list[list[str]]:
    """Header and one row per artefact; speeds as median (first-third quartile)."""
    prefill, decode = f"prefill pp{options.prompt_tokens} t/s", f"decode tg{options.decode_tokens} t/s"
    table = [["artefact", "parameters", "quant", "on disk", prefill, decode, "load ms", "peak RSS"]]
    for result in results:
        table.append(
            [
                Path(result.artefact).name,
                _parameters(result),
                result.manifest.get("quantization", "?"),
                format_bytes(result.file_bytes),
                _figure(result.prefill_tokens_per_second),
                _figure(result.decode_tokens_per_second),
                _figure(result.load_ms),
                format_bytes(result.peak_rss_bytes),
            ]
        )
    return table


def print_table(results: Sequence[Result], options: BenchOptions) -> None:
    header, *body = rows(results, options)
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*row)
    Console(width=max(Console().width, 120)).print(table)
    line = perplexity_line(results)
    if line:
        print(line)


def markdown(results: Sequence[Result], options: BenchOptions) -> str:
    header, *body = rows(results, options)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    text = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    line = perplexity_line(results)
    return f"{text}\n\n{line}\n" if line else f"{text}\n"
