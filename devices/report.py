"""Benchmark results for people: tables for the terminal and for documents, and a page with plots."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from ..runtime.base.extras import extra
from ..runtime.base.figure import Figure
from ..runtime.base.files import write_text_atomically
from ..runtime.base.markdown import markdown_table
from ..runtime.base.quantities import format_bytes, format_count
from .results import DeviceInfo, Result, Run


def _figure(figure: Figure | None) -> str:
    return "-" if figure is None else figure.describe(figure.digits)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def device_line(device: DeviceInfo, threads: int) -> str:
    """The device in one line; figures of an emulator are called that."""
    known = f" ({device.known['soc']}, {device.known['cores']}, {device.known['ram']})" if device.known else ""
    parts = [device.board + known, device.cpu, f"{device.cores} cores"]
    parts += [format_bytes(device.ram_bytes) if device.ram_bytes else "", device.system, device.machine]
    count = "all threads" if threads == 0 else "1 thread" if threads == 1 else f"{threads} threads"
    text = f"{device.name}: {', '.join(part for part in parts if part)}; {count}"
    if device.emulated:
        return f"EMULATED ({device.virtual or 'unknown'}), no figure here is the device's. {text}"
    return f"{text}; {device.virtual}" if device.virtual else text


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


def notes(run: Run) -> list[str]:
    """What a reader of the table must know."""
    lines = [device_line(run.device, run.options.threads), *origin_lines(run), *ratio_lines(run)]
    for name, result in zip(run.labels, run.results, strict=True):
        if result.engine_settings:
            lines.append(f"{name}: {result.engine_settings}")
        if result.spread_of_processes:
            spreads = ", ".join(f"{test} {100 * share:.0f} %" for test, share in result.spread_of_processes.items())
            lines.append(f"{name}: processes differ by {spreads}")
        if result.throttled:
            lines.append(f"{name}: THROTTLED, {result.throttled}; cool the device or use --max-temp")
        if result.temperature_celsius:
            lines.append(f"{name}: {result.temperature_celsius[0]:.1f} to {result.temperature_celsius[1]:.1f} C")
        if result.clock_mhz:
            lines.append(f"{name}: cores at {result.clock_mhz[0]:.0f} to {result.clock_mhz[1]:.0f} MHz")
        lines += [f"{name}: {test} left out: {reason}" for test, reason in result.skipped.items()]
    line = perplexity_line(run.results)
    return [*lines, line] if line else lines


def origin_lines(run: Run) -> list[str]:
    """When and with what versions the figures were made, as far as the run tells."""
    engines = dict.fromkeys(result.engine_version for result in run.results if result.engine_version)
    ours = f"efficientllm {run.efficientllm_version}" if run.efficientllm_version else ""
    ours += f" at commit {run.efficientllm_commit}" if run.efficientllm_commit else ""
    found = ", ".join(part for part in (run.measured_at, ours, *engines) if part)
    return [f"measured: {found}"] if found else []


def ratio_lines(run: Run) -> list[str]:
    """Every further artefact as multiples of the first: its bytes, and how much faster it does each test."""
    if not run.results:
        return []
    (first, *others), (name, *names) = run.results, run.labels
    lines = []
    for label, result in zip(names, others, strict=True):
        tests = [test for test in tests_of([run]) if test in first.speeds and test in result.speeds]
        speeds = [f"{test} x{result.speeds[test].median / first.speeds[test].median:.2f}" for test in tests]
        share = f"{result.file_bytes / first.file_bytes:.2f} of the bytes"
        lines.append(f"{label} against {name}: {', '.join([share, *speeds])}")
    return lines


def tests_of(runs: Sequence[Run]) -> list[str]:
    """Names of the tests, prefill first, in the order they were run."""
    names = dict.fromkeys(test for run in runs for result in run.results for test in result.speeds)
    return sorted(names, key=lambda name: name.startswith("tg"))


def _main_tests(run: Run) -> list[str]:
    """The first prefill and the shortest decode."""
    return [f"pp{run.options.prompt_tokens[0]}", f"tg{min(run.options.decode_tokens)}"]


def rows(run: Run) -> list[list[str]]:
    """Header and one row per artefact; speeds in tokens per second as median (first-third quartile).

    CPU time is that of all threads per token, in milliseconds.
    """
    tests = tests_of([run])
    timed = [test for test in _main_tests(run) if any(test in result.cpu_ms_per_token for result in run.results)]
    energy = any(result.joules_per_token for result in run.results)
    artefact = "artefact, EMULATED" if run.device.emulated else "artefact"
    header = [artefact, "parameters", "quant", "on disk", *(f"{test} t/s" for test in tests)]
    header += [f"{test} CPU ms" for test in timed]
    decode = f"tg{min(run.options.decode_tokens)}"
    limits = any(result.memory_bytes_per_second for result in run.results)
    header += [f"{decode} of bandwidth"] if limits else []
    table = [[*header, "first token ms", "load ms", "peak RSS", "KV cache", *(["J/token"] if energy else [])]]
    for name, result in zip(run.labels, run.results, strict=True):
        table.append(
            [
                name,
                format_count(result.num_parameters) if result.num_parameters else "?",
                result.quantization or "?",
                format_bytes(result.file_bytes),
                *(_figure(result.speeds.get(test)) for test in tests),
                *(_figure(result.cpu_ms_per_token.get(test)) for test in timed),
                *([_share(result.share_of_bandwidth(decode))] if limits else []),
                _figure(result.time_to_first_token_ms),
                _figure(result.load_ms),
                format_bytes(result.peak_rss_bytes),
                format_bytes(result.kv_cache_bytes) if result.kv_cache_bytes else "?",
                *([_figure(result.joules_per_token)] if energy else []),
            ]
        )
    return table


def print_rows(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> None:
    """A table for the terminal, header first, of at least 100 characters; columns not in `left` end right."""
    header, *body = rows
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in left else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    Console(width=max(Console().width, 100), markup=False).print(table)


def print_table(run: Run) -> None:
    """One line per figure and one column per artefact: there are more figures than artefacts, terminals are narrow."""
    print_rows(list(zip(*rows(run), strict=True)))
    for line in notes(run):
        print(line)


def markdown(run: Run) -> str:
    return f"{markdown_table(rows(run))}\n\n" + "\n".join(f"- {line}" for line in notes(run)) + "\n"


def require_plots() -> None:
    """MissingExtraError where the page's plots cannot be drawn."""
    with extra("bench"):
        import matplotlib  # noqa: F401


def _narrow(table: list[list[str]]) -> list[tuple[str, ...]]:
    """The table, turned where that makes it narrower: a column per artefact as in the terminal, else one per figure."""
    return list(zip(*table, strict=True)) if len(table) < len(table[0]) else [tuple(row) for row in table]


def write_html(path: Path, runs: Sequence[Run]) -> None:
    """A page of one file: no script, no font and no picture from anywhere else."""
    require_plots()
    from . import plots

    template = resources.files("efficientllm.devices").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True)
    sections = [{"device": run.device, "notes": notes(run), "rows": _narrow(rows(run))} for run in runs]
    figures = [
        ("Decode speed against file size", plots.speed_against_size(runs)),
        ("Latency of a token against the context before it", plots.latency_against_context(runs)),
        ("Peak memory", plots.memory_bars(runs)),
    ]
    write_text_atomically(path, environment.from_string(template).render(sections=sections, figures=figures))
