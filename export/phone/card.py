"""The kit's README: what is in it, what it needs and gives on a phone, and how to tell that it works there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.quantities import format_bytes, format_count, markdown_table
from ...runtime.engines.manifest import cache_bytes
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import DecoderShape
from ...train.model.architecture import Architecture
from .kit import Kit, Platform

PROMPT, DEPTH = 128, 512
"""Tokens of the prompt and before the decoded token that the expected speed is of."""

USES = {
    "Chat.kt": "Kotlin on ExecuTorch; needs `build.gradle.kts`' line in the app's",
    "build.gradle.kts": "the dependency",
    "Chat.swift": "Swift on ExecuTorch; its head names the package and its products",
    "react-native-executorch.ts": "React Native on ExecuTorch",
    "LlamaChat.kt": "Kotlin on llama.cpp; needs the next two in the app's `src/main/cpp`",
    "llama_chat.cpp": "its calls of llama.cpp",
    "CMakeLists.txt": "builds them for the app; its head has the line of `build.gradle.kts`",
    "LlamaChat.swift": "Swift on llama.cpp's XCFramework",
    "llama-rn.ts": "React Native on llama.cpp",
    "push.sh": "copies the model to a phone by adb, where debug builds may read it",
}

SYSTEMS: dict[Platform, str] = {"android": "Android", "ios": "iOS"}

CACHE_ELEMENT_BYTES = {"llama.cpp": 2, "executorch": 4}


@dataclass(frozen=True)
class ExpectedSpeed:
    """What a profile predicts of the model."""

    device: str
    engine: str
    quantization: str
    prefill_tokens_per_second: float
    """Of a prompt of PROMPT tokens."""
    decode_tokens_per_second: float
    """After DEPTH tokens."""
    is_emulated: bool


def expected_speed(profile: DeviceProfile, architecture: Architecture) -> ExpectedSpeed:
    """On the device of `profile`; UsageError where it cannot price the model."""
    shape = DecoderShape.from_dict(architecture.to_dict())
    on = profile.measured_on
    return ExpectedSpeed(
        on.device,
        on.engine,
        on.quantization,
        1000 * PROMPT / profile.prefill_ms(shape, PROMPT),
        1000 / profile.decode_ms(shape, DEPTH),
        on.emulated,
    )


def card(kit: Kit, folder: Path, speed: ExpectedSpeed | None) -> str:
    """The text of README.md; the models lie in `folder` already."""
    size = format_count(kit.checkpoint.architecture.num_parameters)
    parts = [
        f"# {kit.name} for {SYSTEMS[kit.platform]}",
        f"{size} parameters, conversations of up to {kit.context} tokens.",
        _models(kit, folder),
        "The memory is the file and the key/value caches of a full conversation; the runtime's own comes on top "
        "(tens of MB).",
        _speed(speed),
        "## In an app",
        markdown_table([["file", "what it is"], *([file, USES[file]] for file in kit.snippets)], left=(0, 1)),
        "`generation.json` has the context and how answers are sampled; `chat_template.jinja`, where the model has "
        "one, how a conversation is written. The code was written against the declarations of the releases it names; "
        "our tests parse it and run `llama_chat.cpp`. No phone ran it.",
        "## Does it work there?",
        "`check.json` holds, for each runtime, a prompt and the first greedy tokens of the exporting machine. "
        "`check()` in the Kotlin, the Swift and llama-rn.ts asks the phone the same and returns null (nil) where the "
        f"answers agree. The nearest two candidates are {_margins(kit)} apart; another processor's kernels round "
        "otherwise, by a tenth or so, so where that is little an answer may part late. One that parts within the first "
        "words is of another model.",
        "## Licence and quality",
        "The licence is the source model's. What pruning and training left of its quality is in `manifest.json` under "
        "`training`; how the files compare with the checkpoint, under `verification`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _models(kit: Kit, folder: Path) -> str:
    architecture = kit.checkpoint.architecture
    heads = sum(layer.num_key_value_heads for layer in architecture.layers)
    rows = [["file", "runtime", "weights", "on disk", "memory"]]
    for each in kit.models:
        size = (folder / each.files[0]).stat().st_size
        caches = cache_bytes(kit.context, heads, architecture.head_dim, CACHE_ELEMENT_BYTES[each.engine])
        rows.append([each.files[0], each.engine, each.quantization, format_bytes(size), format_bytes(size + caches)])
    return markdown_table(rows, left=(0, 1, 2))


def _margins(kit: Kit) -> str:
    return " and ".join(f"{check.margin:.2f} nats ({engine})" for engine, check in kit.checks.items())


def _speed(speed: ExpectedSpeed | None) -> str:
    if speed is None:
        return (
            "What speed to expect is not known: measure the phone once with `efficientllm-bench --profile FILE "
            "--device adb` and export with `--device-profile FILE`."
        )
    text = (
        f"Expected on {speed.device} ({speed.engine}, {speed.quantization}), by its latency profile: "
        f"{speed.prefill_tokens_per_second:.0f} tokens/s of a {PROMPT}-token prompt, "
        f"{speed.decode_tokens_per_second:.1f} of an answer after {DEPTH}."
    )
    return text + (
        " The profile is of an EMULATED device: no figure of it holds on a real one." if speed.is_emulated else ""
    )
