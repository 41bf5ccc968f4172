"""The finished file in LiteRT-LM itself: does it write what the program inside it computes?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...runtime.base.errors import ArtefactError
from ..request import log
from .interpreter import TfliteDecoder

PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived an old fisherman who every morning",
    "The three largest cities of the country are",
)
"""The second is asked where nothing follows the first."""
TOKENS = 24


def check_greedy_text(model: Path, decoder: TfliteDecoder, tokenizer: Any) -> int:
    """Characters that LiteRT-LM writes greedily after a prompt; ArtefactError where `decoder`, which is closed, goes
    on in another way."""
    import litert_lm  # type: ignore[import-not-found]

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    with tempfile.TemporaryDirectory() as folder:  # it leaves a cache of packed weights beside its file
        link = Path(folder) / model.name
        link.symlink_to(model.resolve())
        engine = litert_lm.Engine(str(link), backend=litert_lm.Backend.CPU(thread_count=1), max_num_tokens=256)
        greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=1)
        begin = [engine.bos_token_id] if engine.bos_token_id is not None else []
        ends = {ids[0] for ids in engine.eos_token_ids if len(ids) == 1}
        text = ""
        for prompt in PROMPTS:
            with engine.create_session(
                apply_prompt_template=False, sampler_config=greedy, max_output_tokens=TOKENS
            ) as session:
                session.run_prefill([prompt])
                text = "".join(part for answer in session.run_decode_async() for part in answer.texts)
            spoken = _texts(decoder, tokenizer, [*begin, *tokenizer.encode(prompt, add_special_tokens=False).ids], ends)
            if text not in spoken:
                raise ArtefactError(
                    f"litert: LiteRT-LM goes on with {text!r}, the program in its file with {min(spoken)!r}; nothing "
                    "was written. Please report this model; --no-verify exports it all the same"
                )
            if text:
                break
        else:
            log.warning("the model ends every answer at once, in LiteRT-LM as in the program: no text was compared")
    decoder.close()
    return len(text)


def _texts(decoder: TfliteDecoder, tokenizer: Any, prompt: list[int], ends: set[int]) -> set[str]:
    """What the program writes greedily after a prompt, with and without special tokens."""
    answer: list[int] = []
    logits = decoder.prefill(prompt)
    while len(answer) < TOKENS and int(logits.argmax()) not in ends:
        answer.append(int(logits.argmax()))
        logits = decoder.decode(answer[-1])
    return {tokenizer.decode(answer, skip_special_tokens=skip) for skip in (True, False)}
