"""Cache of teacher states on disk, so that runs with the same text and teacher compute them once.

Last hidden states are stored instead of logits. They are smaller than the few best logits, and the LM head computes all
logits from them. Each window is one file, named by its tokens, which several runs may write and read at once. Shapes: B
windows of S tokens, H hidden.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...runtime.base.errors import DiskFullError
from ...runtime.base.files import write_bytes_atomically
from ...runtime.base.quantities import format_bytes

_log = logging.getLogger("efficientllm.train")

CHECKSUM_BYTES = 4


class TeacherCache:
    """Cached last hidden states of one teacher."""

    def __init__(self, folder: Path, dtype: torch.dtype, reserve_bytes: int = 0) -> None:
        """Use `folder`, which belongs to this teacher in this type, and leave `reserve_bytes` of its disk free."""
        self.folder, self.dtype, self._reserve_bytes = folder, dtype, reserve_bytes
        self._keeps = True
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, tokens: Tensor, hidden_size: int) -> Tensor | None:
        """Return [B, S, H] of `tokens` [B, S] on their device; None unless every window is cached and whole.

        A pass over a part of a batch may differ from a pass over all of it in the last bit.
        """
        found = [self._read(path, (tokens.shape[1], hidden_size)) for path in self._paths(tokens)]
        known = [states for states in found if states is not None]
        return torch.stack(known).to(tokens.device) if len(known) == len(found) else None

    def keep(self, tokens: Tensor, hidden: Tensor) -> None:
        """Store `hidden` [B, S, H] of `tokens` [B, S]. A failure is reported once, and states are computed again."""
        if not self._keeps:
            return
        rows = hidden.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        try:
            if (free := shutil.disk_usage(self.folder).free) < self._reserve_bytes:
                raise DiskFullError(self.folder, f"{format_bytes(free)} are left, which checkpoints may need")
            for path, row in zip(self._paths(tokens), rows, strict=True):
                content = row.tobytes()
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomically(path, content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little"))
        except (OSError, DiskFullError) as error:
            self._keeps = False
            _log.warning(f"{error}; teacher states are no longer cached")

    def _paths(self, tokens: Tensor) -> list[Path]:
        """Return the file of each window, in 256 folders."""
        names = [hashlib.sha256(row.tobytes()).hexdigest()[:32] for row in tokens.cpu().to(torch.int32).numpy()]
        return [self.folder / name[:2] / name[2:] for name in names]

    def _read(self, path: Path, shape: tuple[int, int]) -> Tensor | None:
        """Return [S, H], or None if the file is missing or damaged."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        states, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        if len(states) != shape[0] * shape[1] * self.dtype.itemsize:
            return None
        if zlib.crc32(states) != int.from_bytes(checksum, "little"):
            return None
        return torch.from_numpy(np.frombuffer(states, dtype=np.uint8).copy()).view(self.dtype).view(shape)
