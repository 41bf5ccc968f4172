"""Train and score several ways to a small model for one job, with equal tokens.

    python -m research.jobs.study FOLDER --metric exact --output build/study/wikisql

FOLDER has train.jsonl and test.jsonl. Every arm is trained, exported and scored by the commands that users have, and
its folder in OUTPUT keeps their output. The same command continues an interrupted study. It writes study.md: scores,
and differences from the unpruned model in q8_0, paired by example.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from efficientllm.runtime.base.files import write_json_atomically, write_text_atomically
from efficientllm.runtime.base.quantities import markdown_table
from efficientllm.train.evaluation.evaluate import Evaluation
from efficientllm.train.evaluation.jobs import JobResult

OURS, WHOLE = "pruned by the preset", "whole"


@dataclass(frozen=True)
class Arm:
    """One way to a model: flags of efficientllm-train after the common ones, and the types of its files."""

    flags: tuple[str, ...]
    types: tuple[str, ...] = ("q4_0",)
    begins_with: str = ""
    """The arm whose model is the source."""


_unpruned = ("--functions", "learned", "--sequence-length", "256", "--prune", "none", "--no-quality")
_budget = ("--preset", "job", "--target-bytes", "{bytes}")
_at_once = ("--saliency", "magnitude", "--recover", "none", "--removals", "1", "--prune-start", "0.05", "--prune-end")

ARMS = {
    WHOLE: Arm((*_unpruned, "--learning-rate", "4e-4"), ("q8_0", "q4_0")),
    OURS: Arm(_budget),
    "whole layers and vocabulary": Arm((*_budget, "--prune", "layers,vocabulary")),
    "smallest weights, at once": Arm((*_budget, *_at_once, "0.05")),
    # a higher rate, because random weights must move further
    "the preset's shape from scratch": Arm(
        (*_unpruned, "--init", "random", "--learning-rate", "1e-3", "--qat", "q4_0", "--qat-start", "0.75"),
        begins_with=OURS,
    ),
    "whole first, then pruned and distilled": Arm(
        (*_budget, "--distill", "1", "--prune-start", "0.02", "--prune-end", "0.25"), begins_with=WHOLE
    ),
}
"""In the order they run. The last one trains on twice the tokens."""


@dataclass(frozen=True)
class Study:
    """The common part of all arms."""

    data: Path
    output: Path
    metric: str
    tokens: int = 114_688
    bytes: str = "40MB"
    limit: int = 300
    answer_tokens: int = 112
    seed: int = 0

    def keep_settings(self) -> None:
        """Write the settings into the folder of the study. Exit if they differ from those of its finished parts."""
        path = self.output / "study.json"
        settings = {**asdict(self), "data": str(self.data.resolve())}
        del settings["output"]  # may move
        if path.is_file() and (former := json.loads(path.read_text(encoding="utf-8"))) != settings:
            changed = ", ".join(name for name in settings if former.get(name) != settings[name])
            sys.exit(f"{self.output}: its study has another {changed}; give another --output")
        write_json_atomically(path, settings)

    def folder(self, name: str) -> Path:
        """Return the folder of an arm."""
        return self.output / name.replace(",", "").replace(" ", "-")

    def training(self, name: str) -> list[str]:
        """Return the command that trains an arm."""
        arm, run = ARMS[name], self.folder(name) / "run"
        source = ["--source", str(self.folder(arm.begins_with) / "run" / "model")] if arm.begins_with else []
        command = ["efficientllm-train", *(flag.format(bytes=self.bytes) for flag in arm.flags), *source]
        command += ["--tokens", str(self.tokens), "--seed", str(self.seed), "--data", str(self.data / "train.jsonl")]
        return [*command, "--output", str(run), "--resume-or-start"]

    def run(self, name: str) -> None:
        """Train, export and score an arm, without what is finished."""
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run" / "model").is_dir():
            _execute(self.training(name), folder / "train.log")
        for file_type in ARMS[name].types:
            file = folder / file_type
            if not file.is_dir():
                export = ["--target", "gguf", "--quantize", file_type, "--output", str(file)]
                _execute(["efficientllm-export", str(folder / "run"), *export], folder / f"export-{file_type}.log")
            scores = folder / f"score-{file_type}"
            if not (scores / "results.json").is_file():
                score = ["--task", str(self.data / "test.jsonl"), "--metric", self.metric]
                score += ["--task-limit", str(self.limit), "--task-tokens", str(self.answer_tokens)]
                command = ["efficientllm-eval", str(file), *score, "--output", str(scores)]
                _execute(command, folder / f"score-{file_type}.log")

    def result(self, name: str, file_type: str) -> JobResult | None:
        """Return the answers of a file, None before it is scored."""
        path = self.folder(name) / f"score-{file_type}" / "results.json"
        if not path.is_file():
            return None
        (values,) = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        return Evaluation.from_dict(values).job

    def table(self) -> str:
        """Return a row for every file that is scored."""
        rows = [["", "type", "MB", self.metric, "less whole q8_0, points", "tokens an answer", "ms an answer"]]
        whole = self.result(WHOLE, "q8_0")
        for name, arm in ARMS.items():
            for file_type in arm.types:
                if (result := self.result(name, file_type)) is None:
                    continue
                score = result.score_name
                size = (self.folder(name) / file_type / "model.gguf").stat().st_size / 1e6
                mean, error = whole.difference(result, score) if whole is not None else (0.0, 0.0)
                difference = f"{100 * mean:+.1f} ± {100 * error:.1f}" if whole not in (None, result) else ""
                exact = f"{result.mean(score):.3f} ± {result.stderr(score):.3f}"
                answer = [f"{result.tokens_per_answer:.0f}", f"{result.ms_per_answer:.0f}"]
                rows.append([name, file_type, f"{size:.1f}", exact, difference, *answer])
        return markdown_table(rows)


def _execute(command: Sequence[str], log: Path) -> None:
    """Run a command of this environment with its output in `log`. If it fails, exit and name both."""
    program, *arguments = command
    with log.open("ab") as stream:
        done = subprocess.run([Path(sys.executable).parent / program, *arguments], stdout=stream, stderr=stream)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}; see {log}")


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description="Train and score several ways to a small model for one job.")
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--metric", required=True, help="as --metric of efficientllm-eval")
    parser.add_argument("--output", type=Path, required=True, help="folder for the arms and study.md")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="[all]")
    parser.add_argument("--tokens", type=int, default=Study.tokens, help=f"tokens of each arm [{Study.tokens}]")
    parser.add_argument("--bytes", default=Study.bytes, help=f"size of the pruned files [{Study.bytes}]")
    parser.add_argument("--limit", type=int, default=Study.limit, help=f"examples of the test [{Study.limit}]")
    parser.add_argument("--answer-tokens", type=int, default=Study.answer_tokens, help=f"[{Study.answer_tokens}]")
    parser.add_argument("--seed", type=int, default=Study.seed, help=f"[{Study.seed}]")
    values = vars(parser.parse_args())
    arms = values.pop("arms")
    study = Study(**values)
    study.output.mkdir(parents=True, exist_ok=True)
    study.keep_settings()
    for name in arms:
        print(name, flush=True)
        study.run(name)
    table = study.table()
    write_text_atomically(study.output / "study.md", table + "\n")
    print(table)


if __name__ == "__main__":
    main()
