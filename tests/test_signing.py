"""The commands of docs/server.md that sign an artefact and verify it, with sigstore's model-signing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_docs import ROOT, blocks

from efficientllm.runtime import load
from efficientllm.runtime.engines.manifest import Manifest, describe_files

PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("model_signing", path=PROGRAMS), reason="pip install 'efficientllm[signing]'"),
    pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl"),
]


def run(script: str, folder: Path) -> int:
    environment = os.environ | {"PATH": PROGRAMS}
    return subprocess.run(["bash", "-ec", script], cwd=folder, env=environment, check=False).returncode


def test_signature_finds_changes_of_artefact_and_manifest(artefact: Path, tmp_path: Path) -> None:
    (script,) = (block for block in blocks(ROOT / "docs" / "server.md", "bash") if "model_signing" in block)
    verify = script.splitlines()[-1]
    copy = shutil.copytree(artefact, tmp_path / "small-gguf")
    assert run(script, tmp_path) == 0

    (copy / "added").touch()
    assert run(verify, tmp_path) == 1
    (copy / "added").unlink()
    assert run(verify, tmp_path) == 0

    manifest = Manifest.read(copy)
    model = copy / manifest.model_file
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    replace(manifest, files=describe_files(copy, list(manifest.files))).write(copy)
    load(copy).close()
    assert run(verify, tmp_path) == 1
