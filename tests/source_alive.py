"""`efficientllm-train`, and how many of the source's own parameters are still alive at its end."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli, run

references: list[weakref.ref[Any]] = []
make_plan, write_result = run.make_plan, run.write_result


def noting(*arguments: Any) -> Any:
    plan, source = make_plan(*arguments)
    references.extend(weakref.ref(parameter) for parameter in source.parameters())
    return plan, source


def counting(trainer: Any) -> None:
    print(f"{sum(each() is not None for each in references)} of {len(references)} alive", flush=True)
    write_result(trainer)


if __name__ == "__main__":
    run.make_plan, run.write_result = noting, counting
    sys.exit(run_command(cli.body, sys.argv[1:]))
