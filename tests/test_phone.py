"""`--target android` and `ios`: what kits hold, that their code parses, and that checks are the engines' answers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_kotlin
import tree_sitter_swift
import tree_sitter_typescript
from exporting import export
from priced import tiny_profile
from shared_fixtures import Exported
from tiny import UNEQUAL, tiny_architecture

from efficientllm.export.checkpoint import open_checkpoint
from efficientllm.export.greedy import GreedyCheck
from efficientllm.export.phone.exporter import CONVERSATIONS, SNIPPETS, Kit, Platform, write_snippets
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import chat_prompt

GRAMMARS = {
    ".kt": tree_sitter_kotlin.language,
    ".kts": tree_sitter_kotlin.language,
    ".swift": tree_sitter_swift.language,
    ".ts": tree_sitter_typescript.language_typescript,
}
"""CMakeLists.txt and the C++ are built (test_the_native_code_answers_as_checked)."""


@pytest.fixture(scope="module")
def kit(exported: Exported) -> Path:
    """For Android, with the GGUF alone, which takes a second."""
    return exported("android", "--formats", "gguf", "--quantize", "f32")


def errors(code: bytes, suffix: str) -> list[str]:
    """Pieces of the code that its language's grammar does not take."""
    parser = tree_sitter.Parser(tree_sitter.Language(GRAMMARS[suffix]()))
    found, todo = [], [parser.parse(code).root_node]
    while todo:
        node = todo.pop()
        if node.is_error or node.is_missing:
            found.append(f"{node.start_point}: {node.text!r}")
        todo += node.children
    return found


def assert_code_parses(kit: Path, platform: Platform, formats: tuple[str, ...]) -> None:
    for name in (name for key in (*formats, "") for name in SNIPPETS[platform][key]):
        text = (kit / name).read_bytes()
        assert not re.search(rb"@[A-Z_]+@", text), name
        if name.endswith(".sh"):
            subprocess.run(["sh", "-n", kit / name], check=True)
        elif Path(name).suffix in GRAMMARS:
            assert errors(text, Path(name).suffix) == [], name


def assert_engine_answers_as_checked(file: Path, check: dict[str, Any]) -> None:
    with contextlib.closing(load_engine(file, EngineOptions(threads=1, context=128, tune=False))) as engine:
        prompt = chat_prompt(engine, [{"role": "user", "content": check["question"]}])
        generation = Generation(engine, prompt, AnswerOptions(32, top_logprobs=2))
        assert "".join(generation) == check["text"]
        logprobs = generation.pop_logprobs()
        assert min(each.top[0][1] - each.top[1][1] for each in logprobs) == check["margin"] > 0
        assert generation.answer == check["tokens"]
        assert prompt == check["prompt_tokens"]


def test_the_grammars_see_what_is_wrong() -> None:
    assert errors(b"fun f() = 1", ".kt") == []
    assert errors(b"fun f( = 1", ".kt")
    assert errors(b"func f( { 1", ".swift")
    assert errors(b"export const = {", ".ts")


def test_a_kit_with_a_gguf(kit: Path) -> None:
    manifest = Manifest.read(kit)
    assert {*manifest.files, "manifest.json"} == {path.name for path in kit.iterdir()}
    assert_code_parses(kit, "android", ("gguf",))
    assert_engine_answers_as_checked(kit / "model.gguf", json.loads((kit / "check.json").read_text())["llama.cpp"])
    with contextlib.closing(load_engine(kit, EngineOptions(threads=1))) as engine:  # a kit is an artefact, too
        assert engine.context_length == manifest.context_length
    text = (kit / "README.md").read_text()
    assert "| model.gguf | llama.cpp | f32 |" in text
    assert "The expected speed is unknown" in text
    assert re.search(r"are at least \d\.\d\d nats \(llama\.cpp\) apart", text)


def test_the_push_script_copies_what_the_code_reads(kit: Path, tmp_path: Path) -> None:
    adb = tmp_path / "adb"
    adb.write_text(f'#!/bin/sh\necho "$ANDROID_SERIAL: $*" >> {tmp_path / "calls"}\n')
    adb.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    subprocess.run([kit / "push.sh", "phone-1"], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.startswith("phone-1: ") for call in calls)
    pushed = [call.split()[2] for call in calls if " push " in call]
    assert pushed == ["model.gguf", "check.json"]
    adb.write_text("#!/bin/sh\nexit 1\n")
    failed = subprocess.run([kit / "push.sh"], env=environment, capture_output=True, check=False)
    assert failed.returncode == 2
    assert b"no phone answers" in failed.stderr


def test_constants_of_a_template_with_dollars(tmp_path: Path, kit: Path) -> None:
    check = GreedyCheck("Why?", '<$x user>\n"Why?\\"<$y>', [], [], "", 1.0)
    code: dict[str, Platform] = {name: "android" if name.endswith(".kt") else "ios" for name in CONVERSATIONS}
    with open_checkpoint(str(kit.parent / "checkpoint")) as opened:
        for name, platform in code.items():
            assert any(name in names for names in SNIPPETS[platform].values())
            checks = {CONVERSATIONS[name]: check}
            write_snippets(Kit(platform, opened, [], checks, 128, [name], [], "1.5.1"), tmp_path)
            text = (tmp_path / name).read_text()
            assert errors(text.encode(), Path(name).suffix) == []
            if platform == "android":
                assert r'BEFORE = "<\$x user>\n\""' in text
            else:
                assert r'before = "<$x user>\n\""' in text


@pytest.mark.skipif(
    not all(map(shutil.which, ("g++", "javac", "java"))), reason="no g++ and JDK (apt install g++ default-jdk)"
)
def test_the_native_code_answers_as_checked(kit: Path, tmp_path: Path) -> None:
    """llama_chat.cpp against the installed llama.cpp, called by a JVM."""
    import llama_cpp

    libraries = Path(llama_cpp.__file__).parent / "lib"
    java, jdk = shutil.which("java"), Path(str(shutil.which("javac"))).resolve().parents[1]
    headers = [libraries.parents[1] / "include", jdk / "include", jdk / "include" / "linux"]
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    linker = [f"-L{libraries}", "-lllama", f"-Wl,-rpath,{libraries}", "-o", tmp_path / "libllama_chat.so"]
    code = kit / "llama_chat.cpp"
    subprocess.run([*compiler, *(f"-I{each}" for each in headers), code, *linker], check=True)
    subprocess.run(["javac", "-d", tmp_path, Path(__file__).with_name("LlamaChat.java")], check=True)

    def answer(model: Path, prompt: str, count: int) -> str:
        (tmp_path / "prompt").write_text(prompt)
        command = [java, f"-Djava.library.path={tmp_path}", "-cp", tmp_path, "efficientllm.kit.LlamaChat"]
        arguments = [*command, model, tmp_path / "prompt", str(count)]
        return subprocess.run(arguments, stdout=subprocess.PIPE, check=True).stdout.decode(errors="replace")

    model, check = kit / "model.gguf", json.loads((kit / "check.json").read_text())["llama.cpp"]
    assert answer(model, check["prompt"], len(check["tokens"])) == check["text"]
    assert "tokens, the conversation room for" in answer(model, "word " * 300, 1)
    assert answer(tmp_path / "none.gguf", "", 1) == "llama.cpp cannot load model.gguf"


def test_the_card_says_the_profile_s_speed(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "phone.json"
    tiny_profile().save(profile)
    kit = exported("android", "--formats", "gguf", "--quantize", "f32")
    output = tmp_path / "kit"
    flags = ("--formats", "gguf", "--no-verify", "--device-profile", str(profile))
    assert export(kit.parent / "checkpoint", "ios", output, *flags) == 2  # the kit's default is q8_0
    assert "measured with quantization q4_0, not q8_0" in capsys.readouterr().err
    flags = (*flags, "--quantize", "q4_0")
    assert export(kit.parent / "checkpoint", "ios", output, *flags) == 0
    assert re.search(
        r"Expected on local .*: \d+ tokens/s of a 128-token prompt, \d+\.\d of an answer",
        (output / "README.md").read_text(),
    )
    assert not (output / "push.sh").exists()


def test_what_is_refused(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = exported("android", "--formats", "gguf", "--quantize", "f32").parent / "checkpoint"
    for flags, said in (
        (("--formats", "tflite"), "--formats tflite: "),
        (("--max-context", "1"), "--max-context 1: must be at least 2"),
        (("--device-profile", str(tmp_path / "none.json")), "none.json"),
    ):
        assert export(checkpoint, "android", tmp_path / "out", *flags) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_kit_in_both_formats(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, kit = (
        save_tiny(tiny_architecture(layers=UNEQUAL[:1])),
        tmp_path / "kit",
    )  # ExecuTorch takes long a layer
    assert export(checkpoint, "android", kit, "--max-context", "128", "--no-verify") == 0
    assert_code_parses(kit, "android", ("gguf", "pte"))
    checks = json.loads((kit / "check.json").read_text())
    assert checks.keys() == {"llama.cpp", "executorch"}
    assert_engine_answers_as_checked(kit / "model.gguf", checks["llama.cpp"])
    assert_engine_answers_as_checked(kit / "model.pte", checks["executorch"])
    assert (
        f'executorch-android:{importlib.metadata.version("executorch").partition("+")[0]}"'
        in (kit / "build.gradle.kts").read_text()
    )
