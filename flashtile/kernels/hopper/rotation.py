"""Rotary embedding (arXiv:2104.09864) of a tile's query rows, by the consumer that multiplies them, where TMA or the
loader has put them.

A query row belongs to one tile, so turning it here repeats nothing and moves nothing; a key belongs to many, and is
turned before (kernels/copied.py).
"""

from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.compat import fence_async_shared, gl, gluon
from flashtile.kernels.hopper.spec import ROWS
from flashtile.kernels.rotation import COS_SIN_PTX


@gluon.constexpr_function
def chunk_rows(dim):
    """Rows that a consumer turns at once: all 64, if its registers allow."""
    return 64 if dim <= 128 else 16


@gluon.constexpr_function
def pairs_layout(dim):
    """Registers of a chunk of rows [.., dim]: a thread holds 8 neighbouring dims and the 8 that they are turned
    with."""
    across = (dim // 16).bit_length() - 1  # the lanes that share a row, log2
    rows = [[1 << i, 0] for i in range(chunk_rows(dim).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, dim // 2], *rows[7 - across :]],
        lane_bases=[[0, 8 << i] for i in range(across)] + rows[: 5 - across],
        warp_bases=rows[5 - across : 7 - across],
        block_bases=[],
        shape=[chunk_rows(dim), dim],
    )


@gluon.jit
def fast_cos_sin(angle):
    """cos and sin of fp32 angles up to 2e7."""
    return gl.inline_asm_elementwise(
        COS_SIN_PTX, "=&r,=r,r", [angle], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )


@gluon.jit
def turn_query(q, ring, count, pack, freqs_ptr, W: gl.constexpr, C: gl.constexpr):
    """Turn consumer W's rows of tile number `count`, q [64, head dim] in shared memory, by their positions."""
    CHUNK: gl.constexpr = chunk_rows(C.d_qk)
    row_begin = tiles.read(ring, count, tiles.ROW_BEGIN) + W * ROWS
    qo_len = tiles.read(ring, count, tiles.QO_LEN)
    offset = tiles.read(ring, count, tiles.KV_LEN) - qo_len
    for i in gl.static_range(ROWS // CHUNK):
        turn_rows(q.slice(i * CHUNK, CHUNK), row_begin + i * CHUNK, qo_len, offset, pack, freqs_ptr, C)
    fence_async_shared()


@gluon.jit
def turn_rows(rows, row_begin, qo_len, offset, pack, freqs_ptr, C: gl.constexpr):
    """Turn rows of a request from row_begin on; token t of it is at position t + offset."""
    L: gl.constexpr = pairs_layout(C.d_qk)
    HALF: gl.constexpr = C.d_qk // 2
    near, far = gl.split(gl.permute(gl.reshape(rows.load(L), [rows.shape[0], 2, HALF]), (0, 2, 1)))
    row = row_begin + gl.arange(0, rows.shape[0], layout=gl.SliceLayout(1, near.type.layout))
    token = tiles.token_of(row, pack, C)
    if C.pack_decode:  # rows that are heads of one token are all at its position
        token = gl.minimum(token, qo_len - 1)
    freqs = gl.load(freqs_ptr + gl.arange(0, HALF, layout=gl.SliceLayout(0, near.type.layout)))
    cos, sin = fast_cos_sin((token + offset).to(gl.float32)[:, None] * freqs[None, :])
    x, y = near.to(gl.float32), far.to(gl.float32)
    lower, upper = (x * cos - y * sin).to(rows.dtype), (y * cos + x * sin).to(rows.dtype)
    turned = gl.reshape(gl.permute(gl.join(lower, upper), (0, 2, 1)), [rows.shape[0], C.d_qk])
    rows.store(gl.convert_layout(turned, L, assert_trivial=True))
