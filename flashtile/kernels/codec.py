"""How a row of K or V is decoded: one small function per cache format, passed to the mainloop.

Narrow rows are read as 16-bit words, each with two 8-bit or four 4-bit neighbours along head_dim. A function turns a
tile of words [BLOCK_N, BLOCK_W] into a tuple of fp16 tiles of the same shape: part i holds dims i, i + PARTS, i + 2 *
PARTS
... All values of the formats are exact in fp16. The mainloop multiplies part by part, so that nothing moves between
threads: words reach the layout of a tensor-core operand as any 16-bit type does, and are decoded there, two at a time.
"""

import triton
import triton.language as tl

# What a function takes off the numbers of a format; zero points count from there.
BIAS = {"plain": 0.0, "e4m3": 0.0, "e5m2": 0.0, "int8": 0.0, "int4": 8.0}


@triton.jit
def plain(x):
    """A cache of fp16, bf16 or fp32."""
    return (x,)


@triton.jit
def e4m3(x):
    """fp8 e4m3, on GPUs that convert it."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 x; .reg .b16 even, odd;
        prmt.b32 x, $2, 0, 0x3120;
        mov.b32 {even, odd}, x;
        cvt.rn.f16x2.e4m3x2 $0, even;
        cvt.rn.f16x2.e4m3x2 $1, odd; }""",
        "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def e4m3_by_bits(x):
    """fp8 e4m3 on other GPUs; its NaN reads as 480. The sign, then exponent and mantissa one bit lower, are the fp16
    of the value times 2**-8, subnormals too; 0x5c00 is 256."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 even, odd, t, f;
        mov.b32 f, 0x5c005c00;
        shl.b32 even, $2, 8;
        shr.b32 t, even, 1;
        and.b32 t, t, 0x3f803f80;
        lop3.b32 even, even, 0x80008000, t, 0xea;
        shr.b32 t, $2, 1;
        and.b32 t, t, 0x3f803f80;
        lop3.b32 odd, $2, 0x80008000, t, 0xea;
        mul.rn.f16x2 $0, even, f;
        mul.rn.f16x2 $1, odd, f; }""",
        "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def e5m2(x):
    """fp8 e5m2: the upper half of an fp16."""
    return tl.inline_asm_elementwise(
        """prmt.b32 $0, $2, 0, 0x2404;
        and.b32 $1, $2, 0xff00ff00;""",
        "=&r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def int8(x):
    """int8: 0x6400 | n is 1024 + n in fp16, for the unsigned n = value + 128."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 x, even, odd, f;
        mov.b32 f, 0xe480e480;
        xor.b32 x, $2, 0x80808080;
        prmt.b32 even, x, 0x64646464, 0x4240;
        prmt.b32 odd, x, 0x64646464, 0x4341;
        add.rn.f16x2 $0, even, f;
        add.rn.f16x2 $1, odd, f; }""",
        "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def int4(x):
    """Packed int4, less 8: 0x6400 | n is 1024 + n in fp16, and 1024 + 16 * n with n four bits higher."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 x, a, b, c, d, low, sixteenth, high;
        mov.b32 low, 0xe408e408;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 high, 0xd480d480;
        shr.b32 x, $4, 8;
        lop3.b32 a, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 b, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 c, x, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 d, x, 0x00f000f0, 0x64006400, 0xea;
        add.rn.f16x2 $0, a, low;
        fma.rn.f16x2 $1, b, sixteenth, high;
        add.rn.f16x2 $2, c, low;
        fma.rn.f16x2 $3, d, sixteenth, high; }""",
        "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


# Raw: a small whole number is, as the bits of an fp16, that number times 2**-24, exactly, and tensor cores take such
# subnormals as they take others. Half the instructions; the mainloop takes OFFSET off afterwards, a whole tile at once.
OFFSET = {"int8": 128.0, "int4": 8.0}


@triton.constexpr_function
def raw_unit(i, parts):
    """What 1 is in part i of raw_int8 or raw_int4."""
    return 2.0**-20 if parts == 4 and i % 2 == 1 else 2.0**-24


@triton.constexpr_function
def query_gain(i, parts, raw):
    """What the dims of the query that meet part i of K are multiplied by, so that all products have the last one's
    unit."""
    return 2.0**-20 / raw_unit(i, parts) if raw and parts == 4 else 1.0


@triton.jit
def raw_int8(x):
    """int8 + 128."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 high;
        shr.b32 high, $2, 8;
        lop3.b32 $0, $2, 0x00ff00ff, 0x00800080, 0x6a;
        lop3.b32 $1, high, 0x00ff00ff, 0x00800080, 0x6a; }""",
        "=&r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def raw_int4(x):
    """Packed int4; every other one four bits higher."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 high;
        shr.b32 high, $4, 8;
        and.b32 $0, $4, 0x000f000f;
        and.b32 $1, $4, 0x00f000f0;
        and.b32 $2, high, 0x000f000f;
        and.b32 $3, high, 0x00f000f0; }""",
        "=&r,=&r,=r,=r,r", [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


# The same in plain Triton, for its interpreter, which runs no assembly.


@triton.jit
def _bits(x):
    return x.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _e4m3_byte(n):
    value = _bits((n & 0x80) << 8 | (n & 0x7F) << 7) * 256.0
    return tl.where((n & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def plain_e4m3(x):
    n = x.to(tl.int32)
    return (_e4m3_byte(n & 0xFF), _e4m3_byte((n >> 8) & 0xFF))


@triton.jit
def plain_e5m2(x):
    n = x.to(tl.int32)
    return (_bits((n & 0xFF) << 8), _bits(n & 0xFF00))


@triton.jit
def plain_int8(x):
    n = x.to(tl.int32)
    return (((n << 24) >> 24).to(tl.float16), (n >> 8).to(tl.float16))


@triton.jit
def plain_int4(x):
    n = x.to(tl.int32)
    a, b, c, d = n & 15, (n >> 4) & 15, (n >> 8) & 15, (n >> 12) & 15
    return ((a - 8).to(tl.float16), (b - 8).to(tl.float16), (c - 8).to(tl.float16), (d - 8).to(tl.float16))


@triton.jit
def plain_raw_int8(x):
    n = x.to(tl.int32) ^ 0x8080
    return (_bits(n & 0xFF), _bits((n >> 8) & 0xFF))


@triton.jit
def plain_raw_int4(x):
    n = x.to(tl.int32)
    return (_bits(n & 0x0F), _bits(n & 0xF0), _bits((n >> 8) & 0x0F), _bits((n >> 8) & 0xF0))


_PACKED = {"plain": plain, "e4m3": e4m3, "e5m2": e5m2, "int8": int8, "int4": int4}
_PLAIN = {"plain": plain, "e4m3": plain_e4m3, "e5m2": plain_e5m2, "int8": plain_int8, "int4": plain_int4}


_RAW = {"int8": raw_int8, "int4": raw_int4}
_PLAIN_RAW = {"int8": plain_raw_int8, "int4": plain_raw_int4}


def decoder(kv_format: str, has_e4m3: bool, raw: bool) -> triton.JITFunction:
    """The function for a format of plan/problem.py; has_e4m3: the GPU converts e4m3 to fp16; raw: see above."""
    interpret = triton.knobs.runtime.interpret
    if raw:
        return (_PLAIN_RAW if interpret else _RAW)[kv_format]
    if interpret:
        return _PLAIN[kv_format]
    return e4m3_by_bits if kv_format == "e4m3" and not has_e4m3 else _PACKED[kv_format]
