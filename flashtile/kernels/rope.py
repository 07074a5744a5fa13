"""Rotary embeddings in Triton: a program rotates heads of one token, so that cos and sin are read or computed once."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.frequencies import frequencies
from flashtile.kernels.quantization import convert
from flashtile.kernels.tiles import FEW_PROGRAMS, alignment, strides
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

BULK_ELEMENTS = 8192  # of a program: more would take more than 64 fp32 registers of its 128 threads


@triton.jit
def cos_sin_of(angle):
    """cos and sin of fp32 angles of any size, within 2 ulp: one range reduction for both, and no branch, where the
    library's functions take some 200 instructions and a stack frame beyond 1e5 radians."""
    quarters = angle.to(tl.float64) * 0.6366197723675814  # 2 / pi; fp64, as 2**20 quarters leave fp32 no fraction
    nearest = tl.floor(quarters + 0.5)
    r = (quarters - nearest).to(tl.float32) * 1.5707963267948966  # in -pi/4 .. pi/4
    r2 = r * r
    # Taylor: the first term left out is below 3e-9 of the result
    sin = r + r * r2 * (-1 / 6 + r2 * (1 / 120 + r2 * (-1 / 5040 + r2 * (1 / 362880))))
    cos = 1 + r2 * (-1 / 2 + r2 * (1 / 24 + r2 * (-1 / 720 + r2 * (1 / 40320 + r2 * (-1 / 3628800)))))
    quadrant = (nearest - 4 * tl.floor(nearest * 0.25)).to(tl.int32)  # 0 to 3
    swap = (quadrant & 1) == 1
    cos, sin = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -cos, cos), tl.where(quadrant >= 2, -sin, sin)


@triton.jit
def cos_sin(
    position, table_ptr, stride_table, num_positions, CACHED: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr
):  # fmt: skip
    """cos and sin [BLOCK_HALF], fp32, of one position: looked up in a table [num_positions, 2 * HALF] of cos, then sin;
    or computed, the table being radians per token [HALF]. NaN if the position is not in the table."""
    pair = tl.arange(0, BLOCK_HALF)
    if CACHED:
        mask = (pair < HALF) & (position >= 0) & (position < num_positions)
        row_ptr = table_ptr + position.to(tl.int64) * stride_table
        cos = tl.load(row_ptr + pair, mask=mask, other=float("nan"))
        sin = tl.load(row_ptr + HALF + pair, mask=mask, other=float("nan"))
    else:
        cos, sin = cos_sin_of(position.to(tl.float32) * tl.load(table_ptr + pair, mask=pair < HALF, other=0.0))
    return cos, sin


@triton.jit
def load_pairs(row_ptrs, row_mask, INTERLEAVE: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Both elements of every rotated pair, each [rows, BLOCK_HALF] fp32, of rows [rows] that start at row_ptrs."""
    if INTERLEAVE:
        cols = tl.arange(0, 2 * BLOCK_HALF)
        mask = row_mask[:, None] & (cols < 2 * HALF)[None, :]
        x = tl.load(row_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)
        first, second = tl.split(x.reshape(x.shape[0], BLOCK_HALF, 2))
    else:
        cols = tl.arange(0, BLOCK_HALF)
        mask = row_mask[:, None] & (cols < HALF)[None, :]
        first = tl.load(row_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)
        second = tl.load(row_ptrs[:, None] + (HALF + cols)[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_rotated(
    row_ptrs, row_mask, first, second, cos, sin, factor, INTERLEAVE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Store pairs [rows, BLOCK_HALF] turned by the angles of cos and sin [BLOCK_HALF]; fp8 is multiplied by factor."""
    cos, sin = cos[None, :], sin[None, :]
    x = convert(first * cos - second * sin, factor, row_ptrs.dtype.scalar.element_ty)
    y = convert(second * cos + first * sin, factor, row_ptrs.dtype.scalar.element_ty)
    if INTERLEAVE:
        cols = tl.arange(0, 2 * BLOCK_HALF)
        both = tl.join(x, y).reshape(x.shape[0], 2 * BLOCK_HALF)
        tl.store(row_ptrs[:, None] + cols[None, :], both, mask=row_mask[:, None] & (cols < 2 * HALF)[None, :])
    else:
        cols = tl.arange(0, BLOCK_HALF)
        mask = row_mask[:, None] & (cols < HALF)[None, :]
        tl.store(row_ptrs[:, None] + cols[None, :], x, mask=mask)
        tl.store(row_ptrs[:, None] + (HALF + cols)[None, :], y, mask=mask)


@triton.jit
def copy_rest(out_ptrs, row_ptrs, row_mask, BEGIN: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """Copy columns BEGIN to END of rows."""
    cols = BEGIN + tl.arange(0, BLOCK)
    mask = row_mask[:, None] & (cols < END)[None, :]
    tl.store(out_ptrs[:, None] + cols[None, :], tl.load(row_ptrs[:, None] + cols[None, :], mask=mask), mask=mask)


@triton.jit
def rope_kernel(
    q_out_ptr, k_out_ptr, q_ptr, k_ptr, pos_ids_ptr, table_ptr, stride_table, num_positions,
    stride_q_out_token, stride_q_out_head, stride_k_out_token, stride_k_out_head,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head,
    NUM_QO_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    CACHED: tl.constexpr, INTERLEAVE: tl.constexpr, COPY_REST: tl.constexpr, UNIT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_QO_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate q [nnz, NUM_QO_HEADS, HEAD_DIM] and k into the outputs, which may be q and k. SPLITS programs per token;
    strides of tokens and heads in units."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    token = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    q_head = split * BLOCK_QO_HEADS + tl.arange(0, BLOCK_QO_HEADS)
    k_head = split * BLOCK_KV_HEADS + tl.arange(0, BLOCK_KV_HEADS)
    q_mask, k_mask = q_head < NUM_QO_HEADS, k_head < NUM_KV_HEADS
    q_ptrs = q_ptr + (token * stride_q_token + q_head * stride_q_head) * UNIT
    k_ptrs = k_ptr + (token * stride_k_token + k_head * stride_k_head) * UNIT
    q_out_ptrs = q_out_ptr + (token * stride_q_out_token + q_head * stride_q_out_head) * UNIT
    k_out_ptrs = k_out_ptr + (token * stride_k_out_token + k_head * stride_k_out_head) * UNIT
    # All loads first: the stores might alias them, so the compiler may not move them up.
    q_first, q_second = load_pairs(q_ptrs, q_mask, INTERLEAVE, HALF, BLOCK_HALF)
    k_first, k_second = load_pairs(k_ptrs, k_mask, INTERLEAVE, HALF, BLOCK_HALF)
    position = tl.load(pos_ids_ptr + token)
    cos, sin = cos_sin(position, table_ptr, stride_table, num_positions, CACHED, HALF, BLOCK_HALF)
    store_rotated(q_out_ptrs, q_mask, q_first, q_second, cos, sin, 1.0, INTERLEAVE, HALF, BLOCK_HALF)
    store_rotated(k_out_ptrs, k_mask, k_first, k_second, cos, sin, 1.0, INTERLEAVE, HALF, BLOCK_HALF)
    if COPY_REST:
        copy_rest(q_out_ptrs, q_ptrs, q_mask, ROTARY_DIM, HEAD_DIM, BLOCK_REST)
        copy_rest(k_out_ptrs, k_ptrs, k_mask, ROTARY_DIM, HEAD_DIM, BLOCK_REST)


def rope(
    q_out: Tensor,
    k_out: Tensor,
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int,
    rope_scale: float,
    rope_theta: float,
    llama31: Sequence[float] | None,
    interleave: bool,
) -> None:
    """q and k [nnz, num_heads, head_dim] turned by pos_ids [nnz] times the frequencies; outputs may be the inputs."""
    llama31 = None if llama31 is None else tuple(llama31)
    freqs = frequencies(rotary_dim, rope_scale, rope_theta, llama31, q.device)
    _launch(q_out, k_out, q, k, pos_ids, freqs[None, :], rotary_dim, False, interleave)


def rope_inplace(q: Tensor, k: Tensor, *args) -> None:
    """`rope`, written into q and k."""
    rope(q, k, q, k, *args)


def rope_cached(
    q_out: Tensor, k_out: Tensor, q: Tensor, k: Tensor, pos_ids: Tensor, cos_sin_cache: Tensor, interleave: bool
) -> None:
    """The same; row p of cos_sin_cache [max_position, rotary_dim] is cos, then sin, of the angles at position p."""
    _launch(q_out, k_out, q, k, pos_ids, cos_sin_cache, cos_sin_cache.shape[1], True, interleave)


def rope_cached_inplace(q: Tensor, k: Tensor, *args) -> None:
    """`rope_cached`, written into q and k."""
    rope_cached(q, k, q, k, *args)


def _launch(
    q_out: Tensor,
    k_out: Tensor,
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    table: Tensor,
    rotary_dim: int,
    cached: bool,
    interleave: bool,
) -> None:
    nnz, num_qo_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if nnz == 0:
        return
    copy_rest = q_out is not q and rotary_dim < head_dim
    cols = head_dim if copy_rest else rotary_dim
    splits = head_splits(nnz, num_qo_heads, cols)
    block_qo_heads, block_kv_heads = (
        triton.next_power_of_2(max(1, triton.cdiv(n, splits))) for n in (num_qo_heads, num_kv_heads)
    )
    unit = alignment(q_out, k_out, q, k)
    elements = (block_qo_heads + block_kv_heads) * cols
    rope_kernel[(nnz * splits,)](
        q_out, k_out, q, k, pos_ids, table, table.stride(0), table.shape[0],
        *strides(q_out, unit), *strides(k_out, unit), *strides(q, unit), *strides(k, unit),
        NUM_QO_HEADS=num_qo_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ROTARY_DIM=rotary_dim,
        CACHED=cached, INTERLEAVE=interleave, COPY_REST=copy_rest,
        UNIT=unit, SPLITS=splits,
        BLOCK_QO_HEADS=block_qo_heads, BLOCK_KV_HEADS=block_kv_heads,
        BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        num_warps=min(8, triton.next_power_of_2(triton.cdiv(elements, 1536))),  # 24 to 48 elements per thread
    )  # fmt: skip


def head_splits(nnz: int, num_qo_heads: int, cols: int) -> int:
    """Programs per token: as few as keep a program's elements below the bound; one for four heads while there are few
    tokens and only latency counts."""
    splits = triton.cdiv(max(1, num_qo_heads) * triton.next_power_of_2(cols), BULK_ELEMENTS)
    if nnz * splits <= FEW_PROGRAMS:
        splits = max(splits, triton.cdiv(num_qo_heads, 4))
    return triton.next_power_of_2(splits)


def compile_cases() -> Iterator[CompileCase]:
    """Llama, SmolLM and DeepSeek heads; few and many tokens; both sources of angles."""
    for nnz, num_qo_heads, num_kv_heads, head_dim, rotary_dim in (
        (1, 32, 8, 128, 128),
        (16384, 32, 8, 128, 128),
        (4096, 9, 3, 64, 64),
        (4096, 128, 1, 192, 64),
        (64, 32, 32, 80, 32),
    ):
        q, k, q_out, k_out = (
            torch.empty(nnz, heads, head_dim, dtype=torch.bfloat16, device="meta")
            for heads in (num_qo_heads, num_kv_heads) * 2
        )
        pos_ids = torch.empty(nnz, dtype=torch.int32, device="meta")
        cache = torch.empty(8192, rotary_dim, device="meta")
        for interleave in (False, True):
            name = f"nnz={nnz} heads={num_qo_heads}:{num_kv_heads} dim={head_dim} rotary={rotary_dim}"
            name += " interleave" * interleave
            by_cache = partial(rope_cached_inplace, q, k, pos_ids, cache, interleave)
            yield recorded(f"rope_cached_inplace {name}", rope_kernel, by_cache)
            by_frequency = partial(rope, q_out, k_out, q, k, pos_ids, rotary_dim, 1.0, 1e4, None, interleave)
            yield recorded(f"rope {name}", rope_kernel, by_frequency)
