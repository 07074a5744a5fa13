"""The loaders: they walk the tiles of their CTA and keep shared memory filled, one with Q and K, the other with V.

Where a row lives. A *source* of K or V is (descriptor, pointer, page, token, head). By TMA, tensors are seen as
matrices [rows, columns] whose row is one token step: page and head are then in rows, and token is the column step of a
head. The gather works on pointers: page, token and head are strides in units of 8 elements (16 bytes).
"""

from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.barriers import named_arrive, named_wait
from flashtile.kernels.hopper.compat import (
    cp_async,
    cp_async_arrive,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
)
from flashtile.kernels.hopper.spec import (
    ROWS,
    has_turner,
    k_empty,
    loader_warps,
    num_pieces,
    q_asked,
    threads,
    v_empty,
)

TURNER = gl.constexpr(160)  # threads that meet at a barrier of q_asked: the turner's, and a loader's


@gluon.constexpr_function
def copy_layout(columns, warps):
    """Registers of rows of `columns` elements, 8 elements (16 bytes) per thread."""
    across = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def chunk_rows(spec):
    """Rows whose offsets a gathering loader holds at once: more would spill."""
    return 64 if num_pieces(spec.d_qk) == 1 else 16


@gluon.constexpr_function
def gather_layout(rows, columns, warps):
    """The same for a chunk of rows, of which each thread has neighbouring ones: it reads their offsets together."""
    across = min(columns // 8, 32)
    rows = rows * across // (32 * warps)
    return gl.BlockedLayout([rows, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def token_layout(warps):
    """Registers of one value per token, spread over all threads of a loader."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def stage(bufs, i):
    """Slot i of buffers that hold one piece of the head dim each."""
    out = ()
    for p in gl.static_range(len(bufs)):
        out = out + (bufs[p].index(i),)
    return out


@gluon.jit
def strips(buf, ROWS_EACH: gl.constexpr):
    """Buffers [slots, rows, dim] as strips of ROWS_EACH rows of one panel, [.., ROWS_EACH, panel], in the order of
    memory.

    Strip (slot, panel, i) is number (slot * panels + panel) * (rows / ROWS_EACH) + i.
    """
    WIDTH: gl.constexpr = buf.layout.swizzle_byte_width // 2
    COUNT: gl.constexpr = buf.shape[0] * buf.shape[1] * buf.shape[2] // (ROWS_EACH * WIDTH)
    return reinterpret(buf, buf.dtype, [COUNT, ROWS_EACH, WIDTH], buf.layout)


@gluon.jit
def copy_box(desc, bufs, slot, row, col, bar, i):
    """Copy one box of rows, the whole head dim of them, to the i-th such part of a slot."""
    for p in gl.static_range(len(bufs)):
        col = copy_box_piece(desc, bufs[p], slot, row, col, bar, i)


@gluon.jit
def copy_box_piece(desc, buf, slot, row, col, bar, i):
    """One piece of the head dim; returns the column after it."""
    BOX: gl.constexpr = desc.block_type.shape[0]
    view = strips(buf, BOX)
    PANELS: gl.constexpr = buf.shape[2] // view.shape[2]
    for c in gl.static_range(PANELS):
        tma_load(desc, [row, col], bar, view.index((slot * PANELS + c) * (buf.shape[1] // BOX) + i))
        col += view.shape[2]
    return col


@gluon.jit
def copy_block(source, bufs, slot, bar, base, head, n, pages, table, C: gl.constexpr):
    """TMA copies of KV block n: one box, or one per page."""
    desc, ptr, page_rows, head_cols, head_rows = source
    kv_indices_ptr, page_size, boxes = table
    row = head * head_rows
    col = head * head_cols
    if C.paged:
        if C.box == C.block_n:
            row += n * C.block_n % page_size
        for i in range(0, boxes):  # an argument: unrolled, the loop would spill
            copy_box(desc, bufs, slot, row + of_lane(pages, i) * page_rows, col, bar, i)
    else:
        copy_box(desc, bufs, slot, row + base + n * C.block_n, col, bar, 0)


@gluon.jit
def stash_offsets(source, scratch, base, n, pages, table, C: gl.constexpr):
    """Write down where the rows of KV block n are, in units of 8 elements, below 2**32: a thread knows the offsets of a
    few rows, and needs those of the rows it copies."""
    desc, ptr, page_step, token_step, head_step = source
    kv_indices_ptr, page_size, boxes = table
    tokens = n * C.block_n + gl.arange(0, C.block_n, layout=token_layout(loader_warps(C)))
    if C.paged:
        offsets = pages * page_step
        if C.box != 1:
            offsets += tokens % page_size * token_step
    else:
        offsets = (base + tokens) * token_step
    scratch.store(offsets)


@gluon.jit
def gather_block(source, bufs, scratch, bar, head, valid, C: gl.constexpr):
    """16-byte copies of the rows of a KV block at stashed offsets; rows from `valid` on become 0. The threads' copies
    arrive at bar by themselves."""
    desc, ptr, page_step, token_step, head_step = source
    ptr += head.to(gl.int64) * head_step * 8
    if valid >= C.block_n:  # a comparison per row less
        gather_rows(ptr, bufs, scratch, valid, False, C)
    else:
        gather_rows(ptr, bufs, scratch, valid, True, C)
    cp_async_arrive(bar, increment_count=False)


@gluon.jit
def gather_rows(ptr, bufs, scratch, valid, MASKED: gl.constexpr, C: gl.constexpr):
    """Start to copy all rows of a block, those before `valid` only if MASKED."""
    CHUNK: gl.constexpr = chunk_rows(C)
    for r in gl.static_range(C.block_n // CHUNK):
        first_col = 0
        for p in gl.static_range(len(bufs)):
            out = bufs[p].slice(r * CHUNK, CHUNK)
            gather_chunk(ptr + first_col, scratch.slice(r * CHUNK, CHUNK), out, valid - r * CHUNK, MASKED, C)
            first_col += bufs[p].shape[1]


@gluon.jit
def gather_chunk(ptr, offsets, out, valid, MASKED: gl.constexpr, C: gl.constexpr):
    """Start to copy one piece of rows at offsets (shared memory, units of 8 elements) from ptr."""
    L: gl.constexpr = gather_layout(out.shape[0], out.shape[1], loader_warps(C))
    ROW: gl.constexpr = gl.SliceLayout(1, L)
    cols = ptr + gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, L))  # once: a row then takes one 64-bit sum
    rows = cols[None, :] + (offsets.load(ROW).to(gl.uint32).to(gl.int64) * 8)[:, None]
    if MASKED:
        cp_async(out, rows, mask=(gl.arange(0, out.shape[0], layout=ROW) < valid)[:, None])
    else:
        cp_async(out, rows)


@gluon.jit
def load_lanes(ptr, count):
    """Start to read an int32 per lane, the first `count` at ptr; -1 in the other lanes. A scalar, as the compiler sees
    it: only for `of_lane`."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; mul.wide.u32 a, l, 4; add.s64 a, a, $1; "
        "setp.lt.s32 p, l, $2; mov.b32 $0, -1; @p ld.global.b32 $0, [a]; }",
        "=&r,l,r", [ptr.to(gl.int64), count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def of_lane(x, i):
    """Lane i's value of x in all lanes: one shuffle, where a sum over a tensor's lanes takes five."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, i], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_pages(table, base, n, kv_len, valid, C: gl.constexpr):
    """Start to read the page ids of KV block n, where there are any. Past the request's pages they are -1 (TMA), 0
    (gather)."""
    kv_indices_ptr, page_size, boxes = table
    if C.paged and C.gather:  # the page of each token
        tokens = n * C.block_n + gl.arange(0, C.block_n, layout=token_layout(loader_warps(C)))
        entry = tokens
        if C.box != 1:
            entry = tokens // page_size
        entry = (base + entry).to(gl.int64)
        pages = gl.load(kv_indices_ptr + entry, mask=(tokens < kv_len) & valid, other=0)
    elif C.paged:
        entry = n * (C.block_n // C.box)
        if C.box == C.block_n:
            entry = n * C.block_n // page_size
        count = gl.minimum((kv_len - n * C.block_n + C.box - 1) // C.box, C.block_n // C.box)
        pages = load_lanes(kv_indices_ptr + (base + entry).to(gl.int64), gl.where(valid, count, 0))
    else:
        pages = gl.to_tensor(0)
    return pages


@gluon.jit
def wait_empty(base: gl.constexpr, it, C: gl.constexpr):
    """Wait until the consumers have freed the stage of block `it`."""
    if it >= C.stages:
        named_wait(base + it % C.stages, threads(C))


@gluon.jit
def load_k(it, source, smem, bars, base, head, n, kv_len, pages, table, C: gl.constexpr):
    """Fetch K of block n as block number `it` of this CTA."""
    slot = it % C.stages
    bar = bars[2].index(slot)
    if C.gather:
        stash_offsets(source, smem[5].index(0), base, n, pages, table, C)
    wait_empty(k_empty(C), it, C)
    if C.gather:
        gather_block(source, stage(smem[1], slot), smem[5].index(0), bar, head, kv_len - n * C.block_n, C)
    else:
        mbarrier.expect(bar, C.block_n * C.d_qk * 2)
        copy_block(source, smem[1], slot, bar, base, head, n, pages, table, C)


@gluon.jit
def load_v(it, tails, source, smem, bars, base, head, n, kv_len, pages, table, C: gl.constexpr):
    """Fetch V of block n as block number `it`; returns how many tails have been cleared so far."""
    slot = it % C.stages
    bar = bars[3].index(slot)
    tail_full = bars[5].index(0)
    valid = kv_len - n * C.block_n
    if C.gather:
        stash_offsets(source, smem[5].index(1), base, n, pages, table, C)
    wait_empty(v_empty(C), it, C)
    if C.gather:
        gather_block(source, stage(smem[2], slot), smem[5].index(1), bar, head, valid, C)
    else:
        if valid >= C.block_n:
            mbarrier.expect(bar, C.block_n * C.d_vo * 2)
            copy_block(source, smem[2], slot, bar, base, head, n, pages, table, C)
        else:  # the block ends beyond its request
            mbarrier.expect(tail_full, C.block_n * C.d_vo * 2)
            copy_block(source, smem[2], slot, tail_full, base, head, n, pages, table, C)
            mbarrier.wait(tail_full, tails & 1)
            clear_tail(smem[2], slot, valid)
            mbarrier.arrive(bar, count=1)
            tails += 1
    return tails


@gluon.jit
def clear_tail(bufs, slot, valid):
    """Zero the rows of a V block from `valid` on: they may hold NaN, which P = 0 would not undo."""
    for p in gl.static_range(len(bufs)):
        clear_tail_piece(bufs[p], slot, gl.maximum(valid, 0))
    fence_async_shared()


@gluon.jit
def clear_tail_piece(buf, slot, valid):
    """One piece of the head dim."""
    view = strips(buf, 8)
    STRIPS: gl.constexpr = buf.shape[1] // 8
    PANELS: gl.constexpr = buf.shape[2] // view.shape[2]
    L: gl.constexpr = copy_layout(view.shape[2], 1)
    rows = gl.arange(0, 8, layout=gl.SliceLayout(1, L))[:, None]
    for i in range(valid // 8, STRIPS):
        for c in gl.static_range(PANELS):
            strip = view.index((slot * PANELS + c) * STRIPS + i)
            x = strip.load(L)
            strip.store(gl.where(rows < valid - i * 8, x, gl.zeros_like(x)))


@gluon.jit
def copy_packed_rows(source, buf, slot, first_col, q_begin, qo_len, row_begin, head, C: gl.constexpr):
    """Start to copy one piece of a tile's packed query rows by 16-byte copies; rows past qo_len keep what was there."""
    desc, ptr, token_step, head_step, head_rows, pack, by_heads = source
    view = strips(buf, 8)
    WIDTH: gl.constexpr = view.shape[2]
    PANELS: gl.constexpr = buf.shape[2] // WIDTH
    L: gl.constexpr = copy_layout(WIDTH, loader_warps(C))
    cols = first_col + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    rows = gl.minimum(qo_len * pack[0] - row_begin, C.consumers * ROWS)
    if C.pack_decode:
        rows = gl.where(qo_len == 1, by_heads[2], rows)
    for i in range(0, (rows + 7) // 8):  # rows of consumer w are 64 w .. 64 w + 63: strips 8 w .. 8 w + 7 of each panel
        packed = row_begin + i * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, L))
        token, heads, valid = tiles.owner_of(packed, head, qo_len, pack, by_heads[2] if C.pack_decode else 0, C)
        at = ptr + ((q_begin + token).to(gl.int64) * token_step + heads.to(gl.int64) * head_step) * 8
        for c in gl.static_range(PANELS):
            strip = view.index(((slot * C.consumers + i // 8) * PANELS + c) * 8 + i % 8)
            cp_async(strip, at[:, None] + (cols + c * WIDTH)[None, :], mask=valid[:, None])


@gluon.jit
def copy_query(desc, bufs, slot, row, col, bar, C: gl.constexpr):
    """TMA copies of the query rows of all consumers, from `row` on."""
    CONSUMERS: gl.constexpr = C.consumers
    mbarrier.expect(bar, C.consumers * ROWS * C.d_qk * 2)
    for w in gl.static_range(CONSUMERS):
        copy_box(desc, bufs, slot * C.consumers + w, row + w * ROWS, col, bar, 0)


@gluon.jit
def load_q(count, item, source, smem, bars, C: gl.constexpr):
    """Fetch the query rows of an entry, tile number `count`."""
    q_begin = tiles.field(item, tiles.Q_BEGIN)
    row_begin = tiles.field(item, tiles.ROW_BEGIN)
    head = tiles.field(item, tiles.HEAD)
    desc, ptr, token_step, head_cols, head_rows, pack, by_heads = source
    slot = count % C.q_slots
    bar = bars[0].index(slot)
    mbarrier.wait(bars[1].index(slot), ((count // C.q_slots) & 1) ^ 1)
    if C.q_tma:
        row = q_begin + row_begin + head * head_rows
        if C.pack_decode:
            if tiles.field(item, tiles.QO_LEN) == 1:  # the heads of one token, and after them rows that are nobody's
                mbarrier.expect(bar, ROWS * C.d_qk * 2)
                copy_box(by_heads[0], smem[0], slot * C.consumers, q_begin * by_heads[1] + head, 0, bar, 0)
            else:
                copy_query(desc, smem[0], slot, row, head * head_cols, bar, C)
        else:
            copy_query(desc, smem[0], slot, row, head * head_cols, bar, C)
    else:
        qo_len = tiles.field(item, tiles.QO_LEN)
        first_col = 0
        for p in gl.static_range(len(smem[0])):
            copy_packed_rows(source, smem[0][p], slot, first_col, q_begin, qo_len, row_begin, head, C)
            first_col += smem[0][p].shape[2]
        cp_async_arrive(bar, increment_count=True)
        mbarrier.arrive(bar, count=1)
    if has_turner(C):
        named_arrive(q_asked(C) + slot, TURNER)


@gluon.jit
def no_more(count, bars, C: gl.constexpr):
    """Tell the turner that tile number `count` is none; a slot's barrier is in use as long as the slot is."""
    mbarrier.wait(bars[1].index(count % C.q_slots), ((count // C.q_slots) & 1) ^ 1)
    named_arrive(q_asked(C) + count % C.q_slots, TURNER)


@gluon.jit
def walk(item, C: gl.constexpr):
    """Of an entry: its head group (-1: no tile), first entry or token of KV, KV length, first and last KV block."""
    first, last = tiles.block_range(tiles.field(item, tiles.KV_BEGIN), tiles.field(item, tiles.KV_END), C.block_n)
    base = tiles.field(item, tiles.KV_BASE)
    return tiles.field(item, tiles.HEAD), base, tiles.field(item, tiles.KV_LEN), first, last


@gluon.jit
def qk_loader(smem, bars, q, k, work, table, C: gl.constexpr):
    """The role that walks the CTA's tiles, hands them over to the consumers, and fetches Q and K."""
    items_ptr, turns_ptr, heads_per_item, inverse_heads, inverse_groups = work
    t = tiles.first_turn(work, C)
    following = tiles.turn(work, 1)
    item = tiles.with_head(tiles.fetch(work, t, loader_warps(C)), t, work)
    tiles.publish(smem[4], bars[4], 0, item)
    t = following
    item_next = tiles.fetch(work, t, loader_warps(C))
    following = tiles.turn(work, 2)
    head, base, kv_len, first, n = walk(item, C)
    pages = load_pages(table, base, n, kv_len, True, C)
    load_q(0, item, q, smem, bars, C)

    count = gl.to_tensor(0)  # tiles begun, less one
    it = gl.to_tensor(0)  # blocks
    fresh = head >= 0  # the block is the first one of its tile
    owed = head < 0  # the next tile's Q is still to be fetched
    upcoming = item
    while head >= 0:
        if fresh:
            upcoming = tiles.with_head(item_next, t, work)
            tiles.publish(smem[4], bars[4], count + 1, upcoming)
            t = following
            item_next = tiles.fetch(work, t, loader_warps(C))
            following = tiles.turn(work, count + 3)
        # the next block's page ids are under way while this block is fetched
        head_then, base_then, kv_len_then, first_then, n_then = head, base, kv_len, first, n - 1
        if n == first:
            head_then, base_then, kv_len_then, first_then, n_then = walk(upcoming, C)
        pages_then = load_pages(table, base_then, n_then, kv_len_then, head_then >= 0, C)
        load_k(it, k, smem, bars, base, tiles.divide(head, inverse_groups), n, kv_len, pages, table, C)
        it += 1
        if fresh:
            # Q's only slot is free once the last S of the tile before is done, for which this K need not wait
            if C.q_slots == 1:  # noqa: SIM102 (known to the compiler)
                if count > 0:
                    load_q(count, item, q, smem, bars, C)
            item = upcoming
            count += 1
            owed = tiles.field(item, tiles.HEAD) >= 0
            if has_turner(C):  # noqa: SIM102 (one is known to the compiler, the other is not)
                if not owed:
                    no_more(count, bars, C)
        if C.q_slots == 2:
            due = owed
            if C.gather:  # its slot is free when the tile before ends: copies of this K need not wait for that
                due = owed & ((not fresh) | (n == first))
            if due:
                load_q(count, item, q, smem, bars, C)
                owed = False
        fresh = n == first
        head, base, kv_len, first, n, pages = head_then, base_then, kv_len_then, first_then, n_then, pages_then


@gluon.jit
def v_loader(smem, bars, v, work, table, C: gl.constexpr):
    """The role that fetches V, for the same tiles in the same order."""
    items_ptr, turns_ptr, heads_per_item, inverse_heads, inverse_groups = work
    t = tiles.first_turn(work, C)
    following = tiles.turn(work, 1)
    head, base, kv_len, first, n = walk(tiles.with_head(tiles.fetch(work, t, loader_warps(C)), t, work), C)
    t = following
    item_next = tiles.fetch(work, t, loader_warps(C))
    following = tiles.turn(work, 2)
    pages = load_pages(table, base, n, kv_len, True, C)

    count = gl.to_tensor(0)
    it = gl.to_tensor(0)
    tails = gl.to_tensor(0)
    while head >= 0:
        head_then, base_then, kv_len_then, first_then, n_then = head, base, kv_len, first, n - 1
        if n == first:
            count += 1
            head_then, base_then, kv_len_then, first_then, n_then = walk(tiles.with_head(item_next, t, work), C)
            t = following
            item_next = tiles.fetch(work, t, loader_warps(C))
            following = tiles.turn(work, count + 2)
        pages_then = load_pages(table, base_then, n_then, kv_len_then, head_then >= 0, C)
        tails = load_v(it, tails, v, smem, bars, base, tiles.divide(head, inverse_groups), n, kv_len, pages, table, C)
        it += 1
        head, base, kv_len, first, n, pages = head_then, base_then, kv_len_then, first_then, n_then, pages_then
