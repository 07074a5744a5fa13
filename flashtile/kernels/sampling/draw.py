"""Draws without a search: from the probabilities, or from those above a share of the largest.

Two steps: every chunk adds up its weights; then one program for each output finds the chunk in which its token lies,
and reads that chunk again. min-p needs the largest entry first, so there the row is read twice."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.sampling.rows import (
    Chunks,
    Random,
    after,
    chunks_of,
    draw_token,
    entries,
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


@triton.jit
def mass_kernel(
    masses_ptr, thresholds_ptr, maxima_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks, min_p_ptr, min_p,
    INDIRECT: tl.constexpr, USE_MIN_P: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """masses [outputs, NUM_CHUNKS], fp32: of the entries of each chunk; with USE_MIN_P (1: one value, 2: one per
    output) of those that are at least min_p times the largest of maxima [outputs, NUM_CHUNKS]: the threshold, which
    is stored too."""
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


@triton.jit(do_not_specialize=["seed", "offset", "first_output"])
def draw_kernel(
    ids_ptr, valid_ptr, masses_ptr, thresholds_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks,
    seed_ptr, seed, offset_ptr, offset, first_output,
    INDIRECT: tl.constexpr, SHARED: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    USE_THRESHOLD: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """A token for each output, from the masses of its chunks; these and thresholds are the output's, or (SHARED) its
    row's."""
    output = tl.program_id(0)
    u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, 0, SEEDS, OFFSETS)
    row = row_of_output(indices_ptr, output, INDIRECT)
    chunks = tl.arange(0, NUM_CHUNKS)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_wait()
    place = row if SHARED else output.to(tl.int64)
    masses = tl.load(masses_ptr + place * NUM_CHUNKS + chunks, mask=chunks < num_chunks, other=0.0)
    keep_from = tl.load(thresholds_ptr + place) if USE_THRESHOLD else 0.0
    token, good = draw_token(x_ptr + row * stride_x, length, masses, keep_from, u, NUM_CHUNKS, CHUNK)
    tl.store(ids_ptr + output, token)
    tl.store(valid_ptr + output, good)


def draw(
    ids: Tensor, valid: Tensor, probs: Tensor, indices: Tensor | None, min_p: Tensor | None, min_p_value: float,
    random: Random, chunks: Chunks, pdl: bool | None,
) -> None:  # fmt: skip
    """A token for each output, from its row of probs; min_p (0: off) for each output, or one for all."""
    if share_rows(probs, indices, min_p):
        sums = [
            masses_of(probs[part], None, None, min_p_value, chunks, pdl) for part in _mass_slices(len(probs), chunks)
        ]
        masses, thresholds = (torch.cat(x) for x in zip(*sums, strict=True))
        use = thresholds if min_p_value > 0 else None
        draw_from_masses(ids, valid, probs, indices, masses, use, random, chunks, True, pdl)
        return
    for part in _mass_slices(len(ids), chunks):
        x, rows = rows_of(probs, indices, part)
        masses, thresholds = masses_of(x, rows, entries(min_p, part), min_p_value, chunks, pdl)
        use = thresholds if min_p is not None or min_p_value > 0 else None
        draw_from_masses(ids[part], valid[part], x, rows, masses, use, random.part(part), chunks, False, pdl)


def _mass_slices(count: int, chunks: Chunks) -> Iterator[slice]:
    """Runs of outputs, or rows, whose chunks' masses fit in the workspace."""
    return slices(count, chunks.padded * 8)


def masses_of(
    x: Tensor, rows: Tensor | None, min_p: Tensor | None, min_p_value: float, chunks: Chunks, pdl: bool | None
) -> tuple[Tensor, Tensor]:
    """masses [outputs, NUM_CHUNKS] and thresholds [outputs] (of min_p)."""
    overlap, count, num_warps = overlaps(x, pdl), len(x) if rows is None else len(rows), chunks.config.chunk_warps
    use_min_p = 2 if min_p is not None else int(min_p_value > 0)
    masses, maxima = x.new_empty((2, count, chunks.padded), dtype=torch.float32)
    thresholds = x.new_empty(count, dtype=torch.float32)
    source = x, x.stride(0), rows, chunks.length, chunks.count
    grid, where = (count * chunks.count,), {"INDIRECT": rows is not None, **chunks.keywords}
    if use_min_p:
        max_kernel[grid](maxima, *source, ENABLE_PDL=overlap, **where, num_warps=num_warps)
    mass_kernel[grid](
        masses, thresholds, maxima, *source, min_p, min_p_value,
        USE_MIN_P=use_min_p, **where, **after(overlap, bool(use_min_p)), num_warps=num_warps,
    )  # fmt: skip
    return masses, thresholds


def draw_from_masses(
    ids: Tensor, valid: Tensor, x: Tensor, rows: Tensor | None, masses: Tensor, thresholds: Tensor | None,
    random: Random, chunks: Chunks, shared: bool, pdl: bool | None,
) -> None:  # fmt: skip
    """Step 2; masses [outputs, NUM_CHUNKS] and thresholds [outputs], or of the rows of x, if these are shared."""
    draw_kernel[(len(ids),)](
        ids, valid, masses, thresholds, x, x.stride(0), rows, chunks.length, chunks.count, *random.arguments,
        INDIRECT=rows is not None, SHARED=shared, USE_THRESHOLD=thresholds is not None,
        **random.keywords, **chunks.keywords, **after(overlaps(x, pdl)), num_warps=chunks.config.draw_warps,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Vocabularies of one chunk, of Llama-2 and of Llama-3, with overlap and without; min-p for each output."""
    ids, state = torch.empty(8, dtype=torch.int32, device="meta"), Random(None, 2**40, None, 0)
    for length, pdl in ((1000, False), (32000, False), (128256, False), (128256, True)):
        probs = torch.empty((8, length), device="meta")
        chunks = chunks_of(length, None, probs.device)
        launch = partial(draw, ids, ids.bool(), probs, None, None, 0.0, state, chunks, pdl)
        yield from _recordings(f"vocab={length}", (mass_kernel, draw_kernel), launch, pdl)
        launch = partial(draw, ids, ids.bool(), probs.bfloat16(), ids, ids.float(), 0.0, state, chunks, pdl)
        yield from _recordings(f"min_p vocab={length} bf16", (max_kernel, mass_kernel, draw_kernel), launch, pdl)
    many = torch.empty(1000, dtype=torch.int32, device="meta")
    launch = partial(draw, many, many.bool(), probs, many, None, 0.5, state, chunks, False)
    yield from _recordings("min_p shared", (max_kernel, mass_kernel, draw_kernel), launch, False)


def _recordings(name: str, kernels: tuple[Any, ...], launch: Any, pdl: bool) -> list[CompileCase]:
    overlap = " overlapping" if pdl else ""
    return recordings(
        lambda kernel: f"{kernel.__name__} {name}{overlap}", kernels, launch, min_capability=90 if pdl else 80
    )
