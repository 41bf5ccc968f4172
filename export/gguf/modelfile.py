"""What Ollama reads beside a GGUF: its context, how it is sampled, where an answer ends.

There is no TEMPLATE: it would be a second one in another language, and Ollama takes the one in the file.
"""

from __future__ import annotations

import json

from ..checkpoint import Checkpoint
from ..generation_defaults import generation_defaults

MAX_CONTEXT = 4096
"""Tokens; Ollama and llama-server allocate the caches of all of them."""

NAMES = {"temperature": "temperature", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
"""Our options -> Ollama's."""


def modelfile(checkpoint: Checkpoint, model_file: str) -> str:
    """The text of a Modelfile for `model_file`, which lies beside it."""
    lines = [f"FROM ./{model_file}", f"PARAMETER num_ctx {min(checkpoint.context_length, MAX_CONTEXT)}"]
    lines += [f"PARAMETER {NAMES[name]} {value:g}" for name, value in generation_defaults(checkpoint).items()]
    ends = [checkpoint.tokenizer.id_to_token(token) for token in checkpoint.end_of_generation_ids]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends if end]
    return "\n".join(lines) + "\n"
