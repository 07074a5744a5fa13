"""Conversions to narrow formats: saturating fp8 inside other kernels, and bits packed into bytes."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

BLOCK_BYTES = 512  # of a program, from 4 KB of flags: 32 for each of 128 threads

E4M3_MAX = tl.constexpr(448.0)
E5M2_MAX = tl.constexpr(57344.0)


@triton.jit
def convert(x, factor, DTYPE: tl.constexpr):
    """fp32 x as DTYPE; if that is fp8, x * factor, what is too large for it becoming its largest (NaN stays NaN)."""
    if DTYPE.is_fp8():
        largest: tl.constexpr = E5M2_MAX if DTYPE.is_fp8e5() else E4M3_MAX
        x = x * factor
        x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
    return x.to(DTYPE)


@triton.jit
def inverse_scale(factor, scale_ptr):
    """factor / the scale at scale_ptr, or factor if there is none."""
    if scale_ptr is not None:
        factor = factor / tl.load(scale_ptr).to(tl.float32)
    return factor


@triton.jit(do_not_specialize=["num_bytes", "num_segments", "num_steps"])
def packbits_kernel(
    out_ptr, flags_ptr, indptr_ptr, out_indptr_ptr, num_bytes, num_flags, num_segments, num_steps,
    LITTLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack flags [num_flags] (not 0: set) eight to a byte [num_bytes]; LITTLE: the first in the lowest bit.

    With indptr [num_segments + 1], each segment of flags starts a byte, out_indptr says which; num_steps: of a binary
    search among them.
    """
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin, end = byte * 8, tl.zeros([BLOCK], tl.int64) + num_flags
    if indptr_ptr is not None:
        low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + (num_segments - 1)
        for _ in range(num_steps):  # the last segment that starts at or before the byte is in low..high
            middle = (low + high + 1) // 2
            after = tl.load(out_indptr_ptr + middle) <= byte
            low, high = tl.where(after, middle, low), tl.where(after, high, middle - 1)
        begin = tl.load(indptr_ptr + low) + 8 * (byte - tl.load(out_indptr_ptr + low))
        end = tl.load(indptr_ptr + low + 1).to(tl.int64)
    bit = tl.arange(0, 8)
    flag = begin[:, None] + bit[None, :]
    mask = (byte < num_bytes)[:, None] & (flag < end[:, None])
    flags = tl.load(flags_ptr + flag, mask=mask, other=0) != 0
    place = bit if LITTLE else 7 - bit
    tl.store(out_ptr + byte, tl.sum(flags.to(tl.int32) << place[None, :], 1).to(tl.uint8), mask=byte < num_bytes)


def packbits(out: Tensor, x: Tensor, little: bool) -> None:
    """out [ceil(n / 8)] = the flags x [n], bool or uint8."""
    _launch(out, x, None, None, little)


def segment_packbits(out: Tensor, x: Tensor, indptr: Tensor, out_indptr: Tensor, little: bool) -> None:
    """The same for segments from indptr[i] to indptr[i + 1], whose bytes start at out_indptr[i]."""
    _launch(out, x, indptr, out_indptr, little)


def _launch(out: Tensor, x: Tensor, indptr: Tensor | None, out_indptr: Tensor | None, little: bool) -> None:
    if out.numel() == 0:
        return
    num_segments = 1 if indptr is None else indptr.shape[0] - 1
    packbits_kernel[(triton.cdiv(out.shape[0], BLOCK_BYTES),)](
        out, x.view(torch.uint8), indptr, out_indptr, out.shape[0], x.shape[0], num_segments, num_segments.bit_length(),
        LITTLE=little, BLOCK=BLOCK_BYTES,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Whole and in segments, both bit orders."""
    out, x = (torch.empty(n, dtype=torch.uint8, device="meta") for n in (4096, 32768))
    indptr = torch.empty(9, dtype=torch.int32, device="meta")
    yield recorded("packbits", packbits_kernel, partial(packbits, out, x, False))
    yield recorded("segment_packbits", packbits_kernel, partial(segment_packbits, out, x, indptr, indptr, True))
