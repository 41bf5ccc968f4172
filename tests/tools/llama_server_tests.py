"""Run llama.cpp's own server tests against this server and count their assertions.

Every `assert` is recorded, and a test continues after one that fails. The texts and token counts of llama.cpp's test
model are not compared, because another model answers. Nothing is copied into the project:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    python tests/tools/llama_server_tests.py llama_cpp_python-0.3.36 --model demo
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

FILES = ("tokenize", "completion", "chat_completion", "compat_oai_responses", "embedding")
MODEL_NAMES = {"n_prompt", "n_cache", "n_tokens", "bosId", "re_content", "match_regex", "re_prefill"}
"""Names in assertions about the texts and token counts of llama.cpp's test model."""
SKIPPED = "vision or library_stops or with_fa"
"""Tests that need other models, or the network."""


class Recorder(ast.NodeTransformer):
    """Replace each assertion by a call that records whether it holds."""

    def visit_Assert(self, node: ast.Assert) -> Any:
        names = {each.id for each in ast.walk(node.test) if isinstance(each, ast.Name)}
        if names & MODEL_NAMES:
            return ast.copy_location(ast.Pass(), node)
        call = ast.parse(f"record_assertion({node.lineno}, lambda: 0)", mode="eval").body
        assert isinstance(call, ast.Call)
        call.args[1] = ast.Lambda(ast.arguments([], [], None, [], [], None, []), node.test)
        return ast.fix_missing_locations(ast.copy_location(ast.Expr(call), node))


class Results:
    """Counts assertions by test and line: one holds if it held each time that it was reached."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], bool] = {}
        self.test = ""

    def record(self, line: int, check: Callable[[], Any]) -> None:
        with contextlib.suppress(Exception):
            if check():
                self.held.setdefault((self.test, line), True)
                return
        self.held[self.test, line] = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.test = item.nodeid

    def print(self) -> None:
        by_file: dict[str, list[bool]] = defaultdict(list)
        for (test, line), held in sorted(self.held.items()):
            by_file[test.partition("::")[0]].append(held)
            if not held:
                print(f"{test} line {line}")
        for name, found in by_file.items():
            print(f"{name}: {sum(found)} of {len(found)}")
        print(f"{sum(self.held.values())} of {len(self.held)} assertions hold")


class Launcher:
    """Starts one server of ours for each set of options, and keeps it for later tests."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.ports: dict[tuple[Any, ...], tuple[int, subprocess.Popen[bytes]]] = {}

    def start(self, server: Any) -> None:
        slots = server.n_slots or 1
        key = server.model_alias or "model", (server.n_ctx or 4096) // slots, slots, server.temperature
        if key not in self.ports:
            name, context, parallel, temperature = key
            port = 8200 + len(self.ports)
            command = [sys.executable, "-m", "efficientllm.runtime.start", "serve", "--model", f"{name}={self.model}"]
            command += ["--port", str(port), "--context", str(context), "--parallel", str(parallel), "--threads", "1"]
            self.ports[key] = port, subprocess.Popen([*command, "--no-tune", "--temperature", str(temperature)])
        server.server_port, process = self.ports[key]
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{server.server_port}/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the server for {key} ended with {process.returncode}")

    def stop(self) -> None:
        for _, process in self.ports.values():
            process.terminate()
            process.wait()


def adapt(utils: Any, launcher: Launcher) -> None:
    """Let llama.cpp's test helpers start our server and send the defaults of its flags with each request."""

    def with_defaults(send: Callable[..., Any]) -> Callable[..., Any]:
        def request(server: Any, method: str, path: str, data: Any = None, *more: Any, **options: Any) -> Any:
            if isinstance(data, dict) and path.endswith(("completion", "completions")):
                if server.n_predict and not data.keys() & {"max_tokens", "n_predict"}:
                    data = {**data, "n_predict": server.n_predict}
                data = {"seed": server.seed, **data}
            return send(server, method, path, data, *more, **options)

        return request

    process = utils.ServerProcess
    process.start = lambda server, timeout_seconds=60: launcher.start(server)
    process.stop = lambda server: None
    process.make_request = with_defaults(process.make_request)
    process.make_stream_request = with_defaults(process.make_stream_request)


@contextlib.contextmanager
def rewritten(source: Path, results: Results) -> Iterator[Path]:
    """Yield a temporary folder with the core tests, whose assertions are recorded in `results`."""
    recorder = types.ModuleType("recorder")
    recorder.__dict__["record_assertion"] = results.record
    sys.modules["recorder"] = recorder
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            tree = Recorder().visit(ast.parse((source / "unit" / f"test_{name}.py").read_text(encoding="utf-8")))
            text = f"from recorder import record_assertion\n{ast.unparse(tree)}"
            Path(folder, f"test_{name}.py").write_text(text, encoding="utf-8")
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="folder of the unpacked sdist of llama-cpp-python")
    parser.add_argument("--model", default="demo", help="artefact to serve")
    arguments = parser.parse_args()
    source = arguments.sdist / "vendor/llama.cpp/tools/server/tests"
    sys.path.insert(0, str(source))
    sys.modules["wget"] = types.ModuleType("wget")  # for models, which are not downloaded
    results, launcher = Results(), Launcher(arguments.model)
    adapt(importlib.import_module("utils"), launcher)
    try:
        with rewritten(source, results) as folder:
            options = ["-q", "--tb=line", "--noconftest", "-p", "no:cacheprovider", "-k", f"not ({SKIPPED})"]
            pytest.main([*options, "--rootdir", str(folder), str(folder)], plugins=[results])
    finally:
        launcher.stop()
    results.print()


if __name__ == "__main__":
    main()
