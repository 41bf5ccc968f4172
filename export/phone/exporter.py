"""`--target android` and `--target ios`: the model in both formats, code that runs it, what it must answer, a card."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...runtime.base import flags
from ...runtime.base.files import write_json_atomically, write_text_atomically
from ...runtime.base.quantities import none_of
from ...runtime.latency.profile import DeviceProfile
from ..checkpoint import Checkpoint
from ..executorch.exporter import write_program
from ..executorch.options import ExecutorchOptions
from ..generation_defaults import generation_defaults
from ..gguf.exporter import GgufOptions, write_model
from ..greedy import greedy_check
from ..manifest import Contents, write_manifest
from ..request import ExportRequest, log
from ..targets import Exporter
from .card import card, expected_speed
from .kit import Kit, Platform
from .snippets import write_snippets

FORMATS = ("gguf", "pte")
DEFAULT = "q8_0"

SNIPPETS: dict[Platform, dict[str, tuple[str, ...]]] = {
    "android": {
        "gguf": ("LlamaChat.kt", "llama_chat.cpp", "CMakeLists.txt", "llama-rn.ts"),
        "pte": ("Chat.kt", "build.gradle.kts", "react-native-executorch.ts"),
        "": ("push.sh",),
    },
    "ios": {
        "gguf": ("LlamaChat.swift", "llama-rn.ts"),
        "pte": ("Chat.swift", "react-native-executorch.ts"),
        "": (),
    },
}
"""Platform -> format of the model -> the code that takes it ("": any)."""

CHECK_FILE = "check.json"
DEFAULTS_FILE = "generation.json"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class PhoneOptions(GgufOptions):
    """--target android, ios"""

    quantize: str = ""
    """Weight type of the GGUF, as of --target gguf; default: what the checkpoint was trained for (--qat), else q8_0."""
    formats: tuple[str, ...] = flags.comma_separated(*FORMATS)
    """Formats of the model, comma-separated: gguf (llama.cpp), pte (ExecuTorch, 8da4w)."""
    max_context: int = flags.count(2048)
    """Tokens of a conversation, at most the model's context."""
    device_profile: str = ""
    """Profile of the phone, as efficientllm-bench --profile writes it: the card then says what speed to expect."""

    def __post_init__(self) -> None:
        for name in self.formats:
            flags.require(self, "formats", name in FORMATS, none_of(name, FORMATS), value=name)
        flags.require(self, "formats", bool(self.formats), f"must name one of {', '.join(FORMATS)}")
        flags.require(self, "max_context", self.max_context >= 2, "must be at least 2: a token and its answer")


def export_android(checkpoint: Checkpoint, request: ExportRequest[PhoneOptions], folder: Path) -> None:
    """Write a kit for Android apps; raises before anything is left behind."""
    _export("android", checkpoint, request, folder)


def export_ios(checkpoint: Checkpoint, request: ExportRequest[PhoneOptions], folder: Path) -> None:
    """Write a kit for iOS apps; raises before anything is left behind."""
    _export("ios", checkpoint, request, folder)


ANDROID = Exporter(PhoneOptions, export_android)
IOS = Exporter(PhoneOptions, export_ios)


def _export(platform: Platform, checkpoint: Checkpoint, request: ExportRequest[PhoneOptions], folder: Path) -> None:
    options = request.options
    profile = DeviceProfile.load(Path(options.device_profile)) if options.device_profile else None  # before the work
    speed = expected_speed(profile, checkpoint.architecture) if profile is not None else None
    models = _write_models(checkpoint, request, folder)
    if profile is not None:
        _check_profile(profile, models)
    context = min(options.max_context, checkpoint.context_length)
    checks = {each.engine: greedy_check(folder / each.files[0], context) for each in models}
    write_json_atomically(folder / CHECK_FILE, {engine: asdict(check) for engine, check in checks.items()})
    write_json_atomically(folder / DEFAULTS_FILE, {"context": context, **generation_defaults(checkpoint)})
    snippets = [name for key in (*options.formats, "") for name in SNIPPETS[platform][key]]
    pushed = [*dict.fromkeys([*(name for each in models for name in each.files), CHECK_FILE])]
    kit = Kit(platform, checkpoint, models, checks, context, snippets, pushed, _executorch_version(options.formats))
    write_snippets(kit, folder)
    write_text_atomically(folder / CARD_FILE, card(kit, folder, speed))
    written = [*pushed, DEFAULTS_FILE, CARD_FILE, *snippets]
    first = models[0]
    write_manifest(checkpoint, request, folder, replace(first, files=written, layout=f"{platform} kit, {first.layout}"))
    log.info("read %s first", request.output / CARD_FILE)


def _check_profile(profile: DeviceProfile, models: Sequence[Contents]) -> None:
    """UsageError where the profile was measured of a file that is not in the kit."""
    measured = profile.measured_on.engine
    same = next((each for each in models if each.engine == measured), models[0])
    profile.check(engine=same.engine, quantization=same.quantization)


def _write_models(checkpoint: Checkpoint, request: ExportRequest[PhoneOptions], folder: Path) -> Sequence[Contents]:
    """The model in every format asked for, each verified."""
    options = request.options
    found = []
    if "gguf" in options.formats:
        found.append(write_model(checkpoint, request, folder, DEFAULT))
    if "pte" in options.formats:
        program = ExecutorchOptions(
            verify=options.verify, calibrate=options.calibrate, max_kl=options.max_kl, max_context=options.max_context
        )
        # with the same notes: what is said of the program is said of the kit
        part = ExportRequest(program, request.output, request.notes)
        found.append(write_program(checkpoint, part, folder))
    return found


def _executorch_version(formats: Sequence[str]) -> str:
    """Of the installed release; "" without a program."""
    if "pte" not in formats:
        return ""
    return importlib.metadata.version("executorch").partition("+")[0]
