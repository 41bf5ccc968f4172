"""`efficientllm-plan`: predict the gain of pruning on measured devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.extras import extra
from ...runtime.base.model_names import check_source
from ...runtime.base.quantities import format_count
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import Workload
from ..config.pruning import LatencyTarget, PruneConfig

if TYPE_CHECKING:
    from ..model.architecture import Architecture
    from ..pruning.measures import DeviceTime


@dataclass(frozen=True)
class PlanConfig:
    """Plan."""

    device_profile: tuple[str, ...] = ()
    """Latency profile of a device, written by efficientllm-bench --profile; repeatable."""
    workload: str = "depth=512"
    """Workload: prompt=256,answer=128 (tokens) for a whole answer, depth=512 for one token after 512."""
    target: tuple[str, ...] = flags.comma_separated("0.8x", "0.6x")
    """Targets, comma-separated: shares of the source's time (0.6x), or milliseconds (8ms)."""
    prune: tuple[str, ...] = flags.comma_separated("attention", "ffn")
    """Pruning space, comma-separated, as in efficientllm-train."""
    width_multiple: int = 32
    """Multiple of FFN and hidden widths, in channels."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for text in self.target:
            try:
                LatencyTarget.parse(text)
            except ValueError as error:
                flags.require(self, "target", False, str(error), value=text)
        rule = "vocabulary rows are ranked by text, which a plan does not have; remove it"
        flags.require(self, "prune", not self.space.prunes_vocabulary, rule, value=",".join(self.prune))

    @property
    def space(self) -> PruneConfig:
        """Return the pruning space as settings of a run."""
        return PruneConfig(prune=self.prune, width_multiple=self.width_multiple)


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        PlanConfig,
        prog="efficientllm-plan",
        examples=("plan demo --device-profile phone.json --target 0.67x,0.5x",),
        description="Before training: what each kind of group costs on measured devices, and what a target in "
        "milliseconds leaves.",
    )
    parser.add_argument("source", help="Hugging Face or run folder, hub id, .gguf file, or 'demo'")
    return parser


def source_shape(source: str) -> Architecture:
    """Return the shape of a --source of efficientllm-train, or of a finished run. Hub weights are not downloaded."""
    with extra("train"):
        from transformers import AutoConfig

        from ..model.irregular import architecture_of
        from ..model.source import load_source, loading, shape_of_folder, shape_of_gguf
    shape = shape_of_folder(source) or shape_of_folder(str(Path(source) / "model")) or shape_of_gguf(source)
    if shape is not None:
        return shape
    if source == "demo" or source.endswith(".gguf") or Path(source).exists():
        return architecture_of(load_source(source, source)[0].config)
    with loading(source):
        return architecture_of(AutoConfig.from_pretrained(source))


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    name = arguments.pop("source")
    config = flags.take(arguments, PlanConfig)
    if not config.device_profile:
        raise UsageError("name a profile of a device with --device-profile")
    check_source(name, name)
    workload = Workload.parse(config.workload)
    profiles = [DeviceProfile.load(Path(path)) for path in config.device_profile]
    with extra("train"):
        from ..pruning.measures import DeviceTime
    _plan(name, source_shape(name), [DeviceTime(profile, workload) for profile in profiles], config)
    return 0


def _plan(name: str, source: Architecture, times: Sequence[DeviceTime], config: PlanConfig) -> None:
    """Print the plan."""
    from ..pruning.selection import SelectionRules
    from . import targets

    print(f"{name}: {format_count(source.num_parameters)} parameters, {len(source.layers)} layers\n")
    for time in times:
        print("\n".join(targets.device_lines(source, time)))
    print(f"\n{targets.price_table(source, targets.candidates(source), times)}\n")
    space = config.space
    rules = SelectionRules(space.kinds, space.width_multiple, blocks=space.blocks)
    found = [
        (text, time, targets.meaning(source, time, LatencyTarget.parse(text), rules))
        for time in times
        for text in config.target
    ]
    print(targets.target_table(source, found))
