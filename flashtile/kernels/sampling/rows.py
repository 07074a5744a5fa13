"""What all sampling kernels share: rows cut into chunks, parameters of a row, random numbers, and the draw.

A chunk is a fixed run of ids, and every sum is taken over chunks first, in a fixed order. So a row's result depends on
nothing but the row: not on the batch around it, nor on how many programs share the work."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import SamplingConfig, capability, choose_sampling

MAX_CHUNKS = 1024  # of a row: one program adds up the chunks' sums
WORKSPACE_BYTES = 2**28


# Triton's interpreter reduces a tuple of tensors element by element, in Python, and not over all axes
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def sum2(a, b, axis: tl.constexpr):
    """(sum of a, sum of b) along one axis, or all (None), in a single reduction: half the barriers of two."""
    if _INTERPRETED:
        return tl.sum(a, axis), tl.sum(b, axis)
    else:
        return tl.reduce((a, b), axis, _add2)


@triton.jit
def sum3(a, b, c, axis: tl.constexpr):
    """As `sum2`, of three tensors."""
    if _INTERPRETED:
        return tl.sum(a, axis), tl.sum(b, axis), tl.sum(c, axis)
    else:
        return tl.reduce((a, b, c), axis, _add3)


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def sum4(a, b, c, d, axis: tl.constexpr):
    """As `sum2`, of four tensors."""
    if _INTERPRETED:
        return tl.sum(a, axis), tl.sum(b, axis), tl.sum(c, axis), tl.sum(d, axis)
    else:
        return tl.reduce((a, b, c, d), axis, _add4)


@triton.jit
def _add_add_min_max(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, tl.minimum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def sum_sum_min_max(a, b, c, d):
    """(sum of a, sum of b, smallest of c, largest of d) in a single reduction."""
    if _INTERPRETED:
        return tl.sum(a), tl.sum(b), tl.min(c), tl.max(d)
    else:
        return tl.reduce((a, b, c, d), None, _add_add_min_max)


@triton.jit
def fast_log2(x):
    """log2 of a scalar in one instruction, for guesses: `tl.log2` takes twenty, in every warp."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def row_value(ptr, value, row, PER_ROW: tl.constexpr):
    """A parameter of a row: an entry of a tensor, or one value for all rows."""
    return tl.load(ptr + row) if PER_ROW else value


@triton.jit
def row_of_output(indices_ptr, output, INDIRECT: tl.constexpr):
    """The row that an output is drawn from, int64."""
    return tl.load(indices_ptr + output).to(tl.int64) if INDIRECT else output.to(tl.int64)


@triton.jit
def window_of_row(row_ptr, length, starts_ptr, lengths_ptr, row, WINDOW: tl.constexpr):
    """(pointer, length) of the entries that count: `length` from the start; or, with WINDOW, as the tensors say (no
    starts_ptr: from the start), within the row."""
    if WINDOW:
        start = tl.cast(0, tl.int32)
        if starts_ptr is not None:
            start = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), length)
        end = length
        if lengths_ptr is not None:
            end = tl.minimum(start + tl.maximum(tl.load(lengths_ptr + row), 0), length)
        return row_ptr + start, end - start
    else:
        return row_ptr, tl.cast(length, tl.int32)


@triton.jit
def load_chunk(row_ptr, chunk, length, CHUNK: tl.constexpr):
    """Entries [CHUNK] of a row of `length`, fp32; -inf past its end."""
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    return tl.load(row_ptr + offs, mask=offs < length, other=-float("inf")).to(tl.float32)


@triton.jit
def uniform(
    seed_ptr, seed, offset_ptr, offset, output, first_output, draw, SEEDS: tl.constexpr, OFFSETS: tl.constexpr
):  # fmt: skip
    """`uniform` of reference/sampling.py, fp64, shaped as `draw`. SEEDS, OFFSETS: 0 a value, 1 one entry, 2 one per
    row.

    output: the row among those of this launch, which begins at first_output.
    """
    if SEEDS > 0:
        seed = tl.load(seed_ptr + (output if SEEDS == 2 else 0))
    if OFFSETS > 0:
        offset = tl.load(offset_ptr + (output if OFFSETS == 2 else 0))
    seed = tl.cast(seed, tl.int64)
    offset = tl.cast(offset, tl.int64)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream = tl.cast(0 if SEEDS == 2 else first_output + output, tl.uint32)
    w0, w1, _, _ = tl.philox(seed, low, high, stream, tl.cast(draw, tl.uint32))
    bits = (w0.to(tl.int64) << 21) + (w1.to(tl.int64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def first_above(weights, target, SIZE: tl.constexpr):
    """The first place at which the cumulative weights [SIZE] exceed target; at most the last place with a weight."""
    place = tl.arange(0, SIZE)
    cumulative = tl.cumsum(weights, 0)
    first = tl.min(tl.where((cumulative > target) & (weights > 0), place, SIZE), 0)
    return tl.minimum(first, tl.max(tl.where(weights > 0, place, 0), 0))


@triton.jit
def find_chunk(kept, u, NUM_CHUNKS: tl.constexpr):
    """The chunk in which the u-th part of the mass kept [NUM_CHUNKS] ends, what is left of it there, and whether the
    row is a distribution at all."""
    kept = kept.to(tl.float64)
    total = tl.sum(kept, 0)
    target = u * total
    chunk = first_above(kept, target, NUM_CHUNKS)
    before = tl.sum(tl.where(tl.arange(0, NUM_CHUNKS) < chunk, kept, 0.0), 0)
    return chunk, (target - before).to(tl.float32), (total > 0) & (total < float("inf"))


@triton.jit
def draw_token(row_ptr, length, kept, keep_from, u, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """The token at the u-th part of the probabilities that are not below keep_from, of which each chunk holds kept
    [NUM_CHUNKS]; and whether there is one."""
    chunk, rest, good = find_chunk(kept, u, NUM_CHUNKS)
    x = load_chunk(row_ptr, chunk, length, CHUNK)
    weights = tl.where(x < keep_from, 0.0, tl.maximum(x, 0.0))
    token = chunk * CHUNK + first_above(weights, rest, CHUNK)
    return tl.where(good, token, 0), good


@dataclass(frozen=True)
class Chunks:
    """A row of `length` entries in chunks: their number, also rounded up to a power of two, and their size; and how the
    kernels run."""

    length: int
    count: int
    padded: int
    size: int
    config: SamplingConfig

    @property
    def keywords(self) -> dict[str, int]:
        """Constexprs of most kernels."""
        return {"NUM_CHUNKS": self.padded, "CHUNK": self.size}

    @property
    def whole(self) -> bool:
        """Whether one program searches the row, held in registers."""
        return self.count == 1 or self.padded * self.size <= self.config.row

    @property
    def select_options(self) -> dict[str, int]:
        """Warps, and the registers of a thread, of the program that searches the row, or what a sweep left of it."""
        if not self.whole:
            return {"num_warps": self.config.select_warps, "maxnreg": self.config.select_registers}
        num_warps = min(self.config.row_warps, max(4, self.padded * self.size // 1024))
        return {
            "num_warps": num_warps,
            "maxnreg": min(self.config.row_registers * self.config.row_warps // num_warps, 255),
        }


@cache
def chunks_of(length: int, config: SamplingConfig | None, device: torch.device) -> Chunks:
    """How rows of `length` are cut, by the config given or the one chosen. NotImplementedError for rows too long."""
    config = config or choose_sampling(length, capability(device) if device.type == "cuda" else (9, 0))
    size = min(config.chunk, max(128, triton.next_power_of_2(length)))
    count = triton.cdiv(length, size)
    if count > MAX_CHUNKS:
        raise NotImplementedError(
            f"vocab_size: more than {config.chunk * MAX_CHUNKS} is not implemented on CUDA, got {length}"
        )
    return Chunks(length, count, triton.next_power_of_2(count), size, config)


@dataclass(frozen=True)
class Random:
    """Seed and offset of the outputs from `first` on, as kernels take them."""

    seed: Tensor | None
    seed_value: int
    offset: Tensor | None
    offset_value: int
    first: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """seed_ptr, seed, offset_ptr, offset, first_output."""
        return self.seed, self.seed_value, self.offset, self.offset_value, self.first

    @property
    def keywords(self) -> dict[str, int]:
        """Constexprs: 0 a value, 1 one entry, 2 one per row."""
        seeds, offsets = (0 if x is None else 1 if len(x) == 1 else 2 for x in (self.seed, self.offset))
        return {"SEEDS": seeds, "OFFSETS": offsets}

    def part(self, outputs: slice) -> "Random":
        """The state of some outputs."""
        return Random(
            entries(self.seed, outputs),
            self.seed_value,
            entries(self.offset, outputs),
            self.offset_value,
            outputs.start,
        )


NO_RANDOM = Random(None, 0, None, 0)


def entries(x: Tensor | None, outputs: slice) -> Tensor | None:
    """The entries of these outputs, if x has one for each."""
    return x if x is None or len(x) == 1 else x[outputs]


def rows_of(x: Tensor, indices: Tensor | None, outputs: slice) -> tuple[Tensor, Tensor | None]:
    """x and the indices of its rows for these outputs; or, without indices, their rows."""
    return (x[outputs], None) if indices is None else (x, indices[outputs])


def share_rows(x: Tensor, indices: Tensor | None, *per_output: Tensor | None) -> bool:
    """Whether to work on the rows of x first, once for all outputs drawn from them: if there are no more rows than
    outputs, and no output has parameters of its own."""
    return indices is not None and len(x) <= len(indices) and all(p is None for p in per_output)


def slices(num_outputs: int, bytes_per_output: int) -> Iterator[slice]:
    """The outputs in runs whose workspace stays within bounds: all at once, but for very large batches."""
    step = max(1, WORKSPACE_BYTES // bytes_per_output)
    for begin in range(0, num_outputs, step):
        yield slice(begin, min(begin + step, num_outputs))


def overlaps(x: Tensor, pdl: bool | None = None) -> bool:
    """Whether the kernels of a call overlap on the device of x: on sm_90, unless pdl is False. Of meta tensors (compile
    tests), as pdl says."""
    return bool(pdl) if x.is_meta else capability(x.device) >= (9, 0) and pdl is not False


def after(overlap: bool, wait: bool = True) -> dict[str, Any]:
    """Keywords of a launch that may overlap the one before it; wait: it depends on that one's results."""
    return {"ENABLE_PDL": overlap, **({"launch_pdl": True} if overlap and wait else {})}
