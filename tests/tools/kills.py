"""Kill runs of efficientllm-train at random moments and go on with them:

    python tests/tools/kills.py --kills 30 --seed 0 --folder FOLDER -- ARGUMENTS OF efficientllm-train

Every run is a forked process of its own, killed with SIGKILL after a random part of the time that a whole one takes,
and begun again with --resume. A run that comes to its end before is kept as FOLDER/run-N, and another one begun.
Prints one line of JSON: {"kills": ..., "ends": ..., "found": {what the folder held at a kill: how often}}.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli
from efficientllm.train.checkpoint.run_folder import is_finished

LOADED_ONCE = ("torch", "torch.distributed.checkpoint", "efficientllm.train.run", "matplotlib.pyplot")
"""What every run imports; the runs are forked from a process that has it."""


def start(arguments: Sequence[str], log: Path) -> int:
    """The process of one run; what it says goes to `log`."""
    child = os.fork()
    if not child:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os._exit(run_command(cli.body, arguments))
    return child


def ended(child: int, seconds: float) -> bool:
    """Whether it ended by itself, and well, within so many seconds; SystemExit where it failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if code := os.waitstatus_to_exitcode(status):
                sys.exit(f"a run ended with {code}")
            return True
        time.sleep(0.001)
    return False


def state_of(run: Path) -> str:
    """What a killed run has left."""
    if is_finished(run):
        return "model"
    names = sorted(each.name for each in (run / "checkpoints").glob("*")) if run.is_dir() else []
    if any(not name.startswith("step-") for name in names):
        return "half a checkpoint"
    return "checkpoints" if names else "no checkpoint"


def kill_runs(arguments: Sequence[str], folder: Path, kills: int, dice: random.Random) -> dict[str, object]:
    """What is printed."""
    log, ends, done = folder / "log.txt", 0, 0
    began = time.monotonic()
    whole = start([*arguments, "--output", str(folder / "run-0")], log)
    ended(whole, float("inf"))
    seconds = time.monotonic() - began
    found = collections.Counter[str]()
    while done < kills or (folder / f"run-{ends + 1}").exists():
        run = folder / f"run-{ends + 1}"
        resumes = (run / "config.toml").is_file()
        began = time.monotonic()
        child = start([*arguments, "--output", str(run), *(["--resume"] if resumes else [])], log)
        longest = seconds if done else seconds / 10  # the first kill comes before any checkpoint
        if ended(child, dice.uniform(0, longest) if done < kills else float("inf")):
            ends += 1
            seconds = seconds if resumes else min(seconds, time.monotonic() - began)
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        found[state_of(run)] += 1
        if state_of(run) == "model":  # whole: there is nothing to go on with
            ends += 1
    return {"kills": done, "ends": ends + 1, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    for module in LOADED_ONCE:
        importlib.import_module(module)
    dice = random.Random(options.seed)
    print(json.dumps(kill_runs(options.arguments, options.folder, options.kills, dice)))


if __name__ == "__main__":
    main()
