"""Top-p by rejection: no threshold is searched for (the idea is that of FlashInfer's samplers, arXiv:2501.01005).

A token drawn from the whole row lies in the nucleus with a probability of at least top_p, and to see whether it does
takes one masked sum: it is accepted if the mass of the entries greater than its own is less than top_p of the total,
the very law of threshold.py. What is accepted first is distributed as the nucleus is. `reference.top_p_token` says in
which order the numbers of a row are used; it holds for both paths:

- A row that one program holds in registers is drawn from until a token is accepted: one launch.
- For longer rows the first WHOLE_ROW_DRAWS candidates are drawn and judged together: the masses of chunks, candidates,
  the masses above these, and one program for each row that takes the first accepted. Should there be none (once in
  10,000 rows for top_p = 0.9), it goes on alone, and reads the row again for each further candidate."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import WHOLE_ROW_DRAWS, choose_sampling
from flashtile.kernels.sampling.draw import mass_kernel, masses_of
from flashtile.kernels.sampling.guess import filters_of_row
from flashtile.kernels.sampling.rows import (
    Chunks,
    Random,
    after,
    chunks_of,
    draw_token,
    load_chunk,
    overlaps,
    row_of_output,
    rows_of,
    slices,
    sum4,
    uniform,
)
from flashtile.kernels.sampling.threshold import Filters, mass_of_chunks_above, share_of, tile_of_row
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recordings

_DRAWS = tl.constexpr(WHOLE_ROW_DRAWS)


@triton.jit(do_not_specialize=["seed", "offset", "first_output"])
def propose_kernel(
    tokens_ptr, values_ptr, masses_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks,
    seed_ptr, seed, offset_ptr, offset, first_output,
    INDIRECT: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """tokens, values [outputs, WHOLE_ROW_DRAWS]: draws from the whole row, one program for each, and their entries."""
    output = tl.program_id(0) // _DRAWS
    draw = tl.program_id(0) % _DRAWS
    u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, draw, SEEDS, OFFSETS)
    row = row_of_output(indices_ptr, output, INDIRECT)
    chunks = tl.arange(0, NUM_CHUNKS)
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = output.to(tl.int64) * NUM_CHUNKS
    masses = tl.load(masses_ptr + place + chunks, mask=chunks < num_chunks, other=0.0)
    row_ptr = x_ptr + row * stride_x
    token = draw_token(row_ptr, length, masses, 0.0, u, NUM_CHUNKS, CHUNK)[0]
    tl.store(tokens_ptr + tl.program_id(0), token)
    tl.store(values_ptr + tl.program_id(0), tl.load(row_ptr + token).to(tl.float32))


@triton.jit
def verify_kernel(
    above_ptr, values_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks,
    INDIRECT: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """above [outputs, WHOLE_ROW_DRAWS, NUM_CHUNKS], fp32: the mass of a chunk that is greater than each candidate; one
    program for each chunk."""
    tl.static_assert(_DRAWS == 4)
    output = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    row = row_of_output(indices_ptr, output, INDIRECT)
    x = load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK)  # in flight while candidates are drawn
    if ENABLE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    values_ptr += output * _DRAWS
    above_ptr += output * _DRAWS * NUM_CHUNKS + chunk
    mass0, mass1, mass2, mass3 = sum4(
        mass_above(x, tl.load(values_ptr)), mass_above(x, tl.load(values_ptr + 1)),
        mass_above(x, tl.load(values_ptr + 2)), mass_above(x, tl.load(values_ptr + 3)), 0,
    )  # fmt: skip
    tl.store(above_ptr, mass0)
    tl.store(above_ptr + NUM_CHUNKS, mass1)
    tl.store(above_ptr + 2 * NUM_CHUNKS, mass2)
    tl.store(above_ptr + 3 * NUM_CHUNKS, mass3)


@triton.jit
def mass_above(x, value):
    """Entries greater than a value; 0 for the others. (Of a NaN the row's masses know.)"""
    return tl.where(x > value, x, 0.0)


@triton.jit
def masses_above(
    row, row_ptr, length, value, WHOLE: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The mass of each chunk [NUM_CHUNKS] that is greater than a value: of the row held in registers (WHOLE), or of the
    one in memory, WIDTH entries of every chunk at a time."""
    if WHOLE:
        return mass_of_chunks_above(row, value)
    else:
        chunk = tl.arange(0, NUM_CHUNKS)[:, None, None]
        place = chunk * CHUNK + 4 * tl.arange(0, WIDTH // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
        mass = tl.zeros([NUM_CHUNKS, WIDTH // 4, 4], tl.float32)
        for begin in tl.range(0, CHUNK, WIDTH, loop_unroll_factor=2):  # so many loads in flight
            x = tl.load(row_ptr + begin + place, mask=begin + place < length, other=0.0)
            mass += mass_above(x.to(tl.float32), value)
        return tl.sum(tl.sum(mass, 2), 1)


@triton.jit
def is_distribution(masses):
    """Whether a row of these masses [NUM_CHUNKS] has something to draw, and neither NaN nor inf."""
    total = tl.sum(masses.to(tl.float64), 0)
    return (total > 0) & (total < float("inf"))


@triton.jit
def next_above(value):
    """The smallest fp32 greater than a value that is not negative."""
    return (value.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed", "offset", "first_output"])
def accept_kernel(
    ids_ptr, valid_ptr, tokens_ptr, values_ptr, masses_ptr, above_ptr, x_ptr, stride_x, indices_ptr, length, num_chunks,
    top_p_ptr, top_p, seed_ptr, seed, offset_ptr, offset, first_output,
    INDIRECT: tl.constexpr, USE_P: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr, WHOLE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, ENABLE_PDL: tl.constexpr,
):  # fmt: skip
    """A token for each output: the first candidate accepted, of those that were judged, or else of further ones.

    WHOLE: it holds the row in registers, draws all candidates itself, and is the only step.
    """
    output = tl.program_id(0)
    row = row_of_output(indices_ptr, output, INDIRECT)
    row_ptr = x_ptr + row * stride_x
    p = filters_of_row(None, 0, top_p_ptr, top_p, output, length, 0, USE_P)[1]
    if WHOLE:
        row_tile = tile_of_row(row_ptr, length, True, NUM_CHUNKS, CHUNK)
        draw = 0
        u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, draw, SEEDS, OFFSETS)
        masses = mass_of_chunks_above(row_tile, 0.0)
        good = is_distribution(masses)
        enough = share_of(p, masses)
        token = tl.cast(0, tl.int32)
        low = tl.cast(0.0, tl.float32)  # the largest candidate refused
        kept = masses
        refused = good
    else:
        row_tile = None
        draw = _DRAWS
        chunks = tl.arange(0, NUM_CHUNKS)
        j = tl.arange(0, _DRAWS)
        if ENABLE_PDL:
            tl.extra.cuda.gdc_wait()
        place = output.to(tl.int64)
        masses = tl.load(masses_ptr + place * NUM_CHUNKS + chunks, mask=chunks < num_chunks, other=0.0)
        tokens = tl.load(tokens_ptr + place * _DRAWS + j)
        values = tl.load(values_ptr + place * _DRAWS + j)
        above_ptr += place * _DRAWS * NUM_CHUNKS
        above = tl.load(
            above_ptr + j[:, None] * NUM_CHUNKS + chunks[None, :], mask=chunks[None, :] < num_chunks, other=0.0
        )
        good = is_distribution(masses)
        enough = share_of(p, masses)
        accepted = tl.min(tl.where(tl.sum(above.to(tl.float64), 1) < enough, j, _DRAWS), 0)
        token = tl.sum(tl.where(j == accepted, tokens, 0), 0)
        low = tl.max(values, 0)
        greatest = tl.min(tl.where(values == low, j, _DRAWS - 1), 0)
        kept = tl.load(above_ptr + greatest * NUM_CHUNKS + chunks, mask=chunks < num_chunks, other=0.0)
        refused = good & (accepted == _DRAWS)
        u = tl.cast(0.0, tl.float64)
        if refused:
            u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, draw, SEEDS, OFFSETS)
    while refused:
        keep_from = next_above(low)
        weights = kept
        if WHOLE:
            keep_from = tl.where(draw < _DRAWS, 0.0, keep_from)
            weights = tl.where(draw < _DRAWS, masses, kept)
        token = draw_token(row_ptr, length, weights, keep_from, u, NUM_CHUNKS, CHUNK)[0]
        value = tl.load(row_ptr + token).to(tl.float32)
        above_value = masses_above(row_tile, row_ptr, length, value, WHOLE, NUM_CHUNKS, CHUNK, WIDTH)
        kept = tl.where(value > low, above_value, kept)
        low = tl.maximum(low, value)
        refused = tl.sum(above_value.to(tl.float64), 0) >= enough
        draw += 1
        if refused:
            u = uniform(seed_ptr, seed, offset_ptr, offset, output, first_output, draw, SEEDS, OFFSETS)
    tl.store(ids_ptr + output, tl.where(good, token, 0))
    tl.store(valid_ptr + output, good)


def sample_top_p(
    ids: Tensor, valid: Tensor, probs: Tensor, indices: Tensor | None, filters: Filters, random: Random,
    chunks: Chunks, pdl: bool | None,
) -> None:  # fmt: skip
    """A token for each output, from the nucleus of its row of probs; filters: top_p alone."""
    for part in slices(len(ids), chunks.padded * (WHOLE_ROW_DRAWS + 2) * 4 if not chunks.whole else 4):
        x, rows = rows_of(probs, indices, part)
        _accept(ids[part], valid[part], x, rows, filters.part(part), random.part(part), chunks, pdl)


def _accept(
    ids: Tensor, valid: Tensor, x: Tensor, rows: Tensor | None, filters: Filters, random: Random, chunks: Chunks,
    pdl: bool | None,
) -> None:  # fmt: skip
    """The steps, for one slice of outputs; rows that one program holds need only the last."""
    overlap, count, config = overlaps(x, pdl), len(ids), chunks.config
    source = x, x.stride(0), rows, chunks.length, chunks.count
    where = {"INDIRECT": rows is not None, **chunks.keywords}
    work: tuple[Tensor | None, ...] = (None,) * 4
    options: dict[str, Any] = chunks.select_options if chunks.whole else {"num_warps": config.draw_warps}
    if not chunks.whole:
        masses, _ = masses_of(x, rows, None, 0.0, chunks, pdl)
        tokens = x.new_empty((count, WHOLE_ROW_DRAWS), dtype=torch.int32)
        values = x.new_empty((count, WHOLE_ROW_DRAWS), dtype=torch.float32)
        above = x.new_empty((count, WHOLE_ROW_DRAWS, chunks.padded), dtype=torch.float32)
        work = tokens, values, masses, above
        propose_kernel[(count * WHOLE_ROW_DRAWS,)](
            tokens, values, masses, *source, *random.arguments,
            **random.keywords, **where, **after(overlap), num_warps=config.draw_warps,
        )  # fmt: skip
        verify_kernel[(count * chunks.count,)](
            above, values, *source, **where, **after(overlap), num_warps=config.chunk_warps
        )
    accept_kernel[(count,)](
        ids, valid, *work, *source, filters.top_p, filters.top_p_value, *random.arguments,
        USE_P=filters.keywords(x.shape[1])["USE_P"], WHOLE=chunks.whole,
        WIDTH=min(max(config.accept_tile // chunks.padded, 4), chunks.size),
        **random.keywords, **where, **after(overlap, not chunks.whole), **options,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Vocabularies of one chunk, of Llama-2 (in registers before sm_90 too, or not), of GPT-2 and of Llama-3, with
    overlap and without; top_p, seeds and indices for each output."""
    ids, state = torch.empty(8, dtype=torch.int32, device="meta"), Random(None, 2**40, None, 0)
    kernels = mass_kernel, propose_kernel, verify_kernel, accept_kernel
    for length, sms in ((1000, (80, 90)), (32000, (80, 80)), (32000, (90, 90)), (50257, (80, 90)), (128256, (90, 90))):
        probs, config = torch.empty((8, length), device="meta"), choose_sampling(length, (sms[0] // 10, 0))
        chunks, pdl = chunks_of(length, config, probs.device), sms == (90, 90)
        tensors = Filters(top_p=ids.float())
        for name, args in {
            "": (probs, None, Filters(top_p_value=0.9), state),
            " tensors bf16": (probs.bfloat16(), ids, tensors, Random(ids.long(), 0, ids.long(), 0)),
        }.items():
            launch = partial(sample_top_p, ids, ids.bool(), *args, chunks, pdl)
            cases = recordings(
                lambda kernel, name=name, length=length: f"{kernel.__name__} vocab={length}{name}",  # type: ignore[misc]
                kernels,
                launch,
                min_capability=sms[0],
                max_capability=sms[1],
            )
            yield from (case for case in cases if case.kernel is not mass_kernel)  # which has its own
