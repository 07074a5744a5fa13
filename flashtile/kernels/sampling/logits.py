"""Softmax, and draws from logits without one.

Every chunk finds its largest entry and adds up exp(entry - largest); then the chunks' sums are brought to one
maximum, and either all entries are divided by their sum, or one program for each output finds its token's chunk and
reads it again."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import SamplingConfig
from flashtile.kernels.sampling.rows import (
    Chunks,
    Random,
    after,
    chunks_of,
    find_chunk,
    first_above,
    load_chunk,
    overlaps,
    row_of_output,
    row_value,
    rows_of,
    share_rows,
    slices,
    uniform,
)
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recordings


@triton.jit
def exp_sums_kernel(
    sums_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks, temperature_ptr, temperature,
    INDIRECT: tl.constexpr, TEMPERATURES: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """sums [outputs, 2, NUM_CHUNKS], fp32: of each chunk of logits / temperature, the largest, and the sum of
    exp(entry - largest). A chunk of -inf alone: -inf and 0."""
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
    INDIRECT: tl.constexpr, SHARED: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """A token for each output, from the sums of exp of its chunks, which are the output's, or (SHARED) its row's."""
    output = tl.program_id(0)
    u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, 0, SEEDS, OFFSETS)
    row = row_of_output(indices_ptr, output, INDIRECT)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_wait()
    largest, sums = exp_sums_of_row(sums_ptr, row if SHARED else output, num_chunks, NUM_CHUNKS)
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


def sample_from_logits(
    ids: Tensor,
    valid: Tensor,
    logits: Tensor,
    indices: Tensor | None,
    seed: Tensor | None,
    seed_value: int,
    offset: Tensor | None,
    offset_value: int,
    pdl: bool | None = None,
    config: SamplingConfig | None = None,
) -> None:
    """ids[i] from the softmax of row indices[i] of logits [rows, vocab]; valid[i]: some logit of it is above -inf."""
    if not len(ids):
        return
    random, overlap = Random(seed, seed_value, offset, offset_value), overlaps(logits, pdl)
    chunks = chunks_of(logits.shape[1], config, logits.device)
    if share_rows(logits, indices):
        sums = torch.cat([_exp_sums(logits[part], None, chunks, overlap) for part in _sum_slices(len(logits), chunks)])
        _draw(ids, valid, logits, indices, sums, random, chunks, True, overlap)
        return
    for part in _sum_slices(len(ids), chunks):
        x, rows = rows_of(logits, indices, part)
        sums = _exp_sums(x, rows, chunks, overlap)
        _draw(ids[part], valid[part], x, rows, sums, random.part(part), chunks, False, overlap)


def _sum_slices(count: int, chunks: Chunks) -> Iterator[slice]:
    return slices(count, chunks.padded * 8)


def _exp_sums(x: Tensor, rows: Tensor | None, chunks: Chunks, overlap: bool) -> Tensor:
    """sums [outputs, 2, NUM_CHUNKS], as `exp_sums_kernel` says."""
    count = len(x) if rows is None else len(rows)
    sums = x.new_empty((count, 2, chunks.padded), dtype=torch.float32)
    exp_sums_kernel[(count * chunks.count,)](
        sums, x, x.stride(0), rows, chunks.length, chunks.count, None, 1.0,
        INDIRECT=rows is not None, TEMPERATURES=False, ENABLE_PDL=overlap, **chunks.keywords,
        num_warps=chunks.config.chunk_warps,
    )  # fmt: skip
    return sums


def _draw(
    ids: Tensor, valid: Tensor, x: Tensor, rows: Tensor | None, sums: Tensor, random: Random, chunks: Chunks,
    shared: bool, overlap: bool,
) -> None:  # fmt: skip
    draw_from_logits_kernel[(len(ids),)](
        ids, valid, sums, x, x.stride(0), rows, chunks.length, chunks.count, *random.arguments,
        INDIRECT=rows is not None, SHARED=shared, **random.keywords, **chunks.keywords, **after(overlap),
        num_warps=chunks.config.draw_warps,
    )  # fmt: skip


def softmax(
    out: Tensor,
    logits: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    pdl: bool | None = None,
    config: SamplingConfig | None = None,
) -> None:
    """out = softmax(logits / temperature) [rows, vocab], fp32; zeros for a row of -inf alone."""
    if not len(logits):
        return
    chunks, overlap = chunks_of(logits.shape[1], config, logits.device), overlaps(logits, pdl)
    grid = (len(logits) * chunks.count,)
    heat = {"TEMPERATURES": temperature is not None}
    sums = None
    if chunks.count > 1:
        sums = logits.new_empty((len(logits), 2, chunks.padded), dtype=torch.float32)
        exp_sums_kernel[grid](
            sums, logits, logits.stride(0), None, chunks.length, chunks.count, temperature, temperature_value,
            INDIRECT=False, ENABLE_PDL=overlap, **heat, **chunks.keywords, num_warps=chunks.config.chunk_warps,
        )  # fmt: skip
    softmax_kernel[grid](
        out, sums, logits, logits.stride(0), chunks.length, chunks.count, temperature, temperature_value,
        **heat, **chunks.keywords, **after(overlap and chunks.count > 1), num_warps=chunks.config.chunk_warps,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Vocabularies of one chunk and of Llama-3, with overlap and without."""
    ids, state = torch.empty(8, dtype=torch.int32, device="meta"), (None, 2**40, None, 0)
    for length, pdl in ((1000, False), (128256, False), (128256, True)):
        logits = torch.empty((8, length), device="meta")
        for dtype in (torch.float32, torch.bfloat16):
            x, name = logits.to(dtype), f"vocab={length} {dtype}{' overlapping' * pdl}"
            launches = {
                "draw": partial(sample_from_logits, ids, ids.bool(), x, None, *state, pdl=pdl),
                "softmax": partial(softmax, logits, x, logits[:, 0], 0.0, pdl=pdl),
            }
            for op, launch in launches.items():
                yield from recordings(
                    lambda kernel, label=f"{op} {name}": f"{kernel.__name__} {label}",
                    (exp_sums_kernel, draw_from_logits_kernel, softmax_kernel),
                    launch,
                    min_capability=90 if pdl else 80,
                )
