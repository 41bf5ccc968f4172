"""Runs of `efficientllm-train` one after the other, in the processes of one torchrun: to start them takes longest.

`python -m several_runs FILE`, where FILE holds {name: arguments}. A run whose name begins with "stopped" gets SIGTERM
in its tenth step, on one rank only, as a scheduler may do. One whose name begins with "unreadable" cannot read its text
there, on the other rank only. Before each run the first rank prints its name, and after it its exit code and how many
of the source's own parameters are still alive.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import DataError
from efficientllm.train import cli, run
from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.loop import trainer

MARK = "== several_runs"
UNREADABLE = "text.jsonl: line 7 cannot be read"
references: list[weakref.ref[Any]] = []
alive: list[int] = []
make_plan, write_result, step = run.make_plan, run.write_result, trainer.Trainer._step


def noting(*arguments: Any) -> Any:
    plan, source = make_plan(*arguments)
    references.extend(weakref.ref(parameter) for parameter in source.parameters())
    return plan, source


def counting(trainer: Any) -> None:
    alive.append(sum(each() is not None for each in references))
    write_result(trainer)


def stopping_step(self: trainer.Trainer) -> object:
    if self.progress.step == 9 and self.parallel.is_main:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)


def unreadable_step(self: trainer.Trainer) -> object:
    def refuse(count: int) -> None:
        raise DataError(UNREADABLE)

    if self.progress.step == 9 and not self.parallel.is_main:
        self.training_step.stream.next_windows = refuse  # type: ignore[method-assign, assignment]
    return step(self)


STEPS = {"stopped": stopping_step, "unreadable": unreadable_step}
"""First word of a run's name -> its step."""


def main() -> None:
    run.make_plan, run.write_result = noting, counting
    for name in ("plot_architecture", "plot_pruning"):  # they take as long as the run
        setattr(run, name, lambda *arguments: arguments[-1].write_bytes(b""))
    Parallel.close = lambda self: None  # type: ignore[method-assign]  # the next run has the same ranks
    for name, arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        trainer.Trainer._step = STEPS.get(name.split()[0], step)  # type: ignore[method-assign, assignment]
        references.clear()
        alive.clear()
        is_first = os.environ["RANK"] == "0"
        if is_first:
            print(MARK, name, flush=True)
        code = run_command(cli.body, arguments)
        if code not in (0, 130) and not name.startswith("unreadable"):
            sys.exit(code)  # torchrun ends the other rank, which would wait
        if is_first:
            print(json.dumps({"code": code, "alive": alive[:1], "of": len(references)}), flush=True)


if __name__ == "__main__":
    main()
