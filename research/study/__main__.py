"""`python -m research.study`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from efficientllm.runtime.base.command import run_command
from efficientllm.train.cli import set_environment


def body(argv: Sequence[str]) -> int:
    set_environment()
    from .cli import body  # imports transformers, whose own imports warn where a command has not begun

    return body(argv)


if __name__ == "__main__":
    sys.exit(run_command(body))
