"""`--target android` and `--target ios`: the model, code that runs it, a check and a card."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ...runtime.base import flags
from ...runtime.base.files import fill_template, write_json_atomically, write_text_atomically
from ...runtime.base.quantities import format_bytes, format_count, markdown_table
from ...runtime.engines.engine import EngineOptions, load_engine
from ...runtime.engines.manifest import cache_bytes
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import DecoderShape
from ...train.model.architecture import Architecture
from ..checkpoint import Checkpoint
from ..gguf.exporter import GgufOptions, check_gguf, write_model
from ..greedy import CONTEXT, GreedyCheck, greedy_check
from ..manifest import Contents, generation_defaults, write_manifest
from ..request import ExportRequest, log
from ..targets import Exporter
from .conversation import Tools, chat_calls, chat_turns, read_functions

Platform = Literal["android", "ios"]


@dataclass(frozen=True)
class Kit:
    """Contents of a kit, once the model is written."""

    platform: Platform
    checkpoint: Checkpoint
    model: Contents
    check: GreedyCheck
    """The answer of the model."""
    context: int
    """Tokens of a conversation."""
    snippets: Sequence[str]
    """Code files."""
    pushed: Sequence[str]
    """Files for the phone."""
    has_functions: bool = False
    """Whether the kit was exported with functions that the app's `call` may call."""

    @property
    def name(self) -> str:
        return Path(self.checkpoint.name).name


LLAMA_RN = "0.12.9"
"""Release whose type declarations the code was written against."""

LLAMA_CPP = "0c1e57098"
"""Commit of llama.cpp in llama-cpp-python 0.3.36, whose header the code was written against."""


def write_snippets(kit: Kit, folder: Path) -> None:
    """Write the kit's code."""
    options = {}
    for option, value in generation_defaults(kit.checkpoint).items():
        options[option.upper()] = f"{value:g}" if value % 1 else f"{value:.1f}"
    marks = {
        "NAME": kit.name,
        "FOLDER": re.sub(r"[^A-Za-z0-9._-]", "-", kit.name) or "model",
        "FILES": " ".join(kit.pushed),
        "CONTEXT": str(kit.context),
        "LLAMA_CPP": LLAMA_CPP,
        "LLAMA_RN": LLAMA_RN,
        **options,
    }
    source = resources.files(__name__.rpartition(".")[0]).joinpath("code")
    for file in kit.snippets:
        text = source.joinpath(Path(file).name).read_text(encoding="utf-8")
        for mark, value in marks.items():
            text = text.replace(f"@{mark}@", value)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / file, text)
        if file.endswith(".sh"):
            (folder / file).chmod(0o755)


PROMPT, DEPTH = 128, 512
"""Prompt tokens, and tokens before the decoded one, for the expected speed."""

USES = {
    "build.gradle.kts": "the Android app as a Gradle project, with `settings.gradle.kts` and `gradle.properties`",
    "src/main/kotlin/efficientllm/kit/MainActivity.kt": "its screen",
    "src/main/kotlin/efficientllm/kit/Conversation.kt": "conversations as Flows, for your own app, too",
    "src/main/cpp/llama_chat.cpp": "their calls of llama.cpp; `CMakeLists.txt` builds both",
    "Kit.xcodeproj/project.pbxproj": "the iOS app as an Xcode project; put llama.cpp's `llama.xcframework` beside it",
    "App/ChatApp.swift": "its screen",
    "App/Conversation.swift": "conversations as AsyncSequences, for your own app, too",
    "App/llama_chat.cpp": "their calls of llama.cpp; `llama_chat.h` is the bridging header",
    "llama-rn.ts": "React Native on llama.cpp",
    "push.sh": "copies the model to a phone by adb, where debug builds may read it",
}


def expected_speed(profile: DeviceProfile, architecture: Architecture) -> dict[str, Any]:
    """Return the origin of `profile` and the tokens per second that it predicts for prefill and decode.

    Raises UsageError if the profile does not fit the model.
    """
    shape = DecoderShape.from_dict(architecture.to_dict())
    prefill, decode = 1000 * PROMPT / profile.prefill_ms(shape, PROMPT), 1000 / profile.decode_ms(shape, DEPTH)
    return {"on": profile.measured_on, "prefill": prefill, "decode": decode}


def card(kit: Kit, folder: Path, speed: dict[str, Any] | None) -> str:
    """Return the text of README.md for the model in `folder`. `speed` is from `expected_speed`."""
    return fill_template(
        str(__package__),
        "card.md.jinja",
        kit=kit,
        system={"android": "Android", "ios": "iOS"}[kit.platform],
        size=format_count(kit.checkpoint.architecture.num_parameters),
        model=_model(kit, folder),
        speed=speed,
        prompt=PROMPT,
        depth=DEPTH,
        code=markdown_table(
            [["file", "what it is"], *([file, USES[file]] for file in kit.snippets if file in USES)], left=(0, 1)
        ),
        margin=kit.check.margin,
    )


def _model(kit: Kit, folder: Path) -> str:
    architecture, model = kit.checkpoint.architecture, kit.model
    heads = sum(layer.num_key_value_heads for layer in architecture.layers)
    size = (folder / model.files[0]).stat().st_size
    memory = size + cache_bytes(kit.context, heads, architecture.head_dim, 2)
    row = [model.files[0], model.engine, model.quantization, format_bytes(size), format_bytes(memory)]
    return markdown_table([["file", "runtime", "weights", "on disk", "memory"], row], left=(0, 1, 2))


SNIPPETS: dict[Platform, tuple[str, ...]] = {
    "android": (
        *("build.gradle.kts", "settings.gradle.kts", "gradle.properties", "src/main/AndroidManifest.xml"),
        *(f"src/main/kotlin/efficientllm/kit/{name}" for name in ("MainActivity.kt", "Conversation.kt")),
        *(
            f"src/main/cpp/{name}"
            for name in ("CMakeLists.txt", "llama_chat_jni.cpp", "llama_chat.cpp", "llama_chat.h")
        ),
        *("llama-rn.ts", "push.sh"),
    ),
    "ios": (
        "Kit.xcodeproj/project.pbxproj",
        *(f"App/{name}" for name in ("ChatApp.swift", "Conversation.swift", "llama_chat.cpp", "llama_chat.h")),
        "llama-rn.ts",
    ),
}
"""Platform -> code for it."""

CHECK_FILE = "check.json"
DEFAULTS_FILE = "generation.json"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class PhoneOptions(GgufOptions):
    """--target android, ios."""

    max_context: int = flags.count(2048, at_least=2)
    """Tokens of a conversation, at most the model's context."""
    functions: str = ""
    """JSON file with a list of functions in OpenAI's form, which the app's `call` may call."""
    device_profile: str = ""
    """Latency profile of the phone, written by efficientllm-bench --profile; the card then predicts the speed."""


def check_phone(options: PhoneOptions) -> None:
    """Raise UsageError for a damaged profile, and MissingExtraError without llama.cpp."""
    check_gguf(options)
    if options.functions:
        read_functions(Path(options.functions))
    if options.device_profile:
        DeviceProfile.load(Path(options.device_profile))


def export_kit(platform: Platform, checkpoint: Checkpoint, request: ExportRequest[PhoneOptions], folder: Path) -> None:
    """Write a kit for apps of a platform. A failure leaves nothing behind."""
    options = request.options
    profile = DeviceProfile.load(Path(options.device_profile)) if options.device_profile else None
    # before the model is written, so that a profile of another head size fails at once
    speed = expected_speed(profile, checkpoint.architecture) if profile is not None else None
    model = write_model(checkpoint, request, folder)
    if profile is not None:
        profile.check(engine=model.engine, quantization=model.quantization)
    context = min(options.max_context, checkpoint.context_length)
    request.clock.begin("answering")
    check = greedy_check(folder / model.files[0], context)
    write_json_atomically(folder / CHECK_FILE, {model.engine: asdict(check)})
    tools = read_functions(Path(options.functions)) if options.functions else ()
    spoken = _conversation(folder / model.files[0], tools)
    write_json_atomically(folder / DEFAULTS_FILE, {"context": context, **generation_defaults(checkpoint), **spoken})
    snippets, pushed = SNIPPETS[platform], [*model.files, DEFAULTS_FILE, CHECK_FILE]
    kit = Kit(platform, checkpoint, model, check, context, snippets, pushed, bool(tools))
    write_snippets(kit, folder)
    write_text_atomically(folder / CARD_FILE, card(kit, folder, speed))
    layout = f"{platform} kit, {model.layout}"
    contents = replace(model, files=[*pushed, CARD_FILE], layout=layout, editable=snippets)
    write_manifest(checkpoint, request, folder, contents)
    log.info("read %s first", request.output / CARD_FILE)


ANDROID = Exporter(PhoneOptions, partial(export_kit, "android"), check_phone)
IOS = Exporter(PhoneOptions, partial(export_kit, "ios"), check_phone)


def _conversation(model: Path, tools: Tools) -> dict[str, Any]:
    """Return what the model's chat template writes around messages, and the format of calls."""
    with contextlib.closing(load_engine(model, EngineOptions(threads=1, context=CONTEXT, tune=False))) as engine:
        calls = {"calls": asdict(chat_calls(engine, tools))} if tools else {}
        return {"turns": asdict(chat_turns(engine, tools)), **calls}
