"""Rotary embedding (arXiv:2104.09864) of a tile's query rows, where TMA or the loader has put them in shared memory: by
four warps a tile ahead (`turner`), or by the consumer that multiplies them (`turn_query`).

A query row belongs to one tile, so turning it here repeats nothing and moves nothing; a key belongs to many, and is
turned before (kernels/copied.py).
"""

from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.barriers import named_wait, wait_full
from flashtile.kernels.hopper.compat import fence_async_shared, gl, gluon, mbarrier
from flashtile.kernels.hopper.loader import TURNER, strips
from flashtile.kernels.hopper.spec import ROWS, q_asked
from flashtile.kernels.rotation import COS_SIN_PTX, turn_ptx

STRIP = gl.constexpr(8)  # rows that the turner turns at once


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
def turned(x, y, cos, sin):
    """Lower and upper dims x, y of rows, turned."""
    return gl.inline_asm_elementwise(
        turn_ptx(x.dtype), "=&r,=&r,r,r,r,r,r,r", [x, y, cos, sin], dtype=(x.dtype, x.dtype), is_pure=True, pack=2
    )


@gluon.jit
def cos_sin_of_rows(row, freqs, tile, pack, C: gl.constexpr):
    """cos and sin of the angles of packed rows [rows], and frequencies [columns]."""
    qo_len, offset = tile
    token = tiles.token_of(row, pack, C)
    if C.pack_decode:  # rows that are heads of one token are all at its position
        token = gl.minimum(token, qo_len - 1)
    return fast_cos_sin((token + offset).to(gl.float32)[:, None] * freqs[None, :])


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
    freqs = gl.load(freqs_ptr + gl.arange(0, HALF, layout=gl.SliceLayout(0, near.type.layout)))
    lower, upper = turned(near, far, *cos_sin_of_rows(row, freqs, (qo_len, offset), pack, C))
    both = gl.reshape(gl.permute(gl.join(lower, upper), (0, 2, 1)), [rows.shape[0], C.d_qk])
    rows.store(gl.convert_layout(both, L, assert_trivial=True))


@gluon.constexpr_function
def strip_layout():
    """Registers of the turner for half of the dims of a strip, [8, 64]: 4 neighbouring dims of a row."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [0, 32], [1, 0]],
        warp_bases=[[2, 0], [4, 0]],
        block_bases=[],
        shape=[8, 64],
    )


@gluon.jit
def turner(smem, bars, q_ready, pack, freqs_ptr, C: gl.constexpr):
    """The role that turns each tile's query rows as soon as they are there, and hands them over to the consumers."""
    q_bufs, k_bufs, v_bufs, o_bufs, ring, scratch = smem
    L: gl.constexpr = strip_layout()
    count = gl.to_tensor(0)
    named_wait(q_asked(C), TURNER)
    wait_full(bars[4], 0, 4)
    while tiles.read(ring, count, tiles.HEAD) >= 0:
        freqs = gl.load(freqs_ptr + gl.arange(0, C.d_qk // 2, layout=gl.SliceLayout(0, L)))
        qo_len = tiles.read(ring, count, tiles.QO_LEN)
        tile = (qo_len, tiles.read(ring, count, tiles.KV_LEN) - qo_len)
        row = tiles.read(ring, count, tiles.ROW_BEGIN) + gl.arange(0, STRIP, layout=gl.SliceLayout(1, L))
        cos, sin = cos_sin_of_rows(row, freqs, tile, pack, C)
        step = STRIP
        if C.pack_decode:
            step = gl.where(qo_len == 1, 0, STRIP)
        next_cos, next_sin = fast_cos_sin((freqs * step)[None, :])
        wait_full(bars[0], count, C.q_slots)
        view = strips(q_bufs[0], STRIP)
        STRIPS: gl.constexpr = ROWS // STRIP
        slot = count % C.q_slots * C.consumers
        for i in range(C.consumers * STRIPS):
            near = (slot + i // STRIPS) * 2 * STRIPS + i % STRIPS
            x, y = view.index(near).load(L), view.index(near + STRIPS).load(L)
            x, y = turned(x, y, cos, sin)
            view.index(near).store(x)
            view.index(near + STRIPS).store(y)
            if C.chained:
                cos, sin = cos * next_cos - sin * next_sin, sin * next_cos + cos * next_sin
            else:
                cos, sin = cos_sin_of_rows(row + (i + 1) * STRIP, freqs, tile, pack, C)
        fence_async_shared()
        mbarrier.arrive(q_ready.index(count % C.q_slots), count=1)
        count += 1
        named_wait(q_asked(C) + count % C.q_slots, TURNER)
        wait_full(bars[4], count, 4)
