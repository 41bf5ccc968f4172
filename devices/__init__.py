"""Measure artefacts on devices.

from efficientllm.devices import benchmark

run = benchmark(["small-gguf"])
print(run.results[0].speeds["tg64"].median)
"""

from typing import TYPE_CHECKING

from ..runtime.base.extras import lazy_names

if TYPE_CHECKING:
    from .bench import benchmark
    from .results import BenchOptions

__all__ = ["BenchOptions", "benchmark"]

__getattr__ = lazy_names(__name__, {"BenchOptions": ".results:BenchOptions", "benchmark": ".bench:benchmark"})
