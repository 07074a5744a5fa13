"""Grouped matrix products in Triton: one persistent kernel over the tiles of all segments.

The lengths of the segments stay on the device. Each program searches them for the segment that its tile belongs to, so
that a launch needs no host sync and can be captured in a CUDA graph. Rows before the first segment and after the last
one count as two more segments, without a product.
"""

from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import GemmConfig, Product, capability, choose_gemm, num_sms
from flashtile.kernels.tiles import alignment
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

MAX_SEARCH = 1024  # segments that are looked at at once


@triton.jit
def load_bound(seg_indptr_ptr, i, num_segments, num_rows):
    """First row of segment i [...], where segments 0 and num_segments + 1 are the rows before and after all others."""
    inner = (i >= 1) & (i <= num_segments + 1)
    bound = tl.load(seg_indptr_ptr + i - 1, mask=inner, other=0).to(tl.int32)
    return tl.where(i > num_segments + 1, num_rows, bound)


@triton.jit
def find_segment(tile, seg_indptr_ptr, num_segments, num_rows, tiles_n, BLOCK_M: tl.constexpr, SEARCH: tl.constexpr):
    """Which segment a tile belongs to, if each has its row blocks times tiles_n tiles.

    Returns:
        segment (0 and num_segments + 1: outside), its rows begin and end, its first tile; the tiles of all segments.
    """
    segment, begin, end, first, total = 0, 0, 0, 0, 0
    for start in range(0, num_segments + 2, SEARCH):
        i = start + tl.arange(0, SEARCH)
        begins = load_bound(seg_indptr_ptr, i, num_segments, num_rows)
        ends = load_bound(seg_indptr_ptr, i + 1, num_segments, num_rows)
        tiles = tl.where(i < num_segments + 2, tl.cdiv(tl.maximum(ends - begins, 0), BLOCK_M) * tiles_n, 0)
        last = total + tl.cumsum(tiles, 0)
        here = (tile >= last - tiles) & (tile < last)
        segment += tl.sum(tl.where(here, i, 0), 0)
        begin += tl.sum(tl.where(here, begins, 0), 0)
        end += tl.sum(tl.where(here, ends, 0), 0)
        first += tl.sum(tl.where(here, last - tiles, 0), 0)
        total += tl.sum(tiles, 0)
    return segment, begin, end, first, total


@triton.jit
def block_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row block, column block) of a tile of one product: GROUP_M row blocks share a column block while it is in L2."""
    group = tile // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    rest = tile - group * (GROUP_M * tiles_n)
    return group * GROUP_M + rest % size, rest // size


@triton.jit
def dot(x, w, acc):
    """acc + x w in fp32. fp32 operands are multiplied in fp64: sums of TF32 products, or of many fp32 ones in a row,
    err more than twice as much as PyTorch's, and fp64 is as fast as fp32 outside of TF32 on the GPUs that serve models.
    """
    if x.dtype == tl.float32:
        return acc + tl.dot(x.to(tl.float64), w.to(tl.float64), out_dtype=tl.float64)
    else:
        return tl.dot(x, w, acc)


@triton.jit(do_not_specialize=["num_rows", "num_segments"])
def grouped_gemm_kernel(
    out_ptr, x_ptr, weight_ptr, seg_indptr_ptr, weight_indices_ptr, x_scale_ptr, weight_scale_ptr,
    num_rows, num_segments, d_in, d_out, stride_out_batch, stride_out_row, stride_x_batch, stride_x_row, stride_weight,
    stride_weight_row, alpha, beta,
    COLUMN_MAJOR: tl.constexpr, BETA: tl.constexpr, UNIT: tl.constexpr, SEARCH: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = alpha x weight + beta out for the rows of each segment, and 0 for those of none.

    With seg_indptr: x [num_rows, d_in] and out [num_rows, d_out] hold all segments. Without it: segment i is entry i of
    batches of num_rows rows. weight [d_in, d_out], or [d_out, d_in] with COLUMN_MAJOR. Strides are in units.
    """
    tiles_n = tl.cdiv(d_out, BLOCK_N)
    if seg_indptr_ptr is not None:
        total = find_segment(0, seg_indptr_ptr, num_segments, num_rows, tiles_n, BLOCK_M, SEARCH)[4]
    else:
        total = num_segments * tl.cdiv(num_rows, BLOCK_M) * tiles_n
    factor = alpha
    if x_scale_ptr is not None:
        factor *= tl.load(x_scale_ptr)
    if weight_scale_ptr is not None:
        factor *= tl.load(weight_scale_ptr)
    offs_k = tl.arange(0, BLOCK_K)

    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        if seg_indptr_ptr is not None:
            segment, begin, end, first, _ = find_segment(
                tile, seg_indptr_ptr, num_segments, num_rows, tiles_n, BLOCK_M, SEARCH
            )
            inside = (segment >= 1) & (segment <= num_segments)
            weight = tl.where(inside, segment - 1, 0)
            batch = 0
            depth = tl.where(inside, d_in, 0)
            if weight_indices_ptr is not None:
                weight = tl.load(weight_indices_ptr + weight, mask=inside, other=0)
        else:
            weight = tile // (tl.cdiv(num_rows, BLOCK_M) * tiles_n)
            first = weight * (tl.cdiv(num_rows, BLOCK_M) * tiles_n)
            begin, end, batch, depth = 0, num_rows, weight, d_in
        block_m, block_n = block_order(tile - first, tl.cdiv(end - begin, BLOCK_M), tiles_n, GROUP_M)

        rows = begin + block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask, col_mask = rows < end, cols < d_out
        x_rows = x_ptr + (tl.cast(batch, tl.int64) * stride_x_batch + rows.to(tl.int64) * stride_x_row) * UNIT
        matrix = weight_ptr + tl.cast(weight, tl.int64) * stride_weight * UNIT
        if COLUMN_MAJOR:
            weight_cols = matrix + cols.to(tl.int64) * stride_weight_row * UNIT
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32)
        for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
            at = k + offs_k
            x_mask = row_mask[:, None] if EVEN_K else row_mask[:, None] & (at < d_in)[None, :]
            x = tl.load(x_rows[:, None] + at[None, :], mask=x_mask, other=0.0)
            if COLUMN_MAJOR:
                w_ptrs = weight_cols[None, :] + at[:, None]
            else:
                w_ptrs = matrix + at.to(tl.int64)[:, None] * stride_weight_row * UNIT + cols[None, :]
            if EVEN_K and EVEN_N:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=(at < d_in)[:, None] & col_mask[None, :], other=0.0)
            acc = dot(x, w, acc)

        out_rows = tl.cast(batch, tl.int64) * stride_out_batch + rows.to(tl.int64) * stride_out_row
        out_ptrs = out_ptr + (out_rows * UNIT)[:, None] + cols[None, :]
        out_mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & col_mask[None, :]
        acc = acc * factor
        if BETA:
            acc += beta * tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


def grouped_gemm(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    seg_indptr: Tensor | None,
    weight_indices: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    alpha: float,
    beta: float,
    num_sms: int,
    backend: str,
) -> None:
    """out = alpha x weight + beta out for each batch entry, or each segment of the only one; see flashtile/gemm.py."""
    if out.numel() == 0:
        return
    check_fp8(x)
    config = choose(out, x, weights, seg_indptr, backend)
    run = family(config.family).launch
    run(config, out, x, weights, seg_indptr, weight_indices, x_scale, weight_scale, alpha, beta, num_sms)


@cache
def family(name: str) -> Any:
    """The module with the launcher of a kernel family."""
    return import_module("flashtile.kernels.gemm" if name == "portable" else "flashtile.kernels.hopper.gemm")


def check_fp8(x: Tensor) -> None:
    """NotImplementedError for fp8 inputs on a GPU without products of them."""
    if x.element_size() == 1 and x.is_cuda and capability(x.device) < (8, 9):
        found = ".".join(str(n) for n in capability(x.device))
        raise NotImplementedError(f"fp8 products need compute capability 8.9 or later, {x.device} has {found}")


def choose(out: Tensor, x: Tensor, weights: Tensor, seg_indptr: Tensor | None, backend: str) -> GemmConfig:
    """The configuration for these shapes on this device."""
    segments = x.shape[0] if seg_indptr is None else seg_indptr.shape[0] - 1
    rows = x.shape[1] if seg_indptr is None else triton.cdiv(x.shape[1], max(segments, 1))
    device = out.device
    sm = capability(device)
    hopper = sm[0] == 9 and backend != "sm80" and family("hopper").fits(out, x, weights)
    product = Product(segments, rows, *weights.shape[1:], x.element_size())
    return choose_gemm(product, sm, num_sms(device), hopper)


def launch(
    config: GemmConfig,
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    seg_indptr: Tensor | None,
    weight_indices: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    alpha: float,
    beta: float,
    sm_limit: int,
) -> None:
    """`grouped_gemm` with a given configuration."""
    batches, num_rows, d_in = x.shape
    d_out = out.shape[2]
    segments = batches if seg_indptr is None else seg_indptr.shape[0] - 1
    column_major = weights.stride(2) != 1 and d_out > 1
    stored = weights.transpose(1, 2) if column_major else weights
    unit = alignment(out, x, stored)
    ctas = sm_limit or num_sms(out.device) * config.ctas_per_sm
    tiles = (
        config.max_tiles(segments, num_rows, d_out)
        if seg_indptr is not None
        else batches * triton.cdiv(num_rows, config.block_m) * triton.cdiv(d_out, config.block_n)
    )
    grouped_gemm_kernel[(min(tiles, ctas),)](
        out, x, weights, seg_indptr, weight_indices, x_scale, weight_scale, num_rows, segments, d_in, d_out,
        *(s // unit for s in (*out.stride()[:2], *x.stride()[:2], *stored.stride()[:2])), alpha, beta,
        COLUMN_MAJOR=column_major, BETA=beta != 0, UNIT=unit,
        SEARCH=min(triton.next_power_of_2(segments + 2), MAX_SEARCH),
        EVEN_K=d_in % config.block_k == 0, EVEN_N=d_out % config.block_n == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Experts, LoRA's ways down and up, fp8, fp32: the tiles that each architecture gets."""
    bf16, fp16, fp32, e4m3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
    index, scale = torch.empty(9, dtype=torch.int64, device="meta"), torch.empty(1, device="meta")
    for rows, d_in, d_out, dtype, column_major in (
        (8, 4096, 4096, bf16, True),
        (8, 4096, 4096, fp16, False),
        (8, 4096, 4096, fp32, True),
        (8, 4096, 256, bf16, True),
        (512, 4096, 4096, bf16, True),
        (128, 16, 4096, bf16, True),
        (128, 64, 4096, fp16, False),
        (200, 4096, 16, bf16, True),
        (2048, 4096, 64, bf16, True),
        (4096, 4096, 16, bf16, True),
        (32768, 4096, 64, fp16, False),
        (16384, 4096, 4096, bf16, True),
        (16384, 4096, 4096, fp16, False),
        (16384, 4096, 4096, e4m3, True),
        (512, 4096, 4096, e4m3, True),
    ):
        x = torch.empty(1, rows, d_in, dtype=dtype, device="meta")
        weights = torch.empty(8, *((d_out, d_in) if column_major else (d_in, d_out)), dtype=dtype, device="meta")
        out = torch.empty(1, rows, d_out, dtype=bf16 if dtype == e4m3 else dtype, device="meta")
        scales = (scale, scale) if dtype == e4m3 else (None, None)
        matrices = weights.transpose(1, 2) if column_major else weights
        for sm in ((8, 0), (9, 0))[dtype == e4m3 :]:
            config = choose_gemm(Product(8, triton.cdiv(rows, 8), d_in, d_out, dtype.itemsize), sm, 132)
            run = partial(launch, config, out, x, matrices, index, index[:8], *scales, 1.0, 0.0, 132)
            name = f"gemm rows={rows} {d_in}x{d_out} {dtype} {config}"
            capability = 10 * sm[0]
            yield recorded(name, grouped_gemm_kernel, run, min_capability=capability, max_capability=capability)
