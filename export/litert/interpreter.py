"""The .tflite inside a .litertlm, run token by token in LiteRT's interpreter: what a verification asks.

T tokens of the longest prefill signature, C slots of the caches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MASKED = -1e9


class TfliteDecoder:
    """One sequence in a program with the signatures `prefill_T` and `decode`."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

        self._interpreter: Any = Interpreter(str(path), num_threads=1)
        lengths = [int(name.split("_")[1]) for name in self._interpreter.get_signature_list() if name != "decode"]
        self.prefill_length = max(lengths)
        self._prefill = self._interpreter.get_signature_runner(f"prefill_{self.prefill_length}")
        self._decode = self._interpreter.get_signature_runner("decode")
        inputs = self._decode.get_input_details()
        self._slots = int(inputs["mask"]["shape"][-1])
        self._caches = {
            name: np.zeros(entry["shape"], dtype=entry["dtype"])
            for name, entry in inputs.items()
            if name.startswith("kv_cache")
        }
        self._length = 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin with `tokens`; returns the last one's logits, fp32 [V]."""
        self._length = 0
        for start in range(0, len(tokens) - 1, self.prefill_length):
            part = tokens[start : min(start + self.prefill_length, len(tokens) - 1)]
            padded = np.zeros((1, self.prefill_length), dtype=np.int32)
            padded[0, : len(part)] = part
            self._run(self._prefill, padded)
            self._length += len(part)  # what the padding left behind that is written over before it is seen
        return self.decode(tokens[-1])

    def decode(self, token: int) -> np.ndarray:
        """Append one token; returns its logits, fp32 [V]."""
        found = self._run(self._decode, np.array([[token]], dtype=np.int32))
        self._length += 1
        return np.asarray(found["logits"], dtype=np.float32).reshape(-1)

    def _run(self, signature: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """One call; the caches are those that it gives."""
        positions = np.arange(self._length, self._length + tokens.shape[1], dtype=np.int32)
        is_hidden = np.arange(self._slots)[None] > positions[:, None]
        mask = np.where(is_hidden, np.float32(MASKED), np.float32(0))[None, None]
        found = signature(tokens=tokens, input_pos=positions, mask=mask, **self._caches)
        self._caches = {name: found[name] for name in self._caches}
        return found

    def close(self) -> None:
        """Free the model."""
        self._prefill = self._decode = self._interpreter = None
