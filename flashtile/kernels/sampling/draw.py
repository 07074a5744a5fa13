"""Draws without a search: from probabilities, from those above a share of the largest, from logits; and softmax.

Two steps, each reading the row once at most: every chunk adds up its weights; then one program for each output finds the
chunk in which its token lies, and reads that chunk again."""

import triton
import triton.language as tl

from flashtile.kernels.sampling.rows import draw_token, find_chunk, first_above, load_chunk, row_of_output, row_value, uniform


@triton.jit
def mass_kernel(
    masses_ptr, thresholds_ptr, maxima_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks, min_p_ptr, min_p,
    INDIRECT: tl.constexpr, USE_MIN_P: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """masses [outputs, NUM_CHUNKS], fp32: of the entries of each chunk; with USE_MIN_P (1: one value, 2: one per output) of
    those that are at least min_p times the largest of maxima [outputs, NUM_CHUNKS]: the threshold, which is stored too."""
    output = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    row = row_of_output(indices_ptr, output, INDIRECT)
    x = load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = output.to(tl.int64) * NUM_CHUNKS
    if USE_MIN_P:
        chunks = tl.arange(0, NUM_CHUNKS)
        maxima = tl.load(maxima_ptr + place + chunks, mask=chunks < num_chunks, other=-float("inf"))
        keep_from = row_value(min_p_ptr, min_p, output, USE_MIN_P == 2) * tl.max(maxima, 0)
        x = tl.where(x < keep_from, 0.0, x)
        if chunk == 0:
            tl.store(thresholds_ptr + output, keep_from)
    tl.store(masses_ptr + place + chunk, tl.sum(tl.where(x < 0, 0.0, x), 0))


@triton.jit
def max_kernel(
    maxima_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks,
    INDIRECT: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """maxima [outputs, NUM_CHUNKS], fp32: the largest entry of each chunk."""
    output = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = row_of_output(indices_ptr, output, INDIRECT)
    x = load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK)
    tl.store(maxima_ptr + output.to(tl.int64) * NUM_CHUNKS + chunk, tl.max(x, 0))


@triton.jit(do_not_specialize=["seed", "offset", "first_output"])
def draw_kernel(
    ids_ptr, valid_ptr, masses_ptr, thresholds_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks,
    seed_ptr, seed, offset_ptr, offset, first_output,
    INDIRECT: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr, USE_THRESHOLD: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """A token for each output, from the masses of its chunks."""
    output = tl.program_id(0)
    u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, 0, SEEDS, OFFSETS)
    row = row_of_output(indices_ptr, output, INDIRECT)
    chunks = tl.arange(0, NUM_CHUNKS)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_wait()
    masses = tl.load(masses_ptr + output.to(tl.int64) * NUM_CHUNKS + chunks, mask=chunks < num_chunks, other=0.0)
    keep_from = tl.load(thresholds_ptr + output) if USE_THRESHOLD else 0.0
    token, good = draw_token(x_ptr + row * stride_x, length, masses, keep_from, u, NUM_CHUNKS, CHUNK)
    tl.store(ids_ptr + output, token)
    tl.store(valid_ptr + output, good)


@triton.jit
def exp_sums_kernel(
    sums_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks, temperature_ptr, temperature,
    INDIRECT: tl.constexpr, TEMPERATURES: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """sums [outputs, 2, NUM_CHUNKS], fp32: of each chunk of logits / temperature, the largest, and the sum of exp(entry -
    largest). A chunk of -inf alone: -inf and 0."""
    output = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = row_of_output(indices_ptr, output, INDIRECT)
    x = load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK)
    x = x / row_value(temperature_ptr, temperature, output, TEMPERATURES)
    largest = tl.max(x, 0)
    total = tl.sum(tl.exp(x - finite_or_zero(largest)), 0)
    place = output.to(tl.int64) * 2 * NUM_CHUNKS + chunk
    tl.store(sums_ptr + place, largest)
    tl.store(sums_ptr + place + NUM_CHUNKS, total)


@triton.jit
def finite_or_zero(largest):
    """What is subtracted before exp: 0 instead of -inf, so that a masked entry gives exp(-inf) = 0, never NaN."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def exp_sums_of_row(sums_ptr, output, num_chunks, NUM_CHUNKS: tl.constexpr):
    """The largest entry of the row, and the sums of exp(entry - largest) of its chunks [NUM_CHUNKS]."""
    chunk = tl.arange(0, NUM_CHUNKS)
    mask = chunk < num_chunks
    place = output.to(tl.int64) * 2 * NUM_CHUNKS + chunk
    maxima = tl.load(sums_ptr + place, mask=mask, other=-float("inf"))
    sums = tl.load(sums_ptr + place + NUM_CHUNKS, mask=mask, other=0.0)
    largest = finite_or_zero(tl.max(maxima, 0))
    return largest, sums * tl.exp(finite_or_zero(maxima) - largest)


@triton.jit(do_not_specialize=["seed", "offset", "first_output"])
def draw_from_logits_kernel(
    ids_ptr, valid_ptr, sums_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks,
    seed_ptr, seed, offset_ptr, offset, first_output,
    INDIRECT: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """A token for each output, from the sums of exp of its chunks."""
    output = tl.program_id(0)
    u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, 0, SEEDS, OFFSETS)
    row = row_of_output(indices_ptr, output, INDIRECT)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_wait()
    largest, sums = exp_sums_of_row(sums_ptr, output, num_chunks, NUM_CHUNKS)
    chunk, rest, good = find_chunk(sums, u, NUM_CHUNKS)
    weights = tl.exp(load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK) - largest)
    token = chunk * CHUNK + first_above(weights, rest, CHUNK)
    tl.store(ids_ptr + output, tl.where(good, token, 0))
    tl.store(valid_ptr + output, good)


@triton.jit
def softmax_kernel(
    out_ptr, sums_ptr, x_ptr, stride_x, length, num_chunks, temperature_ptr, temperature,
    TEMPERATURES: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """out = softmax(x / temperature), one program for each chunk. A single chunk needs no sums."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    x = load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK)
    x = x / row_value(temperature_ptr, temperature, row, TEMPERATURES)
    if NUM_CHUNKS == 1:
        weights = tl.exp(x - finite_or_zero(tl.max(x, 0)))
        total = tl.sum(weights, 0)
    else:
        if ENABLE_PDL:
            tl.extra.cuda.gdc_wait()
        largest, sums = exp_sums_of_row(sums_ptr, row, num_chunks, NUM_CHUNKS)
        weights = tl.exp(x - largest)
        total = tl.sum(sums, 0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(out_ptr + row * length + offs, weights / tl.where(total == 0, 1.0, total), mask=offs < length)


@triton.jit
def renorm_kernel(
    out_ptr, x_ptr, stride_x, thresholds_ptr, kept_ptr, length, num_chunks, CHUNK: tl.constexpr
):  # fmt: skip
    """out = the entries not below the threshold, divided by their sum; NaN in a row without mass."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    x = tl.maximum(load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK), 0.0)
    kept = tl.load(kept_ptr + row)
    kept = tl.where((kept > 0) & (kept < float("inf")), kept, float("nan"))
    x = tl.where(x < tl.load(thresholds_ptr + row), 0.0, x)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(out_ptr + row * length + offs, x / kept, mask=offs < length)


@triton.jit
def mask_kernel(out_ptr, x_ptr, stride_x, thresholds_ptr, length, num_chunks, CHUNK: tl.constexpr):
    """out = x, with -inf below the threshold."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    x = load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK)
    x = tl.where(x < tl.load(thresholds_ptr + row), -float("inf"), x)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(out_ptr + row * length + offs, x, mask=offs < length)
