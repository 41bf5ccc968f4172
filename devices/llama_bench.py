"""llama.cpp's llama-bench on a phone: its command lines, and the parser of its output."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ..runtime.base.errors import DeviceError
from ..runtime.engines.artefact import Artefact
from .results import BenchOptions

PROGRAM = "llama-bench"
"""File name on the phone."""


@dataclass(frozen=True)
class RunnerOutput:
    """Figures of one call."""

    speeds: dict[str, list[float]]
    """Tokens per second by test, in the order of the tests, with one entry per repetition."""
    version: str
    threads: int

    @property
    def last(self) -> str:
        """Return the name of the last test."""
        return list(self.speeds)[-1]

    def seconds(self, *tests: str) -> float:
        """Return the total time of all repetitions of `tests`."""
        lengths = [(int(re.split(r"\D+", test)[1]), self.speeds[test]) for test in tests]
        return sum(tokens / speed for tokens, speeds in lengths for speed in speeds)


def calls_of(artefact: Artefact, options: BenchOptions) -> list[list[str]]:
    """Return the arguments of each call in the folder of the artefact's files: one call for all decodes at a depth.

    The last test of the first call is the longest decode, over which the energy is measured. The program allocates the
    context that each test needs.
    """
    model = artefact.manifest.model_file if artefact.manifest else artefact.path.name
    # "none" reads the weights instead of mapping them, as on other devices. llama-bench has its own warm-up.
    common = ["-m", model, "-r", str(options.repetitions), "-o", "json", "-lm", "none"]
    common += ["-t", str(options.threads)] if options.threads else []
    prompts = ",".join(map(str, options.prompt_tokens))
    decodes = ",".join(map(str, sorted(options.decode_tokens)))
    calls = [[*common, "-p", prompts, "-n", decodes]]
    depths = [str(depth) for depth in options.depths if depth]
    if depths:
        calls.append([*common, "-p", "0", "-n", str(min(options.decode_tokens)), "-d", ",".join(depths)])
    return calls


def parse_output(output: str) -> RunnerOutput:
    """Parse the program's output. Raises DeviceError for other text."""
    try:
        entries = json.loads(output)
        speeds = {_test_name(entry): [float(value) for value in entry["samples_ts"]] for entry in entries}
        return RunnerOutput(speeds, f"llama.cpp {entries[0]['build_commit']}", int(entries[0]["n_threads"]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DeviceError(f"llama-bench printed no result: {output[-200:].strip() or 'nothing'}") from error


def _test_name(entry: dict[str, int]) -> str:
    """Return pp128, tg64 or tg64@d512 from the lengths in llama-bench's JSON."""
    name = f"pp{entry['n_prompt']}" if entry["n_prompt"] else f"tg{entry['n_gen']}"
    return f"{name}@d{entry['n_depth']}" if entry.get("n_depth") else name
