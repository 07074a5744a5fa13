"""The exact threshold of top-k and top-p, reading the row from memory once.

Three steps (a floating-point form of Floyd and Rivest's selection, CACM 1975):

1. guess: a sample of the row gives a bracket lo..hi of values that holds the threshold, all but surely.
2. sweep: the row is read; each chunk adds up what lies above hi, and stores the few entries in (lo, hi] in slots.
3. select: these numbers prove the bracket right, and bisection over the slots finds the threshold. If the bracket was wrong
   or too full, the row is swept again, by one program, with other brackets, until one is proved.

The threshold is the smallest value x of the row for which keep(x) holds: fewer than k entries are greater than x, and
their mass is less than top_p of the total."""

import triton
import triton.language as tl

from flashtile.kernels.sampling.rows import (
    draw_token,
    load_chunk,
    row_of_output,
    row_value,
    sum2,
    sum3,
    uniform,
    window_of_row,
)

SLOTS = 1024  # per chunk of 4096: brackets of k or of mass cover some 5 % of a flat distribution, 9 % at worst
RUN = 8  # consecutive entries of the sample: a 32-byte sector
SIGMAS = 4.0  # width of the bracket; a row in 10,000 is swept twice
SLOT_TILE = 2048  # slots looked at together: 8 per thread of 8 warps
NO_LIMIT = 2**31 - 1  # top_k that is off

_RUN = tl.constexpr(RUN)
_SIGMAS = tl.constexpr(SIGMAS)
_NO_LIMIT = tl.constexpr(NO_LIMIT)
_KEY_OF_INF = tl.constexpr(0x7F800000)


def sample_size(length: int) -> int:
    """Entries to sample from rows of `length`: with their number the guess gets slower, and the bracket narrower."""
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


@triton.jit
def sweep_chunk(
    x, chunk, lo, hi, slots_ptr, counts_ptr, masses_ptr,
    MASS: tl.constexpr, NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Store the entries of the chunk x [CHUNK] that lie in (lo, hi] in its slots, as many as fit, and its sums.

    counts [2, NUM_CHUNKS] int32: entries in (lo, hi], and above hi. masses [3, NUM_CHUNKS] fp32 (with MASS): of all
    entries, of those above hi, and of those above lo. NaN counts as above, and makes the masses NaN.
    """
    above = (x > hi) | (x != x)
    inside = (x > lo) & (x <= hi)
    place = tl.cumsum(inside.to(tl.int32), 0) - 1
    tl.store(slots_ptr + chunk * SLOTS + place, x, mask=inside & (place < SLOTS))
    num_inside, num_above = sum2(inside.to(tl.int32), above.to(tl.int32), 0)
    tl.store(counts_ptr + chunk, num_inside)
    tl.store(counts_ptr + NUM_CHUNKS + chunk, num_above)
    if MASS:
        mass = tl.where(x < 0, 0.0, x)
        total, above_hi, above_lo = sum3(
            mass, tl.where(above, mass, 0.0), tl.where(above | inside, mass, 0.0), 0
        )
        tl.store(masses_ptr + chunk, total)
        tl.store(masses_ptr + NUM_CHUNKS + chunk, above_hi)
        tl.store(masses_ptr + 2 * NUM_CHUNKS + chunk, above_lo)


@triton.jit
def sweep_kernel(
    slots_ptr, counts_ptr, masses_ptr, brackets_ptr, x_ptr, stride_x, indices_ptr, lengths_ptr, starts_ptr, length,
    num_chunks, INDIRECT: tl.constexpr, WINDOW: tl.constexpr, MASS: tl.constexpr, NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """Step 2: one program for each chunk of each output. NUM_CHUNKS: num_chunks rounded up to a power of two."""
    output = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    row = row_of_output(indices_ptr, output, INDIRECT)
    row_ptr, length = window_of_row(x_ptr + row * stride_x, length, starts_ptr, lengths_ptr, output, WINDOW)
    x = load_chunk(row_ptr, chunk, length, CHUNK)  # in flight while the guess is made
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    lo = tl.load(brackets_ptr + output * 2)
    hi = tl.load(brackets_ptr + output * 2 + 1)
    place = output.to(tl.int64) * NUM_CHUNKS
    sweep_chunk(
        x, chunk, lo, hi, slots_ptr + place * SLOTS, counts_ptr + 2 * place, masses_ptr + 3 * place,
        MASS, NUM_CHUNKS, SLOTS,
    )  # fmt: skip


@triton.jit
def slots_from(slots_ptr, extent, begin, NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """The next entries in slots [NUM_CHUNKS, WIDTH] of all chunks, fp32; -inf past a chunk's extent [NUM_CHUNKS]."""
    chunk = tl.arange(0, NUM_CHUNKS)[:, None]
    slot = begin + tl.arange(0, WIDTH)[None, :]
    mask = slot < extent[:, None]
    return tl.load(slots_ptr + chunk * SLOTS + slot, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def slots_above(
    slots_ptr, extent, pivot, MASS: tl.constexpr, NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Count and mass (0 without MASS) of the entries in slots that are above pivot."""
    count = tl.zeros([NUM_CHUNKS, WIDTH], tl.int32)
    mass = tl.zeros([NUM_CHUNKS, WIDTH], tl.float32)
    for begin in range(0, tl.max(extent), WIDTH):
        x = slots_from(slots_ptr, extent, begin, NUM_CHUNKS, SLOTS, WIDTH)
        above = (x > pivot) | (x != x)
        count += above.to(tl.int32)
        if MASS:
            mass += tl.where(above, x, 0.0)
    if MASS:
        return sum2(count, mass, None)
    else:
        return tl.sum(count), 0.0


@triton.jit
def slots_not_below(slots_ptr, extent, value, NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """Counts and masses, for each chunk [NUM_CHUNKS], of the entries in slots that are at least value."""
    count = tl.zeros([NUM_CHUNKS, WIDTH], tl.int32)
    mass = tl.zeros([NUM_CHUNKS, WIDTH], tl.float32)
    for begin in range(0, tl.max(extent), WIDTH):
        x = slots_from(slots_ptr, extent, begin, NUM_CHUNKS, SLOTS, WIDTH)
        count += (x >= value).to(tl.int32)
        mass += tl.where(x >= value, x, 0.0)
    return sum2(count, mass, 1)


@triton.jit
def bisect_slots(
    slots_ptr, extent, out_key, num_out, hi, k, mass_above, enough, MASS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The smallest entry in slots, up to hi, that fewer than k of them exceed, whose mass together with mass_above is below
    enough. out_key is the key of a lower value; num_out entries in slots are above it, or some more."""
    largest = tl.full([NUM_CHUNKS, WIDTH], -float("inf"), tl.float32)
    for begin in range(0, tl.max(extent), WIDTH):
        largest = tl.maximum(largest, slots_from(slots_ptr, extent, begin, NUM_CHUNKS, SLOTS, WIDTH))
    in_key = tl.minimum(key_of(tl.max(largest)), key_of(hi)).to(tl.int64)
    num_in = 0  # entries in slots above in_key
    while (in_key - out_key > 1) & (num_out - num_in > 1):  # a single entry between them is the threshold
        middle = (out_key + in_key) >> 1
        count, mass = slots_above(slots_ptr, extent, value_of(middle), MASS, NUM_CHUNKS, SLOTS, WIDTH)
        keep = (count < k) & (mass_above + mass < enough)
        in_key = tl.where(keep, middle, in_key)
        num_in = tl.where(keep, count, num_in)
        out_key = tl.where(keep, out_key, middle)
        num_out = tl.where(keep, num_out, count)
    smallest = tl.full([NUM_CHUNKS, WIDTH], float("inf"), tl.float32)
    for begin in range(0, tl.max(extent), WIDTH):
        x = slots_from(slots_ptr, extent, begin, NUM_CHUNKS, SLOTS, WIDTH)
        smallest = tl.where(x > value_of(out_key), tl.minimum(smallest, x), smallest)
    return tl.min(smallest)


@triton.jit
def sums_of_row(
    x_ptr, length, num_chunks, counts_ptr, masses_ptr, bottom, MASS: tl.constexpr, WHOLE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(entries inside, entries above, mass, mass above hi, mass above lo), each [NUM_CHUNKS]: what the sweep stored; with
    WHOLE, of the row itself, with lo = bottom and hi = inf."""
    none = tl.zeros([NUM_CHUNKS], tl.float32)
    if WHOLE:
        x = load_chunk(x_ptr, 0, length, CHUNK)
        inside = tl.zeros([NUM_CHUNKS], tl.int32) + tl.sum(((x > bottom) | (x != x)).to(tl.int32), 0)
        total = none + tl.sum(tl.where(x < 0, 0.0, x), 0) if MASS else none
        return inside, tl.zeros([NUM_CHUNKS], tl.int32), total, none, total
    else:
        chunk = tl.arange(0, NUM_CHUNKS)
        mask = chunk < num_chunks
        inside = tl.load(counts_ptr + chunk, mask=mask, other=0)
        above = tl.load(counts_ptr + NUM_CHUNKS + chunk, mask=mask, other=0)
        if MASS:
            total = tl.load(masses_ptr + chunk, mask=mask, other=0.0)
            above_hi = tl.load(masses_ptr + NUM_CHUNKS + chunk, mask=mask, other=0.0)
            above_lo = tl.load(masses_ptr + 2 * NUM_CHUNKS + chunk, mask=mask, other=0.0)
            return inside, above, total, above_hi, above_lo
        else:
            return inside, above, none, none, none


@triton.jit
def settle(
    row_ptr, length, num_chunks, slots_ptr, counts_ptr, masses_ptr, lo, hi, k, enough, floor, bottom,
    MASS: tl.constexpr, WHOLE: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Step 3 for keep(x) = fewer than k entries above x, of a mass below enough.

    Returns the threshold, `bottom` for a row that keeps all; the mass kept [NUM_CHUNKS]; and the bracket proved. floor: no
    lower value is the threshold. WHOLE: the slots are the row itself, the bracket bottom..inf.
    """
    inside, above, total, above_hi, above_lo = sums_of_row(
        row_ptr, length, num_chunks, counts_ptr, masses_ptr, bottom, MASS, WHOLE, NUM_CHUNKS, CHUNK
    )
    unfiltered = (k == _NO_LIMIT) & (enough == float("inf"))
    keeps_lo = (tl.sum(above) + tl.sum(inside) < k) & (tl.sum(above_lo) < enough)
    keeps_all = keeps_lo & ((lo <= bottom) | unfiltered)
    if MASS:
        keeps_all = keeps_all | ~(tl.sum(total) < float("inf"))  # NaN or inf: no distribution, and nothing to find
    if not WHOLE:
        keeps_hi = ((tl.sum(above) < k) & (tl.sum(above_hi) < enough)) | (hi == float("inf"))
        known_out = key_of(bottom).to(tl.int64)
        known_in = tl.cast(_KEY_OF_INF, tl.int64)
        step = tl.cast(1 << 20, tl.int64)  # an eighth of an octave
        out_key = key_of(lo).to(tl.int64)
        in_key = key_of(hi).to(tl.int64)
        full = tl.max(inside) > SLOTS
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
            tl.debug_barrier()
            for chunk in range(num_chunks):
                x = load_chunk(row_ptr, chunk, length, CHUNK)
                sweep_chunk(x, chunk, lo, hi, slots_ptr, counts_ptr, masses_ptr, MASS, NUM_CHUNKS, SLOTS)
            tl.debug_barrier()
            inside, above, total, above_hi, above_lo = sums_of_row(
                row_ptr, length, num_chunks, counts_ptr, masses_ptr, bottom, MASS, WHOLE, NUM_CHUNKS, CHUNK
            )
            keeps_lo = (tl.sum(above) + tl.sum(inside) < k) & (tl.sum(above_lo) < enough)
            keeps_hi = ((tl.sum(above) < k) & (tl.sum(above_hi) < enough)) | (hi == float("inf"))
            keeps_all = keeps_lo & (lo <= bottom)
            full = tl.max(inside) > SLOTS
    else:
        full = False
    if keeps_all:
        threshold = tl.cast(bottom, tl.float32)
        kept = total
    elif full:  # many entries equal to hi
        threshold = hi
        kept = above_lo
    else:
        extent = tl.zeros([NUM_CHUNKS], tl.int32) + length if WHOLE else inside
        below = tl.maximum(key_of(lo).to(tl.int64), key_of(floor).to(tl.int64) - 1)
        threshold = bisect_slots(
            slots_ptr, extent, below, tl.sum(extent), hi, k - tl.sum(above), tl.sum(above_hi), enough,
            MASS, NUM_CHUNKS, SLOTS, WIDTH,
        )  # fmt: skip
        kept = above_hi
        if MASS:
            kept += slots_not_below(slots_ptr, extent, threshold, NUM_CHUNKS, SLOTS, WIDTH)[1]
    return threshold, kept, lo, hi


@triton.jit(do_not_specialize=["top_k", "seed", "offset", "first_output"])
def select_kernel(
    ids_ptr, valid_ptr, thresholds_ptr, kept_ptr, slots_ptr, counts_ptr, masses_ptr, brackets_ptr,
    x_ptr, stride_x, indices_ptr, lengths_ptr, starts_ptr, length, num_chunks,
    top_k_ptr, top_k, top_p_ptr, top_p, seed_ptr, seed, offset_ptr, offset, first_output,
    INDIRECT: tl.constexpr, WINDOW: tl.constexpr, USE_K: tl.constexpr, USE_P: tl.constexpr, K_FIRST: tl.constexpr,
    SIGNED: tl.constexpr, MASS: tl.constexpr, DRAW: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    WHOLE: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """Step 3, one program for each output: with DRAW a token, otherwise the threshold and (with MASS) the mass kept.

    WHOLE: the row is one chunk, and the only step.
    """
    output = tl.program_id(0)
    row = row_of_output(indices_ptr, output, INDIRECT)
    row_ptr, length = window_of_row(x_ptr + row * stride_x, length, starts_ptr, lengths_ptr, output, WINDOW)
    k, p = filters_of_row(top_k_ptr, top_k, top_p_ptr, top_p, output, length, USE_K, USE_P)
    if DRAW:
        u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, 0, SEEDS, OFFSETS)
    bottom = tl.cast(-float("inf") if SIGNED else 0.0, tl.float32)
    if WHOLE:
        slots_ptr = row_ptr
        lo = bottom
        hi = tl.cast(float("inf"), tl.float32)
    else:
        place = output.to(tl.int64) * NUM_CHUNKS
        slots_ptr += place * SLOTS
        counts_ptr += 2 * place
        masses_ptr += 3 * place
        if ENABLE_PDL:
            tl.extra.cuda.gdc_wait()
        lo = tl.load(brackets_ptr + output * 2)
        hi = tl.load(brackets_ptr + output * 2 + 1)
    enough = tl.cast(float("inf"), tl.float32)
    if USE_P and not K_FIRST:
        total = sums_of_row(
            row_ptr, length, num_chunks, counts_ptr, masses_ptr, bottom, MASS, WHOLE, NUM_CHUNKS, CHUNK
        )[2]
        enough = share_of(p, total)
    threshold, kept, lo, hi = settle(
        row_ptr, length, num_chunks, slots_ptr, counts_ptr, masses_ptr, lo, hi, k, enough, bottom, bottom,
        MASS, WHOLE, NUM_CHUNKS, CHUNK, SLOTS, WIDTH,
    )  # fmt: skip
    if USE_P and K_FIRST:
        if p < 1.0:
            threshold, kept, lo, hi = settle(
                row_ptr, length, num_chunks, slots_ptr, counts_ptr, masses_ptr, lo, hi, k, share_of(p, kept), threshold,
                bottom, MASS, WHOLE, NUM_CHUNKS, CHUNK, SLOTS, WIDTH,
            )  # fmt: skip
    if DRAW:
        token, good = draw_token(row_ptr, length, kept, threshold, u, NUM_CHUNKS, CHUNK)
        tl.store(ids_ptr + output, token)
        tl.store(valid_ptr + output, good)
    else:
        tl.store(thresholds_ptr + output, threshold)
        if MASS:
            tl.store(kept_ptr + output, tl.sum(kept.to(tl.float64), 0).to(tl.float32))


@triton.jit
def share_of(p, masses):
    """The mass that greater entries must stay below: p of the sum of masses [NUM_CHUNKS]; above 0, so that the largest
    entry is always kept; inf for p = inf, a filter that is off."""
    total = tl.sum(masses.to(tl.float64), 0)
    return tl.where(p < 1.0, tl.maximum((p.to(tl.float64) * total).to(tl.float32), 1e-38), float("inf"))
