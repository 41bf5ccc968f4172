"""The SIMD kernels that the web target puts into wllama's module, run by node's WebAssembly against numpy."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from efficientllm.export.web import kernels
from efficientllm.export.web import kernels as wasm
from efficientllm.runtime.base.errors import ArtefactError
from research import web_kernels

RESULT, X, Y, TABLE = 800, 1000, 5000, 1 << 17
"""Addresses in the memory of the test."""

SCRIPT = """
const fs = require("fs"), [module, memoryFile, n, result, x, y] = JSON.parse(process.argv[1]);
const memory = new WebAssembly.Memory({ initial: 16 });
new Uint8Array(memory.buffer).set(fs.readFileSync(memoryFile));
const instance = new WebAssembly.Instance(new WebAssembly.Module(fs.readFileSync(module)), { env: { memory } });
instance.exports.dot(n, result, 0, x, 0, y, 0, 1);
console.log(new Float32Array(memory.buffer, result, 1)[0]);
"""


def module_of(body: bytes, name: str = "dot") -> bytes:
    """A module with imported memory and one function of eight int32, exported and named."""

    def vector(content: bytes) -> bytes:
        return wasm.leb(1) + content

    def text(value: str) -> bytes:
        return wasm.leb(len(value)) + value.encode()

    named = vector(wasm.leb(0) + text(name))
    sections = [
        wasm.Section(1, vector(b"\x60" + wasm.leb(8) + b"\x7f" * 8 + b"\x00")),
        wasm.Section(wasm.IMPORT, vector(text("env") + text("memory") + b"\x02\x00\x10")),
        wasm.Section(3, vector(b"\x00")),
        wasm.Section(7, vector(text("dot") + b"\x00\x00")),
        wasm.Section(wasm.CODE, vector(wasm.leb(len(body)) + body)),
        wasm.Section(0, text("name") + b"\x01" + wasm.leb(len(named)) + named),
    ]
    return wasm.write_sections(sections)


def q8_0(values: np.ndarray, scale: np.float16) -> bytes:
    return scale.tobytes() + values.astype(np.int8).tobytes()


def q4_0(values: np.ndarray, scale: np.float16) -> bytes:
    stored = (values + 8).astype(np.uint8)
    return scale.tobytes() + (stored[:16] | stored[16:] << 4).tobytes()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed (apt install nodejs npm)")
@pytest.mark.parametrize(("name", "pack", "low", "high"), [("q8_0", q8_0, -128, 128), ("q4_0", q4_0, -8, 8)])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_dot_products_equal_those_of_the_blocks(
    name: str, pack: object, low: int, high: int, blocks: int, tmp_path: Path
) -> None:
    random = np.random.default_rng(blocks)
    scales = random.uniform(0.01, 0.1, (2, blocks)).astype(np.float16)
    x, y = random.integers(low, high, (blocks, 32)), random.integers(-127, 128, (blocks, 32))
    memory = bytearray(1 << 20)
    for at, content in (
        (X, b"".join(map(pack, x, scales[0]))),  # type: ignore[call-overload]
        (Y, b"".join(map(q8_0, y, scales[1]))),
        (TABLE, np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).tobytes()),
    ):
        memory[at : at + len(content)] = content
    body = wasm.leb(TABLE).join(kernels.kernel_bodies(is_64=False)[f"ggml_vec_dot_{name}_q8_0"])
    (tmp_path / "m.wasm").write_bytes(module_of(body))
    (tmp_path / "memory").write_bytes(memory)
    arguments = json.dumps([str(tmp_path / "m.wasm"), str(tmp_path / "memory"), 32 * blocks, RESULT, X, Y])
    done = subprocess.run(["node", "-e", SCRIPT, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    products = scales[0].astype(np.float64) * scales[1] * (x * y).sum(1)
    assert float(done.stdout) == pytest.approx(products.sum(), rel=1e-5, abs=1e-6)


def test_the_shipped_bodies_equal_those_of_the_source() -> None:
    shipped = Path(kernels.__file__).with_name("kernels.txt").read_text(encoding="ascii")
    assert shipped.splitlines() == web_kernels.kernel_lines()


def test_a_module_is_the_same_when_nothing_is_put_in() -> None:
    module = module_of(b"\x00\x0b")
    sections = wasm.read_sections(module)
    assert wasm.write_sections(wasm.with_bodies(sections, wasm.function_bodies(sections))) == module
    assert wasm.function_index(sections, "dot") == wasm.imported_functions(sections) == 0


def test_a_module_that_is_built_otherwise_is_refused() -> None:
    with pytest.raises(ArtefactError, match="has no function ggml_vec_dot_q8_0_q8_0"):
        kernels.with_simd_kernels(module_of(b"\x00\x0b"), is_64=True)
    with pytest.raises(ArtefactError, match="fp16 table is not where it was expected"):
        kernels.with_simd_kernels(module_of(b"\x00\x0b", "ggml_vec_dot_q8_0_q8_0"), is_64=True)
    with pytest.raises(ArtefactError, match="not a WebAssembly module"):
        kernels.with_simd_kernels(b"<!doctype html>", is_64=True)
