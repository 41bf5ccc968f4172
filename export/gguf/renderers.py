"""Compare the prompts that stock runtimes render from a chat template in a GGUF with those of this package.

llama-cpp-python runs a template with Jinja. llama-server, here in the wheel xllamacpp, has an engine of its own. Both
run in a child process: `python -m efficientllm.export.gguf.renderers REQUEST.json` writes {runtime: prompts} to the
file that the request names. A prompt that a runtime refuses is null.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...runtime.base.child import run_python
from ...runtime.base.errors import EfficientLLMError
from ...runtime.chat_template import Message
from ...runtime.engines.hf_tokenizer import HfTokenizer
from ...train.data.chat import Chat, ChatFormat
from ..checkpoint import Checkpoint
from .modelfile import PROBES, probes_of

_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"name": "Blue", "sizes": [1, 2]}}}
_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALLING: list[Message] = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": '{"shelf": 4}'},
]
"""A conversation with a call and its result."""
Renderer = Callable[[dict[str, Any]], str]
"""Body of a request -> its prompt."""
WAIT_SECONDS = 120
"""Longest time of the comparison."""
SHOWN = 60
"""Characters of two prompts in a message, from where they differ."""


def differences(path: Path, checkpoint: Checkpoint) -> list[str]:
    """Return a sentence for each runtime that is installed and renders conversations of the GGUF `path` differently."""
    tokenizer = HfTokenizer(checkpoint.folder)
    template, bos, eos = str(tokenizer.chat_template), tokenizer.bos_token, tokenizer.eos_token
    format, chats, ours = ChatFormat(template, bos, eos, ""), list[Chat](), list[str]()
    for messages in (*PROBES, *probes_of(template), CALLING):
        chat = Chat(tuple(messages), (_TOOL,) if messages is CALLING else ())
        try:
            ours.append(format.chat_prompt(chat))
        except EfficientLLMError:  # the template refuses it everywhere
            continue
        chats.append(chat)
    request = {"path": str(path), "template": template, "bos": bos, "eos": eos}
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as name:
        file, output = Path(name) / "request.json", Path(name) / "prompts.json"
        bodies = [{"messages": chat.messages, **({"tools": chat.tools} if chat.tools else {})} for chat in chats]
        file.write_text(json.dumps({**request, "chats": bodies, "output": str(output)}), encoding="utf-8")
        reason = f"they took more than {WAIT_SECONDS} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            reason = run_python("-m", __spec__.name, str(file), timeout=WAIT_SECONDS).last_error
        if not output.is_file():
            return [f"the chat template was not compared with stock runtimes: {reason}"]
        found: dict[str, list[str | None]] = json.loads(output.read_text(encoding="utf-8"))
    # llama-server leaves out a BOS that its tokenizer adds
    found = {name: [text and text.removeprefix(bos) for text in texts] for name, texts in found.items()}
    ours = [text.removeprefix(bos) for text in ours]
    return list(filter(None, (_difference(name, chats, ours, theirs) for name, theirs in found.items())))


def _difference(name: str, chats: Sequence[Chat], ours: Sequence[str], theirs: Sequence[str | None]) -> str:
    """Return a sentence about the first conversation that a runtime renders differently, "" if there is none."""
    pairs = [(chat, one, other) for chat, one, other in zip(chats, ours, theirs, strict=True) if one != other]
    if not pairs:
        return ""
    chat, one, other = pairs[0]
    kind = "with calls and results" if chat.tools else "without functions"
    said = f"{name} renders {len(pairs)} of {len(ours)} conversations differently; the first is one {kind}: "
    if other is None:
        return said + "it refuses the template"
    start = next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
    return said + f"{other[start:][:SHOWN]!r} instead of {one[start:][:SHOWN]!r}"


def _llama_cpp_python(request: dict[str, Any]) -> Renderer:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(request["template"], request["eos"], request["bos"])
    return lambda chat: formatter(**chat).prompt


def _llama_server(request: dict[str, Any]) -> Renderer:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = request["path"], 256, False
    server = xllamacpp.Server(parameters)

    def rendered(chat: dict[str, Any]) -> str:
        url, body = f"{server.listening_address}/apply-template", json.dumps(chat).encode()
        question = urllib.request.Request(url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(question, timeout=WAIT_SECONDS) as answer:
            return str(json.load(answer)["prompt"])

    return rendered


RENDERERS = {"llama-cpp-python": ("llama_cpp", _llama_cpp_python), "llama-server": ("xllamacpp", _llama_server)}
"""Runtime -> its package, and the function that returns its renderer."""


def _attempt(render: Renderer, chat: dict[str, Any]) -> str | None:
    try:
        return render(chat)
    except Exception:  # a template may fail in every way
        return None


def _main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    found: dict[str, list[str | None]] = {}
    for name, (package, make) in RENDERERS.items():
        if importlib.util.find_spec(package) is None:
            continue
        render = make(request)
        found[name] = [_attempt(render, chat) for chat in request["chats"]]
    Path(request["output"]).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the end of xllamacpp's server may wait for itself


if __name__ == "__main__":
    _main(sys.argv[1])
