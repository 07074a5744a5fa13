"""The rotators: with a rope, one for each consumer turns its rows of Q in shared memory, a tile ahead of it where Q has
two slots.

They are single warps, the ones that a warp group of two loaders leaves idle: it takes no more registers, and where
Triton wants a barrier between loads and stores, that of one warp is next to nothing. A thread holds 8 dims of two rows
and their partners half a head dim further.
"""

from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.barriers import wait_full
from flashtile.kernels.hopper.compat import fence_async_shared, gl, gluon, mbarrier
from flashtile.kernels.hopper.loader import copy_layout, strips
from flashtile.kernels.hopper.spec import RING, ROWS, panel, piece, turned_columns, turned_rows
from flashtile.kernels.rotation import FAST_COS_SIN


@gluon.constexpr_function
def position_of(col, dim):
    """Of a column of a row: its piece of the head dim, the panel there, and the column in the panel."""
    first = piece(dim, 0)
    p, col = (0, col) if col < first else (1, col - first)
    return p, col // panel(dim), col % panel(dim)


@gluon.jit
def columns(q_bufs, slot, block, COL: gl.constexpr, C: gl.constexpr):
    """Shared memory of the turned_columns from COL on, of block number `block` of turned_rows rows of a consumer's
    slot."""
    AT: gl.constexpr = position_of(COL, C.d_qk)
    HEIGHT: gl.constexpr = turned_rows(C.d_qk)
    WIDTH: gl.constexpr = turned_columns(C.d_qk)
    buf = q_bufs[AT[0]]
    view = strips(buf, HEIGHT)
    PANELS: gl.constexpr = buf.shape[2] // view.shape[2]
    rows = view.index((slot * PANELS + AT[1]) * (ROWS // HEIGHT) + block)
    if panel(C.d_qk) != WIDTH:
        rows = rows.slice(AT[2], WIDTH, dim=1)
    return rows


@gluon.jit
def turn_block(near_rows, far_rows, position, freqs):
    """Turn pairs in place: rows at positions [rows], by freqs [columns] radians per token."""
    L: gl.constexpr = copy_layout(near_rows.shape[1], 1)
    cos, sin = gl.inline_asm_elementwise(
        FAST_COS_SIN, "=&r,=r,r", [position.to(gl.float32)[:, None] * freqs[None, :]],
        dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    near, far = near_rows.load(L), far_rows.load(L)
    x, y = near.to(gl.float32), far.to(gl.float32)
    near_rows.store((x * cos - y * sin).to(near.dtype))
    far_rows.store((y * cos + x * sin).to(near.dtype))


@gluon.jit
def q_rotator(W: gl.constexpr, smem, q_full, q_turned, tile_full, table_ptr, pack, C: gl.constexpr):
    """The role that turns the rows of consumer W, tile after tile.

    table_ptr: radians per token of each pair, [d_qk / 2] fp32.
    """
    q_bufs, ring = smem[0], smem[4]
    WIDTH: gl.constexpr = turned_columns(C.d_qk)
    HEIGHT: gl.constexpr = turned_rows(C.d_qk)
    L: gl.constexpr = copy_layout(WIDTH, 1)
    count = gl.to_tensor(0)
    wait_full(tile_full, 0, RING)
    head = tiles.read(ring, 0, tiles.HEAD, 1)
    while head >= 0:
        row_begin = tiles.read(ring, count, tiles.ROW_BEGIN, 1) + W * ROWS
        kv_len = tiles.read(ring, count, tiles.KV_LEN, 1)
        offset = kv_len - tiles.read(ring, count, tiles.QO_LEN, 1)
        slot = count % C.q_slots * C.consumers + W
        wait_full(q_full, count, C.q_slots)
        for u in gl.static_range(C.d_qk // 2 // WIDTH):
            freqs = gl.load(table_ptr + u * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L)))
            for block in range(0, ROWS // HEIGHT):
                rows = row_begin + block * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, L))
                turn_block(
                    columns(q_bufs, slot, block, u * WIDTH, C),
                    columns(q_bufs, slot, block, C.d_qk // 2 + u * WIDTH, C),
                    tiles.token_of(rows, pack, C) + offset, freqs,
                )  # fmt: skip
        fence_async_shared()
        mbarrier.arrive(q_turned.index(count % C.q_slots), count=1)
        count += 1
        wait_full(tile_full, count, RING)
        head = tiles.read(ring, count, tiles.HEAD, 1)
