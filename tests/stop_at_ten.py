"""`efficientllm-train` that gets SIGTERM during its tenth step (on one rank only, as a scheduler may do)."""

from __future__ import annotations

import os
import signal

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli, trainer

step = trainer.Trainer._step


def stopping_step(self: trainer.Trainer) -> object:
    if self.progress.step == 9 and self.parallel.is_main:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)


trainer.Trainer._step = stopping_step  # type: ignore[method-assign, assignment]
run_command(cli.body)
