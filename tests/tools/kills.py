"""Kill runs of efficientllm-train and resume them:

    python tests/tools/kills.py --kills 30 --seed 0 --folder FOLDER -- ARGUMENTS OF efficientllm-train
    python tests/tools/kills.py --kills 6 --amid 3 --ranks 2 --folder FOLDER -- ARGUMENTS --data-parallel fsdp

Every rank of a run is a forked process. A run is killed with SIGKILL after a random part of the time that a whole one
takes, and resumed with --resume. `--amid N` of them come while a checkpoint is written or groups are removed. Every
other kill ends one rank only, and the others must then end by themselves. A run that ends before its kill is kept
as FOLDER/run-N, and another one is started. Prints one line of JSON:
{"kills": ..., "ends": ..., "found": {state of the folder at a kill: how often}, "amid": {phase: how often}}.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli
from efficientllm.train.checkpoint.run_folder import is_finished

LOADED_ONCE = ("torch", "torch.distributed.checkpoint", "efficientllm.train.run", "matplotlib.pyplot")
"""What every run imports; the runs are forked from a process that has it."""
PHASES = {
    "checkpoint": ("efficientllm.train.checkpoint.state", "", "save_training_state"),
    "removal": ("efficientllm.train.loop.pruning_event", "PruningEvent", "run"),
}
"""Phase of a run -> module, class and function that do it."""
HANG_SECONDS = 120
"""Longest time that ranks may need to end after one of them was killed."""


def start(arguments: Sequence[str], log: Path, ranks: int) -> list[int]:
    """Fork the ranks of a run, whose output is added to `log`, and return their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.write_bytes(b"")
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if ranks > 1:
                values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in values.items()})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})
            code = 1
            try:
                code = run_command(cli.body, arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int], seconds: float) -> bool:
    """Return True if all ended by themselves within so many seconds. Raises SystemExit if one failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                if code := os.waitstatus_to_exitcode(status):
                    sys.exit(f"a run ended with {code}")
        if not children:
            return True
        time.sleep(0.0005)
    return False


def kill(children: list[int], killed: Sequence[int]) -> None:
    """Kill some of the ranks; the others must then end by themselves. Raises SystemExit if they hang."""
    for child in killed:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + HANG_SECONDS
    while children:
        children[:] = [child for child in children if not os.waitpid(child, os.WNOHANG)[0]]
        if children and time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
            sys.exit(f"{len(children)} ranks hang after another was killed")
        time.sleep(0.001)


def mark_phases(folder: Path) -> None:
    """Let runs hold FOLDER/PHASE while the main rank is in that phase."""
    for phase, (module, owner, name) in PHASES.items():
        holder: Any = importlib.import_module(module)
        holder = getattr(holder, owner) if owner else holder
        setattr(holder, name, _marked(getattr(holder, name), folder / phase))


def _marked(function: Any, marker: Path) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        if os.environ.get("RANK", "0") != "0":
            return function(*arguments, **options)
        marker.touch()
        try:
            return function(*arguments, **options)
        finally:
            marker.unlink()

    return call


def reached(children: list[int], marker: Path, skipped: int) -> bool:
    """Wait until a run is in the phase of `marker` for more than `skipped` times. Return False if it ended before."""
    while True:
        while not marker.exists():
            if ended(children, 0.001):
                return False
        if not skipped:
            return True
        skipped -= 1
        while marker.exists():
            if ended(children, 0.001):
                return False


def state_of(run: Path) -> str:
    """What a killed run has left."""
    if is_finished(run):
        return "model"
    names = sorted(each.name for each in (run / "checkpoints").glob("*")) if run.is_dir() else []
    if any(not name.startswith("step-") for name in names):
        return "half a checkpoint"
    return "checkpoints" if names else "no checkpoint"


def kill_runs(
    arguments: Sequence[str], folder: Path, kills: int, dice: random.Random, ranks: int = 1, amid: int = 0
) -> dict[str, object]:
    """What is printed."""
    log, ends, done = folder / "log.txt", 0, 0
    began = time.monotonic()
    ended(start([*arguments, "--output", str(folder / "run-0")], log, ranks), float("inf"))
    seconds = time.monotonic() - began
    found, phases = collections.Counter[str](), collections.Counter[str]()
    while done < kills or phases.total() < amid or (folder / f"run-{ends + 1}").exists():
        run = folder / f"run-{ends + 1}"
        resumes = (run / "config.toml").is_file()
        phase = list(PHASES)[phases.total() % len(PHASES)] if phases.total() < min(amid, done + 1) else ""
        for each in PHASES:
            (folder / each).unlink(missing_ok=True)
        began = time.monotonic()
        children = start([*arguments, "--output", str(run), *(["--resume"] if resumes else [])], log, ranks)
        longest = seconds if done else seconds / 10  # the first kill comes before any checkpoint
        if phase:
            has_ended = not reached(children, folder / phase, dice.randint(0, 1))
            time.sleep(0 if has_ended else dice.uniform(0, 0.05))
        else:
            has_ended = ended(children, dice.uniform(0, longest) if done < kills else float("inf"))
        if has_ended:
            ends += 1
            seconds = seconds if resumes else min(seconds, time.monotonic() - began)
            continue
        is_amid = bool(phase) and (folder / phase).exists()
        kill(children, [dice.choice(children)] if ranks > 1 and done % 2 else children)  # some may have ended already
        done += 1
        phases[phase] += is_amid
        found[state_of(run)] += 1
        if state_of(run) == "model":  # whole: there is nothing to go on with
            ends += 1
    return {"kills": done, "ends": ends + 1, "found": found, "amid": +phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--amid", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    for module in LOADED_ONCE:
        importlib.import_module(module)
    mark_phases(options.folder)
    dice = random.Random(options.seed)
    print(json.dumps(kill_runs(options.arguments, options.folder, options.kills, dice, options.ranks, options.amid)))


if __name__ == "__main__":
    main()
