"""Where the KV rows of a request live: one small function per layout, passed to the mainloop."""

import triton
import triton.language as tl


@triton.jit
def contiguous_offset(kv_pos, in_range, kv_base, kv_indices_ptr, stride_page, stride_pos, PAGE_SIZE: tl.constexpr):
    """Element offsets, [BLOCK_N] int64, of ragged KV: token kv_pos of the request is row kv_base + kv_pos."""
    return (kv_base + kv_pos).to(tl.int64) * stride_pos


@triton.jit
def paged_offset(kv_pos, in_range, kv_base, kv_indices_ptr, stride_page, stride_pos, PAGE_SIZE: tl.constexpr):
    """Element offsets, [BLOCK_N] int64, of paged KV: the page ids of the request start at kv_indices[kv_base]."""
    page = tl.load(kv_indices_ptr + kv_base + kv_pos // PAGE_SIZE, mask=in_range, other=0).to(tl.int64)
    return page * stride_page + (kv_pos % PAGE_SIZE).to(tl.int64) * stride_pos
