"""Compare an exported model with torch eager within limits.

S sample tokens, V vocabulary; logits are fp32 [S, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..runtime.base.errors import ArtefactError
from ..runtime.base.extras import extra
from ..runtime.sampling import log_softmax
from .checkpoint import Checkpoint
from .request import ExportRequest, RoundingOptions

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest |logit difference| of a zero-padded model in torch itself."""

MAX_EXACT_DIFFERENCE = 1e-3
"""Largest |logit difference| of an fp32 file in another engine, whose sums run in another order."""

MAX_KL_BY_BITS = ((12.0, 0.02), (7.0, 0.3), (4.9, 0.7), (3.5, 1.5), (0.0, 4.0))
"""(at least this many bits per weight, largest mean KL from the exact file in nats per token)."""

SAMPLE_TOKENS = 256

Activation = Callable[[Any], Any]
"""Activation of an FFN as another program computes it: a function of a tensor."""


@cache
def sample_text() -> str:
    """Return prose in several languages and code, shipped with the package."""
    return resources.files("efficientllm.export").joinpath("sample.txt").read_text(encoding="utf-8")


def sample_tokens(checkpoint: Checkpoint, limit: int = SAMPLE_TOKENS) -> list[int]:
    """Return token ids of the sample text under the checkpoint's tokenizer, at most `limit`."""
    ids = checkpoint.tokenizer.encode(sample_text(), add_special_tokens=False).ids
    return ids[: min(limit, checkpoint.context_length)]


@dataclass(frozen=True)
class Sample:
    """Tokens of the sample text and torch's logits: the reference of a verification."""

    tokens: list[int]
    logits: np.ndarray
    """fp32 [S, V]"""


def torch_sample(checkpoint: Checkpoint, limit: int = SAMPLE_TOKENS, activation: Activation | None = None) -> Sample:
    """Return at most `limit` tokens with the checkpoint's logits in torch. `activation` is that of torch_logits."""
    tokens = sample_tokens(checkpoint, limit)
    return Sample(tokens, torch_logits(checkpoint.folder, tokens, activation))


def torch_logits(folder: Path, tokens: list[int], activation: Activation | None = None) -> np.ndarray:
    """Return logits [S, V] of the Hugging Face model in `folder`, fp32, eager.

    `activation` replaces the model's own.
    """
    with extra("export"):
        import torch

        from ..train.model.source import load_for_inference
    model = load_for_inference(folder)
    if activation is not None:
        _replace_activation(model, activation)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def _replace_activation(model: Any, activation: Activation) -> None:
    for name, module in model.named_modules():
        if name.endswith(("mlp.act_fn", "mlp.act")):  # transformers has both names
            module.register_forward_hook(lambda module, inputs, output: activation(inputs[0]))


@dataclass(frozen=True)
class Agreement:
    """Agreement of two sets of logits over the same tokens."""

    tokens: int
    max_logit_difference: float
    argmax_agreement: float
    """Share of positions with the same most likely token."""
    mean_kl: float
    """Mean KL(reference || file) in nats per token."""
    perplexity_ratio: float
    """Perplexity of the file over that of the reference, on the sample."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_logits(reference: np.ndarray, logits: np.ndarray, tokens: list[int]) -> Agreement:
    """Compare logits [S, V] of the same `tokens`."""
    p, q = log_softmax(reference), log_softmax(logits)
    following = np.asarray(tokens[1:])
    rows = np.arange(len(following))
    loss_change = float((p[rows, following] - q[rows, following]).mean())
    return Agreement(
        tokens=len(tokens),
        max_logit_difference=float(np.abs(reference - logits).max()),
        argmax_agreement=float((reference.argmax(-1) == logits.argmax(-1)).mean()),
        mean_kl=max(0.0, float((np.exp(p) * (p - q)).sum(-1).mean())),
        perplexity_ratio=math.exp(min(loss_change, 700.0)),
    )


def check_exact(agreement: Agreement, reference: np.ndarray, target: str, most: float = MAX_EXACT_DIFFERENCE) -> None:
    """Raise ArtefactError if an fp32 file is not the checkpoint's function.

    The limit grows with the logits' size, because fp32 rounding is relative.
    """
    limit = most * max(1.0, float(np.abs(reference).max()) / 32)
    if not agreement.max_logit_difference <= limit:
        raise ArtefactError(
            f"{target}: the fp32 file's logits differ from torch's by {agreement.max_logit_difference:.2e} (limit "
            f"{limit:.0e}); nothing was written. Please report this model; --no-verify exports it anyway"
        )


def check_quantized(agreement: Agreement, bits_per_weight: float, max_kl: float | None, target: str) -> None:
    """Raise ArtefactError if quantisation changed the model more than its bits explain.

    On text that the model would write, a KL of k multiplies the perplexity by exp(k), which is its limit.
    """
    limit = max_kl if max_kl is not None else next(kl for bits, kl in MAX_KL_BY_BITS if bits_per_weight >= bits)
    if not agreement.mean_kl <= limit:
        raise ArtefactError(
            f"{target}: quantisation gives a mean KL of {agreement.mean_kl:.3f} nats per token, more than {limit}; "
            "nothing was written. Choose a larger type, raise --max-kl, or export with --no-verify"
        )
    if not agreement.perplexity_ratio <= math.exp(limit):
        raise ArtefactError(
            f"{target}: quantisation multiplies the sample's perplexity by {agreement.perplexity_ratio:.3f}, more than "
            f"{math.exp(limit):.3f} (exp of --max-kl); nothing was written. Choose a larger type, raise --max-kl, or "
            "export with --no-verify"
        )


PREFILL_TOKENS = 64
"""Tokens of the verification sample in the prefill; the rest is decoded token by token."""


@dataclass(frozen=True)
class Written:
    """A written file in the messages and limits of its verification."""

    target: str
    kind: str
    """The target's name of its file."""
    quantize: str
    """Weight type; f32 must be exact."""
    bits: float
    """Bits per weight, which determine the limit."""


class Stepwise(Protocol):
    """Runner of a written file, token by token: an engine, or a library that gives logits."""

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Start with `tokens` and return the last one's logits, fp32 [V]."""
        ...

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits."""
        ...

    def close(self) -> None: ...


def verify_stepwise(
    engine: Stepwise, sample: Sample, written: Written, request: ExportRequest[RoundingOptions]
) -> Agreement:
    """Compare prefill and teacher-forced decoding of a written file with torch's logits at all positions.

    Closes the engine. Raises ArtefactError beyond the limits.
    """
    tokens = sample.tokens
    start = min(PREFILL_TOKENS, len(tokens) - 1)
    # logits of the prompt's last token, then one row for every token fed: torch's rows from start - 1 on
    rows = [engine.prefill(tokens[:start]), *(engine.decode(token) for token in tokens[start:])]
    engine.close()
    expected = sample.logits[start - 1 :]
    agreement = compare_logits(expected, np.stack(rows), tokens[start - 1 :])
    if written.quantize == "f32":
        check_exact(agreement, expected, written.target)
    else:
        check_quantized(agreement, written.bits, request.options.max_kl, written.target)
    request.say(
        f"verified {written.quantize} {written.kind} against torch (prefill {start}, then {len(tokens) - start} decode "
        f"steps): max |logit difference| {agreement.max_logit_difference:.1e}, same argmax "
        f"{agreement.argmax_agreement:.1%}, mean KL {agreement.mean_kl:.4f}, "
        f"perplexity x{agreement.perplexity_ratio:.3f}"
    )
    return agreement
