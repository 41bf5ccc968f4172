"""`efficientllm-train`: prune a source model while training it on a corpus."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime.base import flags
from ..runtime.base.command import is_main_process
from ..runtime.base.cpu_load import FreeCores
from ..runtime.base.errors import UsageError
from ..runtime.base.extras import extra
from ..runtime.base.output import locked_output
from .checkpoint.run_folder import SETTINGS_FILE, saved_config
from .config.presets import PRESETS, preset
from .config.pruning import NO_TARGET
from .config.sections import TrainConfig
from .loop.request import check_request, check_text, in_its_folder, with_resume

_log = logging.getLogger("efficientllm.train")

BUSY_SHARE = 0.25
"""Share of busy cores above which waiting threads sleep. One of two cores was measured."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        TrainConfig,
        prog="efficientllm-train",
        examples=(
            "train --preset job --data train.jsonl --output runs/job",
            "train --preset recover --source demo --data notes/ --target-ratio 0.8 --output runs/small",
        ),
        description="Prune a pretrained language model while it goes on pretraining (EfficientLLM, arXiv 2502.06663).",
        epilog="Settings are taken from the preset, then from --config, then from flags; --resume --output RUN takes "
        "what is left out from the run.",
    )
    parser.add_argument("--preset", metavar="NAME", help=f"named starting point: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", help="TOML file, as --print-config writes it")
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and leave")
    return parser


def configuration(arguments: dict[str, Any]) -> TrainConfig:
    """Resolve preset, --config file and flags into one configuration."""
    name, file = arguments.pop("preset", None), arguments.pop("config", None)
    config = preset(name) if name else TrainConfig()
    if name and any(arguments.get(field) is not None for field in NO_TARGET):  # it replaces that of the preset
        config = replace(config, pruning=replace(config.pruning, **NO_TARGET))
    settings = Path(arguments.get("output", "")) / SETTINGS_FILE
    is_resumed = arguments.get("resume") or arguments.get("resume_or_start")
    if is_resumed and not name and not file and settings.is_file():  # a resumed run knows its own
        config = saved_config(settings.parent)
    if file:
        try:
            values = flags.read_toml(Path(file).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UsageError(f"--config {file}: cannot be read: {error.strerror}") from error
        except ValueError as error:  # neither UTF-8 nor TOML
            raise UsageError(f"--config {file}: not valid TOML: {error}") from error
        config = flags.merge(config, values, f"--config {file}")
    return flags.merge(config, arguments, "flags")


def set_environment() -> None:
    """Set what torch reads from the environment and the user has not set. Call it before torch is imported.

    Segments of a GPU's memory grow, because tensors of other shapes after a removal do not fit into fixed ones.
    OpenMP's threads sleep while they wait, if other programs use this machine. A small bf16 step of an MLP on two cores
    beside one busy core ran at 5.1 steps/s so, and at 3.4 with threads that spin. On quiet cores it ran at 6.6 and at
    8.3, so threads spin there, as by default.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if "torch" in sys.modules or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    if load := FreeCores.where_known(1):
        load.update()
        if load.others >= BUSY_SHARE * len(load.cores):
            os.environ["OMP_WAIT_POLICY"] = "passive"
            _log.info("other programs use this machine: waiting threads sleep (OMP_WAIT_POLICY=active changes that)")


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    print_only = arguments.pop("print_config")
    config = with_resume(configuration(arguments))
    if print_only:
        print(config.to_toml(), end="")
        return 0
    if config.run.resume and config.run.output:
        saved_config(Path(config.run.output))  # UsageError where there is no run
        config = in_its_folder(config)
    if is_main_process():
        check_request(config)
        check_text(config)
        with locked_output(Path(config.run.output)):  # UsageError now if a run has it, and not when a model is loaded
            pass
    _log.info(f"loading {config.source.source}, to train on {', '.join(config.source.data)}")  # torch takes seconds
    set_environment()
    with extra("train"):
        from .run import run_training

    model = run_training(config)
    if model is None:
        return 130
    _log.info(f"model: {model}")
    return 0
