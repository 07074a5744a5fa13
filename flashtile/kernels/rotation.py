"""Rotary embedding (arXiv:2104.09864) of q and K inside attention: pairs of tiles are turned as they are read.

Dim d is turned together with dim d + head_dim / 2. A row is read as two halves of words (codec.py), so that both dims
of a pair are in the same place of two tiles and nothing moves between threads. The angle of a pair is its position
times its frequency, rounded to fp32.

Chains. Two special functions and six instructions find cos and sin of an angle, four products those of an angle that is
larger by a known one. A thread holds rows of keys at even distances: it finds the first one's cos and sin, and each
next one's from those before. Only the first angle is rounded then: near position p the others differ from fp32 ones by
up to p * 2**-23 radians for the fastest pairs, which config.CHAINED_TOKENS keeps as small as the rounding of keys.
"""

import triton
import triton.language as tl

from flashtile.kernels.rope import cos_sin_of

LONGEST_CHAIN = 8  # rows; what `one_below_another` takes

# cos ($0) and sin ($1) of an angle ($2). Whole turns are taken off by the leading and by the trailing bits of 2 pi.
COS_SIN_PTX = tl.constexpr(
    """{ .reg .f32 turns, r;
    fma.rn.f32 turns, $2, 0f3e22f983, 0f4b400000;
    sub.rn.f32 turns, turns, 0f4b400000;
    fma.rn.f32 r, turns, 0fc0c90fdb, $2;
    fma.rn.f32 r, turns, 0f343bbd2e, r;
    cos.approx.f32 $0, r;
    sin.approx.f32 $1, r; }"""
)


@triton.jit
def fast_cos_sin(angle):
    """cos and sin of fp32 angles up to 2e7, within 2**-20: far below the rounding to 16 bits that follows.

    Whole turns are taken off exactly (1.2e-7 is left at 1e6 radians), where the special function unit alone would lose
    what the angle's size costs. 6 instructions and 2 of that unit.
    """
    return tl.inline_asm_elementwise(
        COS_SIN_PTX, "=&r,=r,r", [angle], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
    )


@triton.jit
def turn(near, far, pos, freqs, COS_SIN: tl.constexpr, GAIN: tl.constexpr):
    """The lower and upper halves of rows at pos [rows], turned, times GAIN: the fp32 tiles of one half, then of the
    other.

    near, far: a tile [rows, BLOCK] per part; freqs: [BLOCK] per part, radians per token.
    """
    lower, upper = (), ()
    for i in tl.static_range(len(near)):
        cos, sin = COS_SIN(tl.expand_dims(pos.to(tl.float32), -1) * freqs[i])
        if GAIN != 1.0:
            cos, sin = cos * GAIN, sin * GAIN
        x, y = near[i].to(tl.float32), far[i].to(tl.float32)
        lower = lower + (x * cos - y * sin,)
        upper = upper + (y * cos + x * sin,)
    return lower + upper


@triton.constexpr_function
def turn_ptx(dtype):
    """PTX: the lower ($0) and upper ($1) dims of two pairs, 16 bits each, from those not yet turned ($2, $3), cos ($4,
    $5) and sin ($6, $7)."""
    if dtype == tl.bfloat16:  # two instructions a word; left to itself, the compiler takes three
        read = "shl.b32 x0, $2, 16; and.b32 x1, $2, 0xffff0000; shl.b32 y0, $3, 16; and.b32 y1, $3, 0xffff0000;"
    else:
        read = (
            "mov.b32 {a, b}, $2; mov.b32 {c, d}, $3; "
            "cvt.f32.f16 x0, a; cvt.f32.f16 x1, b; cvt.f32.f16 y0, c; cvt.f32.f16 y1, d;"
        )
    turned = " ".join(
        f"mul.f32 t, y{i}, ${6 + i}; neg.f32 t, t; fma.rn.f32 l{i}, x{i}, ${4 + i}, t; "
        f"mul.f32 t, x{i}, ${6 + i}; fma.rn.f32 u{i}, y{i}, ${4 + i}, t;"
        for i in (0, 1)
    )
    pack = "cvt.rn.bf16x2.f32" if dtype == tl.bfloat16 else "cvt.rn.f16x2.f32"
    registers = ".reg .b16 a, b, c, d; .reg .f32 t, x0, x1, y0, y1, l0, l1, u0, u1;"
    return f"{{ {registers} {read} {turned} {pack} $0, l1, l0; {pack} $1, u1, u0; }}"


@triton.jit
def turn_chained(near, far, first, freqs, COS_SIN: tl.constexpr, GAIN: tl.constexpr, CHAIN: tl.constexpr):
    """`turn` of rows at positions first, first + 1, ..., in chains of CHAIN rows, each rows / CHAIN after the one
    before; tiles of 16 bits, as what comes out."""
    ROWS: tl.constexpr = near[0].shape[0] // CHAIN
    pos = (first + tl.arange(0, ROWS)).to(tl.float32)
    lower, upper = (), ()
    for i in tl.static_range(len(near)):
        cos, sin = COS_SIN(tl.expand_dims(pos, -1) * freqs[i])
        if GAIN != 1.0:
            cos, sin = cos * GAIN, sin * GAIN
        next_cos, next_sin = COS_SIN(tl.expand_dims(freqs[i] * ROWS, 0))
        all_cos, all_sin = (cos,), (sin,)
        for _ in tl.static_range(1, CHAIN):
            cos, sin = cos * next_cos - sin * next_sin, sin * next_cos + cos * next_sin
            all_cos, all_sin = all_cos + (cos,), all_sin + (sin,)
        # Not pure, for Triton's sake: where it sees a join behind a product's operand, it gives that a layout for bytes
        x, y = tl.inline_asm_elementwise(
            turn_ptx(near[i].dtype), "=&r,=&r,r,r,r,r,r,r",
            [near[i], far[i], one_below_another(all_cos), one_below_another(all_sin)],
            dtype=(near[i].dtype, near[i].dtype), is_pure=False, pack=2,
        )  # fmt: skip
        lower, upper = lower + (x,), upper + (y,)
    return lower + upper


@triton.jit
def joined(tiles):
    """A power of two of tiles [rows, BLOCK] as [rows, BLOCK, 2, ..., 2]: the last dimension tells the halves of the
    list, the one before the quarters, and so on."""
    if len(tiles) == 1:
        return tiles[0]
    else:
        pairs = ()
        for i in tl.static_range(len(tiles) // 2):
            pairs = pairs + (tl.join(tiles[2 * i], tiles[2 * i + 1]),)
        return joined(pairs)


@triton.jit
def one_below_another(tiles):
    """One to eight tiles [rows, BLOCK], a power of two of them, as one [len(tiles) * rows, BLOCK]."""
    x = joined(tiles)
    if len(tiles) == 2:
        x = tl.permute(x, (2, 0, 1))
    elif len(tiles) == 4:
        x = tl.permute(x, (3, 2, 0, 1))
    elif len(tiles) == 8:
        x = tl.permute(x, (4, 3, 2, 0, 1))
    return tl.reshape(x, [len(tiles) * tiles[0].shape[0], tiles[0].shape[1]])


@triton.jit
def load_frequencies(table_ptr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Radians per token, [BLOCK] fp32 per part, of the pairs whose lower dims are in a half row of WIDTH words."""
    word = tl.arange(0, BLOCK)
    out = ()
    for i in tl.static_range(PARTS):
        out = out + (tl.load(table_ptr + word * PARTS + i, mask=word < WIDTH, other=0.0),)
    return out


def cos_sin_for(exact: bool) -> triton.JITFunction:
    """The function for products in fp32 (exact), or for those in 16 bits; the interpreter runs no assembly."""
    return cos_sin_of if exact or triton.knobs.runtime.interpret else fast_cos_sin


def key_gain(kv_format: str, exact: bool) -> float:
    """A factor on turned keys: e5m2 reaches 57344 and a pair of them 81097, which half of fits fp16."""
    return 0.5 if kv_format == "e5m2" and not exact else 1.0
