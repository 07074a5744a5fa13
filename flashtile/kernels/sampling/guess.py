"""Step 1 of a search (threshold.py): a bracket that all but surely holds the threshold, from a sample of the row."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import SamplingConfig, choose_sampling
from flashtile.kernels.sampling.rows import row_of_output, row_value, sum3, window_of_row
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

RUN = 8  # consecutive entries of the sample: a 32-byte sector
GRAIN = 18  # bits of a float that guesses leave 0: their values are 3 % apart
NO_LIMIT = 2**31 - 1  # top_k that is off

_RUN = tl.constexpr(RUN)
_GRAIN = tl.constexpr(GRAIN)
_NO_LIMIT = tl.constexpr(NO_LIMIT)
_LOWEST = tl.constexpr(-0x7F800000 >> GRAIN)  # -inf
_HIGHEST = tl.constexpr(0x7F800000 >> GRAIN)  # inf


@triton.jit
def key_of(x):
    """int32 in the order of the floats x; 0 for both zeros, so that equal floats have equal keys."""
    bits = tl.cast(x, tl.float32).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def value_of(key):
    """The float of a key."""
    key = tl.cast(key, tl.int32)
    magnitude = tl.abs(key).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -magnitude, magnitude)


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
def coarse_value(key):
    """The float of the upper bits of a key."""
    return value_of(key << _GRAIN)


@triton.jit
def pivots_between(lo_out, lo_in, hi_out, hi_in, PIVOTS: tl.constexpr):
    """PIVOTS coarse keys that part lo_out..lo_in evenly, then as many that part hi_out..hi_in; and whether they lie
    within. Each pass over the sample tests all of them: its time is that of the sums, not of the comparisons."""
    lane = tl.arange(0, 2 * PIVOTS)
    out_key = tl.where(lane < PIVOTS, lo_out, hi_out)
    in_key = tl.where(lane < PIVOTS, lo_in, hi_in)
    keys = out_key + (in_key - out_key) * (lane % PIVOTS + 1) // (PIVOTS + 1)
    return keys, keys > out_key


@triton.jit
def narrowed(out_key, in_key, num_out, PIVOTS: tl.constexpr):
    """The part of out_key..in_key after the first num_out of the keys of `pivots_between`."""
    size = in_key - out_key
    return out_key + size * num_out // (PIVOTS + 1), out_key + size * (num_out + 1) // (PIVOTS + 1)


@triton.jit
def guess_top_k(x, wanted, low_key, SIGMAS: tl.constexpr, PIVOTS: tl.constexpr):
    """Coarse keys (lo, hi) around the value that `wanted` entries of the sample exceed, a real number."""
    slack = SIGMAS * tl.sqrt(wanted)
    out_above = tl.ceil(wanted + slack + SIGMAS).to(tl.int32)  # a Poisson number's upper tail is the longer one
    in_above = tl.floor(wanted - slack).to(tl.int32)
    lo_out = tl.cast(low_key, tl.int32)
    lo_in = tl.cast(_HIGHEST, tl.int32)
    # with none of the sample that surely is among the k largest, there is no upper end to look for
    hi_out = tl.where(in_above > 0, lo_out, _HIGHEST - 1)
    hi_in = lo_in
    fewer = tl.where(tl.arange(0, 2 * PIVOTS) < PIVOTS, out_above, in_above + 1)
    while (lo_in - lo_out > 1) | (hi_in - hi_out > 1):
        keys, within = pivots_between(lo_out, lo_in, hi_out, hi_in, PIVOTS)
        above = tl.sum((x[:, None] > coarse_value(keys)[None, :]).to(tl.int32), 0)
        outs = tl.sum(outs_of(~(within & (above < fewer)), PIVOTS), 0)
        lo_out, lo_in = narrowed(lo_out, lo_in, outs & 0xFFFF, PIVOTS)
        hi_out, hi_in = narrowed(hi_out, hi_in, outs >> 16, PIVOTS)
    return lo_out, hi_in


@triton.jit
def outs_of(is_out, PIVOTS: tl.constexpr):
    """Summands of the numbers of keys that are out: of the first PIVOTS, and 2**16 times that of the others."""
    return tl.where(is_out, tl.where(tl.arange(0, 2 * PIVOTS) < PIVOTS, 1, 1 << 16), 0)


@triton.jit
def guess_top_p(x, tail, floor, SIGMAS: tl.constexpr, PIVOTS: tl.constexpr):
    """Coarse keys (lo, hi) around the value up to which the entries of the sample have the mass `tail`; it is above
    floor.

    lo stays below the eighth largest entry of the sample, which knows nothing of greater ones.
    """
    x = tl.maximum(x, 0.0)
    end = tl.minimum((key_of(tl.max(x, 0)) >> _GRAIN) + 1, _HIGHEST)
    lo_out = tl.minimum(key_of(floor) >> _GRAIN, end - 1)
    lo_in = end
    hi_out = lo_out
    hi_in = end
    is_lo = tl.arange(0, 2 * PIVOTS) < PIVOTS
    while (lo_in - lo_out > 1) | (hi_in - hi_out > 1):
        keys, within = pivots_between(lo_out, lo_in, hi_out, hi_in, PIVOTS)
        upper = x[:, None] > coarse_value(keys)[None, :]
        lower = tl.where(upper, 0.0, x[:, None])
        above, below, squares = sum3(upper.to(tl.int32), lower, lower * lower, 0)
        slack = SIGMAS * tl.sqrt(squares)
        is_in = tl.where(is_lo, (above < 8) | (below + slack >= tail), below - slack >= tail)
        outs = tl.sum(outs_of(~(within & is_in), PIVOTS), 0)
        lo_out, lo_in = narrowed(lo_out, lo_in, outs & 0xFFFF, PIVOTS)
        hi_out, hi_in = narrowed(hi_out, hi_in, outs >> 16, PIVOTS)
    return lo_out, tl.where(hi_in == end, _HIGHEST, tl.maximum(hi_in, lo_out + 1))


@triton.jit
def guess_bracket(
    row_ptr, length, k, top_p,
    USE_K: tl.constexpr, USE_P: tl.constexpr, K_FIRST: tl.constexpr, SIGNED: tl.constexpr, SAMPLE: tl.constexpr,
    SIGMAS: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """(lo, hi): all but surely keep(lo) is false and keep(hi) is true.

    The sample's counts and masses estimate the row's, with the standard error of a random sample, of which the bracket
    is SIGMAS wide to either side; rows are taken to sum to 1. Of two filters the one that keeps less decides.
    """
    offs = tl.arange(0, SAMPLE)
    offs = offs // _RUN * (length // (SAMPLE // _RUN)) + offs % _RUN
    x = tl.load(row_ptr + offs, mask=offs < length, other=-float("inf")).to(tl.float32)
    share = SAMPLE / tl.maximum(length, 1).to(tl.float32)  # of the row that is sampled
    low_key: tl.constexpr = _LOWEST if SIGNED else 0  # of -inf, or 0: no threshold is lower
    lo = tl.cast(low_key, tl.int32)
    hi = tl.cast(low_key, tl.int32)
    has_k = k < _NO_LIMIT
    has_p = top_p < 1.0
    if USE_K:  # noqa: SIM102 (one is known to the compiler, the other to the GPU)
        if has_k:
            lo, hi = guess_top_k(x, k.to(tl.float32) * share, low_key, SIGMAS, PIVOTS)
            if K_FIRST:
                hi = tl.cast(
                    _HIGHEST, tl.int32
                )  # top-p is of the top-k's mass, which needs all entries from the k-th on
    if USE_P:  # noqa: SIM102
        if has_p & ~(has_k & K_FIRST):
            tail = 1.0 - top_p
            lo_p, hi_p = guess_top_p(x, tail * share, tail / length.to(tl.float32) * 0.5, SIGMAS, PIVOTS)
            lo = tl.maximum(lo, lo_p)
            hi = tl.maximum(hi, hi_p)
    low_end = -float("inf") if SIGNED else 0.0
    unfiltered = ~has_k & ~has_p
    lower = tl.where(lo == low_key, low_end, coarse_value(lo))
    return tl.where(unfiltered, -float("inf"), lower), tl.where(unfiltered, -float("inf"), coarse_value(hi))


@triton.jit(do_not_specialize=["top_k"])
def guess_kernel(
    brackets_ptr, x_ptr, stride_x, indices_ptr, lengths_ptr, starts_ptr, length, top_k_ptr, top_k, top_p_ptr, top_p,
    INDIRECT: tl.constexpr, WINDOW: tl.constexpr, USE_K: tl.constexpr, USE_P: tl.constexpr, K_FIRST: tl.constexpr,
    SIGNED: tl.constexpr, SAMPLE: tl.constexpr, SIGMAS: tl.constexpr, PIVOTS: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """Step 1, one program for each output: brackets[output] = lo, hi."""
    output = tl.program_id(0)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = row_of_output(indices_ptr, output, INDIRECT)
    row_ptr, length = window_of_row(x_ptr + row * stride_x, length, starts_ptr, lengths_ptr, output, WINDOW)
    k, p = filters_of_row(top_k_ptr, top_k, top_p_ptr, top_p, output, length, USE_K, USE_P)
    lo, hi = guess_bracket(row_ptr, length, k, p, USE_K > 0, USE_P > 0, K_FIRST, SIGNED, SAMPLE, SIGMAS, PIVOTS)
    tl.store(brackets_ptr + output * 2, lo)
    tl.store(brackets_ptr + output * 2 + 1, hi)


def guess(
    brackets: Tensor, rows: tuple[Any, ...], filters: tuple[Any, ...], *, config: SamplingConfig, overlap: bool,
    **constexprs: Any,
) -> None:  # fmt: skip
    """brackets [outputs, 2] of rows (x, stride_x, indices, lengths, starts, length) under filters (top_k_ptr, top_k,
    top_p_ptr, top_p)."""
    guess_kernel[(len(brackets),)](
        brackets, *rows, *filters, **constexprs, SAMPLE=config.sample, SIGMAS=config.sigmas, PIVOTS=config.guess_pivots,
        ENABLE_PDL=overlap, num_warps=config.guess_warps,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Each filter, for rows of both sample sizes."""
    brackets = torch.empty((8, 2), device="meta")
    for length, (use_k, use_p) in ((32000, (1, 1)), (128256, (1, 0)), (128256, (0, 1)), (128256, (2, 2))):
        x, tensor = torch.empty((8, length), device="meta"), torch.empty(8, device="meta")
        rows, filters = (x, length, None, None, None, length), (tensor.int(), 40, tensor, 0.9)
        on = {"USE_K": use_k, "USE_P": use_p, "K_FIRST": bool(use_k and use_p), "SIGNED": not use_p}
        run = {"config": choose_sampling(length), "overlap": False, "INDIRECT": False, "WINDOW": False, **on}
        launch = partial(guess, brackets, rows, filters, **run)
        yield recorded(f"guess vocab={length} k={use_k} p={use_p}", guess_kernel, launch)
