"""`efficientllm-train` that gets SIGTERM during its tenth step (on one rank only, as a scheduler may do)."""

from __future__ import annotations

import os
import signal
import sys

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli, trainer

step = trainer.Trainer._step


def stopping_step(self: trainer.Trainer) -> object:
    if self.progress.step == 9 and self.parallel.is_main:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)


trainer.Trainer._step = stopping_step  # type: ignore[method-assign, assignment]
sys.exit(run_command(cli.body))  # torchrun ends the other rank where one has failed, as 130 is
