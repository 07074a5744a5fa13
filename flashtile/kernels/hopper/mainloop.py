"""The consumers' loop: S = Q K^T, online softmax and O += P V over the KV blocks of a tile, last block first.

FlashAttention-3's schedule (arXiv:2407.08608), in Gluon. In each step a consumer issues S of block j + 1 and P V of
block j together, and works on the softmax of S while P V runs. The row maximum is kept in raw q.k (or capped) units and
the scale is folded into the exponent: p = exp2(s c - m c).

PIN. The exps of the left half of S come before the wait for P V, those of the right half after it, where the packing of
P (and the rescaling of O) fills the gaps of the exp unit. A second wait on a barrier that is already complete stands
between them: it costs nothing but ends the basic block, without which ptxas hoists the wait for P V above all exps
(4..5 % at 4k tokens and more, not causal, H100).

MAXIMA. Where softmax is not the bound, O keeps its scale until a row's maximum has grown by much (`lazy`), and the exps
of the left half do not wait for the maxima of their block: they are taken relative to those before it, and once more
where these had grown (`ahead`). The branch around that second time ends the basic block, as a pin does.
"""

from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.barriers import named_arrive, pass_turn, take_turn, wait_full
from flashtile.kernels.hopper.compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashtile.kernels.hopper.epilogue import rescale, store_tile
from flashtile.kernels.hopper.lazy import any_grew, border, exp2_again, of_rows, rescale_if
from flashtile.kernels.hopper.loader import stage
from flashtile.kernels.hopper.rotation import turn_query
from flashtile.kernels.hopper.spec import (
    ROWS,
    ahead,
    bordered,
    half_first,
    k_empty,
    late_turn,
    lazy,
    masked_loop,
    mma_layout,
    num_pieces,
    p_layout,
    piece,
    row_layout,
    threads,
    turns_query,
    v_empty,
)

NEG_INF = gl.constexpr(float("-inf"))
FLOOR = gl.constexpr(
    -1e30
)  # where a row's maximum starts: finite, so that a row without keys gives exp2(-inf) = 0, never NaN


@gluon.jit
def zeros(C: gl.constexpr):
    """O of a new tile: one accumulator per piece of the head dim."""
    acc = ()
    for p in gl.static_range(num_pieces(C.d_vo)):
        acc = acc + (gl.zeros([ROWS, piece(C.d_vo, p)], gl.float32, mma_layout(piece(C.d_vo, p))),)
    return acc


@gluon.jit
def issue_s(q, k, KEYS: gl.constexpr, C: gl.constexpr):
    """Start S = Q K^T for the first KEYS keys of a block: [64, KEYS]."""
    s = gl.zeros([ROWS, KEYS], gl.float32, mma_layout(KEYS))
    for p in gl.static_range(len(q)):
        keys = k[p] if C.block_n == KEYS else k[p].slice(0, KEYS)
        s = warpgroup_mma(q[p], keys.permute((1, 0)), s, use_acc=p > 0, is_async=True)
    return s


@gluon.jit
def issue_pv(p_left, p_right, v, acc, HALF: gl.constexpr, C: gl.constexpr):
    """Start O += P V; HALF: P's right half is empty."""
    KEYS: gl.constexpr = C.block_n // 2
    out = ()
    for p in gl.static_range(len(acc)):
        o = warpgroup_mma(p_left, v[p].slice(0, KEYS), acc[p], is_async=True)
        if not HALF:
            o = warpgroup_mma(p_right, v[p].slice(KEYS, KEYS), o, is_async=True)
        out = out + (o,)
    return out


@gluon.jit
def wait_pv(acc, OUTSTANDING: gl.constexpr):
    """Wait until at most OUTSTANDING later products are in flight; O is complete then."""
    if len(acc) == 1:
        out = (warpgroup_mma_wait(OUTSTANDING, deps=[acc[0]]),)
    else:
        out = warpgroup_mma_wait(OUTSTANDING, deps=[acc[0], acc[1]])
    return out


@gluon.jit
def halves(s):
    """Left and right half of S's columns; registers are renamed, nothing moves."""
    KEYS: gl.constexpr = s.shape[1] // 2
    a, b = gl.split(gl.permute(gl.reshape(s, [ROWS, 2, KEYS]), (0, 2, 1)))
    L: gl.constexpr = mma_layout(KEYS)
    return gl.convert_layout(a, L, assert_trivial=True), gl.convert_layout(b, L, assert_trivial=True)


@gluon.jit
def joined(a, b):
    """The inverse of `halves`."""
    COLUMNS: gl.constexpr = 2 * a.shape[1]
    s = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [ROWS, COLUMNS])
    return gl.convert_layout(s, mma_layout(COLUMNS), assert_trivial=True)


@gluon.jit
def exps_first(sa, sb, c, mc, never_negative):
    """exp2(sa c - mc), and something with the row maxima of sa and sb [64, 64]: a quarter of the exps is on its way
    before most of the search begins."""
    a, b = halves(sa)
    a0, a1 = halves(a)
    a2, a3 = halves(b)
    a, b = halves(sb)
    b0, b1 = halves(a)
    b2, b3 = halves(b)
    top = gl.maximum(gl.maximum(a0, b0), a1)
    p0, top = border(gl.exp2(a0 * c - of_rows(mc, a0)), top, never_negative)
    p1 = gl.exp2(a1 * c - of_rows(mc, a1))
    top = gl.maximum(gl.maximum(top, b1), a2)
    p2 = gl.exp2(a2 * c - of_rows(mc, a2))
    top = gl.maximum(gl.maximum(top, b2), gl.maximum(a3, b3))
    p3 = gl.exp2(a3 * c - of_rows(mc, a3))
    return joined(joined(p0, p1), joined(p2, p3)), top


@gluon.jit
def sum_own(p):
    """Row sums over the columns that one thread holds: no shuffle until the tile's end."""
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def pack_p(p, dtype: gl.constexpr):
    """P as the left operand of P V; registers are renamed, nothing moves."""
    return gl.convert_layout(p.to(dtype), p_layout(), assert_trivial=True)


@gluon.jit
def to_logits(s, cap_scale, C: gl.constexpr):
    """tanh(s cap_scale) where logits are capped: the cap's own factor is in the scale of the exponent."""
    if C.soft_cap:
        s = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [s * cap_scale], dtype=gl.float32, is_pure=True, pack=1
        )
    return s


@gluon.jit
def limits(ring, count, window, W: gl.constexpr, C: gl.constexpr):
    """What consumer W's rows of tile number `count` may see.

    Returns:
        last: the tile's last KV block; blocks: how many it has; full, left: blocks from `full` on, or before `left`,
        hold keys that some row must not see; high, low: each row sees keys low <= key < high, [64]; idle: all of these
        rows lie beyond the request.
    """
    window_left, window_reach, pack = window
    kv_end = tiles.read(ring, count, tiles.KV_END)
    first, last = tiles.block_range(tiles.read(ring, count, tiles.KV_BEGIN), kv_end, C.block_n)
    qo_len = tiles.read(ring, count, tiles.QO_LEN)
    offset = tiles.read(ring, count, tiles.KV_LEN) - qo_len
    row_begin = tiles.read(ring, count, tiles.ROW_BEGIN) + W * ROWS
    position = tiles.token_of(row_begin + gl.arange(0, ROWS, layout=row_layout()), pack, C) + offset
    if C.pack_decode:  # rows that are heads of one token are all at its position
        position = gl.minimum(position, offset + qo_len - 1)
    high = gl.zeros_like(position) + kv_end
    lowest = kv_end
    if C.right:
        high = gl.minimum(high, position + window_reach)
        lowest = gl.minimum(kv_end, tiles.token_of(row_begin, pack, C) + offset + window_reach)
    left = gl.to_tensor(0)
    low = position
    if C.left:
        low = position - window_left
        highest = tiles.token_of(row_begin + ROWS - 1, pack, C) + offset
        if C.pack_decode:
            highest = gl.minimum(highest, offset + qo_len - 1)
        highest -= window_left
        left = (gl.maximum(highest, 0) + C.block_n - 1) // C.block_n
    idle = tiles.token_of(row_begin, pack, C) >= qo_len
    return last, last - first + 1, gl.maximum(lowest, 0) // C.block_n, left, high, low, idle


@gluon.jit
def rows_of(x, ROW: gl.constexpr):
    """A value per row as [64, 1, 1, 1]."""
    return gl.convert_layout(x, ROW, assert_trivial=True)[:, None][:, :, None][:, :, :, None]


@gluon.jit
def mask(s, n, high, low, C: gl.constexpr):
    """-inf where a key of block n is not visible; K may hold anything there.

    S is seen as [64, groups, 4 lanes, 2], as threads hold it: the keys of a thread are then constants, and its lane's
    offset goes into the bounds. Otherwise the compiler keeps the keys of all its columns in registers, through the
    loop.
    """
    x = gl.reshape(s, [ROWS, s.shape[1] // 8, 4, 2])
    L: gl.constexpr = x.type.layout
    GROUPS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, L))
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, L))
    PAIRS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
    ROW: gl.constexpr = gl.SliceLayout(1, GROUPS)
    groups = gl.arange(0, s.shape[1] // 8, layout=gl.SliceLayout(0, GROUPS))[None, :][:, :, None][:, :, :, None]
    lanes = gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))[None, :][:, None, :][:, :, :, None]
    pairs = gl.arange(0, 2, layout=gl.SliceLayout(0, PAIRS))[None, :][:, None, :][:, :, None, :]
    keys = groups * 8 + pairs
    own = n * C.block_n + lanes * 2
    keep = keys < rows_of(high, ROW) - own
    if C.left:
        keep = keep & (keys >= rows_of(low, ROW) - own)
    x = gl.where(keep, x, NEG_INF)
    return gl.convert_layout(gl.reshape(x, [ROWS, s.shape[1]]), s.type.layout, assert_trivial=True)


@gluon.jit
def first_softmax(s, tile, scales, dtype: gl.constexpr, HALF: gl.constexpr, C: gl.constexpr):
    """P (both halves), m and l after the first block of a tile."""
    last, blocks, full, left, high, low, idle = tile
    c, cap_scale, slack = scales
    s = to_logits(s, cap_scale, C)
    if (last >= full) | (last < left):
        s = mask(s, last, high, low, C)
    if HALF:
        m = gl.maximum(gl.max(s, 1), FLOOR)
        pa = gl.exp2(s * c - (m * c)[:, None])
        l = sum_own(pa)
        pb = gl.zeros_like(pa)
    else:
        sa, sb = halves(s)
        m = gl.maximum(gl.max(gl.maximum(sa, sb), 1), FLOOR)
        pa = gl.exp2(sa * c - (m * c)[:, None])
        pb = gl.exp2(sb * c - (m * c)[:, None])
        l = sum_own(pa) + sum_own(pb)
    return pack_p(pa, dtype), pack_p(pb, dtype), gl.convert_layout(m, row_layout(), assert_trivial=True), l


@gluon.jit
def visible(bars, it, C: gl.constexpr):
    """Wait for a stage; what was gathered by ordinary copies must also become visible to the tensor cores."""
    wait_full(bars, it, C.stages)
    if C.gather:
        fence_async_shared()


@gluon.jit
def step(
    it, n, q, p_left, p_right, acc, m, l, tile, smem, bars, count, scales,
    HALF: gl.constexpr, W: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One block: P of block number `it` and its successor's position n in; the successor's P out, and O with block
    `it`.

    HALF: P's right half is empty.
    """
    last, blocks, full, left, high, low, idle = tile
    c, cap_scale, slack = scales
    dtype: gl.constexpr = p_left.dtype
    visible(bars[2], it + 1, C)
    take_turn(W, C)
    s_token = issue_s(q, stage(smem[1], (it + 1) % C.stages), C.block_n, C)
    visible(bars[3], it, C)
    o_token = issue_pv(p_left, p_right, stage(smem[2], it % C.stages), acc, HALF, C)
    if not late_turn(C):
        pass_turn(W, C)
    bound = m + slack
    PV_PRODUCTS: gl.constexpr = len(acc) * (1 if HALF else 2)
    s = warpgroup_mma_wait(PV_PRODUCTS, deps=[s_token])
    named_arrive(k_empty(C) + (it + 1) % C.stages, threads(C))
    if late_turn(C):
        pass_turn(W, C)
    if C.q_slots == 1:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if n == last - blocks + 1:
            mbarrier.arrive(bars[1].index(0), count=1)
    s = to_logits(s, cap_scale, C)
    if masked_loop(C):  # noqa: SIM102 (the outer condition is known to the compiler, the inner one is not)
        if (n >= full) | (n < left):
            s = mask(s, n, high, low, C)
    sa, sb = halves(s)
    if bordered(C):
        early, top = exps_first(sa, sb, c, m * c, it)
    else:
        top = gl.maximum(sa, sb)
    m_new = gl.convert_layout(gl.max(top, 1), row_layout(), assert_trivial=True)
    if lazy(C):
        grew = any_grew(m_new, bound)
        m_new = gl.where(m_new > bound, m_new, m)
    else:
        m_new = gl.maximum(m, m_new)
    if ahead(C):
        if not bordered(C):
            early = gl.exp2(sa * c - of_rows(m * c, sa))
        pa = exp2_again(grew, early, sa, c, m_new * c)
    else:
        pa = gl.exp2(sa * c - of_rows(m_new * c, sa))
    alpha = gl.exp2((m - m_new) * c)
    if not ahead(C):
        l = l * of_rows(alpha, l) + sum_own(pa)
        if C.q_slots == 1:  # Q may have been freed, but not this V
            wait_full(bars[3], it, C.stages)  # PIN
        else:
            wait_full(bars[0], count, C.q_slots)  # PIN
    acc = wait_pv(o_token, 0)
    named_arrive(v_empty(C) + it % C.stages, threads(C))
    if lazy(C):
        acc = rescale_if(grew, acc, alpha)
    pb = gl.exp2(sb * c - of_rows(m_new * c, sb))
    if not lazy(C):
        acc = rescale(acc, alpha)
    if ahead(C):  # under the right half's exps
        l = l * of_rows(alpha, l) + sum_own(pa)
    l += sum_own(pb)
    return acc, pack_p(pa, dtype), pack_p(pb, dtype), m_new, l


@gluon.jit
def free_query(tile, bars, C: gl.constexpr):
    """After a tile's first S: free Q's only slot, if there is no other S."""
    if C.q_slots == 1:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if tile[1] == 1:
            mbarrier.arrive(bars[1].index(0), count=1)


@gluon.jit
def pass_over(it, bars, W: gl.constexpr, C: gl.constexpr):
    """A step that computes nothing."""
    wait_full(bars[2], it + 1, C.stages)
    take_turn(W, C)
    pass_turn(W, C)
    named_arrive(k_empty(C) + (it + 1) % C.stages, threads(C))
    wait_full(bars[3], it, C.stages)
    named_arrive(v_empty(C) + it % C.stages, threads(C))


@gluon.jit
def consumer(W: gl.constexpr, smem, bars, outputs, scales, window, freqs_ptr, C: gl.constexpr):
    """The role of consumer W: all tiles of the CTA, one after the other.

    Between two tiles, the last P V of one and the first S of the next are issued together, and the epilogue runs under
    them.
    """
    q_bufs, k_bufs, v_bufs, o_bufs, ring, scratch = smem
    q_full, q_empty, k_full, v_full, tile_full, tail_full = bars
    dtype: gl.constexpr = q_bufs[0].dtype
    HALF: gl.constexpr = half_first(C) and W == 0
    KEYS: gl.constexpr = C.block_n // 2 if HALF else C.block_n

    if C.consumers - 1 == W:
        pass_turn(W, C)  # consumer 0 goes first
    it = gl.to_tensor(0)  # KV blocks this CTA has finished
    count = gl.to_tensor(0)  # tiles this CTA has finished
    wait_full(tile_full, 0, 4)
    head = tiles.read(ring, 0, tiles.HEAD)
    tile = limits(ring, 0, window, W, C)
    wait_full(q_full, 0, C.q_slots)
    first_q = stage(q_bufs, W)
    if turns_query(C):
        turn_query(first_q[0], ring, 0, window[2], freqs_ptr, W, C)
    elif not C.q_tma:
        fence_async_shared()
    visible(k_full, 0, C)
    take_turn(W, C)
    s_token = issue_s(first_q, stage(k_bufs, 0), KEYS, C)
    pass_turn(W, C)
    s = warpgroup_mma_wait(0, deps=[s_token])
    named_arrive(k_empty(C), threads(C))
    free_query(tile, bars, C)
    p_left, p_right, m, l = first_softmax(s, tile, scales, dtype, HALF, C)
    acc = zeros(C)

    while head >= 0:
        last, blocks, full, left, high, low, idle = tile
        q = stage(q_bufs, count % C.q_slots * C.consumers + W)
        begin = gl.to_tensor(1)
        if HALF:
            if blocks > 1:
                acc, p_left, p_right, m, l = step(
                    it, last - 1, q, p_left, p_right, acc, m, l, tile, smem, bars, count, scales, True, W, C
                )
                it += 1
            begin = gl.to_tensor(2)
        if C.tails and W > 0:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if idle:  # the tile of a decode row, or a request's last one: all tensor cores are the other consumer's
                for _ in range(1, blocks):
                    pass_over(it, bars, W, C)
                    it += 1
                begin = blocks
                if C.q_slots == 1:  # noqa: SIM102
                    if blocks > 1:
                        mbarrier.arrive(q_empty.index(0), count=1)
        for j in range(begin, blocks):
            acc, p_left, p_right, m, l = step(
                it, last - j, q, p_left, p_right, acc, m, l, tile, smem, bars, count, scales, False, W, C
            )
            it += 1

        if C.q_slots > 1:
            mbarrier.arrive(q_empty.index(count % C.q_slots), count=1)
        done = count
        count += 1
        wait_full(tile_full, count, 4)
        head_done = head
        head = tiles.read(ring, count, tiles.HEAD)
        tile = limits(ring, count, window, W, C)
        more = head >= 0
        # past the last tile, stale shared memory is turned and multiplied; nothing reads the result
        next_q = stage(q_bufs, count % C.q_slots * C.consumers + W)
        if turns_query(C):  # before the products: other consumers' run meanwhile
            wait_full(q_full, count, C.q_slots, more)
            turn_query(next_q[0], ring, count, window[2], freqs_ptr, W, C)
        visible(v_full, it, C)
        take_turn(W, C)
        o_token = issue_pv(p_left, p_right, stage(v_bufs, it % C.stages), acc, False, C)
        if not turns_query(C):
            wait_full(q_full, count, C.q_slots, more)
            if not C.q_tma:
                fence_async_shared()
        wait_full(k_full, it + 1, C.stages, more)
        if C.gather:
            fence_async_shared()
        s_token = issue_s(next_q, stage(k_bufs, (it + 1) % C.stages), KEYS, C)
        pass_turn(W, C)
        acc = wait_pv(o_token, len(next_q))
        named_arrive(v_empty(C) + it % C.stages, threads(C))
        it += 1
        store_tile(acc, m * scales[0], l, head_done, ring, done, o_bufs, outputs, W, C)
        acc = zeros(C)
        s = warpgroup_mma_wait(0, deps=[s_token])
        if more:
            named_arrive(k_empty(C) + it % C.stages, threads(C))
            free_query(tile, bars, C)
        p_left, p_right, m, l = first_softmax(s, tile, scales, dtype, HALF, C)
    if C.o_tma:
        tma_store_wait(0)
