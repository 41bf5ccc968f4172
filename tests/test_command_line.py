"""`efficientllm COMMAND`: the table of commands, and their help."""

from __future__ import annotations

import importlib
import io
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from efficientllm.runtime import command_line
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.progress import PROGRESS_LOGGER

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


def test_output_into_another_encoding_is_written_with_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    assert run_command(lambda _: print("\u65e5") or 0, []) == 0
    assert written.getvalue().strip() == b"\\u65e5"


def test_the_table_has_every_script() -> None:
    own = {"doctor"}
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
def test_ctrl_c_during_imports_gives_one_line(module: str) -> None:
    script = [sys.executable, "-c", INTERRUPTED.replace("MODULE", module)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_unknown_command_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = output_of("efficientllm", "exprot", "x", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.startswith("error: efficientllm exprot: unknown command; known: train, data, fit, ")
    assert err.endswith("; did you mean export?\n")


def test_errors_name_the_command_as_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = output_of("efficientllm", "chat", "--nope", "x", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.endswith("(see efficientllm chat --help)\n")


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_details_are_printed_with_debug_only(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda argv: logging.getLogger(PROGRESS_LOGGER).debug("detail") or 0, flags) == 0
    assert capsys.readouterr().err == "detail\n" * bool(flags)
