"""The exact threshold of top-k and top-p, reading the row from memory once.

A row short enough is held by one program in registers, which searches in it. Others take three steps (a floating-point
form of Floyd and Rivest's selection, CACM 1975):

1. guess: a sample of the row gives a bracket lo..hi of values that holds the threshold, all but surely.
2. sweep: the row is read; each chunk adds up what lies above hi, and stores the few entries in (lo, hi] in slots.
3. select: these numbers prove the bracket right, and a search among the slots, now held in registers, finds the
   threshold. If the bracket
   was wrong or too full, the row is swept again, by one program, with other brackets, until one is proved.

The threshold is the smallest value x of the row for which keep(x) holds: fewer than k entries are greater than x, and
their mass is less than top_p of the total."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import choose_sampling
from flashtile.kernels.sampling.draw import draw_from_masses, draw_kernel
from flashtile.kernels.sampling.guess import NO_LIMIT, filters_of_row, guess, guess_kernel, key_of, value_of
from flashtile.kernels.sampling.rows import (
    NO_RANDOM,
    Chunks,
    Random,
    after,
    chunks_of,
    draw_token,
    entries,
    fast_log2,
    overlaps,
    row_of_output,
    rows_of,
    share_rows,
    slices,
    sum2,
    sum3,
    sum_sum_min_max,
    uniform,
    window_of_row,
)
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recordings

_NO_LIMIT = tl.constexpr(NO_LIMIT)
_KEY_OF_INF = tl.constexpr(0x7F800000)
# passes of a search before it looks for the threshold itself, and before one pass in three halves what is left
_EARLY = tl.constexpr(3)
_LATE = tl.constexpr(7)


@dataclass(frozen=True)
class Filters:
    """top_k (0: off), top_p (1: off), for each output or one for all; joint: top_p is of the row, not of the top-k."""

    top_k: Tensor | None = None
    top_k_value: int = 0
    top_p: Tensor | None = None
    top_p_value: float = 1.0
    joint: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        """top_k_ptr, top_k, top_p_ptr, top_p."""
        return self.top_k, self.top_k_value, self.top_p, self.top_p_value

    def keywords(self, length: int) -> dict[str, Any]:
        """Constexprs: which filters are on, for rows of this length: 0 off, 1 one value, 2 one per output."""
        use_k = 2 if self.top_k is not None else int(0 < self.top_k_value < length)
        use_p = 2 if self.top_p is not None else int(self.top_p_value < 1)
        return {"USE_K": use_k, "USE_P": use_p, "K_FIRST": bool(use_k and use_p and not self.joint)}

    def part(self, outputs: slice) -> "Filters":
        """The filters of some outputs."""
        return Filters(
            entries(self.top_k, outputs), self.top_k_value, entries(self.top_p, outputs), self.top_p_value, self.joint
        )


@triton.jit
def load_fours(row_ptr, chunk, length, MASS: tl.constexpr, CHUNK: tl.constexpr):
    """Entries of a chunk as [CHUNK / 4, 4], fp32: each four in one thread. Past the row's end: 0; -inf without MASS,
    and then NaN is inf."""
    offs = chunk * CHUNK + tl.arange(0, CHUNK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(row_ptr + offs, mask=offs < length, other=0.0 if MASS else -float("inf")).to(tl.float32)
    return x if MASS else tl.where(x != x, float("inf"), x)


@triton.jit
def sweep_chunk(
    x, chunk, bracket_ptr, slots_ptr, counts_ptr, masses_ptr,
    USE_K: tl.constexpr, MASS: tl.constexpr, NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Store the entries of the chunk x [CHUNK / 4, 4] that lie in (lo, hi] in its slots, if they fit, and its sums.

    counts [2, NUM_CHUNKS] int32: entries in (lo, hi], and above hi (USE_K, otherwise 0). masses [3, NUM_CHUNKS] fp32
    (with MASS): of all entries, of those above hi, and of those above lo. NaN counts as above, and makes the masses
    NaN.

    A row's place among the slots comes from a scan over rows, an entry's place in its row costs no exchange between
    threads: half the instructions of a scan over all entries.
    """
    lo = tl.load(bracket_ptr)
    hi = tl.load(bracket_ptr + 1)
    if MASS:
        total, above_hi, above_lo = sum3(
            tl.sum(x, 1), tl.sum(tl.where(x <= hi, 0.0, x), 1), tl.sum(tl.where(x <= lo, 0.0, x), 1), 0
        )
        tl.store(masses_ptr + chunk, total)
        tl.store(masses_ptr + NUM_CHUNKS + chunk, above_hi)
        tl.store(masses_ptr + 2 * NUM_CHUNKS + chunk, above_lo)
    in_row = tl.sum(((x > lo) & (x <= hi)).to(tl.int32), 1)
    num_above = 0
    if USE_K:
        num_inside, num_above = sum2(in_row, tl.sum(tl.where(x <= hi, 0, 1), 1), 0)
    else:
        num_inside = tl.sum(in_row, 0)
    tl.store(counts_ptr + chunk, num_inside)
    tl.store(counts_ptr + NUM_CHUNKS + chunk, num_above)
    before = tl.cumsum(in_row, 0) - in_row
    # loaded again, so that the comparisons are made again: kept, they would need 32 predicates, and there are 7
    lo = tl.load(bracket_ptr, volatile=True)
    hi = tl.load(bracket_ptr + 1, volatile=True)
    inside = (x > lo) & (x <= hi)
    place = (before - 1)[:, None] + tl.cumsum(inside.to(tl.int32), 1)
    slots_ptr += chunk * SLOTS
    tl.store(slots_ptr + place, x, mask=inside & (before <= SLOTS - 4)[:, None])  # 4 slots are left for padding
    end = num_inside + tl.arange(0, 4)  # slots are read in fours
    tl.store(slots_ptr + end, tl.full([4], -float("inf"), tl.float32), mask=end < SLOTS)


@triton.jit
def sweep_kernel(
    slots_ptr, counts_ptr, masses_ptr, brackets_ptr, x_ptr, stride_x, indices_ptr, lengths_ptr, starts_ptr, length,
    num_chunks, INDIRECT: tl.constexpr, WINDOW: tl.constexpr, USE_K: tl.constexpr, MASS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """Step 2: one program for each chunk of each output. NUM_CHUNKS: num_chunks rounded up to a power of two."""
    output = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    row = row_of_output(indices_ptr, output, INDIRECT)
    row_ptr, length = window_of_row(x_ptr + row * stride_x, length, starts_ptr, lengths_ptr, output, WINDOW)
    x = load_fours(row_ptr, chunk, length, MASS, CHUNK)  # in flight while the guess is made
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = output.to(tl.int64) * NUM_CHUNKS
    sweep_chunk(
        x, chunk, brackets_ptr + output * 2, slots_ptr + place * SLOTS, counts_ptr + 2 * place, masses_ptr + 3 * place,
        USE_K, MASS, NUM_CHUNKS, SLOTS,
    )  # fmt: skip


@triton.jit
def tile_of_slots(
    slots_ptr, extent, begin, MASS: tl.constexpr, NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The entries in slots begin .. begin + WIDTH of all chunks [NUM_CHUNKS, WIDTH / 4, 4], fp32. Past their extent
    [NUM_CHUNKS]: 0 or -inf. Slots are padded to fours with -inf, so that a mask of fours will do, and loads are 16
    bytes wide."""
    chunk = tl.arange(0, NUM_CHUNKS)[:, None, None]
    four = begin + 4 * tl.arange(0, WIDTH // 4)[None, :, None]
    slot = four + tl.arange(0, 4)[None, None, :]
    x = tl.load(slots_ptr + chunk * SLOTS + slot, mask=four < extent[:, None, None], other=-float("inf"))
    return tl.maximum(x, 0.0) if MASS else x


@triton.jit
def tile_of_row(row_ptr, length, MASS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """All chunks of a row [NUM_CHUNKS, CHUNK / 4, 4], fp32. Past its end: -inf. With MASS, negative entries are 0;
    without, NaN is inf."""
    chunk = tl.arange(0, NUM_CHUNKS)[:, None, None]
    offs = chunk * CHUNK + 4 * tl.arange(0, CHUNK // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    x = tl.load(row_ptr + offs, mask=offs < length, other=-float("inf")).to(tl.float32)
    return tl.where(x < 0, 0.0, x) if MASS else tl.where(x != x, float("inf"), x)


@triton.jit
def look_around(x, pivot, MASS: tl.constexpr):
    """Of the entries of a tile that are above the value of a key: count (fp32) and mass (0 without MASS), NaN included;
    and how far from that key those of the next entry above and of the next not above are: 2**31 or more if there is
    none.

    With MASS entries are not negative. Then six instructions will do for each: a comparison that gives 1.0 or 0.0, an
    addition, a multiply-add, and a subtraction, which wraps around below the key, a minimum and a maximum.
    """
    value = value_of(pivot)
    above = tl.where(x <= value, 0.0, 1.0)
    if MASS:
        distance = x.to(tl.uint32, bitcast=True) - (pivot + 1).to(tl.uint32)
        count, mass, least, most = sum_sum_min_max(above, x * above, distance, distance)
        return count, mass, least.to(tl.int64) + 1, 0xFFFFFFFF - most.to(tl.int64)
    else:
        nearest_above = tl.where(x > value, x, float("inf"))
        nearest_below = tl.where(x <= value, x, -float("inf"))
        count, mass, up, down = sum_sum_min_max(above, tl.zeros_like(above), nearest_above, nearest_below)
        return count, mass, key_of(up).to(tl.int64) - pivot, pivot - key_of(down).to(tl.int64)


@triton.jit
def sums_above(x, pivot, MASS: tl.constexpr):
    """The first two results of `look_around`, in half the instructions; NaN is not above. (A comparison of its own:
    shared with that of `look_around`, it would be made once before the branch, and spilled.)"""
    above = tl.where(x > value_of(pivot), 1.0, 0.0)
    return sum2(above, x * above if MASS else tl.zeros_like(above), None)


@triton.jit
def mass_of_chunks_above(x, pivot):
    """The mass of each chunk of a tile [NUM_CHUNKS] that is above pivot, NaN included."""
    return tl.sum(tl.sum(tl.where(x <= pivot, 0.0, x), 2), 1)


@triton.jit
def least_above(x, value):
    """The smallest entry of a tile that is above a value; inf if none is."""
    return tl.min(tl.where(x > value, x, float("inf")))


@triton.jit
def survey(x, lo, USE_K: tl.constexpr, MASS: tl.constexpr):
    """Of a tile: how many entries are above lo, NaN included, the mass, the smallest entry above lo, the largest. For
    counts that do not matter (not USE_K) the first is 0, and the third the smallest of all entries."""
    mass = x if MASS else tl.zeros_like(x)
    if USE_K:
        return sum_sum_min_max(tl.where(x <= lo, 0.0, 1.0), mass, tl.where(x > lo, x, float("inf")), x)
    else:
        return sum_sum_min_max(tl.zeros_like(x), mass, x, x)


@triton.jit
def log_odds(mass, total):
    """log2 of the ratio of a mass to what is missing to the total: at least what fp32 resolves."""
    return fast_log2(mass) - fast_log2(tl.maximum(total - mass, 6e-8 * total))


@triton.jit
def part_below(wanted, at_in, at_out, lean):
    """Where `wanted` lies between at_in (0) and at_out (1); lean < 1 moves it away from at_in, lean > 1 towards it."""
    after_in = tl.maximum(wanted - at_in, 0.0)
    before_out = tl.maximum(at_out - wanted, 0.0) * lean
    return after_in / tl.maximum(after_in + before_out, 1e-30)


@triton.jit
def search_tile(
    x, slots_ptr, extent, end, out_key, in_key, num_out, num_in, mass_in, k, enough, total,
    MASS: tl.constexpr, WHOLE: tl.constexpr, NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The largest key found at which keep does not hold: that of a value just below the threshold, or of an equal of
    entries below it.

    x: the candidates, held in registers; those in slots from WIDTH on (not WHOLE), if any, are read in every pass.
    keep(v): fewer than k entries are above v, of a mass below enough, a share of total. It holds at in_key, the key of
    the largest candidate, above which lie num_in entries of mass mass_in. It does not hold at out_key, above which
    there are no more than about num_out: a guess, that only places the first pivot.

    A pivot lies where the threshold would if the logarithm of the count, and that of the odds of the mass, rose evenly
    from in_key to out_key; and a little further from the end that moved last, lest the other one stay (as in the
    Illinois form of regula falsi). The first passes only sum, which takes half the time. Others move one end not to the
    pivot, but to the entry next to it, and settle whether that is the threshold: close to it, any pivot will do, and
    equal entries take one pass. Simulated over rows of 32000 of four kinds: 3 to 6 passes on average, 9 in one row of
    100, 10 at most.
    """
    REST: tl.constexpr = max(WIDTH // 4, 4)  # slots read together: registers are scarce
    num_above = num_in
    mass_above = mass_in
    rank = fast_log2(k - 0.5)
    rank_in = fast_log2(num_in + 0.5)
    rank_out = fast_log2(num_out + 0.5)
    if MASS:
        odds = log_odds(tl.minimum(enough, total), total)
        odds_in = log_odds(tl.maximum(mass_in, 0.5 * value_of(in_key)), total)
        odds_out = log_odds(total - 0.25 * tl.maximum(total - enough, 0.0), total)
    lean = 1.0
    tries = 0
    while (in_key - out_key > 1) & (num_out - num_in > 1):  # a single entry between them is the threshold
        part = part_below(rank, rank_in, rank_out, lean)
        if MASS:
            part = tl.minimum(part, part_below(odds, odds_in, odds_out, lean))
        part = tl.where((tries >= _LATE) & (tries % 3 == 0), 0.5, part)
        pivot = in_key - ((in_key - out_key).to(tl.float32) * part).to(tl.int64)
        pivot = tl.minimum(tl.maximum(pivot, out_key + 1), in_key - 1)
        settles = tries >= _EARLY
        if settles:
            count, mass, ahead, behind = look_around(x, pivot, MASS)
        else:
            count, mass = sums_above(x, pivot, MASS)
            ahead = tl.cast(1, tl.int64)
            behind = tl.cast(0, tl.int64)
        if not WHOLE:
            for begin in range(WIDTH, end, REST):
                more = tile_of_slots(slots_ptr, extent, begin, MASS, NUM_CHUNKS, SLOTS, REST)
                count_of_more, mass_of_more, ahead_of_more, behind_of_more = look_around(more, pivot, MASS)
                count += count_of_more
                mass += mass_of_more
                ahead = tl.minimum(ahead, ahead_of_more)
                behind = tl.minimum(behind, behind_of_more)
        count += num_above
        mass += mass_above
        keep = (count < k) & (mass < enough)
        # the entry beside the pivot, towards the threshold; and whether keep changes if one such entry does
        beside = tl.where(keep, tl.maximum(pivot - behind, out_key + 1), tl.minimum(pivot + ahead, in_key))
        one = tl.where(keep, 1.0, -1.0)
        found = settles & (keep != ((count + one < k) & (mass + one * value_of(beside) < enough)))
        in_key = tl.where(keep | found, beside, in_key)
        out_key = tl.where(keep & ~found, out_key, beside - 1)
        num_in = tl.where(keep, count, num_in)
        num_out = tl.where(keep, num_out, count)
        rank_here = fast_log2(count + 0.5)
        rank_in = tl.where(keep, rank_here, rank_in)
        rank_out = tl.where(keep, rank_out, rank_here)
        if MASS:
            odds_here = log_odds(mass, total)
            odds_in = tl.where(keep, odds_here, odds_in)
            odds_out = tl.where(keep, odds_out, odds_here)
        lean = tl.where(keep, tl.minimum(lean, 1.0) * 0.9, tl.maximum(lean, 1.0) / 0.9)
        tries += 1
    return out_key


@triton.jit
def sums_of_row(
    row, length, num_chunks, counts_ptr, masses_ptr, bottom, USE_K: tl.constexpr, MASS: tl.constexpr,
    WHOLE: tl.constexpr, NUM_CHUNKS: tl.constexpr,
):  # fmt: skip
    """(entries inside of each chunk [NUM_CHUNKS], all of them, entries above; and masses [NUM_CHUNKS]: of all, above
    hi, above lo): what the sweep stored.

    WHOLE: of the row itself, all of which is inside, lo being bottom, and hi inf; its whole mass counts as that of the
    first chunk. Without USE_K, all entries count as inside.
    """
    chunk = tl.arange(0, NUM_CHUNKS)
    none = tl.zeros([NUM_CHUNKS], tl.float32)
    if WHOLE:
        count, mass, _, _ = survey(row, bottom, USE_K, MASS)
        total = tl.where(chunk == 0, mass, 0.0)
        return none.to(tl.int32), count.to(tl.int32) if USE_K else length, tl.cast(0, tl.int32), total, none, total
    else:
        mask = chunk < num_chunks
        inside = tl.load(counts_ptr + chunk, mask=mask, other=0)
        num_inside, num_above = sum2(inside, tl.load(counts_ptr + NUM_CHUNKS + chunk, mask=mask, other=0), 0)
        if MASS:
            total = tl.load(masses_ptr + chunk, mask=mask, other=0.0)
            above_hi = tl.load(masses_ptr + NUM_CHUNKS + chunk, mask=mask, other=0.0)
            above_lo = tl.load(masses_ptr + 2 * NUM_CHUNKS + chunk, mask=mask, other=0.0)
            return inside, num_inside, num_above, total, above_hi, above_lo
        else:
            return inside, num_inside, num_above, none, none, none


@triton.jit
def settle(
    row, row_ptr, length, num_chunks, bracket_ptr, slots_ptr, counts_ptr, masses_ptr, lo, hi, k, enough, floor, most,
    mass_from_floor, bottom, USE_K: tl.constexpr, USE_P: tl.constexpr, MASS: tl.constexpr, EXACT: tl.constexpr,
    WHOLE: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Step 3 for keep(x): fewer than k entries are above x, of a mass below enough.

    Returns a value that the entries kept are not below, and all others are (EXACT: the smallest entry kept), `bottom`
    if all are kept; the mass kept [NUM_CHUNKS]; and the bracket proved. floor: no lower value is the threshold; from
    it on there are about `most` entries, of mass mass_from_floor. WHOLE: the candidates are the row itself, held in
    registers, the bracket bottom..inf.
    """
    REST: tl.constexpr = max(WIDTH // 4, 4)  # slots read together: registers are scarce
    inside, num_inside, num_above, total, above_hi, above_lo = sums_of_row(
        row, length, num_chunks, counts_ptr, masses_ptr, bottom, USE_K, MASS, WHOLE, NUM_CHUNKS
    )
    unfiltered = (k == _NO_LIMIT) & (enough == float("inf"))
    keeps_lo = (num_above + num_inside < k) & (tl.sum(above_lo) < enough)
    keeps_all = keeps_lo & ((lo <= bottom) | unfiltered)
    if MASS:
        keeps_all = keeps_all | ~(tl.sum(total) < float("inf"))  # NaN or inf: no distribution, and nothing to find
    if not WHOLE:
        keeps_hi = ((num_above < k) & (tl.sum(above_hi) < enough)) | (hi == float("inf"))
        known_out = key_of(bottom).to(tl.int64)
        known_in = tl.cast(_KEY_OF_INF, tl.int64)
        step = tl.cast(1 << 20, tl.int64)  # an eighth of an octave
        out_key = key_of(lo).to(tl.int64)
        in_key = key_of(hi).to(tl.int64)
        full = tl.max(inside) > SLOTS - 4
        while ~(keeps_all | (~keeps_lo & keeps_hi & (~full | (in_key - out_key == 1)))):
            known_out = tl.where(~keeps_hi, in_key, tl.where(keeps_lo, known_out, out_key))
            known_in = tl.where(~keeps_hi, known_in, tl.where(keeps_lo, out_key, in_key))
            middle = tl.where(full & keeps_hi & ~keeps_lo, (out_key + in_key) >> 1, known_in)
            new_out = tl.where(keeps_hi & keeps_lo, tl.maximum(known_in - step, known_out), known_out)
            in_key = tl.where(~keeps_hi, tl.minimum(known_out + step, known_in), middle)
            out_key = new_out
            step = tl.minimum(step * 8, 1 << 31)
            lo = value_of(out_key)
            hi = value_of(in_key)
            tl.debug_barrier()  # all have read what is overwritten now
            tl.store(bracket_ptr, lo)
            tl.store(bracket_ptr + 1, hi)
            tl.debug_barrier()
            for chunk in range(num_chunks):
                x = load_fours(row_ptr, chunk, length, MASS, CHUNK)
                sweep_chunk(x, chunk, bracket_ptr, slots_ptr, counts_ptr, masses_ptr, USE_K, MASS, NUM_CHUNKS, SLOTS)
            tl.debug_barrier()
            inside, num_inside, num_above, total, above_hi, above_lo = sums_of_row(
                row, length, num_chunks, counts_ptr, masses_ptr, bottom, USE_K, MASS, WHOLE, NUM_CHUNKS
            )
            keeps_lo = (num_above + num_inside < k) & (tl.sum(above_lo) < enough)
            keeps_hi = ((num_above < k) & (tl.sum(above_hi) < enough)) | (hi == float("inf"))
            keeps_all = keeps_lo & (lo <= bottom)
            full = tl.max(inside) > SLOTS - 4
    else:
        full = False
    if keeps_all:
        threshold = tl.cast(bottom, tl.float32)
        kept = mass_of_chunks_above(row, bottom) if WHOLE and MASS else total
    elif full:  # many entries equal to hi
        threshold = hi
        kept = above_lo
    else:
        end = tl.max(inside)
        x = row if WHOLE else tile_of_slots(slots_ptr, inside, 0, MASS, NUM_CHUNKS, SLOTS, WIDTH)
        _, _, least, largest = survey(x, lo, USE_K, MASS)
        if not WHOLE:
            for begin in range(WIDTH, end, REST):
                more = tile_of_slots(slots_ptr, inside, begin, MASS, NUM_CHUNKS, SLOTS, REST)
                largest = tl.maximum(largest, tl.max(more))
                least = tl.minimum(least, least_above(more, lo))
        out = tl.maximum(key_of(lo).to(tl.int64), tl.maximum(key_of(least), key_of(floor)).to(tl.int64) - 1)
        if WHOLE and MASS:  # entries up to half the mean of the mass left out have at most half of that mass
            share = 0.5 * (tl.sum(total) - enough) / tl.maximum(length, 1).to(tl.float32)
            out = tl.maximum(out, key_of(tl.maximum(share, 0.0)).to(tl.int64))
        out = search_tile(
            x, slots_ptr, inside, end, out, key_of(largest).to(tl.int64),
            tl.minimum(num_inside + num_above, most) * 1.0, num_above * 1.0, tl.sum(above_hi), k, enough,
            mass_from_floor, USE_P, WHOLE, NUM_CHUNKS, SLOTS, WIDTH,
        )  # fmt: skip
        threshold = value_of(out + 1)
        kept = above_hi
        if MASS:
            kept += mass_of_chunks_above(x, value_of(out))
        if EXACT:
            threshold = least_above(x, value_of(out))
        if not WHOLE:
            for begin in range(WIDTH, end, REST):
                more = tile_of_slots(slots_ptr, inside, begin, MASS, NUM_CHUNKS, SLOTS, REST)
                if MASS:
                    kept += mass_of_chunks_above(more, value_of(out))
                if EXACT:
                    threshold = tl.minimum(threshold, least_above(more, value_of(out)))
    return threshold, kept, lo, hi


@triton.jit(do_not_specialize=["top_k", "seed", "offset", "first_output"])
def select_kernel(
    ids_ptr, valid_ptr, thresholds_ptr, kept_ptr, slots_ptr, counts_ptr, masses_ptr, brackets_ptr,
    x_ptr, stride_x, indices_ptr, lengths_ptr, starts_ptr, length, num_chunks,
    top_k_ptr, top_k, top_p_ptr, top_p, seed_ptr, seed, offset_ptr, offset, first_output,
    INDIRECT: tl.constexpr, WINDOW: tl.constexpr, USE_K: tl.constexpr, USE_P: tl.constexpr, K_FIRST: tl.constexpr,
    SIGNED: tl.constexpr, MASS: tl.constexpr, EXACT: tl.constexpr, DRAW: tl.constexpr, SEEDS: tl.constexpr,
    OFFSETS: tl.constexpr, WHOLE: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """Step 3, one program for each output: with DRAW a token, otherwise the threshold and (with MASS) what chunks keep.

    WHOLE: it holds the row in registers, and is the only step.
    """
    output = tl.program_id(0)
    row = row_of_output(indices_ptr, output, INDIRECT)
    row_ptr, length = window_of_row(x_ptr + row * stride_x, length, starts_ptr, lengths_ptr, output, WINDOW)
    k, p = filters_of_row(top_k_ptr, top_k, top_p_ptr, top_p, output, length, USE_K, USE_P)
    if DRAW:
        u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, 0, SEEDS, OFFSETS)
    bottom = tl.cast(-float("inf") if SIGNED else 0.0, tl.float32)
    if WHOLE:
        row_tile = tile_of_row(row_ptr, length, MASS, NUM_CHUNKS, CHUNK)
        bracket_ptr = brackets_ptr
        lo = bottom
        hi = tl.cast(float("inf"), tl.float32)
    else:
        place = output.to(tl.int64) * NUM_CHUNKS
        slots_ptr += place * SLOTS
        counts_ptr += 2 * place
        masses_ptr += 3 * place
        if ENABLE_PDL:
            tl.extra.cuda.gdc_wait()
        bracket_ptr = brackets_ptr + output * 2
        lo = tl.load(bracket_ptr)
        hi = tl.load(bracket_ptr + 1)
        row_tile = None
    kept = sums_of_row(
        row_tile, length, num_chunks, counts_ptr, masses_ptr, bottom, USE_K > 0, MASS, WHOLE, NUM_CHUNKS
    )[3]  # fmt: skip
    threshold = bottom
    for phase in range(tl.where(p < 1.0, 2, 1) if K_FIRST else 1):
        enough = share_of(p, kept) if USE_P else tl.cast(float("inf"), tl.float32)
        most = tl.cast(_NO_LIMIT, tl.int32)
        if K_FIRST:  # first the top-k, of whose mass the second phase wants its share
            enough = tl.where(phase == 0, float("inf"), enough)
            most = tl.where(phase == 0, most, k)
        threshold, kept, lo, hi = settle(
            row_tile, row_ptr, length, num_chunks, bracket_ptr, slots_ptr, counts_ptr, masses_ptr, lo, hi, k, enough,
            threshold, most, tl.sum(kept), bottom, USE_K > 0, USE_P > 0, MASS, EXACT, WHOLE, NUM_CHUNKS, CHUNK, SLOTS,
            WIDTH,
        )  # fmt: skip
    if DRAW:
        token, good = draw_token(row_ptr, length, kept, threshold, u, NUM_CHUNKS, CHUNK)
        tl.store(ids_ptr + output, token)
        tl.store(valid_ptr + output, good)
    else:
        tl.store(thresholds_ptr + output, threshold)
        if MASS:
            tl.store(kept_ptr + output.to(tl.int64) * NUM_CHUNKS + tl.arange(0, NUM_CHUNKS), kept)


@triton.jit
def share_of(p, masses):
    """The mass that greater entries must stay below: p of the sum of masses [NUM_CHUNKS]; above 0, so that the largest
    entry is always kept; inf for p = inf, a filter that is off."""
    total = tl.sum(masses.to(tl.float64), 0)
    return tl.where(p < 1.0, tl.maximum((p.to(tl.float64) * total).to(tl.float32), 1.2e-38), float("inf"))


def sample(
    ids: Tensor, valid: Tensor, probs: Tensor, indices: Tensor | None, filters: Filters, random: Random,
    chunks: Chunks, pdl: bool | None,
) -> None:  # fmt: skip
    """A token for each output, from its row of probs under filters."""
    if share_rows(probs, indices, filters.top_k, filters.top_p):
        from_value, kept = thresholds(probs, filters, chunks, signed=False, mass=True, pdl=pdl)
        draw_from_masses(ids, valid, probs, indices, kept, from_value, random, chunks, True, pdl)
        return
    search = Search(chunks, signed=False, mass=True, pdl=pdl)
    for part in _search_slices(len(ids), chunks):
        x, rows = rows_of(probs, indices, part)
        outputs = (ids[part], valid[part], None, None)
        _search(x, part, filters.part(part), outputs, search, random=random.part(part), indices=rows)


def thresholds(
    x: Tensor, filters: Filters, chunks: Chunks, *, signed: bool, mass: bool, exact: bool = False,
    starts: Tensor | None = None, lengths: Tensor | None = None, pdl: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The thresholds [rows] of x, and (mass) the mass that each chunk keeps [rows, NUM_CHUNKS].

    signed: entries may be negative. exact: the threshold is an entry, not a value just below it. starts, lengths:
    [rows], the entries that count.
    """
    from_value = x.new_empty(len(x), dtype=torch.float32)
    kept = x.new_empty((len(x), chunks.padded if mass else 0), dtype=torch.float32)
    search = Search(chunks, signed, mass, exact, pdl)
    for part in _search_slices(len(x), chunks):
        outputs = (None, None, from_value[part], kept[part])
        windows = {"starts": entries(starts, part), "lengths": entries(lengths, part)}
        _search(x[part], part, filters.part(part), outputs, search, **windows)
    return from_value, kept


def _search_slices(num_outputs: int, chunks: Chunks) -> Iterator[slice]:
    """Runs of outputs to search for at once."""
    return slices(num_outputs, chunks.padded * (chunks.config.slots + 8) * 4 if not chunks.whole else 4)


@dataclass(frozen=True)
class Search:
    """What is searched for, and in what: see `thresholds`."""

    chunks: Chunks
    signed: bool
    mass: bool
    exact: bool = False
    pdl: bool | None = None


def _search(
    x: Tensor, part: slice, filters: Filters, outputs: tuple[Tensor | None, ...], search: Search, *,
    random: Random | None = None, indices: Tensor | None = None, starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:  # fmt: skip
    """The three steps, for one slice of outputs; rows that one program holds need only the last."""
    chunks, overlap, count = search.chunks, overlaps(x, search.pdl), part.stop - part.start
    config = chunks.config
    on = filters.keywords(x.shape[1]) | {"SIGNED": search.signed}
    rows = x, x.stride(0), indices, lengths, starts, chunks.length
    where = {"INDIRECT": indices is not None, "WINDOW": starts is not None or lengths is not None}
    work: tuple[Tensor | None, ...] = (None,) * 4
    if not chunks.whole:
        work = slots, counts, masses, brackets = _workspace(x, count, chunks)
        guess(brackets, rows, filters.arguments, config=config, overlap=overlap, **where, **on)
        sweep_kernel[(count * chunks.count,)](
            slots, counts, masses, brackets, *rows, chunks.count,
            **where, USE_K=on["USE_K"] > 0, MASS=search.mass, SLOTS=config.slots, **chunks.keywords, **after(overlap),
            num_warps=config.sweep_warps,
        )  # fmt: skip
    state = random or NO_RANDOM
    select_kernel[(count,)](
        *outputs, *work, *rows, chunks.count, *filters.arguments, *state.arguments,
        **where, **on, MASS=search.mass, EXACT=search.exact, DRAW=random is not None, WHOLE=chunks.whole,
        SLOTS=config.slots, WIDTH=max(config.slot_tile // chunks.padded, 4), **state.keywords, **chunks.keywords,
        **after(overlap, not chunks.whole), **chunks.select_options,
    )  # fmt: skip


def _workspace(x: Tensor, num_outputs: int, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots, counts, masses (see `sweep_chunk`) and brackets."""
    shape = num_outputs, chunks.padded
    slots, masses = (x.new_empty((*shape, n), dtype=torch.float32) for n in (chunks.config.slots, 3))
    return (
        slots,
        x.new_empty((*shape, 2), dtype=torch.int32),
        masses,
        x.new_empty((num_outputs, 2), dtype=torch.float32),
    )


KERNELS = guess_kernel, sweep_kernel, select_kernel, draw_kernel  # of a search, and of draws that share it


def compile_cases() -> Iterator[CompileCase]:
    """Each filter, for vocabularies of one chunk, of Llama-2, of GPT-2 and of Llama-3, with overlap and without."""
    ids = torch.empty(8, dtype=torch.int32, device="meta")
    out, state = (ids, ids.bool()), Random(None, 2**40, None, 0)
    kinds = {
        "top_p": Filters(top_p_value=0.9),
        "first": Filters(None, 40, None, 0.9),
        "joint": Filters(None, 40, None, 0.9, True),
    }
    for length, sms in ((1000, (80, 90)), (32000, (80, 80)), (32000, (90, 90)), (50257, (80, 90)), (128256, (90, 90))):
        probs, config = torch.empty((8, length), device="meta"), choose_sampling(length, (sms[0] // 10, 0))
        chunks, pdl = chunks_of(length, config, probs.device), sms == (90, 90)
        for kind, filters in kinds.items():
            launch = partial(sample, *out, probs, None, filters, state, chunks, pdl)
            yield from _recordings(f"{kind} vocab={length}", launch, *sms)
    rows = torch.empty((8, 32000), dtype=torch.bfloat16, device="meta")
    for mass in (False, True):
        launch = partial(
            thresholds,
            rows,
            Filters(None, 40),
            chunks_of(32000, None, rows.device),
            signed=not mass,
            mass=mass,
            exact=True,
            pdl=False,
        )
        yield from _recordings(f"thresholds of whole rows bf16 mass={mass}", launch, 90)
    probs, tensors = probs.bfloat16(), Filters(ids, 0, ids.float(), 1.0)
    state = Random(ids.long(), 0, ids.long(), 0)
    yield from _recordings("tensors bf16", partial(sample, *out, probs, ids, tensors, state, chunks, False))
    for mass in (False, True):
        launch = partial(thresholds, probs, Filters(None, 40), chunks, signed=not mass, mass=mass, pdl=False)
        yield from _recordings(f"thresholds bf16 mass={mass}", launch)
    windows = {"starts": ids, "lengths": ids}
    launch = partial(thresholds, probs, Filters(None, 40), chunks, signed=True, mass=False, pdl=False, **windows)
    yield from _recordings("thresholds of windows bf16", launch)


def _recordings(name: str, launch: Any, first: int = 80, last: int = 90) -> list[CompileCase]:
    sms = {"min_capability": first, "max_capability": last}
    cases = recordings(lambda kernel: f"{kernel.__name__} {name}", KERNELS, launch, **sms)
    return [case for case in cases if case.kernel in (sweep_kernel, select_kernel)]  # the others have their own
