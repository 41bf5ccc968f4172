"""`efficientllm doctor`: show this machine, the installed packages, the engines that load, and missing extras."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .base import flags
from .base.child import run, run_python
from .base.errors import install_command
from .base.files import json_text
from .base.quantities import format_bytes
from .base.user_cache import commit

ENGINES = {
    "llama.cpp": ("llama-cpp-python", "llama_cpp"),
    "llama.cpp, binary": ("xllamacpp", "xllamacpp"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "executorch": ("executorch", "executorch.extension.pybindings.portable_lib"),
}
"""Engine -> its distribution and the module that loads its library."""

USES = {
    "train, fit, data": ("train",),
    "train --source demo --data demo": ("demo",),
    "train --data FILE.parquet or a hub dataset": ("datasets",),
    "train, export --adapter": ("adapters",),
    "train --tensorboard": ("tensorboard",),
    "eval": ("train",),
    "eval --tasks": ("eval",),
    "export --target gguf, web, android, ios": ("export", "gguf"),
    "export --target onnx": ("export", "onnx"),
    "export --target executorch": ("export", "executorch"),
    "export --target hf-uniform": ("export",),
    "chat, serve, bench of a .gguf": ("gguf-binary|gguf",),
    "chat, serve, bench of an ONNX folder": ("onnx",),
    "chat, serve, bench of a .pte": ("executorch",),
    "serve": ("server",),
    "bench --profile": ("export", "bench"),
}
"""Command -> the extras that it needs, one of those between |. Commands that are not listed need none."""

X86_FEATURES = {
    "AMX": {"amx_tile"},
    "AVX512-BF16": {"avx512_bf16"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AVX2": {"avx2"},
}
"""Feature of an x86 CPU -> its names in /proc/cpuinfo, of which one suffices."""
ARM_FEATURES = {"dotprod": {"asimddp", "feat_dotprod"}, "i8mm": {"i8mm", "feat_i8mm"}, "sve": {"sve"}}
"""The same of an ARM CPU, in /proc/cpuinfo or in macOS's sysctl."""

GPU_PROBE = """
import json, torch
devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
found = [{"name": each.name, "memory_bytes": each.total_memory} for each in devices]
if torch.backends.mps.is_available():
    found.append({"name": "Apple MPS", "memory_bytes": 0})
print(json.dumps(found))
"""

PACKAGE = "efficientllm"


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution, "" if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def requirements() -> dict[str, dict[str, str]]:
    """Return {extra: {distribution: version range}}, extras that an extra includes resolved. "" has the base packages.

    Requirements of other operating systems are left out. The range has the form of the package's metadata, such as
    "<6,>=5.24".
    """
    required = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or []]

    def of(extra: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for each in required:
            if each.marker is not None and not each.marker.evaluate({"extra": extra}):
                continue
            if each.name == PACKAGE:
                found |= {name: versions for other in each.extras for name, versions in of(other).items()}
            elif each.marker is not None or not extra:
                found[each.name] = str(each.specifier)
        return found

    extras = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    return {extra: of(extra) for extra in ["", *extras]}


def needs() -> dict[str, dict[str, Any]]:
    """Return for each use of the commands the missing or outdated packages and the pip command that installs them."""
    known = requirements()
    found: dict[str, dict[str, Any]] = {}
    for use, extras in USES.items():
        missing: dict[str, str] = {}
        lacking = []
        for alternatives in extras:
            lacks = {extra: _lacks(known[extra]) for extra in alternatives.split("|") if known[extra]}
            extra = min(lacks, key=lambda name: len(lacks[name]))
            if lacks[extra]:
                lacking.append(extra)
                missing |= lacks[extra]
        install = install_command(",".join(lacking)) if lacking else ""
        found[use] = {"missing": [name + wanted for name, wanted in missing.items()], "install": install}
    return found


def _lacks(wanted: Mapping[str, str]) -> dict[str, str]:
    """Return those of {distribution: version range} that are not installed, or outdated."""
    found = {name: version_of(name) for name in wanted}
    return {
        name: versions
        for name, versions in wanted.items()
        if not found[name] or not SpecifierSet(versions).contains(found[name], prereleases=True)
    }


def cpu() -> dict[str, Any]:
    """Return the CPU's model, its instruction set, whether it has each feature, and the cores."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.is_file() else ""
    if sys.platform == "darwin":
        text = run(["sysctl", "machdep.cpu", "hw.optional"]).output
    return describe_cpu(text, platform.machine()) | {"num_cores": os.cpu_count() or 1}


def describe_cpu(text: str, machine: str) -> dict[str, Any]:
    """Return model, instruction set and features from the text of /proc/cpuinfo or of macOS's sysctl.

    `machine` is the instruction set, such as x86_64.
    """
    model = re.search(r"^(?:model name|Model|machdep\.cpu\.brand_string)\s*:\s*(.+)$", text, re.MULTILINE)
    lists = re.findall(r"^(?:flags|Features|machdep\.cpu\.\w*features)\s*:(.*)$", text, re.MULTILINE)
    words = set(" ".join(lists).lower().split())
    words |= {name.lower() for name in re.findall(r"^hw\.optional\.arm\.(\w+): 1$", text, re.MULTILINE)}
    table = ARM_FEATURES if machine.lower() in ("aarch64", "arm64") else X86_FEATURES
    features = {name: bool(names & words) for name, names in table.items()}
    return {"model": model[1] if model else platform.processor(), "machine": machine, "features": features}


def machine_memory_bytes() -> int:
    """Return the bytes of this machine's memory, 0 if the system does not report them."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 0


def gpus() -> list[dict[str, Any]]:
    """Return name and memory of the GPUs that torch sees, [] without torch."""
    if importlib.util.find_spec("torch") is None:
        return []
    # a child process imports torch, because a damaged installation can end the process
    lines = run_python("-W", "ignore", "-c", GPU_PROBE).output.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("[") else []


def engine(distribution: str, module: str) -> dict[str, Any]:
    """Return the version of an engine, whether its library loads in a child process, and the error otherwise."""
    version = version_of(distribution)
    if not version:
        return {"package": distribution, "version": "", "loads": False, "error": "not installed"}
    done = run_python("-W", "ignore", "-c", f"import {module}")
    error = "" if done.code == 0 else done.last_error
    return {"package": distribution, "version": version, "loads": done.code == 0, "error": error}


def examine() -> dict[str, Any]:
    """Return everything that the command shows, as JSON values."""
    packages = sorted({name for extra in requirements().values() for name in extra}, key=str.lower)
    return {
        "efficientllm": {"version": version_of(PACKAGE), "commit": commit()},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu(),
        "memory_bytes": machine_memory_bytes(),
        "gpus": gpus(),
        "packages": {name: version_of(name) for name in packages},
        "engines": {name: engine(*places) for name, places in ENGINES.items()},
        "commands": needs(),
    }


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """Return the lines that show the result of `examine`."""
    own, chip = found["efficientllm"], found["cpu"]
    features = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in chip["features"].items())
    cards = [
        each["name"] + (f" ({format_bytes(each['memory_bytes'])})" if each["memory_bytes"] else "")
        for each in found["gpus"]
    ]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    rows = {
        "efficientllm": own["version"] + (f" (commit {own['commit']})" if own["commit"] else ""),
        "Python": found["python"],
        "system": found["system"],
        "CPU": f"{chip['model'] or 'unknown'}, {chip['num_cores']} cores, {chip['machine']}",
        "features": features,
        "memory": format_bytes(found["memory_bytes"]) if found["memory_bytes"] else "unknown",
        "GPU": ", ".join(cards) or "none that torch sees",
        "packages": packages,
    }
    lines = []
    for name, text in rows.items():
        lines += textwrap.wrap(
            text, 100, initial_indent=f"{name:14}", subsequent_indent=" " * 14, break_on_hyphens=False
        )
    lines += ["", "engines:"]
    for name, each in found["engines"].items():
        state = "loads" if each["loads"] else each["error"]
        lines.append(f"  {name:20}{each['package']} {each['version']}".rstrip() + f": {state}")
    lines += ["", "commands:"]
    for use, each in found["commands"].items():
        lines.append(f"  {use:44}" + ("ok" if not each["install"] else f"needs {', '.join(each['missing'])}"))
        if each["install"]:
            lines.append(f"    {each['install']}")
    return lines


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="efficientllm doctor",
        examples=("doctor", "doctor --json"),
        description="Show this machine, the installed packages, the engines that load, and the missing extras.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    return parser


def body(argv: Sequence[str]) -> int:
    as_json = build_parser().parse(argv)["json"]
    found = examine()
    print(json_text(found) if as_json else "\n".join(lines_of(found)))
    return 0
