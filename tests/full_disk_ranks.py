"""A rank of `efficientllm-train` that does not look for room before it writes a checkpoint."""

from __future__ import annotations

import sys

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli
from efficientllm.train.checkpoint import state

if __name__ == "__main__":
    state.state_bytes = lambda model, optimizer: 0
    sys.exit(run_command(cli.body))
