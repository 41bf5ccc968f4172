"""Inputs, outputs, dynamic axes and dummy inputs of exported decoders, on optimum's exporter base classes.

`OnnxDecoderConfig` describes decoders whose caches are inputs and outputs, `ExecutorchDecoderConfig` decoders with
caches inside. Both are registered with optimum's TasksManager for the irregular model types, so that
`TasksManager.get_exporter_config_constructor("onnx", ...)` finds them.

B batch, S new tokens, P past tokens, T = P + S, G_i key/value heads of layer i, D head_dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedTextConfig
from optimum.utils.input_generators import DummyInputGenerator

from ..train.model.architecture import FAMILIES, Architecture

TASKS = ("text-generation", "text-generation-with-past")


class NormalizedIrregularConfig(NormalizedTextConfig):
    """Config of a model with per-layer widths."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.architecture = Architecture.from_hf_config(config if isinstance(config, dict) else config.to_dict())


class DummyDecoderGenerator(DummyInputGenerator):
    """Dummy tokens, their mask and their position, and caches [B, G_i, P, D], one pair for a layer with attention."""

    SUPPORTED_INPUT_NAMES = ("input_ids", "attention_mask", "tokens", "input_pos", "past_key_values.")

    def __init__(
        self,
        task: str,
        normalized_config: NormalizedIrregularConfig,
        batch_size: int = 2,
        sequence_length: int = 3,
        past_length: int = 5,
        **kwargs: Any,
    ) -> None:
        self.architecture = normalized_config.architecture
        self.batch_size, self.sequence_length, self.past_length = batch_size, sequence_length, past_length

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Any:
        if input_name == "attention_mask":
            return torch.ones(self.batch_size, self.past_length + self.sequence_length, dtype=torch.int64)
        if input_name == "input_pos":
            return torch.zeros(1, dtype=torch.int64)
        if input_name.startswith("past_key_values."):
            heads = self.architecture.layers[int(input_name.split(".")[1])].num_key_value_heads
            shape = [self.batch_size, heads, self.past_length, self.architecture.head_dim]
            return self.random_float_tensor(shape, framework=framework, dtype=float_dtype)
        shape, vocab_size = [self.batch_size, self.sequence_length], self.architecture.vocab_size
        return self.random_int_tensor(shape, max_value=vocab_size, framework=framework, dtype=int_dtype)


class DecoderConfig(ExporterConfig):
    """Common part of both decoder configs."""

    NORMALIZED_CONFIG_CLASS = NormalizedIrregularConfig
    ATOL_FOR_VALIDATION = 1e-3
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyDecoderGenerator,)
    SUPPORTS_PAST = True

    def __init__(self, config: Any, task: str = "text-generation", use_past: bool = True, **kwargs: Any) -> None:
        """Read `config`, a transformers config or the contents of a config.json.

        `use_past` is optimum's "-with-past".
        """
        super().__init__(config, task, **kwargs)
        self.use_past = use_past

    @property
    def architecture(self) -> Architecture:
        return self._normalized_config.architecture


class OnnxDecoderConfig(DecoderConfig):
    """Config of a decoder with caches outside.

    forward(input_ids, attention_mask, past_key_values.i.key/value) -> logits [B, 1, V], present.i.key/value.
    """

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        names = {"input_ids": {0: "batch_size", 1: "sequence"}, "attention_mask": {0: "batch_size", 1: "total"}}
        return names | {f"past_key_values.{name}": {0: "batch_size", 2: "past"} for name in self._caches()}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"logits": {0: "batch_size"}} | {
            f"present.{name}": {0: "batch_size", 2: "total"} for name in self._caches()
        }

    def _caches(self) -> list[str]:
        """Return the names of the caches of layers with attention."""
        if not self.use_past:
            return []
        layers = enumerate(self.architecture.layers)
        return [f"{index}.{part}" for index, layer in layers if layer.num_key_value_heads for part in ("key", "value")]


class ExecutorchDecoderConfig(DecoderConfig):
    """Config of forward(tokens [1, S], input_pos [1]) -> logits [1, V], with the caches inside the program."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"tokens": {1: "tokens"}, "input_pos": {}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"logits": {}}


def register() -> None:
    """Register the irregular model types with optimum's TasksManager. Idempotent."""
    for backend, config in (("onnx", OnnxDecoderConfig), ("executorch", ExecutorchDecoderConfig)):
        for family in FAMILIES:
            register_type: Any = TasksManager.create_register(backend, overwrite_existing=True)
            register_type(f"efficientllm_{family}", *TASKS)(config)


register()
