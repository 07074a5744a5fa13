"""Step 1 of a search (threshold.py): a bracket that all but surely holds the threshold, from a sample of the row."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.sampling.rows import row_of_output, row_value, sum2, window_of_row
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

RUN = 8  # consecutive entries of the sample: a 32-byte sector
SIGMAS = 4.0  # half the width of a bracket, in standard errors: a row in 10,000 is outside
NO_LIMIT = 2**31 - 1  # top_k that is off

_RUN = tl.constexpr(RUN)
_SIGMAS = tl.constexpr(SIGMAS)
_NO_LIMIT = tl.constexpr(NO_LIMIT)


def sample_size(length: int) -> int:
    """Entries to sample from rows of `length`: a larger sample makes the guess slower, and the bracket narrower."""
    return 2048 if length <= 65536 else 4096


@triton.jit
def key_of(x):
    """int32 in the order of the floats x."""
    bits = tl.cast(x, tl.float32).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float of a key."""
    key = tl.cast(key, tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def filters_of_row(
    top_k_ptr, top_k, top_p_ptr, top_p, row, length, USE_K: tl.constexpr, USE_P: tl.constexpr
):  # fmt: skip
    """(k, top_p) of a row; NO_LIMIT and inf where a filter is off. USE_*: 0 off, 1 one value, 2 one per row."""
    k = tl.cast(_NO_LIMIT, tl.int32)
    p = tl.cast(float("inf"), tl.float32)
    if USE_K > 0:
        k = tl.cast(row_value(top_k_ptr, top_k, row, USE_K == 2), tl.int32)
        k = tl.where(k < length, k, _NO_LIMIT)
    if USE_P > 0:
        p = tl.cast(row_value(top_p_ptr, top_p, row, USE_P == 2), tl.float32)
        p = tl.where(p < 1.0, p, float("inf"))
    return k, p


@triton.jit
def guess_bracket(
    row_ptr, length, k, top_p,
    USE_K: tl.constexpr, USE_P: tl.constexpr, K_FIRST: tl.constexpr, SIGNED: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """(lo, hi): all but surely keep(lo) is false and keep(hi) is true.

    The sample's counts and masses estimate the row's, with the standard error of a random sample; rows are taken to sum
    to 1. Both ends are bisected together, over the upper 16 bits of their keys.
    """
    offs = tl.arange(0, SAMPLE)
    offs = offs // _RUN * (length // (SAMPLE // _RUN)) + offs % _RUN
    x = tl.load(row_ptr + offs, mask=offs < length, other=-float("inf")).to(tl.float32)
    share = SAMPLE / tl.maximum(length, 1).to(tl.float32)  # of the row that is sampled
    has_k = k < _NO_LIMIT
    has_p = top_p < 1.0
    wanted = k.to(tl.float32) * share  # entries of the sample above the k-th
    tail = (1.0 - top_p) * share  # mass of the sample below the threshold of top-p
    low_end: tl.constexpr = -32641 if SIGNED else 0  # -inf, or 0: no threshold is lower
    high_end: tl.constexpr = 32640  # inf
    out_key = tl.cast(low_end, tl.int32)  # lo: the largest known to be out
    out_end = tl.cast(high_end, tl.int32)
    in_end = tl.cast(low_end, tl.int32)
    in_key = tl.cast(high_end, tl.int32)  # hi: the smallest known to be in
    for _ in range(16 if SIGNED else 15):
        out_mid = (out_key + out_end) >> 1
        in_mid = (in_end + in_key) >> 1
        lo = value_of(out_mid << 16)
        hi = value_of(in_mid << 16)
        above_lo, above_hi = sum2((x > lo).to(tl.int32), (x > hi).to(tl.int32), 0)
        above_lo = above_lo.to(tl.float32)
        above_hi = above_hi.to(tl.float32)
        is_out = tl.cast(False, tl.int1)
        is_in = tl.cast(True, tl.int1)
        if USE_K:
            is_out = is_out | (has_k & (above_lo - _SIGMAS * tl.sqrt(above_lo + 1.0) >= wanted))
            is_in = is_in & (~has_k | (above_hi + _SIGMAS * tl.sqrt(above_hi + 1.0) <= wanted))
        if USE_P:
            below_lo = tl.where(x <= lo, tl.maximum(x, 0.0), 0.0)
            below_hi = tl.where(x <= hi, tl.maximum(x, 0.0), 0.0)
            mass_lo, squares_lo = sum2(below_lo, below_lo * below_lo, 0)
            mass_hi, squares_hi = sum2(below_hi, below_hi * below_hi, 0)
            # some of the sample must be above lo: it knows nothing of greater values
            p_out = has_p & (above_lo >= 8.0) & (mass_lo + _SIGMAS * tl.sqrt(squares_lo) <= tail)
            p_in = ~has_p | (mass_hi - _SIGMAS * tl.sqrt(squares_hi) >= tail)
            if K_FIRST:  # top-p is of the top-k's mass, which needs all entries down to the k-th
                is_out = is_out | (p_out & ~has_k)
                is_in = is_in & p_in & ~has_k
            else:
                is_out = is_out | p_out
                is_in = is_in & p_in
        out_key = tl.where(is_out, out_mid, out_key)
        out_end = tl.where(is_out, out_end, out_mid)
        in_key = tl.where(is_in, in_mid, in_key)
        in_end = tl.where(is_in, in_end, in_mid)
    lo = tl.where(out_key == low_end, -float("inf") if SIGNED else 0.0, value_of(out_key << 16))
    hi = value_of(in_key << 16)
    unfiltered = ~has_k & ~has_p
    return tl.where(unfiltered, -float("inf"), lo), tl.where(unfiltered, -float("inf"), hi)


@triton.jit(do_not_specialize=["top_k"])
def guess_kernel(
    brackets_ptr, x_ptr, stride_x, indices_ptr, lengths_ptr, starts_ptr, length, top_k_ptr, top_k, top_p_ptr, top_p,
    INDIRECT: tl.constexpr, WINDOW: tl.constexpr, USE_K: tl.constexpr, USE_P: tl.constexpr, K_FIRST: tl.constexpr,
    SIGNED: tl.constexpr, SAMPLE: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """Step 1, one program for each output: brackets[output] = lo, hi."""
    output = tl.program_id(0)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = row_of_output(indices_ptr, output, INDIRECT)
    row_ptr, length = window_of_row(x_ptr + row * stride_x, length, starts_ptr, lengths_ptr, output, WINDOW)
    k, p = filters_of_row(top_k_ptr, top_k, top_p_ptr, top_p, output, length, USE_K, USE_P)
    lo, hi = guess_bracket(row_ptr, length, k, p, USE_K > 0, USE_P > 0, K_FIRST, SIGNED, SAMPLE)
    tl.store(brackets_ptr + output * 2, lo)
    tl.store(brackets_ptr + output * 2 + 1, hi)


def guess(
    brackets: Tensor, rows: tuple[Any, ...], filters: tuple[Any, ...], *, length: int, overlap: bool, **constexprs: Any
) -> None:
    """brackets [outputs, 2] of rows (x, stride_x, indices, lengths, starts, length) under filters (top_k_ptr, top_k,
    top_p_ptr, top_p)."""
    sample = sample_size(length)
    guess_kernel[(len(brackets),)](
        brackets, *rows, *filters, **constexprs, SAMPLE=sample, ENABLE_PDL=overlap, num_warps=sample // 512
    )


def compile_cases() -> Iterator[CompileCase]:
    """Each filter, for rows of both sample sizes."""
    brackets = torch.empty((8, 2), device="meta")
    for length, (use_k, use_p) in ((32000, (1, 1)), (128256, (1, 0)), (128256, (0, 1)), (128256, (2, 2))):
        x, tensor = torch.empty((8, length), device="meta"), torch.empty(8, device="meta")
        rows, filters = (x, length, None, None, None, length), (tensor.int(), 40, tensor, 0.9)
        on = {"USE_K": use_k, "USE_P": use_p, "K_FIRST": bool(use_k and use_p), "SIGNED": not use_p}
        launch = partial(
            guess, brackets, rows, filters, length=length, overlap=False, INDIRECT=False, WINDOW=False, **on
        )
        yield recorded(f"guess vocab={length} k={use_k} p={use_p}", guess_kernel, launch)
