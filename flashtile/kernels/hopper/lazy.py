"""What a block rarely needs: O, and exps already taken, are brought to a new maximum only where some row's maximum has
grown by more than GROWTH.

P may be relative to any number near the row's maximum: O and the sums are then at most 2**GROWTH times as large, which
no dtype here minds (the threshold is FlashAttention-4's, arXiv:2603.05451). After a tile's first block few rows exceed
it, so whole warps pass the products over by a branch: in PTX, since Gluon's `if` takes one value for all warps of a
role, which these would have to agree on in shared memory. A row whose maximum stays is multiplied by 1 and gets the
same exps again: its bits do not depend on the other rows of the warp.
"""

from flashtile.kernels.hopper.compat import gl, gluon

GROWTH = 8.0  # log2 units


@gluon.constexpr_function
def registers_of(*counts):
    """Constraints of inline PTX: so many results, and so many registers of each argument."""
    return ",".join(["=r"] * counts[0] + ["r"] * sum(counts[1:]))


@gluon.constexpr_function
def unless_passed_over(n, flag, body):
    """PTX: n results are what the first n inputs hold; then `body` if input `flag` is not 0, else a jump over it."""
    copies = " ".join(f"mov.b32 ${i}, ${n + i};" for i in range(n))
    return f"{{ .reg .pred p; .reg .f32 x; {copies} setp.ne.s32 p, ${flag}, 0; @!p bra.uni DONE; {body} DONE: }}"


@gluon.constexpr_function
def rescale_asm(n):
    """n accumulators, the factors of their rows, and the flag, each n registers."""
    return unless_passed_over(n, 3 * n, " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)))


@gluon.constexpr_function
def exp2_asm(n):
    """n exps, their logits, the scale, the scaled maxima to subtract, and the flag, each n registers."""
    each = (
        f"neg.f32 x, ${4 * n + i}; fma.rn.f32 x, ${2 * n + i}, ${3 * n + i}, x; ex2.approx.ftz.f32 ${i}, x;"
        for i in range(n)
    )
    return unless_passed_over(n, 5 * n, " ".join(each))


@gluon.constexpr_function
def border_asm(n):
    """n and n registers, and n times a number that is not negative."""
    used = " ".join(f"xor.b32 x, x, ${2 * n + i};" for i in range(2 * n))
    copies = " ".join(f"mov.b32 ${i}, ${2 * n + i};" for i in range(2 * n))
    return (
        f"{{ .reg .pred p; .reg .b32 x; setp.lt.s32 p, ${4 * n}, 0; @p bra NEVER; bra.uni ON; "
        f"NEVER: mov.b32 x, 0; {used} st.volatile.shared.b32 [x], x; trap; ON: {copies} }}"
    )


@gluon.jit
def border(a, b, never_negative):
    """a and b, both [64, columns], computed before anything that uses what this returns.

    ptxas orders instructions between two branches as it likes, and its liking is the longest chain first, here the
    search for the maxima, with the exponential unit idle meanwhile. So here is a branch, never taken, to a place that
    would use a and b.
    """
    N: gl.constexpr = a.shape[1] // 2
    number = gl.zeros_like(a).to(gl.int32) + never_negative
    return gl.inline_asm_elementwise(
        border_asm(N), registers_of(2 * N, 2 * N, N), [a, b, number],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=N,
    )  # fmt: skip


@gluon.jit
def of_rows(x, like):
    """A value per row [64] for the columns of `like` [64, columns]."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def any_grew(top, bound):
    """Whether top exceeds bound in some row that this warp holds: int32, [64]."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.f32 p, $2, $4; setp.gt.or.f32 p, $3, $5, p; vote.sync.any.pred p, p, 0xffffffff; "
        "selp.b32 $0, 1, 0, p; selp.b32 $1, 1, 0, p; }",
        registers_of(2, 2, 2), [top, bound], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def exp2_again(grew, p, s, c, mc):
    """exp2(s c - mc), which p is already unless `grew`; p, s [64, columns], mc and grew [64]."""
    N: gl.constexpr = p.shape[1] // 2
    return gl.inline_asm_elementwise(
        exp2_asm(N), registers_of(N, N, N, N, N, N), [p, s, c, of_rows(mc, p), of_rows(grew, p)],
        dtype=gl.float32, is_pure=False, pack=N,
    )  # fmt: skip


@gluon.jit
def rescale_if(grew, acc, factor):
    """O with each row multiplied by a factor [64], which is 1 unless `grew`."""
    out = ()
    for p in gl.static_range(len(acc)):
        out = out + (times_rows_if(grew, acc[p], factor),)
    return out


@gluon.jit
def times_rows_if(grew, x, factor):
    """One piece of the head dim."""
    N: gl.constexpr = x.shape[1] // 2
    return gl.inline_asm_elementwise(
        rescale_asm(N), registers_of(N, N, N, N), [x, of_rows(factor, x), of_rows(grew, x)],
        dtype=gl.float32, is_pure=False, pack=N,
    )  # fmt: skip
