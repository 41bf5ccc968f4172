"""SIMD dot products for wllama's build of llama.cpp, which has only the portable ones.

Emscripten calls its processor x86, so ggml's CMake file compiles arch/x86 and skips arch/wasm. q8_0 and q4_0 then use
generic loops (90 % of the time, measured with perf). kernels.txt has the two functions in fixed-width SIMD, which every
browser with wllama supports. research/web_kernels.py has their source and assembles them. This module replaces the
bodies of functions in the WebAssembly binary format (https://webassembly.github.io/spec/core/binary/).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from ...runtime.base.errors import ArtefactError

IMPORT, ELEMENT, CODE, DATA = 2, 9, 10, 11
MAGIC = b"\0asm\1\0\0\0"


def leb(value: int) -> bytes:
    """Encode an unsigned LEB128 number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


class Reader:
    """Reader with a position in bytes."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def number(self) -> int:
        result = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return result

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self) -> str:
        return self.take(self.number()).decode()

    def limits(self) -> None:
        """Skip the limits of a table or memory."""
        flags = self.number()
        self.number()
        if flags & 1:
            self.number()


@dataclass(frozen=True)
class Section:
    """One section of a module."""

    id: int
    content: bytes


def read_sections(module: bytes) -> list[Section]:
    """Split a module into sections. Raises ArtefactError if it is not WebAssembly."""
    if module[: len(MAGIC)] != MAGIC:
        raise ArtefactError("not a WebAssembly module")
    reader, sections = Reader(module, len(MAGIC)), []
    while reader.at < len(module):
        number = reader.take(1)[0]
        sections.append(Section(number, reader.take(reader.number())))
    return sections


def write_sections(sections: list[Section]) -> bytes:
    return MAGIC + b"".join(bytes([each.id]) + leb(len(each.content)) + each.content for each in sections)


def imported_functions(sections: list[Section]) -> int:
    """Count the imported functions, which have the first indices."""
    content = next((each.content for each in sections if each.id == IMPORT), b"\0")
    reader, count = Reader(content), 0
    for _ in range(reader.number()):
        for _name in ("module", "field"):
            reader.text()
        kind = reader.take(1)[0]
        if kind == 0:
            reader.number()
            count += 1
        elif kind == 3:
            reader.take(2)
        else:  # table (with the type of its elements), memory, tag
            if kind in (1, 4):
                reader.take(1)
            reader.number() if kind == 4 else reader.limits()
    return count


def function_index(sections: list[Section], name: str) -> int:
    """Return the index of the function `name` in the name section. Raises ArtefactError if it is missing."""
    for section in sections:
        reader = Reader(section.content)
        if section.id or reader.text() != "name":
            continue
        while reader.at < len(section.content):
            kind, size = reader.take(1)[0], reader.number()
            inner = Reader(reader.take(size))
            for _ in range(inner.number() if kind == 1 else 0):
                index = inner.number()
                if inner.text() == name:
                    return index
    raise ArtefactError(f"the module has no function {name}")


def function_bodies(sections: list[Section]) -> list[bytes]:
    """Return the code of the module's own functions."""
    reader = Reader(next(each.content for each in sections if each.id == CODE))
    return [reader.take(reader.number()) for _ in range(reader.number())]


def with_bodies(sections: list[Section], bodies: list[bytes]) -> list[Section]:
    """Return the module with other code."""
    code = leb(len(bodies)) + b"".join(leb(len(body)) + body for body in bodies)
    return [Section(CODE, code) if each.id == CODE else each for each in sections]


TABLE_LOAD = bytes.fromhex("2a02")
"""f32.load of aligned values, before its offset: how a function reads ggml's fp16 table."""


def kernel_bodies(is_64: bool) -> dict[str, list[bytes]]:
    """Return {function: parts of its body, between which the offset of ggml's fp16 table belongs}."""
    lines = (
        resources.files(__name__.rpartition(".")[0]).joinpath("kernels.txt").read_text(encoding="ascii").splitlines()
    )
    found = {}
    for name, bits, *parts in map(str.split, lines):
        if bits == ("64" if is_64 else "32"):
            found[name] = [bytes.fromhex(part) for part in parts]
    return found


def _table_offset(body: bytes) -> int:
    """Return the address of ggml's fp16 table from the function to be replaced."""
    found = set()
    at = body.find(TABLE_LOAD)
    while at >= 0:
        found.add(Reader(body, at + len(TABLE_LOAD)).number())
        at = body.find(TABLE_LOAD, at + 1)
    addresses = {offset for offset in found if offset > 1 << 16}
    if len(addresses) != 1:
        raise ArtefactError(f"wllama: its fp16 table is not where it was expected ({sorted(found)})")
    return addresses.pop()


def with_simd_kernels(module: bytes, is_64: bool) -> bytes:
    """Return wllama's module with the two dot products in SIMD. Raises ArtefactError for an unexpected build."""
    sections = read_sections(module)
    bodies, first = function_bodies(sections), imported_functions(sections)
    for name, parts in kernel_bodies(is_64).items():
        index = function_index(sections, name) - first
        bodies[index] = leb(_table_offset(bodies[index])).join(parts)
    return write_sections(with_bodies(sections, bodies))
