"""The paged KV cache in Triton: rows (token, head) are copied in parallel, whatever requests they belong to."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.tiles import alignment, row_offsets, row_tile, strides
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

BLOCK_TOKENS = 256  # of get_batch_indices_positions


@triton.jit
def find_slot(
    token, in_range, batch_indices_ptr, positions_ptr, kv_indices_ptr, kv_indptr_ptr, batch_size, num_pages,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Page (int64) and slot of tokens [n], and whether they have one: for a bad index nothing may be written."""
    request = tl.load(batch_indices_ptr + token, mask=in_range, other=-1)
    position = tl.load(positions_ptr + token, mask=in_range, other=-1)
    found = (request >= 0) & (request < batch_size) & (position >= 0)
    entry = tl.load(kv_indptr_ptr + request, mask=found, other=0).to(tl.int64) + position // PAGE_SIZE
    found &= entry < tl.load(kv_indptr_ptr + request + 1, mask=found, other=0)
    page = tl.load(kv_indices_ptr + entry, mask=found, other=-1).to(tl.int64)
    return page, position % PAGE_SIZE, found & (page >= 0) & (page < num_pages)


@triton.jit(do_not_specialize=["num_rows", "batch_size", "num_pages"])
def append_kernel(
    k_cache_ptr, v_cache_ptr, key_ptr, value_ptr, batch_indices_ptr, positions_ptr, kv_indices_ptr, kv_indptr_ptr,
    num_rows, batch_size, num_pages,
    stride_k_page, stride_k_slot, stride_k_head, stride_v_page, stride_v_slot, stride_v_head,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    NUM_HEADS: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Copy rows [num_rows] = (token, head) of key [DIM_K] and value [DIM_V] to their slots; strides in units."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_range = row < num_rows
    cols_k, cols_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    # The rows first: they need no index, so that they arrive while the page is looked up.
    key_offs = row_offsets(row, NUM_HEADS, stride_key_token, stride_key_head, UNIT)
    value_offs = row_offsets(row, NUM_HEADS, stride_value_token, stride_value_head, UNIT)
    key = tl.load(key_ptr + key_offs[:, None] + cols_k[None, :], mask=in_range[:, None] & (cols_k < DIM_K)[None, :])
    value = tl.load(
        value_ptr + value_offs[:, None] + cols_v[None, :], mask=in_range[:, None] & (cols_v < DIM_V)[None, :]
    )
    page, slot, found = find_slot(
        row // NUM_HEADS, in_range, batch_indices_ptr, positions_ptr, kv_indices_ptr, kv_indptr_ptr,
        batch_size, num_pages, PAGE_SIZE,
    )  # fmt: skip
    head = row % NUM_HEADS
    k_offs = (page * stride_k_page + slot * stride_k_slot + head * stride_k_head) * UNIT
    v_offs = (page * stride_v_page + slot * stride_v_slot + head * stride_v_head) * UNIT
    tl.store(k_cache_ptr + k_offs[:, None] + cols_k[None, :], key, mask=found[:, None] & (cols_k < DIM_K)[None, :])
    tl.store(v_cache_ptr + v_offs[:, None] + cols_v[None, :], value, mask=found[:, None] & (cols_v < DIM_V)[None, :])


@triton.jit(do_not_specialize=["nnz", "batch_size", "num_steps"])
def batch_indices_positions_kernel(
    batch_indices_ptr, positions_ptr, append_indptr_ptr, seq_lens_ptr, nnz, batch_size, num_steps, BLOCK: tl.constexpr
):  # fmt: skip
    """Request and position of each token [nnz]: a binary search in append_indptr, num_steps >= log2(batch_size + 1)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = token < nnz
    low = tl.zeros(
        [BLOCK], tl.int32
    )  # the answer, the number of requests that end at or before the token, is low..high
    high = tl.zeros([BLOCK], tl.int32) + batch_size
    for _ in range(num_steps):
        middle = (low + high) // 2
        open_ = low < high
        after = tl.load(append_indptr_ptr + middle + 1, mask=open_, other=0) <= token
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & (after == 0), middle, high)
    found = low < batch_size
    end = tl.load(append_indptr_ptr + low + 1, mask=found, other=0)
    seq_len = tl.load(seq_lens_ptr + low, mask=found, other=0)
    tl.store(batch_indices_ptr + token, tl.where(found, low, -1), mask=in_range)
    tl.store(positions_ptr + token, tl.where(found, seq_len - (end - token), -1), mask=in_range)


def append_paged_kv_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
) -> None:
    """Write rows [nnz, num_kv_heads, dim] into caches [num_pages, page_size, num_kv_heads, dim] of any strides."""
    nnz, num_heads, dim_k = append_key.shape
    dim_v = append_value.shape[2]
    if nnz == 0:
        return
    if k_cache.element_size() == 1:  # only moved: no need for a GPU that knows fp8
        k_cache, v_cache, append_key, append_value = (
            x.view(torch.uint8) for x in (k_cache, v_cache, append_key, append_value)
        )
    tile = row_tile(nnz * num_heads, max(dim_k, dim_v))
    unit = alignment(k_cache, v_cache, append_key, append_value)
    append_kernel[(tile.num_programs(nnz * num_heads),)](
        k_cache, v_cache, append_key, append_value, batch_indices, positions, kv_indices, kv_indptr,
        nnz * num_heads, kv_indptr.shape[0] - 1, k_cache.shape[0],
        *(stride // unit for stride in k_cache.stride()[:3]), *(stride // unit for stride in v_cache.stride()[:3]),
        *strides(append_key, unit), *strides(append_value, unit),
        NUM_HEADS=num_heads, DIM_K=dim_k, DIM_V=dim_v, PAGE_SIZE=k_cache.shape[1], UNIT=unit,
        BLOCK_ROWS=tile.block_rows, BLOCK_K=triton.next_power_of_2(dim_k), BLOCK_V=triton.next_power_of_2(dim_v),
        num_warps=tile.num_warps,
    )  # fmt: skip


def get_batch_indices_positions(
    batch_indices: Tensor, positions: Tensor, append_indptr: Tensor, seq_lens: Tensor
) -> None:
    """Request and position of each appended token, [nnz]; -1 for those past append_indptr[-1]."""
    nnz, batch_size = batch_indices.shape[0], seq_lens.shape[0]
    if nnz == 0:
        return
    batch_indices_positions_kernel[(triton.cdiv(nnz, BLOCK_TOKENS),)](
        batch_indices, positions, append_indptr, seq_lens, nnz, batch_size, batch_size.bit_length(), BLOCK=BLOCK_TOKENS
    )


def compile_cases() -> Iterator[CompileCase]:
    """GQA, one page per token, a head dim of no power of two, fp8, and the latent rows of MLA."""
    for nnz, heads, dim_k, dim_v, page_size, dtype in (
        (1, 8, 128, 128, 16, torch.bfloat16),
        (16384, 8, 128, 128, 16, torch.bfloat16),
        (4096, 3, 72, 72, 1, torch.float16),
        (4096, 8, 128, 128, 64, torch.float8_e4m3fn),
        (4096, 1, 512, 64, 17, torch.bfloat16),
        (4096, 2, 64, 64, 16, torch.float32),
    ):
        k_cache, v_cache, key, value = (
            torch.empty(*shape, heads, dim, dtype=dtype, device="meta")
            for shape in ((1024, page_size), (nnz,))
            for dim in (dim_k, dim_v)
        )
        index = torch.empty(nnz, dtype=torch.int32, device="meta")
        launch = partial(append_paged_kv_cache, k_cache, v_cache, key, value, *[index] * 4)
        yield recorded(
            f"append nnz={nnz} heads={heads} dims={dim_k},{dim_v} page={page_size} {dtype}", append_kernel, launch
        )
    for dtype in (torch.int32, torch.int64):
        out, lens = (torch.empty(1000, dtype=t, device="meta") for t in (torch.int32, dtype))
        launch = partial(get_batch_indices_positions, out, out, lens, lens)
        yield recorded(f"batch_indices_positions {dtype}", batch_indices_positions_kernel, launch)
