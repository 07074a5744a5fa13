"""Gated activations in Triton: one pass, tiles of rows by columns, no communication between threads."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.quantization import convert, inverse_scale
from flashtile.kernels.tiles import (
    alignment,
    check_output_dtype,
    launch_options,
    row_offsets,
    row_tile,
    start_after_previous,
)
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

BULK_ELEMENTS = 2048  # of an output tile: as many of gate and of up are read, 128 KB of bf16 in flight on an SM
MAX_BLOCK_DIM = 1024  # columns of a tile: a row of 14336 wastes none, one of 11008 a quarter of its last tile


@triton.jit
def silu(x):
    """x / (1 + exp(-x)): exp overflows to inf for large -x, and x / inf = -0."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """x * (1 + erf(x / sqrt(2))) / 2."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 * x^3): the same as x / (1 + exp(-2 * u))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit(do_not_specialize=["num_rows"])
def act_and_mul_kernel(
    out_ptr, input_ptr, out_scale_ptr, num_rows, stride_out, stride_input, factor,
    ACT: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, ENABLE_PDL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """out [num_rows, DIM] = ACT(gate) * up for input [num_rows, 2 * DIM] = [gate, up]; strides in units. fp8 out is
    scaled by factor / out_scale."""
    start_after_previous(ENABLE_PDL)
    num_col_blocks: tl.constexpr = tl.cdiv(DIM, BLOCK_DIM)
    row = tl.program_id(0).to(tl.int64) // num_col_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(0) % num_col_blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    mask = (row < num_rows)[:, None] & (cols < DIM)[None, :]
    gate_ptrs = input_ptr + row_offsets(row, 1, stride_input, 0, UNIT)[:, None] + cols[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + DIM, mask=mask, other=0.0).to(tl.float32)
    y = convert(ACT(gate) * up, inverse_scale(factor, out_scale_ptr), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offsets(row, 1, stride_out, 0, UNIT)[:, None] + cols[None, :], y, mask=mask)


def silu_and_mul(out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float, enable_pdl: bool) -> None:
    """out [n, d] = silu(input[:, :d]) * input[:, d:]; fp8 out is scaled by out_factor / out_scale."""
    _launch(silu, out, input, out_scale, out_factor, enable_pdl)


def gelu_and_mul(out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float, enable_pdl: bool) -> None:
    """The same with gelu."""
    _launch(gelu, out, input, out_scale, out_factor, enable_pdl)


def gelu_tanh_and_mul(
    out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float, enable_pdl: bool
) -> None:
    """The same with gelu by tanh."""
    _launch(gelu_tanh, out, input, out_scale, out_factor, enable_pdl)


def _launch(
    act: triton.JITFunction, out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float, enable_pdl: bool
) -> None:
    num_rows, dim = out.shape
    if out.numel() == 0:
        return
    check_output_dtype(out)
    col_blocks = triton.cdiv(dim, MAX_BLOCK_DIM)
    tile = row_tile(num_rows * col_blocks, min(dim, MAX_BLOCK_DIM), BULK_ELEMENTS)
    unit = alignment(out, input)
    act_and_mul_kernel[(tile.num_programs(num_rows) * triton.cdiv(dim, tile.block_dim),)](
        out, input, out_scale, num_rows, out.stride(0) // unit, input.stride(0) // unit, out_factor,
        ACT=act, DIM=dim, UNIT=unit, ENABLE_PDL=enable_pdl,
        BLOCK_ROWS=tile.block_rows, BLOCK_DIM=tile.block_dim, **launch_options(tile, enable_pdl),
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """MLP sizes of models, with few and many tokens; all activations; fp8 out."""
    for num_rows, dim in ((1, 4096), (16384, 4096), (128, 14336), (4096, 100)):
        for run, dtype in (
            (silu_and_mul, torch.bfloat16),
            (gelu_and_mul, torch.float32),
            (gelu_tanh_and_mul, torch.float16),
        ):
            input = torch.empty(num_rows, 2 * dim, dtype=dtype, device="meta")
            launch = partial(run, input[:, :dim], input, None, 1.0, False)
            yield recorded(f"{run.__name__} rows={num_rows} dim={dim} {dtype}", act_and_mul_kernel, launch)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        out, scale = input[:, :dim].to(dtype), torch.empty(1, device="meta")
        launch = partial(silu_and_mul, out, input, scale, 1.0, False)
        yield recorded(f"silu_and_mul {dtype}", act_and_mul_kernel, launch, min_capability=90)
