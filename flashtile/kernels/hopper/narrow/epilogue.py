"""The end of a tile: two warps that share a KV head join their states; out and lse, or a partial state, are written.

Of two such warps each stores half of the dims: it hands over the other half of its O, and m and l, through shared
memory.
"""

from flashtile.kernels.hopper.compat import gl, gluon
from flashtile.kernels.hopper.epilogue import finish
from flashtile.kernels.hopper.narrow.registers import along_rows, by_rows, halves, interleaved
from flashtile.kernels.hopper.narrow.spec import ROWS, WAYS

LOG2_E = gl.constexpr(1.4426950408889634)
NEG_INF = gl.constexpr(float("-inf"))
PARTIAL_ROWS = gl.constexpr(16)  # rows of a partial state: block_m of the plan


@gluon.jit
def exchange(x, scratch, upper):
    """What the other warp of a pair has for x [ways, rows]; upper [ways, rows]: whether a warp is the second one."""
    PAIRS: gl.constexpr = WAYS // 2
    pairs = gl.reshape(x, [2, PAIRS, ROWS])
    L: gl.constexpr = pairs.type.layout
    scratch.store(pairs)
    other = gl.where(gl.reshape(upper, [2, PAIRS, ROWS]), scratch.slice(0, 1).load(L), scratch.slice(1, 1).load(L))
    return gl.convert_layout(gl.reshape(other, [WAYS, ROWS]), x.type.layout, assert_trivial=True)


@gluon.jit
def give(x, scratch, upper):
    """Write the half of x [ways, words, rows] that the other warp stores; returns one's own."""
    a, b = halves(x)
    flag = by_rows(upper, a)
    HALF: gl.constexpr = a.shape[1]
    scratch.store(gl.reshape(gl.where(flag, a, b), [2, WAYS // 2, HALF, ROWS]))
    return gl.where(flag, b, a)


@gluon.jit
def take(like, scratch, upper):
    """What the other warp has given, as one's own half [ways, words / 2, rows]."""
    PAIRS: gl.constexpr = WAYS // 2
    HALF: gl.constexpr = like.shape[1]
    L: gl.constexpr = gl.reshape(like, [2, PAIRS, HALF, ROWS]).type.layout
    flag = gl.convert_layout(gl.reshape(by_rows(upper, like), [2, PAIRS, 1, ROWS]), L, assert_trivial=True)
    other = gl.where(flag, scratch.slice(0, 1).load(L), scratch.slice(1, 1).load(L))
    return gl.convert_layout(gl.reshape(other, [WAYS, HALF, ROWS]), like.type.layout, assert_trivial=True)


@gluon.jit
def join_pairs(acc, m, l, scratch, upper):
    """One state from those of two warps that share a head: of O half of the dims in each. scratch: (buffer [.., 2,
    heads, words / 2, rows], its first free part, buffer [2, 2, heads, rows])."""
    parts, first, pair = scratch
    own = ()
    for i in gl.static_range(len(acc)):
        own = own + (give(acc[i], parts.index(first + i), upper),)
    m_other = exchange(m, pair.index(0), upper)
    l_other = exchange(l, pair.index(1), upper)
    top = gl.maximum(m, m_other)
    alpha = gl.exp2(m - top)
    beta = gl.exp2(m_other - top)
    out = ()
    for i in gl.static_range(len(acc)):
        x = own[i] * by_rows(alpha, own[i])
        out = out + (x + take(own[i], parts.index(first + i), upper) * by_rows(beta, own[i]),)
    return out, top, l * alpha + l_other * beta


@gluon.jit
def store_tile(acc, m, l, place, scratch, outputs, v_scale, out_scale, group, C: gl.constexpr):
    """Write the rows of a tile.

    acc: parts of O [ways, words, rows], not normalised; m, l [ways, rows]: maxima in log2 units, and sums; place: the
    query token, the slot of the partial state or -1, and the first KV head.
    """
    q_begin, slot, head = place
    out_ptr, stride_on, stride_oh, lse_ptr, partial_ptr, partial_lse_ptr, sinks_ptr, num_heads, num_groups = outputs
    HEADS: gl.constexpr = C.heads
    PARTS: gl.constexpr = C.parts
    D_VO: gl.constexpr = C.words * PARTS
    ROW: gl.constexpr = m.type.layout
    ways = gl.arange(0, WAYS, layout=gl.SliceLayout(1, ROW))[:, None]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, ROW))[None, :]
    if HEADS < WAYS:
        acc, m, l = join_pairs(acc, m, l, scratch, ways + rows * 0 >= HEADS)
    kv_head = head + ways % HEADS
    heads = kv_head * group + rows
    valid = (rows < group) & (ways < HEADS)  # of a pair the first warp: their sums may differ in a bit
    sink = m
    if C.sinks:
        sink = gl.load(sinks_ptr + heads, mask=rows + ways * 0 < group, other=0.0) * LOG2_E
        sink = gl.where(slot >= 0, NEG_INF, sink)  # of a split tile, the merge adds it
    factor, lse = finish(m, l, sink, C)
    factor = factor * out_scale
    if C.v_form == "head":
        factor = factor * gl.load(v_scale[0] + kv_head * v_scale[1]).to(gl.float32)
    turned = ()
    for i in gl.static_range(PARTS):
        turned = turned + (along_rows(acc[i] * by_rows(factor, acc[i])),)
    out = interleaved(turned)  # [ways, rows, dims that a warp stores]

    L: gl.constexpr = out.type.layout
    THERE: gl.constexpr = gl.SliceLayout(2, L)
    OWN: gl.constexpr = out.shape[2]
    ways_there = gl.arange(0, WAYS, layout=gl.SliceLayout(1, THERE))[:, None]
    rows_there = gl.arange(0, ROWS, layout=gl.SliceLayout(0, THERE))[None, :]
    kv_head_there = head + ways_there % HEADS
    dims = (ways_there // HEADS * OWN)[:, :, None] + gl.arange(0, OWN, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[
        None, None, :
    ]
    stored = ((rows_there < group) & (ways_there >= 0))[:, :, None] & (dims >= 0)
    if slot >= 0:
        first = slot.to(gl.int64) * num_groups
        gl.store(partial_lse_ptr + (first + kv_head) * PARTIAL_ROWS + rows, lse, mask=valid)
        state = (first + kv_head_there) * PARTIAL_ROWS + rows_there
        gl.store(partial_ptr + state[:, :, None] * D_VO + dims, out, mask=stored)
    else:
        gl.store(lse_ptr + q_begin.to(gl.int64) * num_heads + heads, lse, mask=valid)
        heads_there = (kv_head_there * group + rows_there).to(gl.int64)
        at = (q_begin.to(gl.int64) * stride_on + heads_there * stride_oh) * 8
        gl.store(out_ptr + at[:, :, None] + dims, out.to(out_ptr.dtype.element_ty), mask=stored)
