"""`--target android` and `--target ios`: the model in both formats, code that runs it, checks and a card."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ...runtime.base import flags
from ...runtime.base.files import fill_template, write_json_atomically, write_text_atomically
from ...runtime.base.quantities import format_bytes, format_count, markdown_table, not_one_of
from ...runtime.engines.engine import EngineOptions, load_engine
from ...runtime.engines.manifest import cache_bytes
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import DecoderShape
from ...train.model.architecture import Architecture
from ..checkpoint import Checkpoint
from ..executorch.exporter import check_executorch, write_program
from ..executorch.options import ExecutorchOptions
from ..gguf.exporter import GgufOptions, check_gguf, write_model
from ..greedy import CONTEXT, GreedyCheck, greedy_check
from ..manifest import Contents, generation_defaults, write_manifest
from ..request import ExportRequest, log
from ..targets import Exporter
from .conversation import Tools, chat_calls, chat_turns, read_functions

Platform = Literal["android", "ios"]


@dataclass(frozen=True)
class Kit:
    """Contents of a kit, once the models are written."""

    platform: Platform
    checkpoint: Checkpoint
    models: Sequence[Contents]
    """One entry per format."""
    checks: Mapping[str, GreedyCheck]
    """Engine -> the answer of its model."""
    context: int
    """Tokens of a conversation."""
    snippets: Sequence[str]
    """Code files."""
    pushed: Sequence[str]
    """Files for the phone."""
    executorch: str
    """ExecuTorch release of the program, which its runtime on the phone should match; empty without a program."""
    has_functions: bool = False
    """Whether the kit was exported with functions that the app's `call` may call."""

    @property
    def name(self) -> str:
        return Path(self.checkpoint.name).name


LLAMA_RN = "0.12.9"
REACT_NATIVE_EXECUTORCH = "0.10.2"
"""Releases whose type declarations the code was written against."""

LLAMA_CPP = "0c1e57098"
"""Commit of llama.cpp in llama-cpp-python 0.3.36, whose header the code was written against."""

CONVERSATIONS = ("Chat.kt", "Chat.swift")
"""Code for ExecuTorch that renders the prompt of one question itself."""


def write_snippets(kit: Kit, folder: Path) -> None:
    """Write the kit's code."""
    checkpoint, defaults = kit.checkpoint, generation_defaults(kit.checkpoint)
    ends = checkpoint.end_of_generation_ids
    end = (checkpoint.tokenizer.id_to_token(ends[0]) or "") if ends else ""
    options = {}
    for option, value in defaults.items():
        options[option.upper()] = f"{value:g}" if value % 1 else f"{value:.1f}"
    marks = {
        "NAME": kit.name,
        "FOLDER": re.sub(r"[^A-Za-z0-9._-]", "-", kit.name) or "model",
        "FILES": " ".join(kit.pushed),
        "CONTEXT": str(kit.context),
        "EXECUTORCH": kit.executorch,
        "LLAMA_CPP": LLAMA_CPP,
        "LLAMA_RN": LLAMA_RN,
        "REACT_NATIVE_EXECUTORCH": REACT_NATIVE_EXECUTORCH,
        **options,
    }
    source = resources.files(__name__.rpartition(".")[0]).joinpath("code")
    for file in kit.snippets:
        quote = _kotlin if file.endswith(".kt") else _quoted
        literals = {"END": quote(end)}
        if file in CONVERSATIONS:
            check = kit.checks["executorch"]
            before, _, after = check.prompt.partition(check.question)
            literals |= {"BEFORE": quote(before), "AFTER": quote(after)}
        text = source.joinpath(Path(file).name).read_text(encoding="utf-8")
        for mark, value in {**marks, **literals}.items():
            text = text.replace(f"@{mark}@", value)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / file, text)
        if file.endswith(".sh"):
            (folder / file).chmod(0o755)


def _quoted(text: str) -> str:
    """Return a Swift literal, whose escapes of quotes, backslashes, tabs and line ends are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _kotlin(text: str) -> str:
    """Return a Kotlin literal, in which a dollar starts a template."""
    return _quoted(text).replace("$", "\\$")


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
    "Chat.kt": "Kotlin on ExecuTorch; its head has the dependency",
    "Chat.swift": "Swift on ExecuTorch; its head names the package and its products",
    "react-native-executorch.ts": "React Native on ExecuTorch",
    "llama-rn.ts": "React Native on llama.cpp",
    "push.sh": "copies the model to a phone by adb, where debug builds may read it",
}

CACHE_ELEMENT_BYTES = {"llama.cpp": 2, "executorch": 4}


def expected_speed(profile: DeviceProfile, architecture: Architecture) -> dict[str, Any]:
    """Return the origin of `profile` and the tokens per second that it predicts for prefill and decode.

    Raises UsageError if the profile does not fit the model.
    """
    shape = DecoderShape.from_dict(architecture.to_dict())
    prefill, decode = 1000 * PROMPT / profile.prefill_ms(shape, PROMPT), 1000 / profile.decode_ms(shape, DEPTH)
    return {"on": profile.measured_on, "prefill": prefill, "decode": decode}


def card(kit: Kit, folder: Path, speed: dict[str, Any] | None) -> str:
    """Return the text of README.md for the models in `folder`. `speed` is from `expected_speed`."""
    return fill_template(
        str(__package__),
        "card.md.jinja",
        kit=kit,
        system={"android": "Android", "ios": "iOS"}[kit.platform],
        size=format_count(kit.checkpoint.architecture.num_parameters),
        models=_models(kit, folder),
        speed=speed,
        prompt=PROMPT,
        depth=DEPTH,
        code=markdown_table(
            [["file", "what it is"], *([file, USES[file]] for file in kit.snippets if file in USES)], left=(0, 1)
        ),
        margins=" and ".join(f"{check.margin:.2f} nats ({engine})" for engine, check in kit.checks.items()),
    )


def _models(kit: Kit, folder: Path) -> str:
    architecture = kit.checkpoint.architecture
    heads = sum(layer.num_key_value_heads for layer in architecture.layers)
    rows = [["file", "runtime", "weights", "on disk", "memory"]]
    for each in kit.models:
        file = each.files[0]
        size = (folder / file).stat().st_size
        caches = cache_bytes(kit.context, heads, architecture.head_dim, CACHE_ELEMENT_BYTES[each.engine])
        rows.append([file, each.engine, each.quantization, format_bytes(size), format_bytes(size + caches)])
    return markdown_table(rows, left=(0, 1, 2))


FORMATS = ("gguf", "pte")

SNIPPETS: dict[Platform, dict[str, tuple[str, ...]]] = {
    "android": {
        "gguf": (
            *("build.gradle.kts", "settings.gradle.kts", "gradle.properties", "src/main/AndroidManifest.xml"),
            *(f"src/main/kotlin/efficientllm/kit/{name}" for name in ("MainActivity.kt", "Conversation.kt")),
            *(
                f"src/main/cpp/{name}"
                for name in ("CMakeLists.txt", "llama_chat_jni.cpp", "llama_chat.cpp", "llama_chat.h")
            ),
            "llama-rn.ts",
        ),
        "pte": ("Chat.kt", "react-native-executorch.ts"),
        "": ("push.sh",),
    },
    "ios": {
        "gguf": (
            "Kit.xcodeproj/project.pbxproj",
            *(f"App/{name}" for name in ("ChatApp.swift", "Conversation.swift", "llama_chat.cpp", "llama_chat.h")),
            "llama-rn.ts",
        ),
        "pte": ("Chat.swift", "react-native-executorch.ts"),
        "": (),
    },
}
"""Platform -> format of the model -> code for it ("": any)."""

CHECK_FILE = "check.json"
DEFAULTS_FILE = "generation.json"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class PhoneOptions(GgufOptions):
    """--target android, ios."""

    formats: tuple[str, ...] = flags.comma_separated(*FORMATS)
    """Formats of the model, comma-separated: gguf (llama.cpp), pte (ExecuTorch, 8da4w)."""
    max_context: int = flags.count(2048, at_least=2)
    """Tokens of a conversation, at most the model's context."""
    functions: str = ""
    """JSON file with a list of functions in OpenAI's form, which the app's `call` may call."""
    device_profile: str = ""
    """Latency profile of the phone, written by efficientllm-bench --profile; the card then predicts the speed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.formats:
            flags.require(self, "formats", name in FORMATS, not_one_of(name, FORMATS), value=name)
        flags.require(self, "formats", bool(self.formats), f"must name one of {', '.join(FORMATS)}")


def check_phone(options: PhoneOptions) -> None:
    """Raise UsageError for a damaged profile, and MissingExtraError without the packages of a format."""
    if "gguf" in options.formats:
        check_gguf(options)
    if "pte" in options.formats:
        check_executorch(ExecutorchOptions())
    if options.functions:
        read_functions(Path(options.functions))
    if options.device_profile:
        DeviceProfile.load(Path(options.device_profile))


def export_kit(platform: Platform, checkpoint: Checkpoint, request: ExportRequest[PhoneOptions], folder: Path) -> None:
    """Write a kit for apps of a platform. A failure leaves nothing behind."""
    options = request.options
    profile = DeviceProfile.load(Path(options.device_profile)) if options.device_profile else None
    # before the models are written, so that a profile of another head size fails at once
    speed = expected_speed(profile, checkpoint.architecture) if profile is not None else None
    models = _write_models(checkpoint, request, folder)
    if profile is not None:
        _check_profile(profile, models)
    context = min(options.max_context, checkpoint.context_length)
    request.clock.begin("answering")
    checks = {each.engine: greedy_check(folder / each.files[0], context) for each in models}
    write_json_atomically(folder / CHECK_FILE, {engine: asdict(check) for engine, check in checks.items()})
    tools = read_functions(Path(options.functions)) if options.functions else ()
    spoken = _conversation(folder / models[0].files[0], tools) if "gguf" in options.formats else {}
    write_json_atomically(folder / DEFAULTS_FILE, {"context": context, **generation_defaults(checkpoint), **spoken})
    snippets = [name for key in (*options.formats, "") for name in SNIPPETS[platform][key]]
    model_files = [name for each in models for name in each.files]
    # two formats may have the same tokenizer's files
    pushed = list(dict.fromkeys([*model_files, DEFAULTS_FILE, CHECK_FILE]))
    release = importlib.metadata.version("executorch").partition("+")[0] if "pte" in options.formats else ""
    kit = Kit(platform, checkpoint, models, checks, context, snippets, pushed, release, bool(tools))
    write_snippets(kit, folder)
    write_text_atomically(folder / CARD_FILE, card(kit, folder, speed))
    # a manifest describes one engine: the first format's
    first = models[0]
    contents = replace(
        first,
        files=[*pushed, CARD_FILE],
        layout=f"{platform} kit, {first.layout}",
        editable=tuple(snippets),
    )
    write_manifest(checkpoint, request, folder, contents)
    log.info("read %s first", request.output / CARD_FILE)


ANDROID = Exporter(PhoneOptions, partial(export_kit, "android"), check_phone)
IOS = Exporter(PhoneOptions, partial(export_kit, "ios"), check_phone)


def _conversation(model: Path, tools: Tools) -> dict[str, Any]:
    """Return what the model's chat template writes around messages, and the format of calls."""
    with contextlib.closing(load_engine(model, EngineOptions(threads=1, context=CONTEXT, tune=False))) as engine:
        calls = {"calls": asdict(chat_calls(engine, tools))} if tools else {}
        return {"turns": asdict(chat_turns(engine, tools)), **calls}


def _check_profile(profile: DeviceProfile, models: Sequence[Contents]) -> None:
    """Raise UsageError if the profile was measured for a file outside the kit."""
    measured = profile.measured_on.engine
    same = next((each for each in models if each.engine == measured), models[0])
    profile.check(engine=same.engine, quantization=same.quantization)


def _write_models(checkpoint: Checkpoint, request: ExportRequest[PhoneOptions], folder: Path) -> Sequence[Contents]:
    """Write the model in every format, each verified."""
    options = request.options
    found = []
    if "gguf" in options.formats:
        found.append(write_model(checkpoint, request, folder))
    if "pte" in options.formats:
        program = ExecutorchOptions(
            verify=options.verify, calibrate=options.calibrate, max_kl=options.max_kl, max_context=options.max_context
        )
        # with the same notes: what is said of the program is said of the kit
        part = ExportRequest(program, request.output, request.notes, request.limits, request.clock)
        found.append(write_program(checkpoint, part, folder))
    return found
