"""`efficientllm doctor`: machine, engines and missing extras."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from efficientllm.runtime import doctor
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import install_command
from efficientllm.runtime.command_line import COMMANDS

EXTRAS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'efficientllm[gguf]'"),
        ('{"url": "file:///a/b%20c", "dir_info": {}}', "pip install '/a/b c[gguf]'"),
        ('{"url": "file:///a/b", "dir_info": {"editable": true}}', "pip install -e '/a/b[gguf]'"),
        ('{"url": "file:///a/b.whl", "archive_info": {}}', "pip install 'efficientllm[gguf]'"),
    ],
)
def test_a_missing_extra_names_the_command_that_works(
    origin: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [installed])
    assert install_command("gguf") == command


def test_the_table_of_uses_has_every_extra_and_only_known_commands() -> None:
    used = {extra for extras in doctor.USES.values() for each in extras for extra in each.split("|")}
    # grammar comes with server, and no command of ours signs
    assert used == set(EXTRAS) - {"all", "grammar", "signing"}
    for use in doctor.USES:
        names = use.partition(" -")[0].partition(" of ")[0].split(", ")
        assert set(names) <= set(COMMANDS), use


def test_requirements_resolve_extras_that_include_others() -> None:
    found = doctor.requirements()
    assert {"numpy", "rich"} <= found[""].keys()
    assert "llguidance" in found["server"]
    assert set(found) == {"", *EXTRAS}


def test_a_missing_or_old_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"llama-cpp-python": "", "gguf": "0.10", "torch": "2.13.0+cpu", "xllamacpp": "1"}
    monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name, "99"))
    monkeypatch.setattr(doctor, "requirements", lambda: {name: {"numpy": ""} for name in EXTRAS} | GGUF)
    found = doctor.needs()
    expected = {"missing": ["gguf>=0.17", "llama-cpp-python>=0.3.36"], "install": install_command("gguf")}
    assert found["export --target gguf, web, android, ios"] == expected
    assert found["export --target onnx"] == {"missing": [], "install": ""}
    assert found["chat, serve, bench of a .gguf"] == {"missing": [], "install": ""}  # the other extra is complete
    versions |= {"xllamacpp": ""}
    expected = {"missing": ["xllamacpp==1"], "install": install_command("gguf-binary")}
    assert doctor.needs()["chat, serve, bench of a .gguf"] == expected


def test_doctor_offers_no_package_that_the_system_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "")
    lines = doctor.importlib.metadata.requires(doctor.PACKAGE) or []
    given = [line.replace('sys_platform != "win32"', 'sys_platform == "another"') for line in lines]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: given)
    assert doctor.requirements()["gguf-binary"] == {}
    assert doctor.needs()["chat, serve, bench of a .gguf"]["install"] == install_command("gguf")


GGUF = {
    "gguf": {"gguf": ">=0.17", "llama-cpp-python": ">=0.3.36"},
    "gguf-binary": {"xllamacpp": "==1"},
    "export": {"torch": ">=2.6"},
}

X86 = "model name\t: Xeon 6\nflags\t\t: fpu avx2 amx_tile avx_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"
MACOS = "machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"


@pytest.mark.parametrize(
    ("text", "machine", "model", "has"),
    [
        (X86, "x86_64", "Xeon 6", {"AVX2", "AMX", "VNNI"}),
        (ARM, "aarch64", None, {"dotprod", "i8mm"}),
        (MACOS, "arm64", "Apple M2", {"dotprod"}),
        ("", "x86_64", None, set()),
    ],
)
def test_features_of_a_cpu(text: str, machine: str, model: str | None, has: set[str]) -> None:
    found = doctor.describe_cpu(text, machine)
    assert model is None or found["model"] == model
    assert {name for name, is_there in found["features"].items() if is_there} == has


def test_gpus_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [{"name": "H100", "memory_bytes": 80_000_000_000}]
    monkeypatch.setattr(doctor, "GPU_PROBE", f"print('a warning'); print({json.dumps(json.dumps(cards))})")
    assert doctor.gpus() == cards
    monkeypatch.setattr(doctor, "GPU_PROBE", "raise SystemExit(1)")
    assert doctor.gpus() == []
    monkeypatch.setattr(doctor, "GPU_PROBE", "import does_not_exist")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "run_python", lambda *arguments: pytest.fail("torch is not installed"))
    assert doctor.gpus() == []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = {
        "good": ("numpy", "numpy"),
        "absent": ("no-such-package", "json"),
        "damaged": ("rich", "rich.no_such_module"),
        "crashes": ("numpy", "os; os.abort()"),
    }
    monkeypatch.setattr(doctor, "ENGINES", engines)
    monkeypatch.setattr(doctor, "gpus", lambda: [{"name": "H100", "memory_bytes": 80_000_000_000}])


@pytest.mark.usefixtures("machine")
def test_text_and_json_show_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(doctor.body, ["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run_command(doctor.body, []) == 0
    text = capsys.readouterr().out
    assert found["engines"]["good"]["loads"] is True
    assert found["engines"]["absent"] == {"package": "no-such-package", "version": "", "loads": False} | {
        "error": "not installed"
    }
    assert "No module named 'rich.no_such_module'" in found["engines"]["damaged"]["error"]
    assert found["engines"]["crashes"]["error"] == "exit code -6"
    assert found["packages"]["numpy"]
    for name, each in found["engines"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert line.endswith("loads" if each["loads"] else each["error"])
    assert "H100 (80.0 GB)" in text
    for use, each in found["commands"].items():
        assert f"  {use} " in text
        assert not each["install"] or each["install"] in text
