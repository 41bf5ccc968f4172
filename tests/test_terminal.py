"""The terminal: commands, questions of several lines, and what Ctrl-C does, in a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import tiny_architecture

from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.sampling import SamplingOptions
from efficientllm.runtime.terminal import ChatOptions, Conversation, Terminal

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")


@pytest.fixture(scope="module")
def conversation(artefact: Path) -> Iterator[Conversation]:
    engine = load_engine(artefact, EngineOptions(threads=1))
    yield Conversation(engine, ChatOptions(max_tokens=6), SamplingOptions(temperature=1, seed=1))
    engine.close()


def talk(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Run the terminal with `lines` typed into it."""
    conversation.messages, conversation.system, typed = [], "", iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration as error:
            raise EOFError from error

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(Terminal, "_has_more", lambda self: False)
    Terminal(conversation).run()


def questions(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "user"]


def test_a_question_may_have_several_lines(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    talk(conversation, monkeypatch, "one \\", "two", '"""', "three", "", "four", '"""')
    assert questions(conversation) == ["one \ntwo", "three\n\nfour"]


@pytest.mark.parametrize("word", ["/quit", "/exit", "quit", "exit"])
def test_a_word_ends_the_chat(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    talk(conversation, monkeypatch, word, "a question")
    assert questions(conversation) == []


def test_commands(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(conversation, monkeypatch, "/system Be brief.", "one", "two", "/undo", "/again", "/help")
    assert questions(conversation) == ["one"]
    assert conversation.system == "Be brief."
    output = capsys.readouterr().out
    assert all(f"/{name}" in output for name in Terminal(conversation)._commands if name != "help")
    talk(conversation, monkeypatch, "/undo", "/nonsense", "/etc/passwd is a file", "/reset")
    printed = capsys.readouterr().err
    assert "error: there is no question yet" in printed
    assert "error: there is no command /nonsense; /help lists them" in printed
    assert conversation.messages == []


class InterruptedOutput(io.StringIO):
    """Presses Ctrl-C when the answer's first piece is printed."""

    def write(self, text: str) -> int:
        if not self.getvalue():
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_bytes_of_another_encoding_give_one_line(exported: Callable[..., Path], kind: str) -> None:
    artefact = exported(kind, "--quantize", "f32")
    command = [sys.executable, "-m", "efficientllm.runtime.start", "chat", str(artefact), "--max-tokens", "2"]
    piped = subprocess.run(command, input=b"a\xffb", capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    given = subprocess.run([*command, b"a\xffb"], capture_output=True)
    system = subprocess.run([*command, "--system", b"a\xffb", "Hi"], capture_output=True)
    for run in (piped, given, system):
        assert run.returncode == 2, run.stderr
        (line,) = [line for line in run.stderr.splitlines() if b" is new here: " not in line]
        assert line.startswith(b"error: the text has an invalid character: a byte that is not UTF-8, ")


def test_interrupt_ends_the_answer_and_keeps_its_text(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1, context=4096))
    options = ChatOptions(max_tokens=3000)
    conversation = Conversation(engine, options, SamplingOptions(temperature=1, seed=3, top_k=0, top_p=1, min_p=0))
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", InterruptedOutput())
        assert not conversation.ask("Go on")
    answer = conversation.messages[1]["content"]
    assert answer
    assert conversation.last_stats is not None
    assert conversation.last_stats.completion_tokens < 3000
    conversation.options = ChatOptions(max_tokens=4)
    assert conversation.ask("And now")
    assert len(conversation.messages) == 4
    engine.close()


class Screen:
    """A program in a pseudo-terminal."""

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path = Path()) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores for what runs in the background
            os.execve(command[0], command, environment)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120, typing: str = "") -> None:
        """Until what was printed since the last call matches; `typing` for every second in which nothing is printed."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.S)):
            assert time.monotonic() < deadline, self.text
            if select.select([self.file], [], [], 1)[0]:
                self.text += os.read(self.file, 4096).decode("utf-8", "replace")
            else:
                self.type(typing)
        self.text = self.text[found.end() :]


@pytest.mark.slow
def test_a_checkpoint_is_exported_where_the_user_agrees(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture()).rename(tmp_path / "small")
    environment = {**os.environ, "TERM": "xterm", "EFFICIENTLLM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "efficientllm.runtime.start", "chat", str(checkpoint), "Hi"]
    for answer, code in (("n", 2), ("y", 0)):
        screen = Screen([*command, "--max-tokens", "2", "--no-tune"], environment, cwd=tmp_path)
        screen.wait_for(r"is a checkpoint; export it to small-gguf first\? y/N ")
        screen.type(f"{answer}\r")
        with contextlib.suppress(OSError):  # the program ended
            screen.wait_for("nothing prints this")
        assert os.waitstatus_to_exitcode(os.waitpid(screen.pid, 0)[1]) == code, screen.text
        os.close(screen.file)
        assert (tmp_path / "small-gguf" / "manifest.json").exists() == (answer == "y")
    with pytest.raises(ArtefactError, match=r"is a checkpoint; did you mean small-gguf\?"), contextlib.chdir(tmp_path):
        Artefact.open(checkpoint)


@pytest.mark.slow
def test_pasted_lines_are_one_question_and_ctrl_c_leaves_the_conversation(artefact: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TERM": "xterm", "EFFICIENTLLM_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "efficientllm.runtime.start", "chat", str(artefact), "--temperature", "1"]
    flags = ["--seed", "3", "--max-tokens", "100000", "--overflow", "slide"]
    screen = Screen([*command, *flags], environment)
    screen.wait_for("> $")
    screen.type("\x1b[200~first\nsecond\nthird\x1b[201~\r")
    screen.wait_for(r"third\r\n\x1b\[\?2004l\r.{3}")  # the editor gives the screen back, and the answer begins
    screen.type("\x03")
    screen.wait_for(r"\[stopped\].*> ")
    screen.type("half a line")
    screen.wait_for("half a line")
    screen.wait_for("> ", typing="\x03")  # CPython's readline overlooks a signal that comes before it waits for a key
    screen.type("/undo\r")
    screen.wait_for("removed: first\r?\nsecond\r?\nthird")
    screen.type("/quit\r")
    assert os.waitpid(screen.pid, 0)[1] == 0
    os.close(screen.file)
