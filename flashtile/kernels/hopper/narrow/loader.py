"""The loaders of narrow caches: each walks the tiles of its CTA and keeps its half of shared memory filled, K or V.

A *source* is (descriptor, pointer, steps): a TMA descriptor of [pages, heads, page_size, words] (ragged: one page of
all tokens) if pieces are copied whole, and the strides of a page, a token and a head, in units of 8 words, if rows are.
A *factor* is (pointer, strides of a page, a token and a head, buffer).
"""

from flashtile.kernels.hopper import tiles
from flashtile.kernels.hopper.barriers import named_wait
from flashtile.kernels.hopper.compat import cp_async, cp_async_arrive, gl, gluon, mbarrier, tma_load
from flashtile.kernels.hopper.narrow.spec import (
    PIECE,
    blocks,
    empty,
    factors_layout,
    loader_warps,
    rows_layout,
    threads,
)


@gluon.jit
def load_pages(table, base, n, kv_len, some, C: gl.constexpr):
    """Start to read the page of each piece of block n, -1 past the request (nothing is copied from there); of ragged KV
    its first token."""
    BLOCKS: gl.constexpr = blocks(C)
    out = ()
    for i in gl.static_range(BLOCKS):
        token = n * C.block_n + i * PIECE
        page = base + token
        if C.page_size > 0:
            entry = (base + token // C.page_size).to(gl.int64)
            page = gl.load(table + entry, mask=(token < kv_len) & some, other=-1)
        out = out + (page,)
    return out


@gluon.jit
def row_pages(table, base, n, kv_len, some, L: gl.constexpr, C: gl.constexpr):
    """The same as a tensor [blocks] for copies of rows in layout L [blocks, 16], 0 past the request; [blocks, 16] if
    the tokens of a piece may be in several pages."""
    tokens = n * C.block_n + first_tokens(L, C)
    if not C.boxes:
        tokens = tokens[:, None] + within_piece(L)
    pages = base + tokens
    if C.page_size > 0:
        entry = base + tokens
        if C.page_size > 1:
            entry = base + tokens // C.page_size
        pages = gl.load(table + entry.to(gl.int64), mask=(tokens < kv_len) & some, other=0)
    return pages


@gluon.jit
def first_tokens(L: gl.constexpr, C: gl.constexpr):
    """Of each piece of a head in a step, [blocks]."""
    BLOCKS: gl.constexpr = blocks(C)
    return gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, L)) * PIECE


@gluon.jit
def within_piece(L: gl.constexpr):
    """The tokens of a piece, [1, 16]."""
    return gl.arange(0, PIECE, layout=gl.SliceLayout(0, L))[None, :]


@gluon.jit
def row_offsets(pages, steps, n, L: gl.constexpr, C: gl.constexpr):
    """Where the tokens of block n are, [blocks, 16] int64, in the unit of the steps."""
    page, token, head = steps
    if C.page_size == 0:
        at = pages.to(gl.int64) * token
    else:
        at = pages.to(gl.int64) * page
    if C.boxes:
        if C.page_size > 0:
            at += (n * C.block_n + first_tokens(L, C)) % C.page_size * token
        at = at[:, None] + within_piece(L) * token
    elif C.page_size > 1:
        at += (n * C.block_n + first_tokens(L, C)[:, None] + within_piece(L)) % C.page_size * token
    return at


@gluon.jit
def before(valid, L: gl.constexpr, C: gl.constexpr):
    """Which tokens of a step are before `valid`, [blocks, 16]."""
    return first_tokens(L, C)[:, None] + within_piece(L) < valid


@gluon.jit
def copy_boxes(desc, buf, stage, bar, head, n, pages, C: gl.constexpr):
    """TMA copies of the pieces of block n."""
    BLOCKS: gl.constexpr = blocks(C)
    mbarrier.expect(bar, 2 * C.block_n * C.heads * C.words)
    for i in gl.static_range(BLOCKS):
        out = buf.index(stage * BLOCKS + i)
        if C.page_size > 0:
            tma_load(desc, [pages[i], head, (n * C.block_n + i * PIECE) % C.page_size, 0], bar, out)
        else:
            tma_load(desc, [0, head, pages[i], 0], bar, out)


@gluon.jit
def copy_rows(source, out, head, n, pages, valid, MASKED: gl.constexpr, C: gl.constexpr):
    """16-byte copies of the rows of block n; those from `valid` on become 0, if MASKED."""
    desc, ptr, steps = source
    HEADS: gl.constexpr = C.heads
    L: gl.constexpr = rows_layout(C)
    TOKEN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, L))
    HEAD: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L)))
    WORD: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    heads = (head + gl.arange(0, HEADS, layout=HEAD)).to(gl.int64) * steps[2]
    rows = row_offsets(pages, steps, n, TOKEN, C)[:, None, :] + heads[None, :, None]
    at = ptr + rows[:, :, :, None] * 8 + gl.arange(0, C.words, layout=WORD)[None, None, None, :]
    if MASKED:
        cp_async(out, at, mask=before(valid, TOKEN, C)[:, None, :][:, :, :, None])
    else:
        cp_async(out, at)


@gluon.jit
def factor_places(factor, head, n, pages, valid, C: gl.constexpr):
    """Where a factor of block n is, [blocks, heads, 16], and which of it there is."""
    ptr, steps, buf = factor
    HEADS: gl.constexpr = C.heads
    L: gl.constexpr = factors_layout(C)
    TOKEN: gl.constexpr = gl.SliceLayout(1, L)
    heads = (head + gl.arange(0, HEADS, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))).to(gl.int64) * steps[2]
    at = ptr + (row_offsets(pages, steps, n, TOKEN, C)[:, None, :] + heads[None, :, None])
    return at, before(valid, TOKEN, C)[:, None, :]


@gluon.jit
def load_factors(factors, head, n, pages, valid, C: gl.constexpr):
    """Start to read factors of 2 bytes, which are too few to be copied by themselves; 0 from `valid` on."""
    out = ()
    for i in gl.static_range(len(factors) if C.half else 0):
        at, some = factor_places(factors[i], head, n, pages, valid, C)
        out = out + (gl.load(at, mask=some, other=0.0),)
    return out


@gluon.jit
def bring_factors(factors, loaded, stage, bar, head, n, pages, valid, C: gl.constexpr):
    """Copies of factors of 4 bytes, which their threads announce later; or stores of what has been read."""
    for i in gl.static_range(len(factors)):
        out = factors[i][2].index(stage)
        if C.half:
            out.store(loaded[i].to(gl.float32))
        else:
            at, some = factor_places(factors[i], head, n, pages, valid, C)
            cp_async(out, at, mask=some)
    if C.half and len(factors) > 0:
        mbarrier.arrive(bar, count=1)


@gluon.jit
def walk(item, C: gl.constexpr):
    """Of an entry: head group (-1: no tile), first entry or token of KV, KV length and end, first and last block."""
    end = tiles.field(item, tiles.KV_END)
    first, last = tiles.block_range(tiles.field(item, tiles.KV_BEGIN), end, C.block_n)
    base = tiles.field(item, tiles.KV_BASE)
    return tiles.field(item, tiles.HEAD), base, tiles.field(item, tiles.KV_LEN), end, first, last


@gluon.jit
def loader(buf, full, source, factors, work, table, C: gl.constexpr):
    """The role that fetches K, or V, and its factors."""
    WARPS: gl.constexpr = loader_warps(C)
    ROW_TOKEN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, rows_layout(C)))
    FACTOR_TOKEN: gl.constexpr = gl.SliceLayout(1, factors_layout(C))
    SCALED: gl.constexpr = len(factors) > 0
    t = gl.program_id(0)
    following = tiles.turn(work, 1)
    item = tiles.with_head(tiles.fetch(work, t, WARPS), t, work)
    t = following
    upcoming = tiles.fetch(work, t, WARPS)
    following = tiles.turn(work, 2)
    head, base, kv_len, end, first, n = walk(item, C)
    if C.boxes:
        pages = load_pages(table, base, n, kv_len, True, C)
    else:
        pages = row_pages(table, base, n, kv_len, True, ROW_TOKEN, C)
    factor_pages = gl.to_tensor(0)
    if SCALED:
        factor_pages = row_pages(table, base, n, kv_len, True, FACTOR_TOKEN, C)

    count = gl.to_tensor(0)  # tiles begun, less one
    it = gl.to_tensor(0)  # blocks
    while head >= 0:
        # the next block's page ids are under way while this block is fetched
        head_then, base_then, kv_len_then, end_then, first_then, n_then = head, base, kv_len, end, first, n - 1
        if n == first:
            count += 1
            item = tiles.with_head(upcoming, t, work)
            head_then, base_then, kv_len_then, end_then, first_then, n_then = walk(item, C)
            t = following
            upcoming = tiles.fetch(work, t, WARPS)
            following = tiles.turn(work, count + 2)
        some = head_then >= 0
        if C.boxes:
            pages_then = load_pages(table, base_then, n_then, kv_len_then, some, C)
        else:
            pages_then = row_pages(table, base_then, n_then, kv_len_then, some, ROW_TOKEN, C)
        factor_pages_then = factor_pages
        if SCALED:
            factor_pages_then = row_pages(table, base_then, n_then, kv_len_then, some, FACTOR_TOKEN, C)

        kv_head = head * C.heads
        valid = end - n * C.block_n
        loaded = load_factors(factors, kv_head, n, factor_pages, valid, C)
        stage = it % C.stages
        if it >= C.stages:
            named_wait(empty(C) + stage, threads(C))
        bar = full.index(stage)
        if C.boxes:
            copy_boxes(source[0], buf, stage, bar, kv_head, n, pages, C)
        bring_factors(factors, loaded, stage, bar, kv_head, n, factor_pages, valid, C)
        if not C.boxes:
            if valid >= C.block_n:  # a comparison per row less
                copy_rows(source, buf.index(stage), kv_head, n, pages, valid, False, C)
            else:
                copy_rows(source, buf.index(stage), kv_head, n, pages, valid, True, C)
        if (SCALED and not C.half) or not C.boxes:
            cp_async_arrive(bar, increment_count=False)
        it += 1
        head, base, kv_len, end, first, n = head_then, base_then, kv_len_then, end_then, first_then, n_then
        pages, factor_pages = pages_then, factor_pages_then
