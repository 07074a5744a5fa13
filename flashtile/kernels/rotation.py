"""Rotary embedding (arXiv:2104.09864) of q and K inside attention: pairs of tiles are turned as they are read.

Dim d is turned together with dim d + head_dim / 2. A row is read as two halves of words (codec.py), so that both dims
of a pair are in the same place of two tiles and nothing moves between threads. The angle of a pair is its position
times its frequency, rounded to fp32.
"""

import triton
import triton.language as tl

from flashtile.kernels.rope import cos_sin_of

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
