"""`efficientllm COMMAND`: the table of commands, their help, and completion in three shells."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from efficientllm.runtime import command_line, completion

SCRIPTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
HYPHENATED = sorted(set(SCRIPTS) - {"efficientllm"})


def output_of(*argv: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [*argv])
    module, _, function = SCRIPTS[argv[0]].partition(":")
    main = getattr(importlib.import_module(module), function)
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_the_table_has_every_script() -> None:
    own = {"doctor", "completion"}
    assert {f"efficientllm-{name}" for name in command_line.COMMANDS if name not in own} == set(HYPHENATED)
    assert set(SCRIPTS.values()) == {"efficientllm.runtime.start:main"}


@pytest.mark.parametrize("script", HYPHENATED)
def test_both_names_of_a_command_print_the_same_help(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = script.removeprefix("efficientllm-")
    _, long_help, _ = output_of(script, "--help", monkeypatch=monkeypatch, capsys=capsys)
    code, short_help, _ = output_of("efficientllm", name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert short_help.startswith(f"usage: efficientllm {name} ")
    usage, _, rest = short_help.partition("\n\n")
    long_usage, _, long_rest = long_help.partition("\n\n")
    assert usage.replace(f"efficientllm {name}", script) == long_usage
    assert rest.replace(f"efficientllm {name} --target", f"{script} --target") == long_rest


def test_help_lists_the_commands_by_group(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["efficientllm"], ["efficientllm", "-h"], ["efficientllm", "--help"]):
        code, out, _ = output_of(*argv, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0
        for group, commands in command_line.GROUPS.items():
            listed = out.partition(f"\n{group}:\n")[2].partition("\n\n")[0]
            assert [line.split()[0] for line in listed.splitlines()] == list(commands)


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from efficientllm.runtime.command_line import help_text; help_text(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "asyncio"} & set(done.stdout.split())


INTERRUPTED = """
import os, signal, sys
from efficientllm.runtime.start import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["efficientllm-train", "--source", "demo"]
main()
"""


@pytest.mark.parametrize("module", ["efficientllm.runtime.command_line", "argparse", "efficientllm.train.cli", "numpy"])
def test_ctrl_c_while_a_command_is_imported_is_one_line(module: str) -> None:
    script = [sys.executable, "-c", INTERRUPTED.replace("MODULE", module)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_unknown_command_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = output_of("efficientllm", "exprot", "x", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.startswith("error: efficientllm exprot: unknown command; known: train, data, corpus, ")
    assert err.endswith("; did you mean export?\n")


def test_errors_name_the_command_as_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = output_of("efficientllm", "chat", "--nope", "x", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.endswith("(see efficientllm chat --help)\n")


COMPLETED = {
    "tra": ["train"],
    "chat --system-": [],
    "chat --over": ["--overflow"],
    "chat --overflow ": ["error", "slide"],
    "chat --overflow s": ["slide"],
    "export --target gg": ["gguf"],
    "export --recip": ["--recipe"],
    "serve-web --po": ["--port"],
}
"""Text after "efficientllm " -> words that complete its last one."""


@pytest.fixture(scope="module")
def commands() -> dict[str, completion.Flags]:
    return {
        name: completion.flags_of(name) if name in ("chat", "export", "serve-web") else {}
        for name in command_line.COMMANDS
    }


def shell(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def words_of(done: subprocess.CompletedProcess[str], typed: str) -> list[str]:
    assert not done.stderr
    assert done.returncode == 0
    last = typed.split(" ")[-1]
    return [word for word in done.stdout.split() if word.startswith(last)]


@pytest.mark.parametrize("typed", COMPLETED)
def test_bash_completes(typed: str, commands: dict[str, completion.Flags]) -> None:
    script = f"""{completion.bash(commands)}
COMP_WORDS=(efficientllm "$@"); COMP_CWORD=$#; _efficientllm; echo "${{COMPREPLY[@]}}" """
    command = [shell("bash"), "-c", script, "bash", *typed.split(" ")]
    assert words_of(subprocess.run(command, capture_output=True, text=True, check=False), typed) == COMPLETED[typed]


@pytest.mark.parametrize("typed", COMPLETED)
def test_zsh_completes(typed: str, commands: dict[str, completion.Flags]) -> None:
    script = f"""compadd() {{ shift; print -- "$@" }}; compdef() {{ }}; _files() {{ }}
{completion.zsh(commands)}
words=(efficientllm "$@"); CURRENT=$#words; PREFIX=$words[CURRENT]; _efficientllm"""
    command = [shell("zsh"), "-f", "-c", script, "zsh", *typed.split(" ")]
    assert words_of(subprocess.run(command, capture_output=True, text=True, check=False), typed) == COMPLETED[typed]


@pytest.mark.parametrize("typed", COMPLETED)
def test_fish_completes(typed: str, commands: dict[str, completion.Flags], tmp_path: Path) -> None:
    path = tmp_path / "efficientllm.fish"
    path.write_text(completion.fish(commands))
    script = f"source {path}; complete -C 'efficientllm {typed}' | string split -f 1 \\t"
    done = subprocess.run([shell("fish"), "-N", "-c", script], capture_output=True, text=True, check=False)
    done.returncode = 0  # `string split` fails where nothing completes
    assert words_of(done, typed) == COMPLETED[typed]


def test_a_command_whose_packages_are_missing_has_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientllm.runtime.chat", None)
    assert completion.flags_of("chat") == {}
