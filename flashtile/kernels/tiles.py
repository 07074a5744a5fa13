"""Tiles of memory-bound kernels: how many rows and columns a program takes, and how wide it may load."""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

BULK_ELEMENTS = 4096  # of a program: 32 per thread of 4 warps, 16 programs on an SM, so 128 KB of bf16 in flight there
FEW_PROGRAMS = 264  # two per SM of the largest GPU known here (H100, 132 SMs); below this, latency is all that counts


@dataclass(frozen=True)
class RowTile:
    """[block_rows, block_dim] elements for each program, both powers of two."""

    block_rows: int
    block_dim: int
    num_warps: int

    def num_programs(self, num_rows: int) -> int:
        """Programs that cover `num_rows` rows of one tile's width."""
        return triton.cdiv(num_rows, self.block_rows)


def row_tile(num_rows: int, dim: int, bulk: int = BULK_ELEMENTS, per_thread: int = 32) -> RowTile:
    """Whole rows: as many as make `bulk` elements, `per_thread` of them for a thread; an eighth of these rows, and half
    the elements per thread, if that leaves the GPU with few programs. Two tiles per row size, so that a serving process
    compiles no more than two kernels."""
    block_dim = triton.next_power_of_2(dim)
    block_rows = max(1, bulk // block_dim)
    if triton.cdiv(num_rows, block_rows) <= FEW_PROGRAMS:
        block_rows, per_thread = max(1, block_rows // 8), per_thread // 2
    return RowTile(block_rows, block_dim, min(16, max(1, block_rows * block_dim // (32 * per_thread))))


def launch_options(tile: RowTile, enable_pdl: bool) -> dict[str, int]:
    """Keyword arguments of a launch."""
    return {"num_warps": tile.num_warps} | ({"launch_pdl": True} if enable_pdl else {})


def check_output_dtype(out: Tensor) -> None:
    """NotImplementedError for fp8 output on a GPU without instructions for it."""
    if out.element_size() == 1 and out.is_cuda and torch.cuda.get_device_capability(out.device) < (8, 9):
        capability = ".".join(str(n) for n in torch.cuda.get_device_capability(out.device))
        raise NotImplementedError(f"out: fp8 needs compute capability 8.9 or later, {out.device} has {capability}")


def alignment(*tensors: Tensor) -> int:
    """The largest power of two, up to 16, that divides every stride but the last: rows start at multiples of it.

    Kernels take strides in units of it, as a constexpr: so the compiler knows that it may use 16-byte accesses,
    whatever the strides (of itself, Triton only looks for multiples of 16)."""
    return gcd(
        16, *(stride for x in tensors for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    )


def strides(x: Tensor, unit: int) -> tuple[int, int]:
    """Strides of a token and of a head, in units, of x [n, d] (one head) or [n, num_heads, d]."""
    return x.stride(0) // unit, x.stride(1) // unit if x.dim() == 3 else 0


@triton.jit
def row_offsets(row, num_heads, stride_token, stride_head, UNIT: tl.constexpr):
    """Offsets in elements, int64, of rows (token, head) = divmod(row, num_heads); strides in units."""
    row = row.to(tl.int64)
    return (row // num_heads * stride_token + row % num_heads * stride_head) * UNIT


@triton.jit
def start_after_previous(ENABLE_PDL: tl.constexpr):
    """With programmatic dependent launch: wait for the previous kernel's results, and let the next one be scheduled."""
    if ENABLE_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
