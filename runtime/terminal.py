"""The interactive terminal: questions of several lines, commands, and the questions of earlier sessions."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .base.errors import EfficientLLMError, UsageError
from .base.user_cache import cache_folder
from .conversation import Conversation

QUOTES = '"""'
"""Alone on a line, it begins and ends a question of several lines."""

HISTORY_LENGTH = 1000
PASTE_SECONDS = 0.02
"""What comes this soon after a line was pasted with it."""

HELP = f"""/again      answer the last question anew
/undo       take back the last question and its answer
/reset      begin anew
/system X   set the system prompt to X (empty: the model's own)
/stats      figures of the last answer
/save FILE  write the conversation as Markdown
/quit       leave (or Ctrl-D)
A line that ends with \\ goes on in the next; {QUOTES} begins and ends a question of several lines; what is pasted is
one question. Ctrl-C ends an answer, or empties the line."""


class Terminal:
    """Reads questions and commands until the user leaves."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._readline = _readline()
        self._commands: dict[str, Callable[[str], object]] = {
            "help": lambda rest: print(HELP),
            "again": lambda rest: conversation.ask_again(),
            "undo": lambda rest: print(f"forgotten: {conversation.forget_last()}"),
            "reset": lambda rest: conversation.messages.clear(),
            "system": lambda rest: setattr(conversation, "system", rest),
            "stats": lambda rest: print(conversation.describe_stats()),
            "save": self._save,
        }

    def run(self) -> None:
        """Answer until /quit or the end of the input."""
        print("/help lists commands; Ctrl-C ends an answer, Ctrl-D leaves", file=sys.stderr)
        with self._history():
            while True:
                try:
                    text = self._read()
                    if text in ("/quit", "/exit"):
                        return
                    if text:
                        self._obey(text)
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print()
                except EfficientLLMError as error:  # the question is at fault, not the session
                    print(f"error: {error}", file=sys.stderr)

    def _obey(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        if not text.startswith("/") or not name.isalpha():
            self.conversation.ask(text)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UsageError(f"there is no command /{name}; /help lists them")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a file")
        try:
            path = Path(rest).expanduser()
            if path.exists():
                raise UsageError(f"{rest} is there already; give another name")
            self.conversation.save(path)
        except (OSError, RuntimeError, ValueError) as error:  # no such user's home, a zero byte
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{rest} cannot be written: {reason}") from error

    def _read(self) -> str:
        """One question, which may have several lines."""
        line = input("> ")
        if line.strip() == QUOTES:
            lines = []
            while (line := input(". ")).strip() != QUOTES:
                lines.append(line)
            return "\n".join(lines).strip()
        lines = [line]
        while lines[-1].endswith("\\") or self._has_more():
            if lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
            lines.append(input(". "))
        return "\n".join(lines).strip()

    def _has_more(self) -> bool:
        """Whether more was pasted with the line, where the line editor does not say so itself."""
        if self._readline is not None or os.name != "posix":
            return False
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])

    @contextlib.contextmanager
    def _history(self) -> Iterator[None]:
        """The questions of earlier sessions at hand, and this one's kept, for this user's eyes alone."""
        editor = self._readline
        if editor is None or not self.conversation.options.history:
            yield
            return
        file = cache_folder() / "history"
        with contextlib.suppress(OSError):
            editor.read_history_file(file)
        try:
            yield
        finally:
            editor.set_history_length(HISTORY_LENGTH)
            with contextlib.suppress(OSError):  # nowhere to keep it
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)
                editor.write_history_file(file)


def _readline() -> Any:
    """GNU's line editor, which takes pasted lines as one; None where there is another one or none."""
    try:
        import readline  # absent on Windows
    except ImportError:
        return None
    if "libedit" in (readline.__doc__ or ""):
        return None
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return readline
