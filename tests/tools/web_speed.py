"""The speeds of docs/web.md: `PYTHONPATH=tests python tests/tools/web_speed.py [--threads N,M] FOLDER...` measures
`--target web` folders in headless Chromium, and whether they say what native llama.cpp said when they were exported.

Folders take turns. Prefill is of a prompt of some 300 tokens, decode of 64 tokens after it, by the page's own clock;
beside it by CPU time of the browser's processes, which other programs do not add to."""

from __future__ import annotations

import argparse
import os
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chromium import chromium

from efficientllm.server.web import WebServerOptions, web_server

ROUNDS = 3
NEW_TOKENS = 64
PROMPT = (
    "The river rises in the hills above the town and runs to the sea through fields, woods and two old mills. " * 12
)


def cpu_seconds() -> float:
    """Of all processes that this one started, and theirs."""
    parents, times = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        parents[entry.name], times[entry.name] = fields[1], int(fields[11]) + int(fields[12])

    def is_ours(process: str) -> bool:
        while process in parents and process != str(os.getpid()):
            process = parents[process]
        return process == str(os.getpid())

    return sum(
        time for process, time in times.items() if process != str(os.getpid()) and is_ours(process)
    ) / os.sysconf("SC_CLK_TCK")


def asked(page: Any, count: int) -> tuple[dict[str, float], float]:
    """(timings as llama.cpp gives them, CPU seconds)"""
    began = cpu_seconds()
    timings = page.evaluate("([count, prompt]) => efficientllm.greedy(count, prompt)", [count, PROMPT])["timings"]
    return timings, cpu_seconds() - began


def speeds(browser: Any, folder: str, threads: int) -> tuple[dict[str, float], str]:
    """({what: tokens per second}, what the page says of its first tokens)"""
    server = web_server(Path(folder), WebServerOptions(port=0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.evaluate("document.getElementById('panel').open = true")
    page.fill("#threads", str(threads))
    page.click("#load")
    page.wait_for_selector("#question:enabled", timeout=300_000)
    page.click("#check")
    page.wait_for_selector("#check:enabled", timeout=300_000)
    verdict = page.text_content("#verdict")
    asked(page, 8)
    first, cpu_of_prompt = asked(page, 1)
    whole, cpu = asked(page, NEW_TOKENS + 1)
    context.close()
    server.shutdown()
    server.server_close()
    found = {
        "prefill": whole["prompt_per_second"],
        "decode": whole["predicted_per_second"],
        "prefill, by CPU time": first["prompt_n"] / cpu_of_prompt,
        "decode, by CPU time": NEW_TOKENS / (cpu - cpu_of_prompt),
    }
    return found, verdict


def print_speeds(rounds: Sequence[dict[str, float]]) -> None:
    """A line for each figure: median, lowest and highest of the rounds."""
    for name in rounds[0]:
        values = sorted(each[name] for each in rounds)
        print(f"  {name}: {statistics.median(values):.1f} tokens/s ({values[0]:.1f} to {values[-1]:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1")
    parser.add_argument("folders", nargs="+")
    arguments = parser.parse_args()
    cases = [(folder, int(number)) for folder in arguments.folders for number in arguments.threads.split(",")]
    measured: dict[tuple[str, int], list[tuple[dict[str, float], str]]] = {case: [] for case in cases}
    with chromium() as browser:
        for _ in range(ROUNDS):
            for case in cases:
                measured[case].append(speeds(browser, *case))
    for (folder, threads), found in measured.items():
        print(f"{Path(folder).name}, threads: {threads}: {found[0][1]}")
        print_speeds([each for each, _ in found])


if __name__ == "__main__":
    main()
