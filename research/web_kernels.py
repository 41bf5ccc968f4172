"""Assemble the SIMD dot products of the web target: `python -m research.web_kernels > export/web/kernels.txt`.

Blocks have 32 weights: q8_0 2 bytes of fp16 scale and 32 int8; q4_0 the scale and 16 bytes, low nibbles first.
Parameters: 0 n, 1 s (result), 3 x, 5 y. Opcodes follow https://webassembly.github.io/spec/core/binary/.
"""

from __future__ import annotations

from efficientllm.export.web.kernels import TABLE_LOAD, leb


def signed_leb(value: int) -> bytes:
    """Encode a signed LEB128 number, as in constants."""
    out = bytearray()
    while not -64 <= value < 64:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value & 0x7F))


SIMPLE = {
    "loop": "03 40",
    "if": "04 40",
    "end": "0b",
    "i32.ge_s": "4e",
    "i32.sub": "6b",
    "f32.add": "92",
    "f32.mul": "94",
    "f32x4.splat": "fd 13",
    "v128.and": "fd 4e",
    "i8x16.shr_u": "fd 6d",
    "i8x16.sub": "fd 71",
    "i8x16.splat": "fd 0f",
    "i16x8.extend_low_i8x16_s": "fd 87 01",
    "i16x8.extend_high_i8x16_s": "fd 88 01",
    "i32x4.add": "fd ae 01",
    "i32x4.dot_i16x8_s": "fd ba 01",
    "f32x4.add": "fd e4 01",
    "f32x4.mul": "fd e6 01",
    "f32x4.convert_i32x4_s": "fd fa 01",
}
"""Instructions without operands."""

WITH_NUMBER = {"local.get": "20", "local.set": "21", "local.tee": "22", "br_if": "0d", "f32x4.extract_lane": "fd 1f"}
MEMORY = {"f32.load": ("2a", 2), "f32.store": ("38", 2), "v128.load": ("fd 00", 0), "v128.load8x8_s": ("fd 01", 0)}
"""Instruction -> opcode and alignment (log2) of the access; the operand is the offset."""

POINTER = {
    "ptr.add": ("6a", "7c"),
    "ptr.shl": ("74", "86"),
    "ptr.const": ("41", "42"),
    "ptr.load16_u": ("2f 01 00", "33 01 00"),
}
"""Instructions on addresses, of 32 and of 64 bits."""

X, Y, SUM, LOW, HIGH = 3, 5, 8, 9, 10
"""Local variables: two parameters, three vectors."""

LOCALS = bytes((1, 3, 0x7B))
"""One group of three v128."""


def _scale(of: int, table: int) -> str:
    """Return code that converts the fp16 scale of a block to f32 through ggml's table of 65,536 values."""
    return f"local.get {of}; ptr.load16_u; ptr.const 2; ptr.shl; f32.load {table}"


def _dot_q8_0(table: int) -> str:
    products = [
        f"local.get {X}; v128.load8x8_s {at}; local.get {Y}; v128.load8x8_s {at}; i32x4.dot_i16x8_s"
        for at in (2, 10, 18, 26)
    ]
    return _loop(_sum_of(products), 34, table)


def _dot_q4_0(table: int) -> str:
    eight = "i32.const 8; i8x16.splat; i8x16.sub"
    unpack = (
        f"local.get {X}; v128.load 2; local.tee {HIGH}; i32.const 15; i8x16.splat; v128.and; {eight}; local.set {LOW}; "
        f"local.get {HIGH}; i32.const 4; i8x16.shr_u; {eight}; local.set {HIGH}; "
    )
    quarters = ((LOW, "low", 2), (LOW, "high", 10), (HIGH, "low", 18), (HIGH, "high", 26))
    products = [
        f"local.get {half}; i16x8.extend_{part}_i8x16_s; local.get {Y}; v128.load8x8_s {at}; i32x4.dot_i16x8_s"
        for half, part, at in quarters
    ]
    return _loop(unpack + _sum_of(products), 18, table)


def _sum_of(products: list[str]) -> str:
    first, *others = products
    return "; ".join([first, *(f"{product}; i32x4.add" for product in others)])


def _loop(integers: str, x_bytes: int, table: int) -> str:
    """Return the loop over blocks: SUM += float(integers) * scale of x * scale of y, and the store of the lane sum."""
    first, *others = [f"local.get {SUM}; f32x4.extract_lane {lane}" for lane in range(4)]
    lanes = "; ".join([first, *(f"{lane}; f32.add" for lane in others)])
    return (
        "local.get 0; i32.const 32; i32.ge_s; if; loop; "
        f"{integers}; f32x4.convert_i32x4_s; {_scale(X, table)}; {_scale(Y, table)}; f32.mul; f32x4.splat; f32x4.mul; "
        f"local.get {SUM}; f32x4.add; local.set {SUM}; "
        f"local.get {X}; ptr.const {x_bytes}; ptr.add; local.set {X}; "
        f"local.get {Y}; ptr.const 34; ptr.add; local.set {Y}; "
        "local.get 0; i32.const 32; i32.sub; local.tee 0; i32.const 32; i32.ge_s; br_if 0; end; end; "
        f"local.get 1; {lanes}; f32.store 0; end"
    )


KERNELS = {"ggml_vec_dot_q8_0_q8_0": _dot_q8_0, "ggml_vec_dot_q4_0_q8_0": _dot_q4_0}


def assemble(text: str, is_64: bool) -> bytes:
    """Assemble instructions, separated by semicolons. `is_64` selects 64-bit addresses."""
    code = bytearray()
    for line in filter(None, (part.strip() for part in text.split(";"))):
        name, _, operand = line.partition(" ")
        if name in SIMPLE:
            code += bytes.fromhex(SIMPLE[name])
        elif name in WITH_NUMBER:
            code += bytes.fromhex(WITH_NUMBER[name]) + leb(int(operand))
        elif name in MEMORY:
            opcode, alignment = MEMORY[name]
            code += bytes.fromhex(opcode) + leb(alignment) + leb(int(operand))
        elif name == "i32.const":
            code += b"\x41" + signed_leb(int(operand))
        else:
            code += bytes.fromhex(POINTER[name][is_64]) + (signed_leb(int(operand)) if operand else b"")
    return bytes(code)


def kernel_lines() -> list[str]:
    """Return the lines of kernels.txt: function, bits of an address, and body in parts around the table's offset."""
    offset = 1 << 20
    lines = []
    for name, kernel in KERNELS.items():
        for is_64 in (False, True):
            body = LOCALS + assemble(kernel(offset), is_64)
            first, *others = body.split(TABLE_LOAD + leb(offset))
            parts = [first + TABLE_LOAD, *(part + TABLE_LOAD for part in others[:-1]), others[-1]]
            lines.append(" ".join([name, "64" if is_64 else "32", *(part.hex() for part in parts)]))
    return lines


if __name__ == "__main__":
    print("\n".join(kernel_lines()))
