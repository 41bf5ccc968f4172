"""`efficientllm completion SHELL`: print a script that completes commands, flags and their choices.

The flags are read from the help of every command when the script is printed, so that a key press starts no Python.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from . import command_line
from .base import flags

Flags = dict[str, list[str]]
"""Flag -> the values it accepts, [] if they are not a fixed list."""


def help_of(name: str, *arguments: str) -> str:
    """Return the help of a command, "" if a package is missing that the command needs to print it."""
    output = io.StringIO()
    silenced = contextlib.redirect_stderr(io.StringIO())
    with contextlib.redirect_stdout(output), silenced, contextlib.suppress(SystemExit, ImportError):
        command_line.run(name, [*arguments, "--help"])
    return output.getvalue()


def flags_in(text: str) -> Flags:
    """Return the flags in the help text of argparse."""
    found: Flags = {}
    for line in text.splitlines():
        if line.startswith("  -"):
            invocation = line.strip().split("  ")[0]
            choices = re.search(r"{(.+)}", invocation)
            for flag in re.findall(r"--[\w-]+", invocation):
                found[flag] = choices[1].split(",") if choices else []
    return found


def flags_of(name: str) -> Flags:
    """Return the flags of a command, those of all its variants included."""
    found = flags_in(help_of(name))
    variant = command_line.COMMANDS[name].variant_flag
    for choice in found.get(variant, []):
        found = flags_in(help_of(name, variant, choice)) | found
    return found


def _cases(commands: Mapping[str, Flags], complete: Callable[[Sequence[str]], str]) -> tuple[str, str]:
    """Return the branches of two `case` statements of a shell: of "COMMAND --flag" and of "COMMAND"."""
    values = [
        f'        "{name} {flag}") {complete(choices)} ;;'
        for name, found in commands.items()
        for flag, choices in found.items()
        if choices
    ]
    names = [f"            {name}) {complete(list(found))} ;;" for name, found in commands.items()]
    return "\n".join(values), "\n".join(names)


def bash(commands: Mapping[str, Flags]) -> str:
    """Return the script for bash."""
    values, names = _cases(commands, lambda words: f'words="{" ".join(words)}"')
    return f"""_efficientllm() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if (( COMP_CWORD == 1 )); then
        words="{" ".join(commands)}"
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD - 1]}}" in
{values}
        *) [[ $word == -* ]] && case "${{COMP_WORDS[1]}}" in
{names}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _efficientllm efficientllm
"""


def zsh(commands: Mapping[str, Flags]) -> str:
    """Return the script for zsh, which may be sourced or stored as `_efficientllm` in a folder of $fpath."""
    values, names = _cases(commands, lambda words: f"compadd -- {' '.join(words)}")
    return f"""#compdef efficientllm
_efficientllm() {{
    if (( CURRENT == 2 )); then
        compadd -- {" ".join(commands)}
        return
    fi
    case "$words[2] $words[CURRENT-1]" in
{values}
        *) if [[ $PREFIX != -* ]]; then
            _files
            return
        fi
        case "$words[2]" in
{names}
        esac ;;
    esac
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _efficientllm "$@"
else
    compdef _efficientllm efficientllm
fi
"""


def fish(commands: Mapping[str, Flags]) -> str:
    """Return the script for fish."""
    lines = []
    for name, found in commands.items():
        summary = shlex.quote(command_line.COMMANDS[name].summary)
        lines.append(f"complete -c efficientllm -n __fish_use_subcommand -f -a {name} -d {summary}")
        for flag, choices in found.items():
            values = f" -x -a '{' '.join(choices)}'" if choices else ""
            condition = f"__fish_seen_subcommand_from {name}"
            lines.append(f"complete -c efficientllm -n '{condition}' -l {flag.removeprefix('--')}{values}")
    return "\n".join(lines) + "\n"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="efficientllm completion",
        examples=(
            "completion bash > ~/.local/share/bash-completion/completions/efficientllm",
            "completion fish > ~/.config/fish/completions/efficientllm.fish",
        ),
        description="Print a script that completes the commands and flags of efficientllm.",
    )
    parser.add_argument("shell", choices=SHELLS, help="shell to print the script for")
    return parser


def body(argv: Sequence[str]) -> int:
    shell = build_parser().parse(argv)["shell"]
    print(SHELLS[shell]({name: flags_of(name) for name in command_line.COMMANDS}), end="")
    return 0
