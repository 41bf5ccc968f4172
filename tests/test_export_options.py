"""Every target has its own options: what it does not read is refused, on the command line and in Python."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exporting
import pytest
import wrong_commands
from tiny import tiny_architecture

from efficientllm.devices import cli as bench_cli
from efficientllm.export import cli
from efficientllm.export.checkpoint import Checkpoint
from efficientllm.export.cli import export
from efficientllm.export.gguf.exporter import GgufOptions
from efficientllm.export.onnx.quantize import PRESETS
from efficientllm.export.request import ExportRequest
from efficientllm.export.targets import ENTRY_POINT_GROUP, EXPORTERS, Exporter, load_exporter
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError, install_command
from efficientllm.runtime.base.flags import field_docs, merge
from efficientllm.runtime.base.ggml_types import WRITTEN_TYPES
from efficientllm.runtime.base.output import locked_output
from efficientllm.runtime.engines.manifest import Manifest

FOREIGN = [
    (
        "onnx",
        ["--output-type=int8"],
        "--output-type: --target onnx does not read it, gguf, executorch, web, android, ios do (see ",
    ),
    ("gguf", ["--no-custom-ops"], "--no-custom-ops: --target gguf does not read it, executorch does (see "),
    (
        "hf-uniform",
        ["--max-kl", "1"],
        "--max-kl: --target hf-uniform does not read it, gguf, onnx, executorch, web, android, ios do (see ",
    ),
    ("gguf", ["--no-verfy"], "unrecognized arguments: --no-verfy; did you mean --no-verify?"),
]


@pytest.mark.parametrize(("target", "more", "message"), FOREIGN)
def test_flags_of_other_targets_are_refused(
    target: str, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exporting.export(tmp_path, target, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        cli.body([*arguments, "--help"])
    return capsys.readouterr().out


def test_help_shows_the_flags_of_the_named_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--calibrate" in help_of("--target", "onnx", capsys=capsys)
    assert "--group-size" not in help_of("--target", "onnx", capsys=capsys)
    assert "--group-size" in help_of("--target=executorch", capsys=capsys)
    uniform = help_of("--target", "hf-uniform", capsys=capsys)
    assert "--target hf-uniform:" in uniform
    assert "every target:" not in uniform
    common = help_of(capsys=capsys)
    assert "gguf,onnx,executorch,hf-uniform" in common
    assert "--verify" in common
    assert "--quantize" not in common.partition("examples:")[0]


@pytest.mark.parametrize("target", EXPORTERS)
def test_every_option_has_a_help_text(target: str) -> None:
    options = load_exporter(target).options
    assert field_docs(options).keys() == {field.name for field in dataclasses.fields(options)}


@pytest.mark.parametrize(("target", "types"), [("gguf", WRITTEN_TYPES), ("onnx", PRESETS)])
def test_help_names_every_weight_type(target: str, types: Any) -> None:
    text = field_docs(load_exporter(target).options)["quantize"]
    assert all(f" {name}" in text for name in types)


def test_python_exports_as_the_command_does(
    save_tiny: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save_tiny(tiny_architecture())
    monitored = logging.getLogger("efficientllm")
    monitored.propagate = True  # a command that ran in this process turned it off
    with caplog.at_level(logging.INFO, "efficientllm"):
        folder = export(checkpoint, "gguf", tmp_path / "gguf", quantize="q8_0", verify=False)
    assert (folder, Manifest.read(folder).quantization) == (tmp_path / "gguf", "q8_0")
    assert caplog.messages[0] == f"0.0 s: reading {checkpoint}"
    assert caplog.messages[-1].startswith(f"artefact: {folder} in ")
    seconds = Manifest.read(folder).stage_seconds
    assert list(seconds) == ["reading", "writing", "quantising", "hashing"]
    stages = ", ".join(f"{stage} {each:.1f}" for stage, each in seconds.items())
    assert caplog.messages[-1].endswith(f"({stages}); not verified")
    with pytest.raises(UsageError, match="is not empty"):
        export(checkpoint, "gguf", folder)
    assert export(str(checkpoint), "gguf", str(folder), overwrite=True, verify=False) == folder
    with pytest.raises(UsageError, match="--custom-ops: --target gguf does not read it, executorch does"):
        export(checkpoint, "gguf", tmp_path / "other", custom_ops=False)
    with pytest.raises(UsageError, match="--pad: 'some' is not one of auto, none"):
        export(checkpoint, "gguf", tmp_path / "other", pad="some")


@dataclasses.dataclass(frozen=True)
class ShapeOptions:
    """--target shape"""

    digits: int = 3
    """Digits of the layer's number."""


def write_shape(checkpoint: Checkpoint, request: ExportRequest[ShapeOptions], folder: Path) -> None:
    rows = (f"{index:0{request.options.digits}} {layer}" for index, layer in enumerate(checkpoint.architecture.layers))
    (folder / "shape.txt").write_text("\n".join(rows))


SHAPE_EXPORTER = Exporter(ShapeOptions, write_shape)


def test_plug_ins_bring_their_flags(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = importlib.metadata.EntryPoint("shape", f"{__name__}:SHAPE_EXPORTER", ENTRY_POINT_GROUP)
    installed = {ENTRY_POINT_GROUP: [plugin]}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: installed.get(group, []))
    checkpoint = save_tiny(tiny_architecture())
    assert exporting.export(checkpoint, "shape", tmp_path / "shape", "--digits", "2") == 0
    assert (tmp_path / "shape" / "shape.txt").read_text().startswith("00 LayerShape(")
    assert exporting.export(checkpoint, "shape", tmp_path / "other", "--quantize", "f32") == 2
    assert (
        "--quantize: --target shape does not read it, gguf, onnx, executorch, web, android, ios do"
        in capsys.readouterr().err
    )
    assert exporting.export(checkpoint, "onnx", tmp_path / "other", "--digits", "2") == 2
    assert "--digits: --target onnx does not read it, shape does" in capsys.readouterr().err


def test_engines_refuse_a_plain_model(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But it has its manifest: what it is, where it came from, how well it matches."""
    checkpoint, output = save_tiny(tiny_architecture()), tmp_path / "uniform"
    assert exporting.export(checkpoint, "hf-uniform", output) == 0
    manifest = Manifest.read(output)
    manifest.check_files(output)
    assert manifest.engine == "transformers"
    assert manifest.verification["exact"]["max_logit_difference"] < 1e-4
    capsys.readouterr()
    assert run_command(bench_cli.body, [str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "needs engine 'transformers'; load it with AutoModelForCausalLM" in error


EDITS = ["tokenizer_config.json", "Modelfile", "model.gguf/thesis.txt", "notes/thesis.txt"]


@pytest.mark.parametrize("name", EDITS)
def test_overwrite_keeps_files_that_users_added_to_an_artefact(
    save_tiny: Callable[..., Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = save_tiny(tiny_architecture()), tmp_path / "out"
    target = "gguf" if name != "tokenizer_config.json" else "onnx"
    arguments = ("--quantize", "f32", "--no-verify", "--overwrite")
    assert exporting.export(checkpoint, target, output, *arguments) == 0
    file = output / name
    if file.parent.is_file():
        file.parent.unlink()
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine", encoding="utf-8")
    assert exporting.export(checkpoint, target, output, *arguments) == 2
    assert "not written by this command; --overwrite deletes only what was" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "mine"


def test_damaged_weights_are_replaced(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, output = save_tiny(tiny_architecture()), tmp_path / "out"
    arguments = ("--quantize", "f32", "--no-verify", "--overwrite")
    assert exporting.export(checkpoint, "gguf", output, *arguments) == 0
    whole = (output / "model.gguf").read_bytes()
    (output / "model.gguf").write_bytes(whole[:-100])
    assert exporting.export(checkpoint, "gguf", output, *arguments) == 0
    assert (output / "model.gguf").read_bytes() == whole


def test_printed_commands_run_as_they_are(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a b"
    assert exporting.export(save_tiny(tiny_architecture()), "gguf", output, "--quantize", "f32", "--no-verify") == 0
    hints = [line.removeprefix("run it with: ") for line in capsys.readouterr().out.splitlines() if "run it" in line]
    assert shlex.split(hints[0]) == ["efficientllm", "serve", str(output)]
    assert shlex.split(hints[1])[:3] == ["llama-server", "-m", str(output / "model.gguf")]
    assert shlex.split(hints[2]) == ["ollama", "create", "a b", "-f", str(output / "Modelfile")]


SLOW_EXPORT = """
import sys, time
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.output import atomic_output
from pathlib import Path

def body(argv):
    with atomic_output(Path(argv[0]), False, lambda folder: [], [], ""):
        print("writing", flush=True)
        time.sleep(60)
    return 0

sys.exit(run_command(body))
"""


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SLOW_EXPORT, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[1] == "terminated\n"
    assert process.returncode == -signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_broken_plug_in_harms_only_its_own_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from efficientllm.export import targets

    known = targets.known_targets() | {"broken": "efficientllm.export.targets:NOTHING"}
    monkeypatch.setattr(targets, "known_targets", lambda: known)
    with pytest.raises(UsageError, match=r"--level: --target gguf does not read it, no target does"):
        targets.refuse_option("gguf", "level")
    with pytest.raises(UsageError, match=r"--target broken: its plug-in, .*, cannot be loaded: .*NOTHING"):
        targets.load_exporter("broken")


REFUSED = wrong_commands.COMMANDS | {
    "export MODEL --target gguf": "llama-cpp-python is not installed; run: " + install_command("gguf"),
    "export MODEL --target web": "llama-cpp-python is not installed; run: " + install_command("gguf"),
    "export MODEL --target onnx": "onnxruntime is not installed; run: " + install_command("onnx"),
    "export MODEL --target hf-uniform": "torch is not installed; run: " + install_command("export"),
}
"""Command -> part of its error."""

RUN_ALL = """
import contextlib, io, json, sys
commands, heavy = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(heavy)
from efficientllm.runtime import command_line
found = []
for name, *arguments in commands:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        found.append([command_line.run(name, arguments), errors.getvalue()])
print(json.dumps(found))
"""


def test_export_refuses_impossible_options_before_imports(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    wrong_commands.write_inputs(tmp_path)
    save_tiny(tiny_architecture()).rename(tmp_path / "MODEL")
    heavy = ["torch", "transformers", "llama_cpp", "onnxruntime", "executorch", "uvicorn", "fastapi"]
    script = [sys.executable, "-c", RUN_ALL, json.dumps([[command.split() for command in REFUSED], heavy])]
    with locked_output(tmp_path / "held"):
        done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=tmp_path)
    for (code, error), expected in zip(json.loads(done.stdout), REFUSED.values(), strict=True):
        assert code == 2
        assert expected in error
        assert error.count("\n") == 1
    assert not {"run", "out", "MODEL-gguf"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("target", ["onnx", "gguf", "executorch"])
def test_a_context_of_one_token_is_refused(
    target: str, save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if target == "executorch":
        pytest.importorskip(target)
    for family, settings in (("mistral", {"sliding_window": 1}), ("llama", {"max_position_embeddings": 1})):
        checkpoint = save_tiny(tiny_architecture(family), **settings)
        assert exporting.export(checkpoint, target, tmp_path / "out") == 2
        assert f"error: config.json: {next(iter(settings))} is 1, a context of one token" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_types_are_read_in_either_case() -> None:
    arguments = ["x", "--target", "gguf", "--quantize", "Q4_K_M", "--pad", "None"]
    values = cli.build_parser().parse(arguments)
    assert (values["quantize"], values["pad"]) == ("q4_k_m", "none")
    assert merge(GgufOptions(), {"quantize": "Q8_0"}, "").quantize == "q8_0"
