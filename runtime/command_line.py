"""`efficientllm COMMAND ...`: all commands of the package under one name.

Commands are named as text and imported on use, because this package imports none of the others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import flags
from .base.command import run_command
from .base.errors import UsageError
from .base.quantities import did_you_mean

PROGRAM = "efficientllm"


@dataclass(frozen=True)
class Command:
    """One command."""

    module: str
    """Module below the package efficientllm. Its function `body` takes the arguments and returns the exit code."""
    summary: str
    """One line for the help, which starts with a verb."""


GROUPS = {
    "make": {
        "train": Command("train.cli", "prune and train a model"),
        "data": Command("train.data.check", "check files of examples before training"),
        "fit": Command("train.family.fit", "choose a size of a run for a budget of bytes, time and memory"),
    },
    "ship": {"export": Command("export.cli", "write a checkpoint as GGUF, ONNX, ExecuTorch, ...")},
    "run": {
        "chat": Command("runtime.chat", "chat with an exported model in the terminal"),
        "serve": Command("server.cli", "serve models with OpenAI's HTTP interface"),
        "serve-web": Command("server.web", "serve an exported page to browsers"),
    },
    "know": {
        "eval": Command("train.evaluation.cli", "measure the quality of models"),
        "bench": Command("devices.cli", "measure speed and memory on a device"),
        "doctor": Command("runtime.doctor", "show this machine, its engines and missing packages"),
    },
}
"""Group -> command name -> command, in the order of the help."""

COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def help_text() -> str:
    """Return the help of `efficientllm` with the commands by group."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "Prune, train, export, run and measure small language models."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}{each.summary}" for name, each in commands.items())]
    lines += ["", f"{PROGRAM} COMMAND --help lists the options of a command; --version prints the version."]
    return "\n".join(lines)


def run(name: str, arguments: Sequence[str]) -> int:
    """Import and run the command `name`, and return its exit code."""
    module = f"efficientllm.{COMMANDS[name].module}"
    return run_command(lambda argv: importlib.import_module(module).body(argv), arguments)


def body(argv: Sequence[str]) -> int:
    """Print the help or the version, and raise UsageError for an unknown command."""
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h"):
        print(help_text())
    elif name == "--version":
        flags.Parser(prog=PROGRAM).parse(["--version"])
    else:
        rule = f"known: {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
        raise UsageError(f"{PROGRAM} {name}: unknown command; {rule}")
    return 0


def main() -> None:
    """Run the command that the program's name or the first argument names."""
    program, *arguments = sys.argv
    _, _, name = Path(program).stem.partition(f"{PROGRAM}-")
    if name not in COMMANDS and arguments and arguments[0] in COMMANDS:
        name, *arguments = arguments
        sys.argv[:2] = [f"{PROGRAM} {name}"]  # its help and errors then show this name, see flags.Parser
    sys.exit(run(name, arguments) if name in COMMANDS else run_command(body, arguments))
