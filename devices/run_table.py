"""The table of one run in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..runtime.base.errors import UsageError
from ..runtime.base.quantities import Figure, format_bytes, format_count, print_rows
from ..runtime.latency.profile import DeviceProfile
from ..runtime.latency.shape import DecoderShape
from .results import DeviceInfo, Result, Run, mean_context


def device_line(device: DeviceInfo, threads: int) -> str:
    """Return one line that describes the device. It names an emulator first."""
    memory = format_bytes(device.ram_bytes) if device.ram_bytes else ""
    parts = (device.board, device.cpu, f"{device.cores} cores", memory, device.system, device.machine)
    threads_text = {0: "all threads", 1: "1 thread"}.get(threads, f"{threads} threads")
    text = f"{device.name}: {', '.join(part for part in parts if part)}; {threads_text}"
    return f"EMULATED ({device.emulator}), no figure here is the device's. {text}" if device.emulator else text


def origin_lines(run: Run) -> list[str]:
    """Return a line with the date and the versions of the run, and none if they are unknown."""
    engines = dict.fromkeys(result.engine_version for result in run.results if result.engine_version)
    release = f"efficientllm {run.efficientllm_version}" if run.efficientllm_version else ""
    release += f" at commit {run.efficientllm_commit}" if run.efficientllm_commit else ""
    facts = ", ".join(part for part in (run.measured_at, release, *engines) if part)
    return [f"measured: {facts}"] if facts else []


def tests_of(run: Run) -> list[str]:
    """Return the names of the tests in the order of the run, prefill first."""
    names = dict.fromkeys(test for result in run.results for test in result.speeds)
    return sorted(names, key=lambda name: name.startswith("tg"))


def rows(run: Run) -> list[list[str]]:
    """Return the header and one row per artefact.

    Speeds are tokens per second as median (first-third quartile). CPU time is milliseconds of all threads per token.
    """
    results = run.results
    tests = tests_of(run)
    first_prefill, first_decode = f"pp{run.options.prompt_tokens[0]}", f"tg{min(run.options.decode_tokens)}"
    timed = []
    for test in (first_prefill, first_decode):
        if any(test in result.cpu_ms_per_token for result in results):
            timed.append(test)
    has_energy = any(result.joules_per_token for result in results)
    header = ["artefact, EMULATED" if run.device.emulator else "artefact", "parameters", "quant", "on disk"]
    header += [f"{test} t/s" for test in tests]
    header += [f"{test} CPU ms" for test in timed]
    header += ["first token ms", "load ms", "peak RSS", "KV cache"]
    header += ["J/token"] if has_energy else []
    table = [header]
    for name, result in run.labelled:
        row = [
            name,
            format_count(result.num_parameters) if result.num_parameters else "?",
            result.quantization or "?",
            format_bytes(result.file_bytes),
        ]
        row += [_format_figure(result.speeds.get(test)) for test in tests]
        row += [_format_figure(result.cpu_ms_per_token.get(test)) for test in timed]
        row += [_format_figure(result.time_to_first_token_ms), _format_figure(result.load_ms)]
        row.append(format_bytes(result.peak_rss_bytes))
        row.append(format_bytes(result.kv_cache_bytes) if result.kv_cache_bytes else "?")
        row += [_format_figure(result.joules_per_token)] if has_energy else []
        table.append(row)
    return table


def _format_figure(figure: Figure | None) -> str:
    return "-" if figure is None else figure.describe(figure.digits)


def notes(run: Run) -> list[str]:
    """Return the notes below the table: the device first, then origin, ratios and remarks on each artefact."""
    lines = [device_line(run.device, run.options.threads), *origin_lines(run), *_ratio_lines(run)]
    for name, result in run.labelled:
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
        lines += [f"{name}: {test} skipped: {reason}" for test, reason in result.skipped.items()]
    return lines + _perplexity_lines(run.results)


def _ratio_lines(run: Run) -> list[str]:
    """Return bytes and speeds of each further artefact relative to the first."""
    if not run.results:
        return []
    (first_name, first), *others = run.labelled
    lines = []
    for name, result in others:
        tests = [test for test in tests_of(run) if test in first.speeds and test in result.speeds]
        speeds = [f"{test} x{result.speeds[test].median / first.speeds[test].median:.2f}" for test in tests]
        share = f"{result.file_bytes / first.file_bytes:.2f} of the bytes"
        lines.append(f"{name} against {first_name}: {', '.join([share, *speeds])}")
    return lines


def _perplexity_lines(results: Sequence[Result]) -> list[str]:
    """Return a line with the held-out perplexities of the first trained model, and none without one."""
    for result in results:
        training = result.manifest.get("training")
        if not isinstance(training, dict) or not training.get("perplexity"):
            continue
        try:
            stages = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in training["perplexity"].items()]
            return [
                f"held-out perplexity ({training['held_out_tokens']:,} tokens): {', '.join(stages)}; "
                f"trained on {training['tokens']:,} tokens in {training['seconds']:.0f} s"
            ]
        except (AttributeError, KeyError, TypeError, ValueError):  # a manifest of another kind
            continue
    return []


def print_table(run: Run) -> None:
    """Print one line per figure and one column per artefact, because terminals are narrow, and the notes."""
    print_rows(list(zip(*rows(run), strict=True)))
    for line in notes(run):
        print(line)


def prediction_rows(run: Run, profile: DeviceProfile) -> list[list[str]]:
    """Return the header and one row per test of each artefact, in milliseconds per token by the profile's clock.

    Raises UsageError if the profile has another number of threads or other engine settings.
    """
    clock = profile.measured_on.clock
    table = [["artefact", "test", f"predicted ms ({clock})", "measured ms", "measured / predicted"]]
    for name, result in run.labelled:
        _check_profile(profile, result, name)
        shape = DecoderShape.from_dict(result.manifest["architecture"])
        for test in result.speeds:
            measured = result.quiet_ms(test, clock)
            predicted = _predicted_ms(profile, shape, test)
            table.append([name, test, f"{predicted:.3f}", f"{measured:.3f}", f"{measured / predicted:.3f}"])
    return table


def _check_profile(profile: DeviceProfile, result: Result, name: str) -> None:
    profile.check(threads=result.threads or None)
    measured_with = profile.measured_on.engine_settings
    if measured_with and result.engine_settings and measured_with != result.engine_settings:
        raise UsageError(
            f"--predict: the profile was measured with {measured_with}, {name} ran with {result.engine_settings}; "
            "give the same --kv-cache"
        )


def _predicted_ms(profile: DeviceProfile, shape: DecoderShape, test: str) -> float:
    """Return the predicted milliseconds per token, for a decode at its mean context."""
    context = mean_context(test)
    if context is not None:
        return profile.decode_ms(shape, math.ceil(context))
    tokens = int(test.removeprefix("pp"))
    return profile.prefill_ms(shape, tokens) / tokens
