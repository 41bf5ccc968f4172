"""What Ollama reads beside a GGUF: its chat template, its context, how it is sampled, where an answer ends."""

from __future__ import annotations

import json

from ...runtime.engines.hf_tokenizer import HfTokenizer
from ..checkpoint import Checkpoint
from ..generation_defaults import generation_defaults
from .go_template import derive_turns

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
    return "\n".join([*lines, *_template(checkpoint)]) + "\n"


def _template(checkpoint: Checkpoint) -> list[str]:
    """In Ollama's language; a remark where the model's says more than one turn after the other."""
    tokenizer = HfTokenizer(checkpoint.folder)
    if tokenizer.chat_template is None:
        return []
    turns = derive_turns(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, adds_bos=tokenizer.adds_bos)
    if turns is None:
        return [
            "# no TEMPLATE: the model's writes more than one turn after the other; Ollama looks for one that it knows"
        ]
    return [f'TEMPLATE """{turns.go()}"""']
