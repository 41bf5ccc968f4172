"""Flags of `efficientllm-serve` for its models. They import no web framework, as those in options.py."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.base import flags


@dataclass(frozen=True)
class PoolOptions:
    """Models."""

    max_memory: int = flags.byte_count(0)
    """Memory limit of all loaded models, in bytes, such as 2GB; 0: none. Above it the least recently used model is
    unloaded."""
    idle_unload: float = flags.number(0.0, at_least=0)
    """Time without requests after which a model is unloaded, in seconds; 0: never."""
    prompt_cache: int = flags.byte_count(0)
    """gguf: disk space for the caches of prompts, such as 500MB; 0: none. They are written to the user's cache folder
    when a model is unloaded or the server stops, and read when the model is loaded again."""
    pin: tuple[str, ...] = ()
    """File of a system prompt, or .json with messages or with messages and tools, repeatable. It is evaluated when a
    model is loaded and stays in its cache."""
    waiting: int = flags.number(64, at_least=0)
    """Requests per model that may wait for a place. Further ones are refused with status 429."""
    timeout: float = flags.number(600.0, above=0)
    """Longest time of a request in seconds, including its wait."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
