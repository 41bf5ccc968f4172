"""Just enough of the WebAssembly binary format to give a function of a compiled module another body.

Sections, LEB128 numbers and opcodes as in https://webassembly.github.io/spec/core/binary/.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.base.errors import ArtefactError

IMPORT, ELEMENT, CODE, DATA = 2, 9, 10, 11
MAGIC = b"\0asm\1\0\0\0"


def leb(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def signed_leb(value: int) -> bytes:
    """Signed LEB128, as constants are written."""
    out = bytearray()
    while not -64 <= value < 64:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value & 0x7F))


class Reader:
    """A position in bytes."""

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
    """ArtefactError where `module` is no WebAssembly."""
    if module[: len(MAGIC)] != MAGIC:
        raise ArtefactError("this is no WebAssembly module")
    reader, sections = Reader(module, len(MAGIC)), []
    while reader.at < len(module):
        number = reader.take(1)[0]
        sections.append(Section(number, reader.take(reader.number())))
    return sections


def write_sections(sections: list[Section]) -> bytes:
    return MAGIC + b"".join(bytes([each.id]) + leb(len(each.content)) + each.content for each in sections)


def imported_functions(sections: list[Section]) -> int:
    """How many functions are imported: they have the first indices."""
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
    """Index of the function called `name` in the module's name section; ArtefactError where there is none."""
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
    raise ArtefactError(f"the module names no function {name}")


def function_bodies(sections: list[Section]) -> list[bytes]:
    """Code of the module's own functions."""
    reader = Reader(next(each.content for each in sections if each.id == CODE))
    return [reader.take(reader.number()) for _ in range(reader.number())]


def with_bodies(sections: list[Section], bodies: list[bytes]) -> list[Section]:
    """The same module with other code."""
    code = leb(len(bodies)) + b"".join(leb(len(body)) + body for body in bodies)
    return [Section(CODE, code) if each.id == CODE else each for each in sections]
