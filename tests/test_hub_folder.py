"""`efficientllm-hub`: artefacts as the folder of a model hub's repository."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from made_up import LAPTOP, speed
from shared_fixtures import Exported

from efficientllm.devices import hub_folder
from efficientllm.devices.hub_folder import ollama_files
from efficientllm.devices.results import BenchOptions, Run, summarize
from efficientllm.runtime import load
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.manifest import Manifest, describe_files

OLLAMA = ("params", "template")
BESIDE = (*OLLAMA, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SETTINGS = ("--base-model", "owner/source", "--license", "apache-2.0")


@pytest.fixture
def onnx(exported: Exported) -> Path:
    return exported("onnx", "--quantize", "f32")


def hub(*arguments: str | Path) -> int:
    return run_command(hub_folder.body, [str(each) for each in arguments])


def test_the_folder_is_a_repository_whose_files_run(artefact: Path, onnx: Path, tmp_path: Path) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text(encoding="utf-8"))
    measured = summarize("elsewhere", "0" * 64, "llama.cpp", 1, manifest, [speed(123.0)])
    Run(LAPTOP, BenchOptions(), [measured], "2026-11-01T10:00:00+00:00", "0.1.0").write(tmp_path / "bench.json")
    output = tmp_path / "Small-1M"
    assert hub(output, artefact, onnx, "--bench", tmp_path / "bench.json", *SETTINGS) == 0
    assert {path.name for path in output.iterdir()} == {"README.md", "Small-1M-F32.gguf", "onnx", *BESIDE}

    card = ModelCard.load(output / "README.md")
    header = card.data.to_dict()
    assert header["base_model"] == "owner/source"
    assert header["license"] == "apache-2.0"
    assert header["library_name"] == "gguf"
    assert header["pipeline_tag"] == "text-generation"
    assert header["inference"] is False
    assert header["tags"] == ["efficientllm", "gguf", "onnx"]  # nothing was pruned or trained
    assert header["base_model_relation"] == "quantized"
    assert "| tg4 t/s |" in card.text
    gguf, other = (line for line in card.text.splitlines() if line.startswith("| ") and "f32" in line)
    assert gguf.startswith("| Small-1M-F32.gguf | llama.cpp | f32 |")
    assert "| 124 (124-124) |" in gguf
    assert "124" not in other
    assert "a CPU" in card.text

    parameters = json.loads((output / "params").read_text(encoding="utf-8"))
    assert parameters["stop"] == ["<|im_end|>"]
    assert parameters["num_ctx"] == 4096
    template = (output / "template").read_text(encoding="utf-8")
    assert f'TEMPLATE """{template}"""' in (artefact / "Modelfile").read_text(encoding="utf-8")

    answers = []
    for place in ("Small-1M-F32.gguf", "onnx"):
        with load(output / place) as model:
            answers.append(model.complete("The", max_tokens=8, temperature=0.0))
    assert answers[0] == answers[1]
    with pytest.raises(ArtefactError, match=r"has several models; name one: .*F32\.gguf, .*onnx$"):
        Artefact.open(output)
    shutil.rmtree(output / "onnx")
    assert Artefact.open(output).model_file == output / "Small-1M-F32.gguf"


@pytest.mark.parametrize(
    ("engine", "file", "command"),
    [
        ("litert-lm", "model.litertlm", "litert-lm run litert-lm-f32/model.litertlm"),
        (
            "openvino-genai",
            "openvino_model.xml",
            "# OpenVINO GenAI: openvino_genai.LLMPipeline('openvino-genai-f32', 'CPU')",
        ),
    ],
)
def test_a_file_for_another_runtime_is_run_by_it(
    engine: str, file: str, command: str, artefact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / file).write_bytes(b"a model")
    files = describe_files(folder, [file])
    limits = ("llama.cpp has no rstrip of <tool>",)
    replace(Manifest.read(artefact), engine=engine, model_file=file, files=files, limits=limits).write(folder)
    assert hub(tmp_path / "small", folder) == 0
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert f"\n{command}\n" in card
    assert f"\n- {engine}-f32: llama.cpp has no rstrip of &lt;tool>\n" in card


def test_only_what_the_command_wrote_is_replaced(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small"
    assert hub(output, artefact) == 0
    assert hub(output, artefact) == 2
    expected = f"error: OUTPUT {output} is not empty; name another folder, or give --overwrite to replace it\n"
    assert capsys.readouterr().err == expected
    assert hub(output, artefact, "--overwrite", "--name", "Other") == 0
    assert {path.name for path in output.iterdir()} == {"README.md", "Other-F32.gguf", *OLLAMA}
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    assert hub(output, artefact, "--overwrite") == 2
    assert "holds notes.txt, not written by this command" in capsys.readouterr().err
    assert (artefact / "model.gguf").is_file()


@pytest.mark.parametrize(
    ("noted", "license_"), [({"license": "mit", "base_model": "owner/small"}, "mit"), ({"license": ["mit"]}, None)]
)
def test_the_licence_of_the_training_is_the_default(
    artefact: Path, tmp_path: Path, noted: dict[str, Any], license_: str | None
) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    replace(Manifest.read(copy), training=noted).write(copy)
    for output, given, base in (("noted", (), noted.get("base_model")), ("given", ("--base-model", "o/m"), "o/m")):
        assert hub(tmp_path / output, copy, *given) == 0
        header = ModelCard.load(tmp_path / output / "README.md").data.to_dict()
        assert (header.get("license"), header.get("base_model")) == (license_, base)


def test_a_damaged_artefact_is_not_passed_on(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    content = bytearray((copy / "model.gguf").read_bytes())
    content[-9] ^= 1
    (copy / "model.gguf").write_bytes(content)
    assert hub(tmp_path / "small", copy) == 2
    assert "is damaged: its content is not the exported one" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_words_of_the_card_are_read_back_as_they_are(artefact: Path, tmp_path: Path) -> None:
    assert hub(tmp_path / "small", artefact, "--language", "no", "--license", "1.0") == 0
    header = ModelCard.load(tmp_path / "small" / "README.md").data.to_dict()
    assert (header["language"], header["license"]) == ("no", "1.0")


def test_results_of_other_artefacts_are_refused(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = summarize("elsewhere", "0" * 64, "llama.cpp", 1, {}, [speed(123.0)])
    Run(LAPTOP, BenchOptions(), [measured]).write(tmp_path / "bench.json")
    assert hub(tmp_path / "small", artefact, "--bench", tmp_path / "bench.json") == 2
    assert "measured none of these artefacts" in capsys.readouterr().err


def test_what_somebody_put_into_an_artefact_s_folder_stays(
    onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub(tmp_path / "small", onnx, onnx) == 2
    assert "a second onnxruntime in" in capsys.readouterr().err
    assert hub(tmp_path / "small", onnx) == 0
    (tmp_path / "small" / "onnx" / "notes.txt").write_text("mine", encoding="utf-8")
    assert hub(tmp_path / "small", onnx, "--overwrite") == 2
    assert "holds onnx/notes.txt, not written by this command" in capsys.readouterr().err
    (tmp_path / "small" / "onnx" / "notes.txt").unlink()
    assert hub(tmp_path / "small", onnx, "--overwrite") == 0
    (tmp_path / "small" / "config.json").write_text("{}", encoding="utf-8")  # it is no link to the artefact's
    assert hub(tmp_path / "other", onnx) == 0


@pytest.mark.parametrize("name", ["README.md", "params", "template", "small-F32.gguf"])
def test_what_somebody_has_changed_stays(
    artefact: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub(tmp_path / "small", artefact) == 0
    file = tmp_path / "small" / name
    written = file.read_bytes()
    file.write_bytes(b"My words.\n" + written)
    assert hub(tmp_path / "small", artefact, "--overwrite") == 2
    assert f"holds {name}" in capsys.readouterr().err
    file.write_bytes(written)
    assert hub(tmp_path / "small", artefact, "--overwrite") == 0


@pytest.mark.parametrize("name", ["onnx/tokenizer.json", "onnx/link", "onnx/folder", "link"])
def test_whatever_is_not_as_it_was_written_stays(
    onnx: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub(tmp_path / "small", onnx) == 0
    place = tmp_path / "small" / name
    if name.endswith("link"):
        place.symlink_to("/nowhere/x")
    elif name.endswith("folder"):
        place.mkdir()
    else:
        place.write_text("mine", encoding="utf-8")
    assert hub(tmp_path / "small", onnx, "--overwrite") == 2
    assert f"holds {name}, not written by this command" in capsys.readouterr().err


MODELFILE = """# PARAMETER temperature 9
FROM ./x.gguf
parameter   temperature  0.5
PARAMETER num_ctx 4096
PARAMETER stop 5
PARAMETER stop "<|im_end|>"
TEMPLATE "{{ .Prompt }}
and more"
SYSTEM \"\"\"You are
PARAMETER seed 3
TEMPLATE "no"
\"\"\"
PARAMETER min_p NaN
PARAMETER penalize_newline true
"""


def test_a_modelfile_is_read_as_ollama_reads_it() -> None:
    files = ollama_files(MODELFILE)
    assert files["template"] == "{{ .Prompt }}\nand more"
    assert json.loads(files["params"]) == {
        "temperature": 0.5,
        "num_ctx": 4096,
        "stop": ["5", "<|im_end|>"],
        "min_p": "NaN",
        "penalize_newline": True,
    }


def test_what_makes_no_repository_is_one_line(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub(tmp_path / "small", artefact, artefact) == 2
    assert "a second llama.cpp in f32; give one artefact of each runtime and type" in capsys.readouterr().err
    assert hub(tmp_path / "small", tmp_path) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
    assert hub(artefact, artefact, "--overwrite") == 2
    assert "is or holds" in capsys.readouterr().err
    assert hub(tmp_path / "small", artefact, "--license", "apache\nevil: true") == 2
    assert "--license" in capsys.readouterr().err
    assert hub(tmp_path / "my model", artefact) == 2
    assert "is not one plain word; rename the folder, or give --name" in capsys.readouterr().err
    assert hub(tmp_path / "small", artefact, "--name", "..") == 2
    assert "--name" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
