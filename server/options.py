"""Flags of `efficientllm-serve`. They import no web framework, so that its help works without one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.copied_arguments import ToolArguments
from ..runtime.generation import Overflow


@dataclass(frozen=True)
class ServeOptions:
    """Server."""

    host: str = "127.0.0.1"
    """Address to listen on. With 0.0.0.0 other machines can reach the server."""
    port: int = flags.number(8000, at_least=1, at_most=65535)
    """Port to listen on."""
    model: tuple[str, ...] = ()
    """A further model, NAME=PATH, repeatable. It is loaded on its first request."""
    grace: int = flags.number(10, at_least=0)
    """Time that answers in progress have at shutdown, in seconds."""
    max_connections: int = flags.number(512, at_least=1)
    """Most connections at once, idle ones included. Most systems limit a process to 1024 open files."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "host", bool(self.host), "must not be empty; 0.0.0.0 means all addresses", value="''")
        for text in self.model:
            flags.require(self, "model", all(text.partition("=")), "must be NAME=PATH", value=text)


@dataclass(frozen=True)
class AppOptions:
    """Access."""

    api_key: str = ""
    """Key that clients must send; empty: the key in --api-key-file, else in EFFICIENTLLM_API_KEY, if any."""
    api_key_file: str = ""
    """File that holds the key, or several, one on a line. It is safer than --api-key, which the list of processes
    shows."""
    allow_host: tuple[str, ...] = ()
    """Host name of the server, repeatable. Without a key, a server that listens on a local address or has such names
    refuses requests with any other host name, except the local ones."""
    cors_origin: tuple[str, ...] = ()
    """Origin of a web page that may call the server from a browser (CORS), repeatable; none by default."""
    max_body_bytes: int = flags.byte_count(1_000_000, at_least=1)
    """Largest body of a request."""
    body_timeout: float = flags.number(30.0, above=0)
    """Longest time to receive a request, in seconds."""
    access_log: bool = False
    """Print a line for every request: time, client, path, status, bytes, seconds and the id in its header
    X-Request-Id."""
    tool_arguments: ToolArguments = "any"
    """Default of the field tool_arguments. copy: free texts in arguments of calls are words of the request; examples:
    those with examples in their schema are examples that occur in the request. listed: those with the name of a field
    are values of one record of the conversation, as the model's chat template describes them."""
    wrong_acts: float = flags.number(1.0, at_least=0, at_most=1)
    """Share of requests with wrong calls that is allowed, such as 0.02. Less sure calls become a question, and a yes
    makes them. Needs a model whose calls efficientllm-eval --task FILE --metric call --write has scored. 1: all calls
    pass."""
    overflow: Overflow = "error"
    """Action when a chat exceeds the context window: error, or slide (remove the oldest tokens)."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for text in self.allow_host:
            flags.require(self, "allow_host", "/" not in text, "must be a name without http:// and path", value=text)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return the keys from the flag, the file or the environment. UsageError for a file that has none."""
        if self.api_key or not self.api_key_file:
            key = self.api_key or os.environ.get("EFFICIENTLLM_API_KEY", "")
            return (key,) if key else ()
        try:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--api-key-file {self.api_key_file}: cannot be read: {error}; name a text file"
            ) from error
        keys = tuple(filter(None, map(str.strip, lines)))
        if not keys:
            raise UsageError(f"--api-key-file {self.api_key_file}: is empty; write the key into it")
        return keys
