"""Programs that measure a model on a phone: their command lines, and the parsers of their output."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Protocol

from ..runtime.base.errors import DeviceError
from ..runtime.engines.artefact import Artefact
from .results import BenchOptions


@dataclass(frozen=True)
class RunnerOutput:
    """Figures of one call."""

    speeds: dict[str, list[float]]
    """Tokens per second by test, in the order of the tests, with one entry per repetition."""
    version: str = ""
    threads: int = 0

    @property
    def last(self) -> str:
        """Return the name of the last test."""
        return list(self.speeds)[-1]

    def seconds(self, *tests: str) -> float:
        """Return the total time of all repetitions of `tests`."""
        lengths = [(int(re.split(r"\D+", test)[1]), self.speeds[test]) for test in tests]
        return sum(tokens / speed for tokens, speeds in lengths for speed in speeds)


class Runner(Protocol):
    """A program for one engine. It runs in the folder of the artefact's files."""

    name: str
    """File name on the phone."""
    origin: str
    """Hint how to get the program."""

    def commands(
        self, artefact: Artefact, options: BenchOptions, context: int
    ) -> tuple[list[list[str]], dict[str, str]]:
        """Return the arguments of each call, and {skipped test: reason}. `context` is the limit in tokens.

        The last test of the first call is the longest decode, over which the energy is measured.
        """
        ...

    def parse(self, output: str) -> RunnerOutput:
        """Parse the program's output. Raises DeviceError for other text."""
        ...


class LlamaBench:
    """llama.cpp's llama-bench: one call for all prompts and decodes, and one for the decodes at a depth.

    It allocates the context that each test needs. So `context` is not passed on, and no test is skipped.
    """

    name = "llama-bench"
    origin = "build it with `make android-runner`"

    def commands(
        self, artefact: Artefact, options: BenchOptions, context: int
    ) -> tuple[list[list[str]], dict[str, str]]:
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
        return calls, {}

    def parse(self, output: str) -> RunnerOutput:
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


class LlamaMain:
    """ExecuTorch's llama_main, which the user builds. It times one prompt and its answer, so a decode has a depth.

    It reports no version and no thread count. Its output is a line of JSON in milliseconds, defined in ExecuTorch's
    extension/llm/runner/stats.h.
    """

    name = "llama_main"
    origin = "build llama_main for Android from ExecuTorch's examples/models/llama"

    def commands(
        self, artefact: Artefact, options: BenchOptions, context: int
    ) -> tuple[list[list[str]], dict[str, str]]:
        if artefact.manifest is None:
            raise DeviceError(
                f"{artefact.path} has no tokenizer, which llama_main needs; give the folder of the artefact"
            )
        common = ["--model_path", artefact.manifest.model_file, "--tokenizer_path", "tokenizer.json"]
        common += ["--temperature", "0", "--warmup"]
        common += ["--cpu_threads", str(options.threads)] if options.threads else []
        calls, skipped = [], {}
        answer = max(options.decode_tokens)
        for prompt in options.prompt_tokens:
            if prompt + answer > context:
                skipped[f"pp{prompt}"] = f"needs a context of {prompt + answer} tokens, the artefact holds {context}"
                continue
            # " a" is one token in common tokenizers. The program reports the actual numbers of tokens.
            call = [*common, "--prompt", " a" * prompt, "--seq_len", str(prompt + answer)]
            calls += [call] * options.repetitions
        return calls, skipped

    def parse(self, output: str) -> RunnerOutput:
        found = re.search(r"PyTorchObserver (\{.*\})", output)
        if found is None:
            raise DeviceError(f"llama_main printed no PyTorchObserver line: {output[-200:].strip() or 'nothing'}")
        times = json.loads(found[1])
        prompt, answer = times["prompt_tokens"], times["generated_tokens"]
        prefill_ms = times["prompt_eval_end_ms"] - times["inference_start_ms"]
        decode_ms = times["inference_end_ms"] - times["prompt_eval_end_ms"]
        if min(prompt, answer, prefill_ms, decode_ms) <= 0:
            raise DeviceError(f"llama_main printed no positive times: {found[1]}")
        speeds = {f"pp{prompt}": [1000 * prompt / prefill_ms], f"tg{answer}@d{prompt}": [1000 * answer / decode_ms]}
        return RunnerOutput(speeds)


RUNNERS: dict[str, Runner] = {"llama.cpp": LlamaBench(), "executorch": LlamaMain()}
"""Maps an engine to its program on a phone."""
