"""Compare an exported model with torch eager within limits.

S sample tokens, V vocabulary; logits are fp32 [S, V].
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..runtime.base.errors import ArtefactError, ModelError
from ..runtime.base.extras import extra
from ..runtime.sampling import log_softmax
from ..train.model.architecture import Architecture
from ..train.model.rescaling import Scales
from .checkpoint import Checkpoint
from .request import ExportRequest, RoundingOptions

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest |logit difference| of a zero-padded model in torch itself."""

MAX_EXACT_DIFFERENCE = 1e-3
"""Largest |logit difference| of an fp32 file in another engine, whose sums run in another order."""
OWN_ERRORS, MAX_OWN_DIFFERENCE = 2.0, 1e-2
"""The same in errors of torch's own fp32 logits, if that is more, and its cap: a model may depend on the last bits of
an angle."""

REPORT = "nothing was written. Please report this model; --no-verify exports it anyway"
"""End of the message for a file that is not what was exported."""

SAMPLE_TOKENS = 256
"""Tokens of the sample of a model without windows."""
BEYOND_WINDOW = 64
"""Tokens of the sample behind the longest window."""

Activation = Callable[[Any], Any]
"""Activation of an FFN as another program computes it: a function of a tensor."""


@cache
def sample_text() -> str:
    """Return prose in several languages and code, shipped with the package."""
    return resources.files("efficientllm.export").joinpath("sample.txt").read_text(encoding="utf-8")


def sample_tokens(checkpoint: Checkpoint, slots: int = sys.maxsize) -> list[int]:
    """Return token ids of the sample text under the checkpoint's tokenizer, at most `slots`."""
    ids = checkpoint.tokenizer.encode(sample_text(), add_special_tokens=False).ids
    if not ids:
        raise ModelError(f"{checkpoint.name}: tokenizer.json gives no tokens for a text; its vocabulary is empty")
    window = max(settings.window for settings in checkpoint.attention)
    count = min(SAMPLE_TOKENS, len(ids))
    if window:  # every window must end within the sample, which repeats the text if that is too short
        count = max(count, window + BEYOND_WINDOW)
    repetitions = -(-count // len(ids))
    return (ids * repetitions)[: min(count, slots, checkpoint.context_length)]


@dataclass(frozen=True)
class Sample:
    """Tokens of the sample text and torch's logits: the reference of a verification."""

    tokens: list[int]
    logits: np.ndarray
    """fp32 [S, V]"""
    own_error: Callable[[], float] = lambda: 0.0
    """Measures the error of these logits, see `torch_error`."""


def torch_sample(
    checkpoint: Checkpoint,
    slots: int = sys.maxsize,
    activation: Activation | None = None,
    multiplies_angles: bool = False,
) -> Sample:
    """Return at most `slots` tokens with the checkpoint's logits in torch. `activation` replaces the model's own.

    `multiplies_angles` is that of `torch_error`. Raises ArtefactError if the checkpoint was read as another model than
    transformers builds.
    """
    with extra("export"):
        from ..train.model.source import load_for_inference
        from .reading import check_reading
    tokens, model = sample_tokens(checkpoint, slots), load_for_inference(checkpoint.folder)
    check_reading(checkpoint, model, len(tokens))
    logits = _logits(model, tokens, activation)
    return Sample(tokens, logits, cache(partial(torch_error, checkpoint.folder, tokens, logits, multiplies_angles)))


def torch_logits(folder: Path, tokens: list[int], activation: Activation | None = None) -> np.ndarray:
    """Return logits [S, V] of the Hugging Face model in `folder`, fp32, eager."""
    with extra("export"):
        from ..train.model.source import load_for_inference
    return _logits(load_for_inference(folder), tokens, activation)


def _logits(model: Any, tokens: list[int], activation: Activation | None = None) -> np.ndarray:
    import torch

    if activation is not None:
        replace_activation(model, activation)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def torch_error(folder: Path, tokens: list[int], logits: np.ndarray, multiplies_angles: bool = False) -> float:
    """Return the largest |difference| of torch's fp32 logits [S, V] from those in fp64.

    transformers computes angles of rotation in fp32, in an fp64 model as well. At position 256 they are wrong by 1e-5,
    and sharp attention multiplies that. Here they are products in fp64 of torch's own frequencies. Those are fp32
    numbers, so every second one moves by a unit in its last place. With `multiplies_angles`, the engine multiplies the
    angle of a channel by one fp32 ratio to get the next, as llama.cpp does, so channel i moves by i units.
    """
    with extra("export"):
        import torch

        from ..train.model.attention import FULL
        from ..train.model.source import load_for_inference
        from .reading import frequencies_of

    def rotate_exactly(module: Any, inputs: Any, outputs: Any) -> Any:
        frequencies = frequencies_of(module, inputs[2] if len(inputs) > 2 else FULL)
        channels = torch.arange(len(frequencies))
        units = channels if multiplies_angles else (channels + 1) % 2
        moved = frequencies * (1 + torch.finfo(torch.float32).eps * units)
        angles = (torch.arange(len(tokens)).double()[:, None] * moved).repeat(1, 2)[None]
        return angles.cos(), angles.sin()

    model = load_for_inference(folder).double()
    model.base_model.rotary_emb.register_forward_hook(rotate_exactly)
    return float(np.abs(_logits(model, tokens) - logits).max())


def replace_activation(model: Any, activation: Activation) -> None:
    """Let every FFN of a transformers model use `activation`."""
    for name, module in model.named_modules():
        if name.endswith(("mlp.act_fn", "mlp.act")):  # transformers has both names
            module.register_forward_hook(lambda module, inputs, output: activation(inputs[0]))


@dataclass(frozen=True)
class StoredWeights:
    """Dequantised weights of a file, in a shape of the checkpoint's family or of Llama's."""

    architecture: Architecture
    scales: Scales
    tensors: Mapping[str, np.ndarray]
    """{our name: fp32 array}, gains with their offset."""
    roundings: Mapping[str, str]
    """{matrix: key of parity.ROUNDINGS} of the matrices whose inputs the engine rounds."""
    origin: str
    """Origin of the weights, for the manifest."""


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
    divergences = (np.exp(p) * (p - q)).sum(-1)
    is_same = reference.argmax(-1) == logits.argmax(-1)
    return Agreement(
        tokens=len(tokens),
        max_logit_difference=float(np.abs(reference - logits).max()),
        argmax_agreement=float(is_same.mean()),
        mean_kl=max(0.0, float(divergences.mean())),  # rounding may leave a little less than 0
        perplexity_ratio=math.exp(min(loss_change, 700.0)),  # exp of more overflows
    )


def size_of(reference: np.ndarray) -> float:
    """Return the factor of limits: they grow with the logits' size, because fp32 rounding is relative."""
    return max(1.0, float(np.abs(reference).max()) / 32)


def own_limit(reference: np.ndarray, own_error: Callable[[], float]) -> float:
    """Return the limit for a model whose fp32 logits have an error of their own."""
    return min(OWN_ERRORS * own_error(), MAX_OWN_DIFFERENCE * size_of(reference))


def check_exact(
    agreement: Agreement,
    reference: np.ndarray,
    target: str,
    most: float = MAX_EXACT_DIFFERENCE,
    own_error: Callable[[], float] = lambda: 0.0,
) -> None:
    """Raise ArtefactError if an fp32 file is not the checkpoint's function, beyond torch's `own_error`."""
    limit = most * size_of(reference)
    if agreement.max_logit_difference > limit:
        limit = max(limit, own_limit(reference, own_error))
    if not agreement.max_logit_difference <= limit:  # NaN is not within it
        raise ArtefactError(
            f"{target}: the fp32 file's logits differ from torch's by {agreement.max_logit_difference:.2e} (limit "
            f"{limit:.0e}); {REPORT}"
        )


def check_distance(agreement: Agreement, max_kl: float | None, target: str) -> None:
    """Raise ArtefactError if quantisation changed the model more than --max-kl, if that is set."""
    if max_kl is None:
        return
    if not agreement.mean_kl <= max_kl:
        raise ArtefactError(
            f"{target}: quantisation gives a mean KL of {agreement.mean_kl:.3f} nats per token, more than --max-kl "
            f"{max_kl}; nothing was written. Choose a larger type or raise --max-kl"
        )
    # on text that the model would write, a KL of k multiplies the perplexity by exp(k)
    if not agreement.perplexity_ratio <= math.exp(max_kl):
        raise ArtefactError(
            f"{target}: quantisation multiplies the sample's perplexity by {agreement.perplexity_ratio:.3f}, more than "
            f"{math.exp(max_kl):.3f} (exp of --max-kl); nothing was written. Choose a larger type or raise --max-kl"
        )


@dataclass(frozen=True)
class EngineRun:
    """Logits of an engine at some positions of the sample."""

    title: str
    """Passes of the tokens through the engine, in words."""
    positions: list[int]
    logits: np.ndarray
    """fp32 [positions, V]"""


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
    doubtful: float = math.inf
    """Mean KL beyond which a warning recommends int8."""


class Stepwise(Protocol):
    """Runner of a written file, token by token: an engine, or a library that gives logits."""

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Start with `tokens` and return the last one's logits, fp32 [V]."""
        ...

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits."""
        ...

    def close(self) -> None: ...


def step_through(engine: Stepwise, tokens: list[int]) -> EngineRun:
    """Return the logits of a prefill and of teacher-forced decoding. Closes the engine."""
    start = min(PREFILL_TOKENS, len(tokens) - 1)
    # logits of the prompt's last token, then one row for every token fed
    rows = [engine.prefill(tokens[:start]), *(engine.decode(token) for token in tokens[start:])]
    engine.close()
    title = f"a prefill of {start}, then {len(tokens) - start} decode steps"
    return EngineRun(title, list(range(start - 1, len(tokens))), np.stack(rows))


CHUNKS = (33, 1, 64, 7, 2)
"""Tokens of the passes of a run in uneven chunks, repeated."""


def run_chunks(engine: Stepwise, tokens: list[int]) -> EngineRun:
    """Return the logits after each of several prefills, each of which continues the last. Closes the engine."""
    all_ends = itertools.accumulate(itertools.cycle(CHUNKS))
    ends = list(itertools.takewhile(lambda end: end < len(tokens), all_ends))
    ends = ends or [len(tokens) // 2, len(tokens) - 1]  # a context shorter than the first chunk
    rows = [engine.prefill(tokens[:end]) for end in ends]
    engine.close()
    return EngineRun(f"in chunks of {', '.join(map(str, CHUNKS))}", [end - 1 for end in ends], np.stack(rows))


def check_stepwise(
    run: EngineRun, sample: Sample, written: Written, request: ExportRequest[RoundingOptions]
) -> Agreement:
    """Compare a run of a written file with torch's logits at its positions, which follow each other.

    Raises ArtefactError beyond the limits.
    """
    expected = sample.logits[run.positions]
    agreement = compare_logits(expected, run.logits, sample.tokens[run.positions[0] :])
    if written.quantize == "f32":
        check_exact(agreement, expected, written.target, own_error=sample.own_error)
    else:
        check_distance(agreement, request.options.max_kl, written.target)
    request.say(
        f"{'verified ' if written.quantize == 'f32' else ''}{written.quantize} {written.kind} against torch "
        f"({run.title}): max |logit difference| {agreement.max_logit_difference:.1e}, same argmax "
        f"{agreement.argmax_agreement:.1%}, mean KL {agreement.mean_kl:.4f}, "
        f"perplexity x{agreement.perplexity_ratio:.3f}"
    )
    return agreement
