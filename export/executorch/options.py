"""Flags of `--target executorch`, without the torch code that writes the program."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import unknown_name
from ..request import PaddingOptions

GROUP_SIZES = (32, 64, 128)
TYPES = ("8da4w", "int8", "f32", "f16")
"""`--quantize` values; the first is the default."""


@dataclass(frozen=True)
class ExecutorchOptions(PaddingOptions):
    """--target executorch."""

    quantize: str = flags.type_name()
    """Weight type: f32, f16, 8da4w, int8; default: 8da4w."""
    output_type: str = flags.type_name()
    """Type of the LM head: int8, int4."""
    embedding_type: str = flags.type_name()
    """Type of the token embedding: int8, int4."""
    group_size: int = 32
    """Weights per scale of 8da4w: 32, 64 or 128."""
    custom_ops: bool = True
    """Use ExecuTorch's LLM operators; turn off for runtimes without them (decoding is several times slower)."""
    max_context: int = flags.count(2048, at_least=2)
    """Slots of the key/value caches, at most the model's context."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        sizes = ", ".join(map(str, GROUP_SIZES))
        flags.require(self, "group_size", self.group_size in GROUP_SIZES, f"XNNPACK takes {sizes}")
        name = self.weight_type
        if name not in TYPES:
            raise unknown_name("--quantize", name, TYPES, of=" for executorch")
        for flag, value in (("--output-type", self.output_type), ("--embedding-type", self.embedding_type)):
            if value not in ("", "int8", "int4"):
                raise UsageError(f"{flag} {value}: executorch takes int8 or int4")
            if value and name not in ("8da4w", "int8"):
                raise UsageError(f"{flag} {value} goes with --quantize 8da4w or int8, not {name}")

    @property
    def weight_type(self) -> str:
        """Return the weight type."""
        return self.quantize or TYPES[0]
