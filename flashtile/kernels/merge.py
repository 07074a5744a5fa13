"""Merging attention states in Triton, fp32 inside. A state without keys (s = -inf) takes no part, whatever its v
holds."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.softmax import NEG_INF
from flashtile.kernels.tiles import RowTile, alignment, row_offsets, row_tile, strides
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded


@triton.jit
def finite_or_zero(top):
    """What to subtract from logits whose maximum is `top`: exp2(-inf - 0) = 0, where -inf - -inf would be NaN."""
    return tl.where(top == NEG_INF, 0.0, top)


@triton.jit(do_not_specialize=["num_rows"])
def merge_state_kernel(
    v_out_ptr, s_out_ptr, v_a_ptr, s_a_ptr, v_b_ptr, s_b_ptr, mask_ptr, num_rows, num_heads,
    stride_v_out_n, stride_v_out_head, stride_v_a_n, stride_v_a_head, stride_v_b_n, stride_v_b_head,
    stride_s_out_n, stride_s_out_head, stride_s_a_n, stride_s_a_head, stride_s_b_n, stride_s_b_head,
    DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Merge states a and b of rows [num_rows] = (n, head), where mask [n] says so if there is one; outputs may be a.

    Strides of v are in units. If one state is empty, the other comes out bit for bit.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_DIM)
    row_mask = row < num_rows
    if mask_ptr is not None:
        row_mask &= tl.load(mask_ptr + row // num_heads, mask=row_mask, other=0) != 0
    mask = row_mask[:, None] & (cols < DIM)[None, :]
    v_a_offs = row_offsets(row, num_heads, stride_v_a_n, stride_v_a_head, UNIT)
    v_b_offs = row_offsets(row, num_heads, stride_v_b_n, stride_v_b_head, UNIT)
    v_a = tl.load(v_a_ptr + v_a_offs[:, None] + cols[None, :], mask=mask).to(tl.float32)
    v_b = tl.load(v_b_ptr + v_b_offs[:, None] + cols[None, :], mask=mask).to(tl.float32)
    s_a = tl.load(s_a_ptr + row_offsets(row, num_heads, stride_s_a_n, stride_s_a_head, 1), mask=row_mask, other=0.0)
    s_b = tl.load(s_b_ptr + row_offsets(row, num_heads, stride_s_b_n, stride_s_b_head, 1), mask=row_mask, other=0.0)
    top = tl.maximum(s_a, s_b)
    weight_a, weight_b = tl.exp2(s_a - finite_or_zero(top)), tl.exp2(s_b - finite_or_zero(top))
    total = weight_a + weight_b
    share_a, share_b = (weight_a / total)[:, None], (weight_b / total)[:, None]
    v = v_a * share_a + v_b * share_b
    v = tl.where(
        (weight_a == 0.0)[:, None], v_b, v
    )  # not v_a * 0, which may be NaN; nor v_b + 0, which turns -0 into 0
    v = tl.where((weight_b == 0.0)[:, None], v_a, v)
    v = tl.where((top == NEG_INF)[:, None], 0.0, v)
    v_out_offs = row_offsets(row, num_heads, stride_v_out_n, stride_v_out_head, UNIT)
    tl.store(v_out_ptr + v_out_offs[:, None] + cols[None, :], v, mask=mask)
    s_out_offs = row_offsets(row, num_heads, stride_s_out_n, stride_s_out_head, 1)
    tl.store(s_out_ptr + s_out_offs, top + tl.log2(total), mask=row_mask)  # both empty: -inf + log2(0)


@triton.jit(do_not_specialize=["num_rows", "num_states", "nnz"])
def merge_states_kernel(
    v_out_ptr, s_out_ptr, v_ptr, s_ptr, indptr_ptr, num_rows, num_states, nnz, num_heads,
    stride_v_out_n, stride_v_out_head, stride_v_n, stride_v_state, stride_v_head,
    stride_s_out_n, stride_s_out_head, stride_s_n, stride_s_state, stride_s_head,
    DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Merge num_states states of each row [num_rows] = (n, head); with indptr, those from indptr[n] to indptr[n + 1] of
    nnz. Strides of v are in units."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_DIM)
    row_mask = row < num_rows
    n, head = row // num_heads, row % num_heads
    if indptr_ptr is None:
        begin = tl.zeros([BLOCK_ROWS], tl.int64)
        end = begin + num_states
    else:
        begin = tl.load(indptr_ptr + n, mask=row_mask, other=0).to(tl.int64)
        end = tl.minimum(tl.load(indptr_ptr + n + 1, mask=row_mask, other=0).to(tl.int64), nnz)
    s_ptrs = s_ptr + n * stride_s_n + head * stride_s_head
    v_ptrs = v_ptr + (n * stride_v_n + head * stride_v_head) * UNIT
    longest = tl.max(tl.where(row_mask, end - begin, 0), 0)
    top = tl.full([BLOCK_ROWS], NEG_INF, tl.float32)
    for i in range(0, longest):
        some = row_mask & (begin + i < end)
        top = tl.maximum(top, tl.load(s_ptrs + (begin + i) * stride_s_state, mask=some, other=NEG_INF))
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for i in range(0, longest):
        some = row_mask & (begin + i < end)
        s = tl.load(s_ptrs + (begin + i) * stride_s_state, mask=some, other=NEG_INF)
        weight = tl.exp2(s - finite_or_zero(top))
        v_rows = v_ptrs + (begin + i) * stride_v_state * UNIT
        v = tl.load(
            v_rows[:, None] + cols[None, :], mask=(some & (weight > 0.0))[:, None] & (cols < DIM)[None, :], other=0.0
        )
        total += weight
        acc += v.to(tl.float32) * weight[:, None]
    v = tl.where((total > 0.0)[:, None], acc / total[:, None], 0.0)
    v_out_offs = row_offsets(row, num_heads, stride_v_out_n, stride_v_out_head, UNIT)
    tl.store(v_out_ptr + v_out_offs[:, None] + cols[None, :], v, mask=row_mask[:, None] & (cols < DIM)[None, :])
    s_out_offs = row_offsets(row, num_heads, stride_s_out_n, stride_s_out_head, 1)
    tl.store(s_out_ptr + s_out_offs, top + tl.log2(total), mask=row_mask)  # no keys: -inf + log2(0)


def merge_state(v_out: Tensor, s_out: Tensor, v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> None:
    """Two states, v [n, num_heads, head_dim] and s [n, num_heads]; with one empty, the other's very bits."""
    _merge_pair(v_out, s_out, v_a, s_a, v_b, s_b, None)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None) -> None:
    """Merge the other state into (v, s), in rows where mask [n] is True (None: in all)."""
    _merge_pair(v, s, v, s, v_other, s_other, mask)


def merge_states(v_out: Tensor, s_out: Tensor, v: Tensor, s: Tensor) -> None:
    """v [n, num_states, num_heads, head_dim] and s [n, num_states, num_heads] into one state per row."""
    _merge_many(v_out, s_out, v, s, None)


def merge_ragged_states(v_out: Tensor, s_out: Tensor, v: Tensor, s: Tensor, indptr: Tensor) -> None:
    """The states of row i are v [nnz, num_heads, head_dim] and s [nnz, num_heads] from indptr[i] to indptr[i + 1]."""
    _merge_many(
        v_out, s_out, v[None].expand(v_out.shape[0], -1, -1, -1), s[None].expand(v_out.shape[0], -1, -1), indptr
    )


def _merge_pair(
    v_out: Tensor, s_out: Tensor, v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor, mask: Tensor | None
) -> None:
    n, num_heads, dim = v_out.shape
    if v_out.numel() == 0:
        return
    tile, unit = row_tile(n * num_heads, dim), alignment(v_out, v_a, v_b)
    merge_state_kernel[(tile.num_programs(n * num_heads),)](
        v_out, s_out, v_a, s_a, v_b, s_b, mask, n * num_heads, num_heads,
        *strides(v_out, unit), *strides(v_a, unit), *strides(v_b, unit), *s_out.stride(), *s_a.stride(), *s_b.stride(),
        UNIT=unit, **_tile_args(tile, dim),
    )  # fmt: skip


def _merge_many(v_out: Tensor, s_out: Tensor, v: Tensor, s: Tensor, indptr: Tensor | None) -> None:
    n, num_heads, dim = v_out.shape
    if v_out.numel() == 0:
        return
    tile, unit = row_tile(n * num_heads, dim, per_thread=16), alignment(v_out, v)
    merge_states_kernel[(tile.num_programs(n * num_heads),)](
        v_out, s_out, v, s, indptr, n * num_heads, v.shape[1], v.shape[1], num_heads,
        *strides(v_out, unit), *(stride // unit for stride in v.stride()[:3]), *s_out.stride(), *s.stride(),
        UNIT=unit, **_tile_args(tile, dim),
    )  # fmt: skip


def _tile_args(tile: RowTile, dim: int) -> dict[str, int]:
    return {"DIM": dim, "BLOCK_ROWS": tile.block_rows, "BLOCK_DIM": tile.block_dim, "num_warps": tile.num_warps}


def compile_cases() -> Iterator[CompileCase]:
    """Heads of models; states in their own tensors, stacked and ragged."""
    for n, heads, dim, dtype in (
        (1, 32, 128, torch.bfloat16),
        (4096, 32, 128, torch.bfloat16),
        (4096, 9, 72, torch.float32),
        (512, 16, 512, torch.float16),
    ):
        v, s = torch.empty(n, 5, heads, dim, dtype=dtype, device="meta"), torch.empty(n, 5, heads, device="meta")
        a, b = (v[:, 0], s[:, 0]), (v[:, 1], s[:, 1])
        mask, indptr = (
            torch.empty(n, dtype=torch.bool, device="meta"),
            torch.empty(n + 1, dtype=torch.int32, device="meta"),
        )
        name = f"n={n} heads={heads} dim={dim} {dtype}"
        yield recorded(f"merge_state {name}", merge_state_kernel, partial(merge_state, *a, *a, *b))
        yield recorded(f"merge_state_in_place {name}", merge_state_kernel, partial(merge_state_in_place, *a, *b, mask))
        yield recorded(f"merge_states {name}", merge_states_kernel, partial(merge_states, *a, v, s))
        ragged = partial(merge_ragged_states, *a, v.flatten(0, 1), s.flatten(0, 1), indptr)
        yield recorded(f"merge_ragged_states {name}", merge_states_kernel, ragged)
