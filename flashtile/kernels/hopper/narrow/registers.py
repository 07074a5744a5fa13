"""How values lie in the registers of a warp whose products are transposed, and how they get from one such place to
another without shared memory: 8 x 8 blocks are transposed by movmatrix, everything else only renames registers."""

from flashtile.kernels.hopper.compat import gl, gluon
from flashtile.kernels.hopper.narrow.spec import operand


@gluon.jit
def by_rows(x, like):
    """[ways, rows] for a tensor [ways, n, rows]."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None, :]


@gluon.jit
def sum_own(p):
    """Sums of p [ways, tokens, rows] over the tokens that one thread holds, [ways, 8, rows]: no shuffle until the
    tile's end."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8, p.shape[2]]), 1)


@gluon.jit
def swapped(x):
    """x [ways, n, rows], of which each thread holds what its partner in 8 x 8 blocks held, as what it then is."""
    WAYS: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    ROWS: gl.constexpr = x.shape[2]
    x = gl.reshape(x, [WAYS, N // 8, 8, ROWS // 8, 8])
    return gl.reshape(gl.permute(x, (0, 1, 4, 3, 2)), [WAYS, N, ROWS])


@gluon.jit
def as_operand(p):
    """P [ways, tokens, rows], fp16, as the right operand of V' P'."""
    p = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], dtype=gl.float16, is_pure=False, pack=2
    )
    return gl.convert_layout(swapped(p), operand(1), assert_trivial=True)


@gluon.jit
def along_rows(x):
    """x [ways, n, rows] fp32 with two neighbours along n in a thread, not along the rows: the halves of 32 bits are
    transposed each for themselves."""
    x = gl.inline_asm_elementwise(
        "{ .reg .b32 low, high; prmt.b32 low, $2, $3, 0x5410; prmt.b32 high, $2, $3, 0x7632; "
        "movmatrix.sync.aligned.m8n8.trans.b16 low, low; movmatrix.sync.aligned.m8n8.trans.b16 high, high; "
        "prmt.b32 $0, low, high, 0x5410; prmt.b32 $1, low, high, 0x7632; }",
        "=r,=r,r,r", [x], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip
    return swapped(x)


@gluon.jit
def interleaved(parts):
    """Parts [ways, words, rows] as rows of all their dims, [ways, rows, words * parts]."""
    ROWS: gl.constexpr = parts[0].shape[2]
    DIMS: gl.constexpr = parts[0].shape[1] * len(parts)
    if len(parts) == 2:
        x = gl.permute(gl.join(parts[0], parts[1]), (0, 2, 1, 3))
    else:
        x = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
        x = gl.permute(x, (0, 2, 1, 3, 4))
    return gl.reshape(x, [parts[0].shape[0], ROWS, DIMS])


@gluon.jit
def halves(x):
    """Lower and upper half of the words of x [ways, words, rows]."""
    WAYS: gl.constexpr = x.shape[0]
    HALF: gl.constexpr = x.shape[1] // 2
    ROWS: gl.constexpr = x.shape[2]
    return gl.split(gl.permute(gl.reshape(x, [WAYS, 2, HALF, ROWS]), (0, 2, 3, 1)))
