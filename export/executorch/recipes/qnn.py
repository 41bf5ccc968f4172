"""Qualcomm's NPUs: their compiler is part of an SDK that pip cannot install, so nothing is lowered to them yet."""

from __future__ import annotations

from typing import Any

from ....runtime.base.errors import UsageError
from . import Recipe


def partitioners() -> list[Any]:
    raise UsageError(
        "--recipe qnn: ExecuTorch lowers to it only with Qualcomm's AI Engine Direct SDK (QNN_SDK_ROOT), with which "
        "efficientllm has not been tried; --recipe vulkan and xnnpack run on the same phones without it"
    )


RECIPE = Recipe("qnn", partitioners, formats=("f16",), custom_ops=False, static_length=True, runs_here=False)
