"""The ids of exactly k entries of each row: all above the threshold, and as many equal to it as are missing."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import SamplingConfig
from flashtile.kernels.sampling.rows import chunks_of, load_chunk, window_of_row
from flashtile.kernels.sampling.threshold import KERNELS, Filters, thresholds
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recordings

BLOCK_K = 1024  # ids of padding written together


@triton.jit
def count_kernel(
    counts_ptr, x_ptr, stride_x, thresholds_ptr, lengths_ptr, starts_ptr, length, num_chunks,
    WINDOW: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """counts [rows, 2, NUM_CHUNKS] int32: entries of each chunk above the threshold (NaN is), and equal to it."""
    row = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    row_ptr, length = window_of_row(x_ptr + row.to(tl.int64) * stride_x, length, starts_ptr, lengths_ptr, row, WINDOW)
    above, equal = compare_chunk(row_ptr, length, chunk, tl.load(thresholds_ptr + row), CHUNK)
    place = row.to(tl.int64) * 2 * NUM_CHUNKS + chunk
    tl.store(counts_ptr + place, tl.sum(above.to(tl.int32), 0))
    tl.store(counts_ptr + place + NUM_CHUNKS, tl.sum(equal.to(tl.int32), 0))


@triton.jit
def compare_chunk(row_ptr, length, chunk, threshold, CHUNK: tl.constexpr):
    """Which entries of a chunk [CHUNK] are above the threshold, and which equal to it."""
    x = load_chunk(row_ptr, chunk, length, CHUNK)
    inside = chunk * CHUNK + tl.arange(0, CHUNK) < length
    return ((x > threshold) | (x != x)) & inside, (x == threshold) & inside


@triton.jit
def write_ids_kernel(
    ids_ptr, stride_ids, k, x_ptr, stride_x, thresholds_ptr, counts_ptr, lengths_ptr, starts_ptr, length, num_chunks,
    WINDOW: tl.constexpr, LARGE_IDS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ids [rows, k]: the entries selected, by rising id, then -1. Of equal ones the first are taken, or the last."""
    row = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    row_ptr, length = window_of_row(x_ptr + row.to(tl.int64) * stride_x, length, starts_ptr, lengths_ptr, row, WINDOW)
    chunks = tl.arange(0, NUM_CHUNKS)
    place = row.to(tl.int64) * 2 * NUM_CHUNKS + chunks
    num_above = tl.load(counts_ptr + place, mask=chunks < num_chunks, other=0)
    num_equal = tl.load(counts_ptr + place + NUM_CHUNKS, mask=chunks < num_chunks, other=0)
    missing = tl.maximum(k - tl.sum(num_above, 0), 0)  # to be taken from the equal ones
    skipped = tl.maximum(tl.sum(num_equal, 0) - missing, 0) if LARGE_IDS else 0
    above_before = tl.sum(tl.where(chunks < chunk, num_above, 0), 0)
    equal_before = tl.sum(tl.where(chunks < chunk, num_equal, 0), 0)
    above, equal = compare_chunk(row_ptr, length, chunk, tl.load(thresholds_ptr + row), CHUNK)
    rank = equal_before + tl.cumsum(equal.to(tl.int32), 0) - 1
    taken = equal & (rank >= skipped) & (rank < skipped + missing)
    taken_before = tl.minimum(tl.maximum(equal_before - skipped, 0), missing)
    selected = above | taken
    position = above_before + taken_before + tl.cumsum(selected.to(tl.int32), 0) - 1
    ids_ptr += row.to(tl.int64) * stride_ids
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(ids_ptr + position, offs, mask=selected & (position < k))
    if chunk == 0:
        num_selected = tl.sum(num_above, 0) + tl.minimum(tl.sum(num_equal, 0), missing)
        for begin in range(0, k, BLOCK_K):
            rest = begin + tl.arange(0, BLOCK_K)
            tl.store(ids_ptr + rest, tl.full([BLOCK_K], -1, tl.int32), mask=(rest >= num_selected) & (rest < k))


def top_k(
    ids: Tensor,
    input: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    prefer_large_ids: bool,
    pdl: bool | None = None,
    config: SamplingConfig | None = None,
) -> None:
    """ids [rows, k]: the k largest of input[r, start : start + length], as rising positions from start; then -1."""
    if not len(input):
        return
    k, chunks = ids.shape[1], chunks_of(input.shape[1], config, input.device)
    from_value, _ = thresholds(
        input, Filters(top_k_value=k), chunks, signed=True, mass=False, exact=True, starts=starts, lengths=lengths,
        pdl=pdl,
    )  # fmt: skip
    counts = ids.new_empty((len(input), 2, chunks.padded))
    grid = (len(input) * chunks.count,)
    windows = lengths, starts, chunks.length, chunks.count
    options = {"WINDOW": starts is not None or lengths is not None, **chunks.keywords}
    num_warps = chunks.config.chunk_warps
    count_kernel[grid](counts, input, input.stride(0), from_value, *windows, **options, num_warps=num_warps)
    write_ids_kernel[grid](
        ids, ids.stride(0), k, input, input.stride(0), from_value, counts, *windows,
        LARGE_IDS=prefer_large_ids, BLOCK_K=BLOCK_K, **options, num_warps=chunks.config.draw_warps,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Whole rows and windows; the search has cases of its own."""
    kernels = (count_kernel, write_ids_kernel, *KERNELS)
    x, ids = torch.empty((8, 128256), device="meta"), torch.empty((8, 2048), dtype=torch.int32, device="meta")
    for window, name in ((None, "rows"), (ids[:, 0], "windows")):
        launch = partial(top_k, ids, x, window, window, window is None, pdl=False)
        cases = recordings(lambda kernel, name=name: f"{kernel.__name__} {name}", kernels, launch)
        yield from (case for case in cases if case.kernel in (count_kernel, write_ids_kernel))
