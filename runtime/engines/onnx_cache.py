"""Key/value caches of onnxruntime sessions, bound as inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import ArtefactError


@dataclass(frozen=True)
class CacheInput:
    """A graph input past_key_values.i.key or .value."""

    name: str
    groups: int
    head_dim: int
    dtype: type[np.floating[Any]]

    @property
    def output(self) -> str:
        """The output that is this input one step later."""
        return self.name.replace("past_key_values", "present")

    def zeros(self, length: int) -> np.ndarray:
        """A cache [1, G, length, D]."""
        return np.zeros((1, self.groups, length, self.head_dim), dtype=self.dtype)


def cache_inputs(items: Sequence[Any], decoder: dict[str, Any]) -> list[CacheInput]:
    """The caches among graph inputs.

    onnxruntime-genai's builder leaves their sizes to `decoder` in genai_config.json; ArtefactError without either.
    """
    caches = []
    for item in items:
        if item.name.startswith("past_key_values."):
            _, groups, _, head_dim = item.shape
            try:
                groups = groups if isinstance(groups, int) else decoder["num_key_value_heads"]
                head_dim = head_dim if isinstance(head_dim, int) else decoder["head_size"]
            except KeyError as error:
                raise ArtefactError(f"{item.name} names no size, nor does {error} in genai_config.json") from error
            caches.append(CacheInput(item.name, groups, head_dim, np.float16 if "16" in item.type else np.float32))
    return caches


def ort_value(array: np.ndarray) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


class SharedCache:
    """One buffer [1, G_i, context, D] per layer and part, input and output at once."""

    def __init__(self, inputs: list[CacheInput], binding: Any, context: int) -> None:
        self._arrays = [cache.zeros(context) for cache in inputs]
        self._buffers = [ort_value(array) for array in self._arrays]  # the same memory
        for cache, buffer in zip(inputs, self._buffers, strict=True):
            binding.bind_ortvalue_input(cache.name, buffer)
            binding.bind_ortvalue_output(cache.output, buffer)

    def truncate(self, length: int) -> None:
        """Positions beyond `length` are overwritten: nothing to do."""

    def advance(self) -> None:
        """The buffers hold the new positions already."""

    def copy(self, source: SharedCache, length: int) -> None:
        """Hold the first `length` positions of `source`."""
        for target, array in zip(self._arrays, source._arrays, strict=True):
            target[:, :, :length] = array[:, :, :length]


class GrowingCache:
    """Every step's present becomes the next one's past."""

    def __init__(self, inputs: list[CacheInput], binding: Any) -> None:
        self._inputs, self._binding = inputs, binding
        self._past = [ort_value(cache.zeros(0)) for cache in inputs]
        self._bind()

    def _bind(self) -> None:
        for cache, past in zip(self._inputs, self._past, strict=True):
            self._binding.bind_ortvalue_input(cache.name, past)
            self._binding.bind_output(cache.output, "cpu")

    def copy(self, source: GrowingCache, length: int) -> None:
        """Hold the first `length` positions of `source`."""
        self._past = source._past
        self.truncate(length)
        self._bind()

    def truncate(self, length: int) -> None:
        if self._past and length < self._past[0].shape()[2]:
            kept = (np.ascontiguousarray(past.numpy()[:, :, :length]) for past in self._past)
            self._past = [ort_value(array) for array in kept]
            self._bind()

    def advance(self) -> None:
        self._past = list(self._binding.get_outputs()[: len(self._inputs)])  # in the order they were bound
        self._bind()
