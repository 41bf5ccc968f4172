"""A Hugging Face model under evaluation in torch.

Shapes: B requests, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..compute.hardware import choose_hardware
from ..data.chat import chat_template_of, end_of_text_id
from ..model.continuation import continuations
from ..model.folder_files import check_folder
from ..model.foreign_configs import DEFAULTS, is_foreign
from ..model.source import load_foreign, loading, quiet_loading
from ..vocabulary.pieces import bytes_of_tokens, tokenizer_data
from .scoring import Score, ScoreRequest

ANSWER_BATCH = 50
"""Prompts answered in one batch."""


class TorchModel:
    """A Hugging Face model as a scoring.EvaluatedModel."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, autocast: bool, batch_tokens: int) -> None:
        """Set `model` to eval mode. It takes its inputs on `device`.

        `batch_tokens` limits the padded tokens per forward pass. `autocast` selects matrix products in bfloat16.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device = device
        self.autocast = autocast
        self.batch_tokens = batch_tokens
        self.context_length = int(model.config.max_position_embeddings)
        self.vocab_size = int(model.config.vocab_size)
        self.separator = end_of_text_id(tokenizer)
        self.chat_template = chat_template_of(tokenizer)
        self.bos_token, self.eos_token = tokenizer.bos_token or "", tokenizer.eos_token or ""

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str, threads: int, batch_tokens: int) -> TorchModel:
        """Load a folder in fp32. Raises ModelError if transformers cannot load it."""
        hardware = choose_hardware(device, dtype, threads)
        check_folder(folder)
        model: Any
        if is_foreign(folder):
            imported, tokenizer = load_foreign(folder, str(folder), DEFAULTS)
            model = imported.model
        else:
            with loading(str(folder)), quiet_loading():
                model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
                tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        autocast = hardware.dtype == torch.bfloat16
        return cls(model.to(hardware.device), tokenizer, hardware.device, autocast, batch_tokens)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text that begins a document."""
        return self.tokenizer.encode(text, verbose=False)

    def encode_markup(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def num_bytes(self, tokens: Sequence[int]) -> int:
        """Return the bytes of the text of tokens."""
        # a part of a character would decode to a replacement character of three bytes
        others = [token for token in tokens if token not in self._pieces]
        text = self.tokenizer.decode(others, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8")) + sum(len(self._pieces.get(token, b"")) for token in tokens)

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        """Return {id: bytes} of a tokenizer of byte-pair encoding, except for added tokens; {} of another kind."""
        data = tokenizer_data(self.tokenizer)
        return bytes_of_tokens(data) if data["model"]["type"] == "BPE" else {}

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        # requests that differ only in their last token share one row, as the last token is never an input
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            rows[request.tokens[:-1]].append(index)
        ordered = sorted(rows, key=len, reverse=True)  # so that little of a batch is padding
        while ordered:
            size = max(1, self.batch_tokens // len(ordered[0]))
            batch, ordered = ordered[:size], ordered[size:]
            first_scored = [requests[index].first for inputs in batch for index in rows[inputs]]
            first = min(first_scored) - 1  # the logits of a position score the next token
            logits = self._logits(batch, first)
            for row, inputs in enumerate(batch):
                for index in rows[inputs]:
                    request = requests[index]
                    begin, end = request.first - 1 - first, len(inputs) - first
                    yield index, _score(logits[row, begin:end], request)

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[str]:
        """Yield the greedy answer to each prompt, of at most `max_tokens` tokens."""
        for start in range(0, len(prompts), ANSWER_BATCH):
            yield from self._answers(prompts[start : start + ANSWER_BATCH], max_tokens)

    def _answers(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
        settings = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=sorted(self._end_ids()),
            pad_token_id=self.separator,
        )
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            rows = continuations(self.model, prompts, settings, self.device)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def _end_ids(self) -> set[int]:
        """Return the tokens that end an answer, by the tokenizer and the model's generation settings."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {end for end in (self.separator, self.tokenizer.eos_token_id, *ends) if end is not None}

    @torch.inference_mode()
    def _logits(self, batch: list[tuple[int, ...]], first: int) -> torch.Tensor:
        """Return the logits of position `first` and later ones, [B, S - first, V]."""
        width = len(batch[0])
        # on the right, where a causal model cannot attend to the padding
        padded = [[*row, *[self.separator] * (width - len(row))] for row in batch]
        inputs = torch.tensor(padded, device=self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.model(input_ids=inputs, use_cache=False, logits_to_keep=width - first).logits


@torch.inference_mode()
def _score(logits: torch.Tensor, request: ScoreRequest) -> Score:
    """Return the score of a request from its logits [n, V], one row per scored token."""
    targets = torch.tensor(request.tokens[request.first :], device=logits.device)
    all_log_probs = torch.log_softmax(logits.float(), -1)
    log_probs = all_log_probs.gather(1, targets[:, None])[:, 0]
    is_greedy = logits.argmax(-1) == targets
    return Score(log_probs.double().cpu().numpy(), is_greedy.cpu().numpy())
