"""Client libraries against the real server, each for what it is used for.

`make clients` installs them in build/clients, apart from ours, since they want other versions of what we need.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from python_clients import CLIENTS
from serving import served

from efficientllm.server.options import AppOptions

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("EFFICIENTLLM_CLIENTS") or ROOT / "build/clients/bin/python")
NODE = ROOT / "build/node"

pytestmark = pytest.mark.xdist_group("clients")


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    with served(artefact, AppOptions(api_key="secret"), context=2048) as address:
        yield address


@functools.cache
def installed() -> set[str]:
    """The clients that are there."""
    if not PYTHON.is_file():
        return set()
    names = "','".join(CLIENTS)
    code = f"from importlib.util import find_spec; print(*[name for name in ['{names}'] if find_spec(name)])"
    return set(subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_is_served(address: str, name: str, tmp_path: Path) -> None:
    if name not in installed():
        pytest.skip(f"{name} is not installed; make clients installs it")
    script = str(ROOT / "tests/clients/python_clients.py")
    run([str(PYTHON), script, name, address], HOME=str(tmp_path), PYTHONPATH="", OPENAI_API_KEY="secret")


def test_the_client_for_node_is_served(address: str) -> None:
    node = shutil.which("node")
    if node is None or not (NODE / "node_modules/openai").is_dir():
        pytest.skip("node or its package openai is not installed; .ci/run installs them")
    run([node, str(ROOT / "tests/clients/openai.mjs"), str(NODE), address])
