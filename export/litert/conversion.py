"""Run Google's exporter (litert-torch) on a checkpoint, with corrections for irregular models.

It traces the model as transformers loads it and sizes the caches by `per_layer_config`. Only layers without heads need
a correction.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base.errors import ArtefactError
from ...runtime.base.extras import extra
from ..checkpoint import Checkpoint
from ..request import log

IMAGE_GENERATION = "litert_torch.generative.export_hf.model_ext.bonsai_flux2.bonsai_flux2"
"""Module of litert-torch 0.10 that imports a TensorFlow outside the package's requirements."""

SAMPLER = ("top_k", "top_p", "temperature")
"""Sampling settings that the file can store."""


@dataclass(frozen=True)
class Program:
    """Output of the exporter."""

    tflite: Path
    """The graph with the weights."""
    bundle: Path
    """The same with tokenizer, chat template and metadata, which LiteRT-LM loads."""


def _import_exporter() -> Any:
    """Return litert-torch's exporter. Raises MissingExtraError if it is not installed."""
    # an empty module in its place: no model of ours generates images
    if importlib.util.find_spec("tensorflow") is None and IMAGE_GENERATION not in sys.modules:
        stand_in = types.ModuleType(IMAGE_GENERATION)
        stand_in.BonsaiFlux2 = type("BonsaiFlux2", (), {})  # type: ignore[attr-defined]
        sys.modules[IMAGE_GENERATION] = stand_in
    with extra("litert", "litert-torch"):
        from litert_torch.generative.export_hf import export  # type: ignore[import-not-found]
    return export


def convert(checkpoint: Checkpoint, work: Path, recipe: str, context: int, prefill_lengths: Sequence[int]) -> Program:
    """Write the program of a checkpoint into the folder `work`, quantised by `recipe` ("none": fp32).

    Raises ArtefactError with the last message if the exporter fails.
    """
    exporter, said = _import_exporter(), io.StringIO()
    log.info("tracing the model with litert-torch, which takes a minute or more")
    settings = {
        "trust_remote_code": True,  # the modeling file beside our weights
        "prefill_lengths": list(prefill_lengths),
        "cache_length": context,
        "quantization_recipe": recipe,
        "keep_temporary_files": True,  # the .tflite, which is verified
        **{f"sampler_{name}": value for name, value in checkpoint.sampling.items() if name in SAMPLER},
    }
    # it asks on stdin whether a tokenizer may run code; ours needs none
    with _layers_without_heads(), contextlib.redirect_stdout(said), _no_input():
        try:
            exporter.export(str(checkpoint.folder), str(work), **settings)
        except Exception as error:  # of whatever library it was
            raise ArtefactError(f"litert-torch cannot convert {checkpoint.name}: {error}") from error
    bundles, programs = sorted(work.glob("*.litertlm")), sorted(work.glob("*.tflite"))
    if len(bundles) != 1 or not programs:
        last = (said.getvalue().strip().splitlines() or ["it said nothing"])[-1]
        raise ArtefactError(f"litert-torch wrote no model of {checkpoint.name}: {last}")
    return Program(max(programs, key=lambda path: len(path.name)), bundles[0])  # the quantised one has a suffix


@contextlib.contextmanager
def _no_input() -> Iterator[None]:
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


@contextlib.contextmanager
def _layers_without_heads() -> Iterator[None]:
    """Size the caches of layers without heads for the one zero per token that our modeling file stores there."""
    from litert_torch.generative.export_hf.core import cache  # type: ignore[import-not-found]

    layer_class: Any = cache.LiteRTLMCacheLayer
    infer = layer_class._infer_cache_shape_from_config

    def shapes(cls: Any, model_config: Any, layer_index: int, export_config: Any) -> Any:
        keys, values, kind = infer.__func__(cls, model_config, layer_index, export_config)
        if keys[1]:
            return keys, values, kind
        return *(_with_one(export_config, index) for index in (export_config.k_ts_idx, export_config.v_ts_idx)), kind

    layer_class._infer_cache_shape_from_config = classmethod(shapes)
    try:
        yield
    finally:
        layer_class._infer_cache_shape_from_config = infer


def _with_one(export_config: Any, time_axis: int) -> tuple[int, int, int, int]:
    """Return the shape of a cache with one head of one channel."""
    batch, slots = export_config.batch_size, export_config.cache_length
    return (batch, 1, slots, 1) if time_axis == 2 else (batch, 1, 1, slots)
