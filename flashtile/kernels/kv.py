"""Where the KV rows of a request live: one small function per layout, passed to the mainloop.

Token vectors are [BLOCK_N], or [WAYS, BLOCK_N / WAYS] (attention.py); what they are spread over comes behind.
"""

import triton
import triton.language as tl


@triton.jit
def contiguous_row(kv_pos, in_range, kv_base, kv_indices_ptr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Page and row, [BLOCK_N] int64, of ragged KV: token kv_pos of the request is row kv_base + kv_pos; there is one
    page."""
    row = (kv_base + kv_pos).to(tl.int64)
    return tl.zeros_like(row), row


@triton.jit
def paged_row(kv_pos, in_range, kv_base, kv_indices_ptr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Page and row in the page, [BLOCK_N] int64: the page ids of the request start at kv_indices[kv_base]."""
    pos = kv_pos.to(tl.uint32)  # division and remainder by a power of 2 are one instruction each if there is no sign
    ptrs = kv_indices_ptr + kv_base + pos // PAGE_SIZE
    page = tl.load(ptrs, mask=in_range, other=0) if MASKED else tl.load(ptrs)
    return page.to(tl.int64), (pos % PAGE_SIZE).to(tl.int64)


@triton.jit
def prefetch_pages(kv_base, kv_indices_ptr, begin, end, PAGE_SIZE: tl.constexpr):
    """Ask for the page ids of tokens [begin, end), of up to 1024 pages, in L2, 32 bytes a thread."""
    first = begin // PAGE_SIZE + tl.arange(0, 128) * 8
    wanted = (first < tl.cdiv(end, PAGE_SIZE)).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [kv_indices_ptr + kv_base + first, wanted], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_rows(ptr, rows, cols, in_range, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `cols` [BLOCK], of which WIDTH exist, of the rows at offsets `rows` [BLOCK_N] in elements; 0
    elsewhere."""
    ptrs = ptr + (tl.expand_dims(rows, -1) + cols)
    if MASKED and WIDTH != BLOCK:
        return tl.load(ptrs, mask=tl.expand_dims(in_range, -1) & (cols < WIDTH), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=tl.expand_dims(in_range, -1), other=0.0)
    elif WIDTH != BLOCK:
        return tl.load(ptrs, mask=tl.full(ptrs.shape, True, tl.int1) & (cols < WIDTH), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def of_head(factor, kv_head):
    """A scale or zero point of one head, or of those [WAYS, 1] of the warps: (pointer, strides of a page, a row, a head
    (and a group)) without the head's."""
    ptr = factor[0] + kv_head * factor[3]
    if len(factor) == 4:
        return (ptr, factor[1], factor[2])
    else:
        return (ptr, factor[1], factor[2], factor[4])


@triton.jit
def widened(x):
    """x in fp32, as a sum of one: Triton 3.6 moves changes of layout above a plain conversion, and with them, wrongly,
    a product below the one that it needs ("operand does not dominate this use")."""
    if x.dtype == tl.float32:
        return x
    else:
        return tl.sum(tl.expand_dims(x.to(tl.float32), -1), -1)


@triton.jit
def load_factor(factor, page, row, in_range, MASKED: tl.constexpr):
    """A scale or zero point per token, [BLOCK_N] fp32: factor is (pointer, strides of a page and a row)."""
    ptrs = factor[0] + page * factor[1] + row * factor[2]
    if MASKED:
        return widened(tl.load(ptrs, mask=in_range, other=0))
    else:
        return widened(tl.load(ptrs))


@triton.jit
def load_factors(first, second, page, row, in_range, MASKED: tl.constexpr):
    """Two scales per token, as `load_factor`, in one load: where [BLOCK_N] alone is fewer elements than threads, Triton
    loads each again, and its page ids, for each layout that it is used in. Offsets are joined, not pointers, with which
    Triton 3.9 fails."""
    BYTES: tl.constexpr = first[0].dtype.element_ty.primitive_bitwidth // 8
    apart = (second[0].to(tl.int64) - first[0].to(tl.int64)) // BYTES
    ptrs = first[0] + tl.join(page * first[1] + row * first[2], apart + page * second[1] + row * second[2])
    if MASKED:
        both = widened(tl.load(ptrs, mask=tl.expand_dims(in_range, -1), other=0))
    else:
        both = widened(tl.load(ptrs))
    return tl.split(both)


@triton.jit
def load_group_factor(
    factor, page, row, in_range, FIRST: tl.constexpr, WIDTH: tl.constexpr, GROUP_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A scale or zero point per token and group of GROUP_WIDTH columns, spread over columns FIRST to FIRST + WIDTH of a
    row: [BLOCK_N, BLOCK] fp32. factor is (pointer, strides of a page, a row and a group)."""
    GROUPS: tl.constexpr = BLOCK // GROUP_WIDTH if BLOCK > GROUP_WIDTH else 1
    SPAN: tl.constexpr = BLOCK // GROUPS
    WHOLE: tl.constexpr = FIRST % GROUP_WIDTH == 0 or (FIRST % GROUP_WIDTH + WIDTH <= GROUP_WIDTH)
    row_ptrs = tl.expand_dims(factor[0] + (page * factor[1] + row * factor[2]), -1)
    if WHOLE:
        group = tl.arange(0, GROUPS)
        mask = tl.expand_dims(in_range, -1) & (group * GROUP_WIDTH < WIDTH)
        each = tl.load(row_ptrs + (FIRST // GROUP_WIDTH + group) * factor[3], mask=mask, other=0).to(tl.float32)
        each = tl.expand_dims(each, -1)
        if len(row.shape) == 1:
            return tl.reshape(tl.broadcast_to(each, [row.shape[0], GROUPS, SPAN]), [row.shape[0], BLOCK])
        else:
            spread = tl.broadcast_to(each, [row.shape[0], row.shape[1], GROUPS, SPAN])
            return tl.reshape(spread, [row.shape[0], row.shape[1], BLOCK])
    else:  # a half row that begins within a group: each column looks for its own
        cols = tl.arange(0, BLOCK)
        mask = tl.expand_dims(in_range, -1) & (cols < WIDTH)
        return tl.load(row_ptrs + (FIRST + cols) // GROUP_WIDTH * factor[3], mask=mask, other=0).to(tl.float32)
