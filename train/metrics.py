"""What a run logs: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..runtime.base.errors import UsageError
from .config import RunConfig
from .progress import Progress

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes one record per step; only the main rank writes anything."""

    def __init__(self, folder: Path, settings: RunConfig, is_main: bool) -> None:
        self.path = folder / FILE_NAME
        self.is_main = is_main
        self.settings = settings
        self._tensorboard: Any = None
        self._wandb: Any = None

    def _open(self) -> None:
        if self.settings.tensorboard and self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"))
        if self.settings.wandb and self._wandb is None:
            try:
                import wandb  # type: ignore[import-not-found]
            except ModuleNotFoundError as error:
                raise UsageError("--wandb: wandb is not installed; run: pip install wandb") from error
            self._wandb = wandb.init(project="efficientllm", dir=str(self.path.parent), name=self.path.parent.name)

    def write(self, record: dict[str, Any]) -> None:
        if not self.is_main:
            return
        self._open()
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        numbers |= {f"next_saliency/{kind}": value for kind, value in record.get("next_saliency", {}).items()}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, record["tokens"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def truncate(self, progress: Progress) -> None:
        """Drop what a killed run logged after the checkpoint that is resumed."""
        if not self.is_main or not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off by the kill
                continue
            stage = next((key for key in record if key.startswith("perplexity_")), None)
            seen = stage is None or stage.removeprefix("perplexity_") in progress.perplexity
            if record["step"] <= progress.step and seen:
                kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()]
