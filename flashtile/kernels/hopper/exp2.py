"""Powers of two on two pipes: most on the special function unit (MUFU, 16 a cycle and SM), some by a polynomial on the
FMA pipe, as FlashAttention-4 has them (arXiv:2603.05451).

x = n + f with f in [-1/2, 1/2]: adding 1.5 * 2**23 rounds x to n and leaves n in the low bits of the sum, which are
shifted into the exponent of 2**f. Of degree 3 with 2**0 exact, the polynomial errs by 1.0e-4 at most, a twentieth of
the rounding of P to bf16. Below -127 the result is exactly 0, so that masked logits weigh nothing.
"""

from flashtile.kernels.hopper.compat import gl, gluon

EMULATED_OF = gl.constexpr(8)  # of so many neighbours in a thread, Spec.emulated take the polynomial

_UNIT = "ex2.approx.ftz.f32 ${y}, ${x};"
_POLYNOMIAL = (
    "max.ftz.f32 u, ${x}, 0fC2FE0000; "  # -127
    "add.ftz.f32 r, u, 0f4B400000; sub.ftz.f32 n, r, 0f4B400000; sub.ftz.f32 f, u, n; "  # 1.5 * 2**23
    "fma.rn.ftz.f32 q, f, 0f3D61510B, 0f3E780626; "  # 0.05500893, 0.24221096
    "fma.rn.ftz.f32 q, q, f, 0f3F317AFD; fma.rn.ftz.f32 q, q, f, 0f3F800000; "  # 0.69328293, 1
    "mov.b32 b, q; mov.b32 s, r; shl.b32 s, s, 23; add.s32 b, b, s; mov.b32 ${y}, b;"
)


@gluon.constexpr_function
def assembly(emulated):
    """PTX for EMULATED_OF powers: outputs $0 .. $7, inputs $8 .. $15. The emulated ones are spread evenly."""
    code = "{ .reg .f32 u, r, n, f, q; .reg .b32 b, s; "
    for i in range(8):
        mine = (i + 1) * emulated // 8 > i * emulated // 8
        code += (_POLYNOMIAL if mine else _UNIT).replace("{y}", str(i)).replace("{x}", str(i + 8)) + " "
    return code + "}"


@gluon.constexpr_function
def constraints():
    """The operands of `assembly`."""
    return ",".join(["=&f"] * 8 + ["f"] * 8)


@gluon.jit
def exp2(x, C: gl.constexpr):
    """2**x for x <= 127, whose threads hold a multiple of EMULATED_OF elements each."""
    if C.emulated == 0:
        p = gl.exp2(x)
    else:
        p = gl.inline_asm_elementwise(
            assembly(C.emulated), constraints(), [x], dtype=gl.float32, is_pure=True, pack=EMULATED_OF
        )
    return p
