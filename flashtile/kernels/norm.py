"""Norms in Triton: a program keeps its rows in registers, so that they cross the memory bus once each way."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.activation import silu
from flashtile.kernels.quantization import convert, inverse_scale
from flashtile.kernels.tiles import (
    RowTile,
    alignment,
    check_output_dtype,
    launch_options,
    row_offsets,
    row_tile,
    start_after_previous,
    strides,
)
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

REGISTER_DIM = 16384  # the longest row kept in registers: 32 fp32 per thread of 16 warps, and its weights
LONG_BLOCK_DIM = 8192  # longer rows are read more than once, in steps of this


@triton.jit
def load_sum(x_ptr, residual_ptr, x_offs, residual_offs, cols, mask):
    """Rows of x, or of x + residual if there is one, fp32; 0 where masked."""
    x = tl.load(x_ptr + x_offs[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + residual_offs[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_weight(weight_ptr, cols, DIM: tl.constexpr):
    """Columns of a weight, fp32."""
    return tl.load(weight_ptr + cols, mask=cols < DIM, other=0.0).to(tl.float32)


@triton.jit
def store_normed(
    out_ptr, residual_ptr, out_offs, residual_offs, cols, mask, x, scale, weight, factor, SILU: tl.constexpr
):  # fmt: skip
    """Store x * scale * weight, its silu with SILU; and x itself into residual if there is one."""
    if residual_ptr is not None:
        tl.store(residual_ptr + residual_offs[:, None] + cols[None, :], x, mask=mask)
    y = x * scale[:, None] * weight[None, :]
    if SILU:
        y = silu(y)
    tl.store(out_ptr + out_offs[:, None] + cols[None, :], convert(y, factor, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def rmsnorm_kernel(
    out_ptr, x_ptr, residual_ptr, weight_ptr, out_scale_ptr, num_rows, num_heads, stride_out_token, stride_out_head,
    stride_x_token, stride_x_head, stride_residual_token, stride_residual_head, eps, weight_offset, factor,
    DIM: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, ENABLE_PDL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """out = rmsnorm(x) * (weight_offset + weight) for rows [DIM]; of x + residual, which is stored, if there is one.

    out may be x; strides are in units. fp8 out is scaled by factor / out_scale. A row longer than BLOCK_DIM is read
    twice, once for its sum of squares.
    """
    start_after_previous(ENABLE_PDL)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out_offs = row_offsets(row, num_heads, stride_out_token, stride_out_head, UNIT)
    x_offs = row_offsets(row, num_heads, stride_x_token, stride_x_head, UNIT)
    residual_offs = row_offsets(row, num_heads, stride_residual_token, stride_residual_head, UNIT)
    row_mask = (row < num_rows)[:, None]
    cols = tl.arange(0, BLOCK_DIM)
    factor = inverse_scale(factor, out_scale_ptr)
    if DIM <= BLOCK_DIM:
        mask = row_mask & (cols < DIM)[None, :]
        x = load_sum(x_ptr, residual_ptr, x_offs, residual_offs, cols, mask)
        weight = weight_offset + load_weight(weight_ptr, cols, DIM)  # in flight during the reduction
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
        store_normed(out_ptr, residual_ptr, out_offs, residual_offs, cols, mask, x, scale, weight, factor, SILU)
    else:
        squares = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        for start in range(0, DIM, BLOCK_DIM):
            mask = row_mask & (start + cols < DIM)[None, :]
            x = load_sum(x_ptr, residual_ptr, x_offs, residual_offs, start + cols, mask)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 1) / DIM + eps)
        for start in range(0, DIM, BLOCK_DIM):
            at = start + cols
            mask = row_mask & (at < DIM)[None, :]
            x = load_sum(x_ptr, residual_ptr, x_offs, residual_offs, at, mask)
            weight = weight_offset + load_weight(weight_ptr, at, DIM)
            store_normed(out_ptr, residual_ptr, out_offs, residual_offs, at, mask, x, scale, weight, factor, SILU)


@triton.jit(do_not_specialize=["num_rows"])
def layernorm_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, out_scale_ptr, num_rows, num_heads, stride_out_token, stride_out_head,
    stride_x_token, stride_x_head, eps, factor,
    DIM: tl.constexpr, UNIT: tl.constexpr, ENABLE_PDL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias for rows [DIM]; strides in units, fp8 as rmsnorm_kernel.

    The variance is that of the differences from the mean, which is taken twice, so that a large mean costs no digits. A
    row longer than BLOCK_DIM is read three times.
    """
    start_after_previous(ENABLE_PDL)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out_ptrs = out_ptr + row_offsets(row, num_heads, stride_out_token, stride_out_head, UNIT)[:, None]
    x_offs = row_offsets(row, num_heads, stride_x_token, stride_x_head, UNIT)
    row_mask = (row < num_rows)[:, None]
    cols = tl.arange(0, BLOCK_DIM)
    factor = inverse_scale(factor, out_scale_ptr)
    if DIM <= BLOCK_DIM:
        mask = row_mask & (cols < DIM)[None, :]
        x = load_sum(x_ptr, None, x_offs, x_offs, cols, mask)
        weight, bias = load_weight(weight_ptr, cols, DIM), load_weight(bias_ptr, cols, DIM)
        x = tl.where(mask, x - (tl.sum(x, 1) / DIM)[:, None], 0.0)
        x = tl.where(mask, x - (tl.sum(x, 1) / DIM)[:, None], 0.0)  # what rounding the first sum left of the mean
        y = x * tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None] * weight[None, :] + bias[None, :]
        tl.store(out_ptrs + cols[None, :], convert(y, factor, out_ptr.dtype.element_ty), mask=mask)
    else:
        sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        for start in range(0, DIM, BLOCK_DIM):
            mask = row_mask & (start + cols < DIM)[None, :]
            sums += load_sum(x_ptr, None, x_offs, x_offs, start + cols, mask)
        mean = (tl.sum(sums, 1) / DIM)[:, None]
        sums = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        squares = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        for start in range(0, DIM, BLOCK_DIM):
            mask = row_mask & (start + cols < DIM)[None, :]
            x = tl.where(mask, load_sum(x_ptr, None, x_offs, x_offs, start + cols, mask) - mean, 0.0)
            sums += x
            squares += x * x
        rest = (tl.sum(sums, 1) / DIM)[:, None]  # what rounding the first sum left of the mean
        mean += rest
        scale = tl.rsqrt(tl.sum(squares, 1)[:, None] / DIM - rest * rest + eps)
        for start in range(0, DIM, BLOCK_DIM):
            at = start + cols
            mask = row_mask & (at < DIM)[None, :]
            x = load_sum(x_ptr, None, x_offs, x_offs, at, mask) - mean
            y = x * scale * load_weight(weight_ptr, at, DIM)[None, :] + load_weight(bias_ptr, at, DIM)[None, :]
            tl.store(out_ptrs + at[None, :], convert(y, factor, out_ptr.dtype.element_ty), mask=mask)


def rmsnorm(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    silu: bool,
    out_scale: Tensor | None,
    out_factor: float,
    enable_pdl: bool,
) -> None:
    """out = rmsnorm(input) * (weight_offset + weight) [..., d], its silu if asked for; fp8 out is scaled by
    out_factor / out_scale."""
    _launch_rmsnorm(out, input, None, weight, eps, weight_offset, silu, out_scale, out_factor, enable_pdl)


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float, enable_pdl: bool
) -> None:
    """residual += input; input = rmsnorm of the unrounded sum."""
    _launch_rmsnorm(input, input, residual, weight, eps, weight_offset, False, None, 1.0, enable_pdl)


def fused_add_rmsnorm_quant(
    out: Tensor,
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    eps: float,
    out_scale: Tensor | None,
    out_factor: float,
    enable_pdl: bool,
) -> None:
    """residual += input; out = rmsnorm of the unrounded sum, scaled by out_factor / out_scale, in fp8."""
    _launch_rmsnorm(out, input, residual, weight, eps, 0.0, False, out_scale, out_factor, enable_pdl)


def layernorm(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: Tensor | None, out_factor: float
) -> None:
    """out = layernorm(input) * weight + bias [..., d]; fp8 out is scaled by out_factor / out_scale."""
    if input.numel() == 0:
        return
    check_output_dtype(out)
    num_rows, num_heads, dim = _shape(input)
    tile, unit = _tile(num_rows, dim), alignment(out, input)
    layernorm_kernel[(tile.num_programs(num_rows),)](
        out, input, weight, bias, out_scale, num_rows, num_heads, *strides(out, unit), *strides(input, unit), eps,
        out_factor, DIM=dim, UNIT=unit, ENABLE_PDL=False,
        BLOCK_ROWS=tile.block_rows, BLOCK_DIM=tile.block_dim, **launch_options(tile, False),
    )  # fmt: skip


def _launch_rmsnorm(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    silu: bool,
    out_scale: Tensor | None,
    out_factor: float,
    enable_pdl: bool,
) -> None:
    if x.numel() == 0:
        return
    check_output_dtype(out)
    num_rows, num_heads, dim = _shape(x)
    strided = (out, x, x if residual is None else residual)
    tile, unit = _tile(num_rows, dim), alignment(*strided)
    rmsnorm_kernel[(tile.num_programs(num_rows),)](
        out, x, residual, weight, out_scale, num_rows, num_heads, *(s for y in strided for s in strides(y, unit)),
        eps, weight_offset, out_factor, DIM=dim, SILU=silu, UNIT=unit, ENABLE_PDL=enable_pdl,
        BLOCK_ROWS=tile.block_rows, BLOCK_DIM=tile.block_dim, **launch_options(tile, enable_pdl),
    )  # fmt: skip


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Rows, heads and elements of a row, of x [n, d] or [n, num_heads, d]."""
    num_heads = x.shape[1] if x.dim() == 3 else 1
    return x.shape[0] * num_heads, num_heads, x.shape[-1]


def _tile(num_rows: int, dim: int) -> RowTile:
    return row_tile(num_rows, dim if dim <= REGISTER_DIM else LONG_BLOCK_DIM)


def compile_cases() -> Iterator[CompileCase]:
    """Hidden sizes of models with few and many tokens, heads of a query norm, a row too long for registers."""
    for rows, dim, dtype in (
        ((1,), 4096, torch.bfloat16),
        ((16384,), 4096, torch.bfloat16),
        ((16384,), 4096, torch.float32),
        ((16384,), 576, torch.float16),
        ((8192, 8), 128, torch.bfloat16),
        ((64,), 16384, torch.float32),
        ((8,), 65536, torch.bfloat16),
    ):
        x, weight = (torch.empty(*shape, dim, dtype=dtype, device="meta") for shape in (rows, ()))
        name = f"rows={'x'.join(map(str, rows))} dim={dim} {dtype}"
        plain = partial(rmsnorm, x, x, weight, 1e-6, 0.0, False, None, 1.0, False)
        yield recorded(f"rmsnorm {name}", rmsnorm_kernel, plain)
        yield recorded(f"add {name}", rmsnorm_kernel, partial(fused_add_rmsnorm, x, x, weight, 1e-6, 1.0, False))
        yield recorded(f"layernorm {name}", layernorm_kernel, partial(layernorm, x, x, weight, weight, 1e-6, None, 1.0))
    fp8, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(1, device="meta")
    quant = partial(fused_add_rmsnorm_quant, fp8, x, x, weight, 1e-6, scale, 1.0, True)
    yield recorded("add quant pdl", rmsnorm_kernel, quant, min_capability=90)
    silu_quant = partial(rmsnorm, fp8, x, weight, 1e-6, 0.0, True, None, 0.5, False)
    yield recorded("rmsnorm silu quant", rmsnorm_kernel, silu_quant, min_capability=90)
    layer_quant = partial(layernorm, fp8, x, weight, weight, 1e-6, scale, 1.0)
    yield recorded("layernorm quant", layernorm_kernel, layer_quant, min_capability=90)
