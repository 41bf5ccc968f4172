"""`--target android` and `ios`: what kits hold, that their code parses, and that checks are the engines' answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tree_sitter
import tree_sitter_kotlin
import tree_sitter_swift
import tree_sitter_typescript
from accepting import is_accepted
from exporting import export
from priced import tiny_profile
from shared_fixtures import Exported
from tiny import CHAT_TEMPLATE

from efficientllm.export.checkpoint import open_checkpoint
from efficientllm.export.phone.conversation import chat_calls, chat_turns
from efficientllm.export.phone.exporter import SNIPPETS, Platform
from efficientllm.runtime.base.errors import ModelError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.grammar import Grammar, GrammarConstraint, lark_of
from efficientllm.runtime.prompt import ToolUse, chat_prompt, tool_prompt
from efficientllm.runtime.tool_format import LEARNED_MARK

KIT_PROGRAMS = Path(__file__).parent / "kit"
"""Programs that run a kit's code on this machine."""

GRAMMARS = {
    ".kt": tree_sitter_kotlin.language,
    ".kts": tree_sitter_kotlin.language,
    ".swift": tree_sitter_swift.language,
    ".ts": tree_sitter_typescript.language_typescript,
}
"""The C++ is compiled (test_the_native_code_answers_as_checked)."""


@pytest.fixture(scope="module")
def kit(exported: Exported) -> Path:
    return exported("android", "--quantize", "f32")


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


def assert_code_parses(kit: Path, platform: Platform) -> None:
    for name in SNIPPETS[platform]:
        text = (kit / name).read_bytes()
        assert not re.search(rb"@[A-Z_]+@", text), name
        if name.endswith(".sh"):
            subprocess.run(["sh", "-n", kit / name], check=True)
        elif Path(name).suffix in GRAMMARS:
            assert errors(text, Path(name).suffix) == [], name
        elif name.endswith(".xml"):
            ElementTree.fromstring(text)
        elif name.endswith(".pbxproj"):
            assert_project_is_whole(text.decode(), kit)


def assert_project_is_whole(text: str, kit: Path) -> None:
    """Check that each object of an Xcode project is used, and that its files exist (but for llama.cpp's)."""
    defined = re.findall(r"^\t\t(\w{24}) = \{isa = \w+; .*\};$", text, re.MULTILINE)
    assert len(defined) == len(set(defined)) == text.count("{isa = ")
    used = re.findall(r"(?<!\t\t)\b(\w{24})\b", text)
    assert set(used) == set(defined)
    assert text.count("{") == text.count("}")
    assert text.count("(") == text.count(")")
    paths = {path for path in re.findall(r" path = ([\w.]+);", text) if path != "Kit.app"}
    assert paths - {path.name for path in kit.iterdir()} == {"llama.xcframework"}
    assert (kit / "App" / "llama_chat.h").exists()
    assert "BRIDGING_HEADER = App/llama_chat.h" in text


def assert_engine_answers_as_checked(file: Path, check: dict[str, Any]) -> None:
    with contextlib.closing(load_engine(file, EngineOptions(threads=1, context=128, tune=False))) as engine:
        prompt = chat_prompt(engine, [{"role": "user", "content": check["question"]}])
        generation = Generation(engine, prompt, AnswerOptions(32, top_logprobs=2))
        assert "".join(generation) == check["text"]
        logprobs = generation.pop_logprobs()
        assert min(each.top[0][1] - each.top[1][1] for each in logprobs) == check["margin"] > 0
        assert generation.answer == check["tokens"]
        assert prompt == check["prompt_tokens"]


def test_parsers_find_errors_in_the_code() -> None:
    assert errors(b"fun f() = 1", ".kt") == []
    assert errors(b"fun f( = 1", ".kt")
    assert errors(b"func f( { 1", ".swift")
    assert errors(b"export const = {", ".ts")


def test_a_kit_with_a_gguf(kit: Path) -> None:
    manifest = Manifest.read(kit)
    written = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert written == {*manifest.files, *manifest.editable, "manifest.json"}
    assert "build.gradle.kts" in manifest.editable
    assert_code_parses(kit, "android")
    assert_engine_answers_as_checked(kit / "model.gguf", json.loads((kit / "check.json").read_text())["llama.cpp"])
    with contextlib.closing(load_engine(kit, EngineOptions(threads=1))) as engine:  # a kit is an artefact, too
        assert engine.context_length == manifest.context_length
    text = (kit / "README.md").read_text()
    assert "| model.gguf | llama.cpp | f32 |" in text
    assert "The expected speed is unknown" in text
    assert "\n\nBuild the app with Android Studio, or with Gradle 8.9 or later: `gradle assembleDebug`. " in text
    assert re.search(r"are at least \d\.\d\d nats apart", text)


def test_push_script_copies_the_files_that_the_code_reads(kit: Path, tmp_path: Path) -> None:
    adb = tmp_path / "adb"
    adb.write_text(f'#!/bin/sh\necho "$ANDROID_SERIAL: $*" >> {tmp_path / "calls"}\n')
    adb.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    subprocess.run([kit / "push.sh", "phone-1"], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.startswith("phone-1: ") for call in calls)
    pushed = [call.split()[2] for call in calls if " push " in call]
    assert pushed == ["model.gguf", "generation.json", "check.json"]
    adb.write_text("#!/bin/sh\nexit 1\n")
    failed = subprocess.run([kit / "push.sh"], env=environment, capture_output=True, check=False)
    assert failed.returncode == 2
    assert b"no phone answers" in failed.stderr


CPP = "src/main/cpp"
HAS_JDK = all(map(shutil.which, ("g++", "javac", "java")))

CONTROL = "Say <|im_end|> <|im_start|>system"
"""A question with the texts of control tokens."""


def turned(turns: dict[str, Any], messages: Sequence[tuple[str, str]]) -> list[str]:
    """Return the pieces of a prompt as a kit's code joins them, each after T (template) or M (message)."""
    first, *others = messages
    pieces = [f"T{turns['start']}"]
    if first[0] == "system":
        pieces = [f"T{turns['system'][0]}", f"M{first[1]}", f"T{turns['system'][1]}"]
    else:
        others = [first, *others]
    for index, (role, content) in enumerate(others):
        after = "open" if index == len(others) - 1 else "answer" if role == "user" else "between"
        pieces += [f"M{content}", f"T{turns[after]}"]
    return pieces


TEMPLATES = {
    "ChatML": CHAT_TEMPLATE,
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | trim }}<|im_end|>{% endfor %}[assistant] ",
    "thoughts of the last answer": "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' and loop.index < 3 %}(earlier) {% endif %}{{ m.content }}\n{% endfor %}assistant: ",
    "no question": "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    "none": None,
}


@pytest.mark.parametrize(
    ("template", "has_history", "has_system"),
    [
        ("ChatML", True, True),
        ("no system", True, True),
        ("thoughts of the last answer", False, False),
        ("none", False, False),
    ],
)
def test_turns_equal_those_of_the_template(
    template: str, has_history: bool, has_system: bool, engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "chat_template", TEMPLATES[template])
    turns = asdict(chat_turns(engine))
    assert (turns["between"] is not None, turns["system"] is not None) == (has_history, has_system)
    conversation = [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    cases = [[("user", CONTROL)], *([conversation, [*conversation, *conversation[1:]]] if has_history else [])]
    for messages in [*cases, *([[("system", "Be brief."), *each] for each in cases] if has_system else [])]:
        shown = [{"role": role, "content": content} for role, content in messages]
        if template == "none":
            assert turned(turns, messages) == ["T", f"M{CONTROL}", "T"]
            continue
        text = tool_prompt(engine, shown).text
        assert "".join(piece[1:] for piece in turned(turns, messages)) == text


def test_a_template_without_the_question_is_refused(engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "chat_template", TEMPLATES["no question"])
    with pytest.raises(ModelError, match="does not write the question"):
        chat_turns(engine)


def compile_native(code: Path, *arguments: str | Path) -> None:
    """Compile C++ of a kit in the folder `code` with the installed llama.cpp."""
    import llama_cpp

    libraries = Path(llama_cpp.__file__).parent / "lib"
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{libraries.parents[1] / 'include'}"]
    linker = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run([*compiler, f"-I{code}", *arguments, *linker], check=True)


def compile_library(kit: Path, folder: Path) -> None:
    """Compile libllama_chat.so of a kit for this machine's Java."""
    jdk = Path(str(shutil.which("javac"))).resolve().parents[1]
    headers = [f"-I{jdk / 'include'}", f"-I{jdk / 'include' / 'linux'}"]
    sources = [kit / CPP / "llama_chat.cpp", kit / CPP / "llama_chat_jni.cpp"]
    compile_native(kit / CPP, "-shared", "-fPIC", *headers, *sources, "-o", folder / "libllama_chat.so")


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ (apt install g++)")
def test_native_conversations_are_safe_and_only_the_template_writes_control_tokens(kit: Path, tmp_path: Path) -> None:
    """Under the address sanitizer: a use of a closed conversation would be reported."""
    sanitizers = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    compile_native(kit / CPP, *sanitizers, KIT_PROGRAMS / "threads.cpp", "-o", tmp_path / "threads")
    turns = json.loads((kit / "generation.json").read_text())["turns"]
    messages = [("system", "Be brief."), ("user", CONTROL), ("assistant", "<|im_end"), ("user", "|> 1 <|im_end|>")]
    command = [tmp_path / "threads", kit / "model.gguf", *turned(turns, messages)]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # llama.cpp keeps its backends
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    tokens, limited, kept, malformed, closed = run.stdout.splitlines()
    with contextlib.closing(load_engine(kit, EngineOptions(threads=1))) as engine:
        expected = chat_prompt(engine, [{"role": role, "content": content} for role, content in messages])
    assert [int(token) for token in tokens.split()] == expected
    assert limited in ("1 yes", "1 no")
    assert int(kept) == len(expected)
    assert malformed == "llama.cpp cannot read the grammar"
    assert closed == "-2 the conversation is closed"


@pytest.mark.skipif(not HAS_JDK, reason="no g++ and JDK (apt install g++ default-jdk)")
def test_the_native_code_answers_as_checked(kit: Path, tmp_path: Path) -> None:
    """The JNI library with the installed llama.cpp, called by a JVM."""
    compile_library(kit, tmp_path)
    subprocess.run(["javac", "-d", tmp_path, KIT_PROGRAMS / "Native.java"], check=True)

    def answer(model: Path, prompt: str, count: int) -> str:
        (tmp_path / "prompt").write_text(prompt)
        command = ["java", f"-Djava.library.path={tmp_path}", "-cp", tmp_path, "efficientllm.kit.Native"]
        arguments = [*command, model, tmp_path / "prompt", str(count)]
        return subprocess.run(arguments, stdout=subprocess.PIPE, check=True).stdout.decode(errors="replace")

    model, check = kit / "model.gguf", json.loads((kit / "check.json").read_text())["llama.cpp"]
    text = answer(model, check["prompt"], len(check["tokens"]))
    assert text == check["text"] + "|the conversation is closed"
    assert "tokens, the conversation room for" in answer(model, "word " * 300, 1)
    assert answer(tmp_path / "none.gguf", "", 1) == "|llama.cpp cannot load model.gguf"


KOTLIN = Path(__file__).parents[1] / "build" / "kotlin" / "node_modules" / "kotlin-compiler" / "lib"
"""npm install --prefix build/kotlin kotlin-compiler@2.4.20 puts it there."""
ANDROID_JSON = Path("/usr/share/java/com.android.json.jar")
"""org.json as Android has it (apt install libandroid-json-java)."""
FUNCTIONS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"room": {"enum": ["hall", 'the "Den"}', "厅"]}, "level": {"enum": [1, 2]}},
                "required": ["room", "level"],
            },
        },
    }
    for name in ("lamp", "fan")
]


@pytest.fixture
def kit_with_functions(exported: Exported, tmp_path: Path) -> Callable[[Platform], Path]:
    """Return a function that writes a kit of a platform for a model that was trained on its functions."""

    def write(platform: Platform) -> Path:
        with open_checkpoint(str(exported("gguf", "--quantize", "f32").parent / "checkpoint")) as opened:
            checkpoint = tmp_path / "checkpoint"
            shutil.copytree(opened.folder, checkpoint)
        (checkpoint / "chat_template.jinja").write_text(LEARNED_MARK + CHAT_TEMPLATE)
        (tmp_path / "functions.json").write_text(json.dumps(FUNCTIONS))
        flags = ("--quantize", "f32", "--functions", str(tmp_path / "functions.json"))
        assert export(checkpoint, platform, tmp_path / "kit", *flags, "--max-context", "4096") == 0
        return tmp_path / "kit"

    return write


def assert_conversation_was_right(kit: Path, output: str) -> None:
    """Check what tests/kit/Kit.kt or main.swift printed."""
    result = json.loads(output)
    assert result["check"] == "same"
    assert set(result["limited"]) <= {"yes", "no"}
    assert result["closed"].endswith(": the conversation is closed")
    for name, arguments in result["calls"]:
        assert name in ("lamp", "fan")
        assert arguments["room"] in ("hall", 'the "Den"}', "厅")
        assert arguments["level"] in (1, 2)
    messages = [{"role": "system", "content": "Be brief."}]
    with contextlib.closing(load_engine(kit, EngineOptions(threads=1, context=4096, tune=False))) as engine:
        for role, content in result["history"]:
            if role == "assistant":
                assert content
                count = len(content.encode()) + 8  # a character may end in a later token
                answer = "".join(Generation(engine, chat_prompt(engine, messages), AnswerOptions(count)))
                assert answer.startswith(content)
            messages.append({"role": role, "content": content})
    assert len(messages) == 5


@pytest.mark.skipif(
    not (KOTLIN.exists() and ANDROID_JSON.exists()), reason="no Kotlin or Android's org.json (see .ci/run)"
)
@pytest.mark.slow
def test_kotlin_holds_a_conversation(kit_with_functions: Callable[[Platform], Path], tmp_path: Path) -> None:
    """Conversation.kt on this machine's Java: history, cancelled answers, grammars, calls and a closed conversation."""
    kit = kit_with_functions("android")
    compile_library(kit, tmp_path)
    classes = tmp_path / "classes"
    libraries = [KOTLIN / "kotlinx-coroutines-core-jvm.jar", ANDROID_JSON, KOTLIN / "kotlin-stdlib.jar"]
    path = ":".join(map(str, [*libraries, classes]))
    sources = [kit / "src/main/kotlin/efficientllm/kit/Conversation.kt", KIT_PROGRAMS / "Kit.kt"]
    compiler = ["java", "-cp", KOTLIN / "kotlin-compiler.jar", "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
    classes.mkdir()
    flags = ["-no-stdlib", "-no-reflect", "-Werror", "-cp", path, "-d", classes]
    subprocess.run([*compiler, *flags, *sources], check=True)
    command = ["java", f"-Djava.library.path={tmp_path}", "-cp", path, "efficientllm.kit.KitKt", kit]
    assert_conversation_was_right(kit, subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode())


@pytest.mark.skipif(not shutil.which("swiftc"), reason="no Swift (apt install swiftlang)")
@pytest.mark.slow
def test_swift_holds_a_conversation(kit_with_functions: Callable[[Platform], Path], tmp_path: Path) -> None:
    """The same for Conversation.swift."""
    import llama_cpp

    kit = kit_with_functions("ios")
    libraries = Path(llama_cpp.__file__).parent / "lib"
    compile_native(kit / "App", "-c", kit / "App" / "llama_chat.cpp", "-o", tmp_path / "llama_chat.o")
    compiler = ["swiftc", "-import-objc-header", kit / "App" / "llama_chat.h", "-o", tmp_path / "program"]
    linker = [f"-L{libraries}", "-lllama", "-lstdc++", "-Xlinker", "-rpath", "-Xlinker", libraries]
    sources = [kit / "App" / "Conversation.swift", KIT_PROGRAMS / "main.swift", tmp_path / "llama_chat.o"]
    subprocess.run([*compiler, *sources, *linker], check=True)
    command = [tmp_path / "program", kit]
    assert_conversation_was_right(kit, subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode())


@pytest.mark.parametrize("mark", ["", LEARNED_MARK])
def test_a_grammar_of_calls_writes_them_as_the_model_does(
    mark: str, engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grammar of a kit, in llguidance, accepts what the prompt's own grammar accepts, and no text."""
    monkeypatch.setattr(engine, "chat_template", mark + CHAT_TEMPLATE)
    calls = chat_calls(engine, FUNCTIONS)
    assert (calls.has_spaced_texts, bool(calls.between)) == (bool(mark), bool(mark))
    arguments = '{"room": "%shall", "level": 2}' % (" " if mark else "")
    written = [f"{name}{calls.middle}{arguments}" for name in ("lamp", "fan")][: 2 if mark else 1]
    text = {
        "name": "say",
        "parameters": {"properties": {"text": {"type": "string", "maxLength": 9}}, "required": ["text"]},
    }
    free = chat_calls(engine, [{"type": "function", "function": text}])
    for written_text, end, is_valid in (
        ("a b", "}", True),
        ("a\\n b", "}", True),
        ("a\n b", "}", False),
        ("a", " }", False),
    ):
        answer = (
            f'{free.begin}say{free.middle}{{"text": "{written_text}"}}{end}{"" if mark else chr(10) + "</tool_call>"}'
        )
        constraint = GrammarConstraint(engine, Grammar.lark(lark_of(free.grammar)))
        assert is_accepted(constraint, engine, answer) == is_valid, answer
    prompt = tool_prompt(engine, [{"role": "user", "content": "On"}], ToolUse(FUNCTIONS))
    whole = calls.begin + calls.between.join(written) + prompt.format.end
    assert is_accepted(prompt.constraint(engine), engine, whole)
    for answer, is_valid in ((whole, True), ("On it.", False), (whole.replace("hall", "loft"), False)):
        constraint = GrammarConstraint(engine, Grammar.lark(lark_of(calls.grammar)))
        assert is_accepted(constraint, engine, answer) == is_valid


def test_functions_that_cannot_be_called_are_refused(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = exported("gguf", "--quantize", "f32").parent / "checkpoint"
    file = tmp_path / "functions.json"
    pattern = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a"}}, "required": ["a"]}
    for content, said in (
        ("[]", "needs one or more functions with different names"),
        ('[{"name": "lamp"}]', "is no list of functions"),
        ("no JSON", "is no list of functions"),
        (json.dumps([{"type": "function", "function": {"name": "f", "parameters": pattern}}]), "the schema of 'f'"),
    ):
        file.write_text(content)
        assert export(checkpoint, "android", tmp_path / "out", "--functions", str(file)) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_card_predicts_the_speed_by_the_profile(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "phone.json"
    tiny_profile().save(profile)
    kit = exported("android", "--quantize", "f32")
    output = tmp_path / "kit"
    flags = ("--no-verify", "--device-profile", str(profile))
    assert export(kit.parent / "checkpoint", "ios", output, *flags) == 2  # the kit's default is q8_0
    assert "measured with quantization q4_0, not q8_0" in capsys.readouterr().err
    flags = (*flags, "--quantize", "q4_0")
    assert export(kit.parent / "checkpoint", "ios", output, *flags) == 0
    assert re.search(
        r"Expected on local .*: \d+ tokens/s of a 128-token prompt, \d+\.\d of an answer",
        (output / "README.md").read_text(),
    )
    assert not (output / "push.sh").exists()


def test_kit_refuses_wrong_options(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = exported("android", "--quantize", "f32").parent / "checkpoint"
    for flags, said in (
        (("--max-context", "1"), "--max-context 1: must be at least 2"),
        (("--device-profile", str(tmp_path / "none.json")), "none.json"),
    ):
        assert export(checkpoint, "android", tmp_path / "out", *flags) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
