"""A made-up device for tiny models, and one whose FFN kernel works in steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from latency import made_up_profile

from efficientllm.runtime.latency.profile import DeviceProfile
from efficientllm.runtime.latency.shape import Workload
from efficientllm.runtime.latency.table import Grid
from efficientllm.train.pruning.measures import DeviceTime

AT_512 = Workload.at_depth(512)


def tiny_profile(head_dim: int = 32) -> DeviceProfile:
    """Heads are dear at depth there, channels cheap."""
    profile = made_up_profile()
    return replace(profile, table=replace(profile.table, head_dim=head_dim))


def cheap_attention_profile(head_dim: int = 32) -> DeviceProfile:
    """Another device, where attention takes a tenth."""
    profile = tiny_profile(head_dim)
    attention = profile.table.parts["attention"]
    parts = profile.table.parts | {"attention": replace(attention, values=attention.values * 0.1)}
    return replace(
        profile,
        measured_on=replace(profile.measured_on, device="other"),
        table=replace(profile.table, parts=parts),
        _prices={},
    )


def stepped_profile(step: int = 64, ms: float = 1.0) -> DeviceProfile:
    """FFN time grows by `ms` with every started `step` of channels, and by nothing in between."""
    profile = tiny_profile()
    widths = tuple(range(8, 257, 8))
    row = [[ms * -(-width // step)] * profile.table.num_conditions for width in widths]
    parts = profile.table.parts | {"ffn": Grid(((64,), widths), np.array([row]))}
    return replace(profile, table=replace(profile.table, parts=parts), _prices={})


def tiny_time(profile: DeviceProfile | None = None, workload: Workload = AT_512) -> DeviceTime:
    return DeviceTime(profile or tiny_profile(), workload)
