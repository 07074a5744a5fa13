"""The end of a tile: normalise O, add the sinks, and write out and lse, or a partial state."""

from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.compat import fence_async_shared, gl, gluon, tma_store, tma_store_wait
from flashtile.kernels.hopper.lazy import of_rows
from flashtile.kernels.hopper.spec import ROWS, row_layout, store_layout

LOG2_E = gl.constexpr(1.4426950408889634)
NEG_INF = gl.constexpr(float("-inf"))


@gluon.jit
def finish(m, l, sink, C: gl.constexpr):
    """(factor on O, lse) of rows with maximum m and one more logit sink (log2 units), and sum l; all [64].

    A row that saw no key: 0 and -inf.
    """
    factor = gl.full_like(l, 1.0)
    if C.sinks:
        top = gl.maximum(m, sink)
        # m is a product, and may be subtracted from before it is rounded: of a row without keys, some 1e24 are left of
        # 1e31 - 1e31, and exp2 of them would be infinite
        factor = gl.exp2(gl.minimum(m - top, 0.0))
        l = l * factor + gl.exp2(sink - top)
        m = top
    empty = l == 0.0
    safe = gl.where(empty, 1.0, l)
    return gl.where(empty, 0.0, factor / safe), gl.where(empty, NEG_INF, m + gl.log2(safe))


@gluon.jit
def times_rows(x, factor):
    """x [64, columns] with each row multiplied by a factor [64]."""
    return x * of_rows(factor, x)


@gluon.jit
def rescale(acc, factor):
    """O with each row multiplied by a factor [64]."""
    out = ()
    for p in gl.static_range(len(acc)):
        out = out + (times_rows(acc[p], factor),)
    return out


@gluon.jit
def store_rows(ptr, out, rows, valid, WIDE: gl.constexpr):
    """Store rows [64] (offsets in elements) of all pieces, where valid, in the dtype of ptr. WIDE: 16 bytes at a time,
    for 16-bit elements; more instructions, which cost where they are rarely run (1 % of causal prefill)."""
    for p in gl.static_range(len(out)):
        store_piece(ptr, out[p], rows, valid, WIDE)
        ptr += out[p].shape[1]


@gluon.constexpr_function
def transpose_asm():
    """PTX that transposes 4 x 4 matrices of 32-bit words which four neighbouring threads hold by columns: two of them
    in 8 registers, in turn. A thread hands on half of its words in each of two exchanges."""
    lines = [".reg .pred p0, p1; .reg .b32 lane, bit, x;", "mov.u32 lane, %laneid;"]
    lines += [f"and.b32 bit, lane, {1 << k}; setp.ne.b32 p{k}, bit, 0;" for k in (0, 1)]
    first_input = 8
    for k, pairs in ((0, ((0, 1), (2, 3))), (1, ((0, 2), (1, 3)))):
        for i in (0, 1):
            for a, b in pairs:
                x, y = 2 * a + i, 2 * b + i
                x_in, y_in = x + first_input, y + first_input
                lines.append(f"selp.b32 x, ${x_in}, ${y_in}, p{k}; shfl.sync.bfly.b32 x, x, {1 << k}, 31, -1;")
                lines.append(f"selp.b32 ${y}, ${y_in}, x, p{k}; selp.b32 ${x}, x, ${x_in}, p{k};")
        first_input = 0
    return "{ " + " ".join(lines) + " }"


EIGHT_IN_EIGHT_OUT = gl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r")


@gluon.jit
def neighbours(x):
    """x [64, columns] of 16-bit elements, in registers as an accumulator has them, as [64, columns / 32, 32] with 8
    neighbouring columns in a thread: 16 bytes in a store instead of 4."""
    COLUMNS: gl.constexpr = x.shape[1]
    x = gl.inline_asm_elementwise(transpose_asm(), EIGHT_IN_EIGHT_OUT, [x], dtype=x.dtype, is_pure=False, pack=16)
    x = gl.reshape(gl.permute(gl.reshape(x, [ROWS, COLUMNS // 32, 4, 4, 2]), (0, 1, 3, 2, 4)), [ROWS, COLUMNS])
    x = gl.convert_layout(x, store_layout(COLUMNS), assert_trivial=True)  # only the order of registers changes
    return gl.reshape(x, [ROWS, COLUMNS // 32, 32])


@gluon.jit
def store_piece(ptr, out, rows, valid, WIDE: gl.constexpr):
    """One piece of the head dim, seen as [64, groups, columns of a group]: all addresses of a thread are one per row
    plus constants."""
    out = out.to(ptr.dtype.element_ty)
    if WIDE:
        out = neighbours(out)
    else:  # four threads write 16 bytes of a row together, or 32
        out = gl.reshape(out, [ROWS, out.shape[1] // 8, 8])
    WIDTH: gl.constexpr = out.shape[2]
    L: gl.constexpr = out.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
    groups = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    inner = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    at = (ptr + gl.convert_layout(rows, ROW, assert_trivial=True))[:, None, None] + inner[None, None, :]
    keep = gl.convert_layout(valid, ROW, assert_trivial=True)[:, None, None]
    gl.store(at + WIDTH * groups[None, :, None], out, mask=keep)


@gluon.jit
def copy_rows(desc, out, row, col, bufs, W: gl.constexpr):
    """Store all 64 rows by TMA, through a buffer of the consumer's own."""
    WIDTH: gl.constexpr = desc.block_type.shape[1]
    tma_store_wait(0)  # the previous tile's copy, long done
    for p in gl.static_range(len(out)):
        bufs[p].index(W).store(out[p].to(bufs[p].dtype))
    fence_async_shared()
    for p in gl.static_range(len(out)):
        for c in gl.static_range(out[p].shape[1] // WIDTH):
            tma_store(desc, [row, col], bufs[p].index(W).slice(c * WIDTH, WIDTH, dim=1))
            col += WIDTH


@gluon.jit
def store_tile(acc, m, l, head, ring, count, o_bufs, outputs, W: gl.constexpr, C: gl.constexpr):
    """Write the rows of consumer W of tile number `count`.

    acc: O, not normalised; m: row maxima in log2 units [64]; l: row sums, still spread over four threads each; head:
    the tile's head group.
    """
    (desc, out_ptr, stride_on, stride_oh, head_cols, head_rows, lse_ptr, partial_ptr, partial_lse_ptr, sinks_ptr,
     num_heads, num_groups, pack, group) = outputs  # fmt: skip
    q_begin = tiles.read(ring, count, tiles.Q_BEGIN)
    qo_len = tiles.read(ring, count, tiles.QO_LEN)
    row_begin = tiles.read(ring, count, tiles.ROW_BEGIN) + W * ROWS
    slot = gl.to_tensor(-1)
    if C.split:
        slot = tiles.read(ring, count, tiles.SLOT)

    own = gl.arange(0, ROWS, layout=row_layout())
    token, heads, valid = tiles.owner_of(row_begin + own, head, qo_len, pack, group, C)
    sink = m
    if C.sinks:
        sink = gl.load(sinks_ptr + heads) * LOG2_E
        if C.split:
            sink = gl.where(slot >= 0, NEG_INF, sink)  # the merge adds it, once
    factor, lse = finish(m, gl.convert_layout(gl.sum(l, 1), row_layout(), assert_trivial=True), sink, C)
    out = rescale(acc, factor)
    final = valid
    if C.split:
        final = valid & (slot < 0)
        if slot >= 0:
            state = (slot.to(gl.int64) * num_groups + head) * (C.consumers * ROWS) + W * ROWS + own
            if C.pack_decode:
                state = gl.where(qo_len == 1, (slot.to(gl.int64) * num_groups + heads) * (C.consumers * ROWS), state)
            gl.store(partial_lse_ptr + state, lse, mask=valid)
            store_rows(partial_ptr, out, state * C.d_vo, valid, False)
    rows = (q_begin + token).to(gl.int64)
    gl.store(lse_ptr + rows * num_heads + heads, lse, mask=final)
    at = (rows * stride_on + heads.to(gl.int64) * stride_oh) * 8
    if C.o_tma:
        if (row_begin + ROWS <= qo_len) & (slot < 0):
            copy_rows(desc, out, q_begin + row_begin + head * head_rows, head * head_cols, o_bufs, W)
        else:
            store_rows(out_ptr, out, at, final, False)
    else:
        store_rows(out_ptr, out, at, final, True)
