"""The consumers of narrow caches: each warp's online softmax over the pieces of its KV head.

S' = K Q' [16 tokens, 8 rows] of each piece, in log2 units, then O' += V' P' [words, 8 rows] for each part of the words.
Where each token has its own scale of V, its exponent joins the logit, so that what P is multiplied by is below 2 and P
fits fp16 whatever the scales are (as in the portable family).
"""

from flashtile.kernels.attention import split_scale
from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.barriers import named_arrive, wait_full
from flashtile.kernels.hopper.compat import fence_async_shared, gl, gluon, mma_v2
from flashtile.kernels.hopper.narrow.epilogue import store_tile
from flashtile.kernels.hopper.narrow.registers import as_operand, by_rows, sum_own
from flashtile.kernels.hopper.narrow.spec import (
    PIECE,
    ROWS,
    WAYS,
    bias,
    decoder,
    empty,
    has_nan,
    mma_layout,
    operand,
    pieces_of_way,
    room,
    threads,
)

NEG_INF = gl.constexpr(float("-inf"))
FLOOR = gl.constexpr(-1e30)  # where maxima start: finite, so that a row without keys gives exp2(-inf) = 0, never NaN


@gluon.jit
def load_query(source, q_begin, head, group, C: gl.constexpr):
    """The query rows of a tile as right operands [ways, words, rows] of fp16, one for each part; their sums, and the
    powers of two that were taken out of them, [ways, rows]: bf16 values may exceed fp16."""
    ptr, q_token, q_head = source
    L: gl.constexpr = operand(1)
    PARTS: gl.constexpr = C.parts
    words = gl.arange(0, C.words, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    ways = gl.arange(0, WAYS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    heads = (head + ways % C.heads) * group + rows
    at = ptr + q_begin.to(gl.int64) * q_token + heads.to(gl.int64) * q_head + words * PARTS
    valid = (rows < group) & (words + ways >= 0)
    loaded = ()
    top = gl.zeros([WAYS, ROWS], gl.float32, gl.SliceLayout(1, L))
    for i in gl.static_range(PARTS):
        x = gl.load(at + i, mask=valid, other=0.0).to(gl.float32)
        top = gl.maximum(top, gl.max(gl.abs(x), 1))
        loaded = loaded + (x,)
    power = (top.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    unit = gl.where(power == 0.0, 1.0, power)
    inverse = (1.0 / unit)[:, None, :]
    q = ()
    total = gl.zeros_like(top)
    for i in gl.static_range(PARTS):
        x = (loaded[i] * inverse).to(gl.float16)
        if C.k_zero:
            total += gl.sum(x.to(gl.float32), 1)
        q = q + (x,)
    ROW: gl.constexpr = gl.SliceLayout(1, mma_layout())
    return q, gl.convert_layout(total, ROW), gl.convert_layout(unit, ROW)


@gluon.jit
def products(keys, query):
    """K Q' [ways, 16, rows] over all parts, as two sums that do not wait for each other."""
    zeros = gl.zeros([WAYS, PIECE, ROWS], gl.float32, mma_layout())
    a = mma_v2(keys[0], query[0], zeros)
    b = mma_v2(keys[1], query[1], zeros)
    for i in gl.static_range(2, len(keys), 2):
        a = mma_v2(keys[i], query[i], a)
        b = mma_v2(keys[i + 1], query[i + 1], b)
    return a + b


@gluon.jit
def is_visible(first, limits, L: gl.constexpr, C: gl.constexpr):
    """Which tokens of one piece of each way its query sees, [ways, 16] in layout L; first: of way 0's piece."""
    begin, end = limits
    ways = gl.arange(0, WAYS, layout=gl.SliceLayout(1, L))[:, None]
    tokens = first + ways // C.heads * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, L))[None, :]
    keep = tokens < end
    if C.left:
        keep = keep & (tokens >= begin)
    return keep


@gluon.jit
def to_logits(s, c, cap, C: gl.constexpr):
    """q.k in log2 units; c [ways, rows]: sm_scale, but for a soft cap in log2 units, times units."""
    s = s * by_rows(c, s)
    if C.soft_cap:
        s = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [s], dtype=gl.float32, is_pure=True, pack=1)
        s = s * cap
    return s


@gluon.jit
def step(it, first, masked, query, c, cap, limits, m, l, shift, acc, buffers, C: gl.constexpr):
    """Fold the pieces of KV block number `it`, whose first token is `first`, into m, l, acc, and shift, which is what
    V's zero points take from each dim of acc."""
    k_buf, v_buf, k_scales, v_scales, k_zeros, v_zeros = buffers
    q, q_sum = query
    decode: gl.constexpr = decoder(C)
    OWN: gl.constexpr = pieces_of_way(C)
    PARTS: gl.constexpr = C.parts
    TOKEN: gl.constexpr = gl.SliceLayout(2, mma_layout())
    DIM_TOKEN: gl.constexpr = gl.SliceLayout(1, operand(0))
    at = it % C.stages * OWN
    logits = ()
    factors = ()
    m_new = m
    for j in gl.static_range(OWN):
        s = products(decode(k_buf.index(at + j).load(operand(0))), q)
        if C.k_zero:
            zero = k_zeros.index(at + j).load(TOKEN) - bias(C)
            s = s - by_rows(q_sum, s) * zero[:, :, None]
        if C.k_form == "token":
            s = s * k_scales.index(at + j).load(TOKEN)[:, :, None]
        s = to_logits(s, c, cap, C)
        if masked:
            s = gl.where(is_visible(first + j * (WAYS // C.heads * PIECE), limits, TOKEN, C)[:, :, None], s, NEG_INF)
        if C.v_form == "token":
            power, inverse, mantissa = split_scale(v_scales.index(at + j).load(TOKEN))
            s = s + power[:, :, None]
            factors = factors + ((inverse, mantissa),)
        m_new = gl.maximum(m_new, gl.max(s, 1))
        logits = logits + (s,)
    alpha = gl.exp2(m - m_new)
    l = l * by_rows(alpha, l)
    if C.v_zero:
        shift = shift * by_rows(alpha, shift)
    scaled = ()
    for i in gl.static_range(PARTS):
        scaled = scaled + (acc[i] * by_rows(alpha, acc[i]),)
    acc = scaled
    for j in gl.static_range(OWN):
        p = gl.exp2(logits[j] - by_rows(m_new, logits[j]))
        if C.v_form == "token":
            l = l + sum_own(p * factors[j][0][:, :, None])
            p = p * factors[j][1][:, :, None]
        else:
            l = l + sum_own(p)
        words = v_buf.index(at + j).permute((0, 2, 1)).load(operand(0))
        if has_nan(C) and (C.boxes or C.left):  # noqa: SIM102 (what nobody sees may be NaN, and NaN * 0 is NaN)
            if masked:
                keep = is_visible(first + j * (WAYS // C.heads * PIECE), limits, DIM_TOKEN, C)
                words = gl.where(keep[:, None, :], words, gl.zeros_like(words))
        values = decode(words)
        p = p.to(gl.float16)
        if C.v_zero:
            zero = v_zeros.index(at + j).load(TOKEN) - bias(C)
            shift = shift + sum_own(p.to(gl.float32) * zero[:, :, None])
        right = as_operand(p)
        added = ()
        for i in gl.static_range(PARTS):
            added = added + (mma_v2(values[i], right, acc[i]),)
        acc = added
    return m_new, l, shift, acc


@gluon.jit
def less(acc, shift):
    """Parts of O [ways, words, rows] less a number per row [ways, rows]."""
    out = ()
    for i in gl.static_range(len(acc)):
        out = out + (acc[i] - by_rows(shift, acc[i]),)
    return out


@gluon.jit
def consumer(smem, full, q, outputs, scales, params, work, C: gl.constexpr):
    """The role of all consumer warps: the CTA's tiles, one after the other."""
    buffers, scratch, pair = smem
    k_scale, v_scale, out_scale = scales
    scale, cap, window_left, group = params
    L: gl.constexpr = mma_layout()
    ROW: gl.constexpr = gl.SliceLayout(1, L)
    WORDS: gl.constexpr = C.words
    PARTS: gl.constexpr = C.parts
    SHARED: gl.constexpr = C.heads < WAYS  # two warps share a head
    ways = gl.arange(0, WAYS, layout=gl.SliceLayout(1, ROW))
    it = gl.to_tensor(0)  # KV blocks this CTA has finished
    count = gl.to_tensor(0)  # tiles
    t = gl.program_id(0)
    following = tiles.turn(work, 1)
    item = tiles.with_head(tiles.fetch(work, t, WAYS), t, work)
    head_group = tiles.field(item, tiles.HEAD)
    while head_group >= 0:
        t = following  # the next tile's entry is under way while this one is computed
        upcoming = tiles.fetch(work, t, WAYS)
        following = tiles.turn(work, count + 2)
        head = head_group * C.heads
        q_begin = tiles.field(item, tiles.Q_BEGIN)
        end = tiles.field(item, tiles.KV_END)
        limits = (tiles.field(item, tiles.KV_LEN) - 1 - window_left, end)
        first, last = tiles.block_range(tiles.field(item, tiles.KV_BEGIN), end, C.block_n)
        rows, q_sum, unit = load_query(q, q_begin, head, group, C)
        c = unit * scale
        if C.k_form == "head":
            c = c * gl.load(k_scale[0] + (head + ways % C.heads) * k_scale[1]).to(gl.float32)[:, None]
        m = gl.full([WAYS, ROWS], FLOOR, gl.float32, ROW)
        l = sum_own(gl.zeros([WAYS, PIECE, ROWS], gl.float32, L))
        shift = l
        acc = ()
        for _ in gl.static_range(PARTS):
            acc = acc + (gl.zeros([WAYS, WORDS, ROWS], gl.float32, L),)
        for j in range(0, last - first + 1):
            n = last - j
            masked = n == last
            if C.left:
                masked = masked | (n * C.block_n < limits[0])
            wait_full(full, it, C.stages)
            m, l, shift, acc = step(
                it, n * C.block_n, masked, (rows, q_sum), c, cap, limits, m, l, shift, acc, buffers, C
            )
            if not SHARED or n > first:
                named_arrive(empty(C) + it % C.stages, threads(C))
            it += 1

        stage = (it - 1) % C.stages
        l = gl.convert_layout(gl.sum(l, 1), ROW, assert_trivial=True)
        if C.v_zero:
            acc = less(acc, gl.convert_layout(gl.sum(shift, 1), ROW, assert_trivial=True))
        room_there = (scratch, stage * room(C), pair)
        place = (q_begin, tiles.field(item, tiles.SLOT), head)
        store_tile(acc, m, l, place, room_there, outputs, v_scale, out_scale, group, C)
        if SHARED:  # warps have exchanged states through the last stage of K
            fence_async_shared()
            named_arrive(empty(C) + stage, threads(C))
        count += 1
        item = tiles.with_head(upcoming, t, work)
        head_group = tiles.field(item, tiles.HEAD)
