"""Configuration of a decoder whose layers differ, in the format of Llama-Nemotron (`block_configs`).

This file is copied into every folder of `efficientllm-export --target hf`, where vLLM and TensorRT-LLM load it with
trust_remote_code. It imports transformers only.
"""

from collections.abc import Sequence
from typing import Any

from transformers.models.llama import configuration_llama

strict: Any = getattr(configuration_llama, "strict", lambda cls: cls)  # collects validators since transformers 5


class Block(dict[str, Any]):
    """A JSON object whose entries are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return Block(value) if isinstance(value, dict) else value


@strict
class NemotronNasConfig(configuration_llama.LlamaConfig):
    """Llama's configuration with one entry of block_configs per layer."""

    model_type = "nemotron-nas"

    def __init__(
        self, block_configs: Sequence[dict[str, Any]] = (), num_attention_heads: int = 32, **settings: Any
    ) -> None:
        # Llama's own check wants hidden_size to be a multiple of the heads, which nothing needs where head_dim is given
        super().__init__(num_attention_heads=1, **settings)
        self.num_attention_heads = num_attention_heads
        self.block_configs = [Block(block) for block in block_configs]

    def validate_architecture(self) -> None:
        """Accept any number of heads, because head_dim is given."""
