"""Run exported models: engines, sampling, chat. Imports no torch.

from efficientllm.runtime import load

with load("small-gguf") as model:
    print(model.chat("What is the capital of France?"))
"""

from typing import TYPE_CHECKING

from .base.extras import lazy_names

if TYPE_CHECKING:
    __version__: str

    from .base.errors import EfficientLLMError
    from .engines.engine import EngineOptions
    from .model import Model, load
    from .sampling import SamplingOptions

__all__ = ["EfficientLLMError", "EngineOptions", "Model", "SamplingOptions", "__version__", "load"]

__getattr__ = lazy_names(
    __name__,
    {
        "EfficientLLMError": ".base.errors:EfficientLLMError",
        "EngineOptions": ".engines.engine:EngineOptions",
        "Model": ".model:Model",
        "SamplingOptions": ".sampling:SamplingOptions",
        "__version__": ".base.flags:VERSION",
        "load": ".model:load",
    },
)
