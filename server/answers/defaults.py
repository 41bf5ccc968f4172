"""How a server samples where a request says nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ...runtime.sampling import SamplingOptions


@dataclass(frozen=True)
class SamplingDefaults:
    """sampling, where a request says nothing; by default the model's own, else llama.cpp's"""

    temperature: float | None = None
    """0: always the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0: all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probabilities reach this sum."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float | None = None
    """Divide the logits of tokens already in the sequence by this; 1: off."""

    def __post_init__(self) -> None:
        SamplingOptions(**asdict(self))  # which says what is wrong

    def fill(self, asked: SamplingOptions) -> SamplingOptions:
        """`asked`, with what it leaves open from here, as far as it is said here."""
        open_names = [
            name for name, value in asdict(self).items() if value is not None and getattr(asked, name) is None
        ]
        return replace(asked, **{name: getattr(self, name) for name in open_names})
