"""Export a checkpoint to a file that stock runtimes run, verified.

from efficientllm.export import export

export("runs/small", "gguf", "small-gguf", quantize="q8_0")
"""

from typing import TYPE_CHECKING

from ..runtime.base.extras import lazy_names

if TYPE_CHECKING:
    from .cli import export

__all__ = ["export"]

__getattr__ = lazy_names(__name__, {"export": ".cli:export"})
