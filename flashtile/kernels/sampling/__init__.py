"""Launchers of sampling, Triton: see rows.py for what the kernels share, threshold.py for how thresholds are found.

Launches depend on shapes alone, and nothing waits for the GPU: all of it can be captured in a CUDA graph. On sm_90 the
kernels of one call overlap (programmatic dependent launch): each is scheduled while the one before it ends, and loads
what does not depend on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from flashtile import config
from flashtile.kernels.sampling import draw, select_ids, speculative, threshold
from flashtile.kernels.sampling.rows import CHUNK, MAX_CHUNKS
from flashtile.kernels.sampling.threshold import SLOT_TILE, SLOTS, sample_size
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

WORKSPACE_BYTES = 2**28  # a call with more outputs than fit runs in slices
CHUNK_WARPS = 4  # 32 entries, eight 16-byte loads, per thread
ROW_WARPS = 8  # a program with a row to itself: few of them, so latency counts


@dataclass(frozen=True)
class Chunks:
    """A row of `length` entries in chunks: their number, also rounded up to a power of two, and their size."""

    length: int
    count: int
    padded: int
    size: int

    @property
    def keywords(self) -> dict[str, int]:
        """Constexprs of every kernel."""
        return {"NUM_CHUNKS": self.padded, "CHUNK": self.size}


def chunks_of(length: int) -> Chunks:
    """How rows of `length` are cut. NotImplementedError for rows too long."""
    size = min(CHUNK, max(128, triton.next_power_of_2(length)))
    count = triton.cdiv(length, size)
    if count > MAX_CHUNKS:
        raise NotImplementedError(f"vocab_size: more than {CHUNK * MAX_CHUNKS} is not implemented on CUDA, got {length}")
    return Chunks(length, count, triton.next_power_of_2(count), size)


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
        """seed_ptr, seed, offset_ptr, offset."""
        return self.seed, self.seed_value, self.offset, self.offset_value

    @property
    def keywords(self) -> dict[str, int]:
        """Constexprs: 0 a value, 1 one entry, 2 one per row."""
        return {"SEEDS": _per_row(self.seed), "OFFSETS": _per_row(self.offset)}

    def part(self, outputs: slice) -> "Random":
        """The state of some outputs."""
        return Random(
            _entries(self.seed, outputs), self.seed_value, _entries(self.offset, outputs), self.offset_value, outputs.start
        )


@dataclass(frozen=True)
class Filters:
    """top_k (0: off) and top_p (1: off), for each output or one for all; top_p is of the top-k's mass, or of the row's."""

    top_k: Tensor | None = None
    top_k_value: int = 0
    top_p: Tensor | None = None
    top_p_value: float = 1.0
    joint: bool = False

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
            _entries(self.top_k, outputs), self.top_k_value, _entries(self.top_p, outputs), self.top_p_value, self.joint
        )


def sample_from_probs(
    ids: Tensor,
    valid: Tensor,
    probs: Tensor,
    indices: Tensor | None,
    top_k: Tensor | None,
    top_k_value: int,
    top_p: Tensor | None,
    top_p_value: float,
    min_p: Tensor | None,
    min_p_value: float,
    joint: bool,
    seed: Tensor | None,
    seed_value: int,
    offset: Tensor | None,
    offset_value: int,
    pdl: bool | None = None,
) -> None:
    """ids[i] from row indices[i] of probs [rows, vocab] under its filters; valid[i]: that row is a distribution."""
    random = Random(seed, seed_value, offset, offset_value)
    filters = Filters(top_k, top_k_value, top_p, top_p_value, joint)
    on = filters.keywords(probs.shape[1])
    filtered = bool(on["USE_K"] or on["USE_P"])
    if filtered and (min_p is not None or min_p_value > 0):
        raise NotImplementedError("min_p together with top_k or top_p is not implemented")
    for part in _slices(len(ids), probs.shape[1], filtered):
        out = ids[part], valid[part], probs, _entries(indices, part)
        if filtered:
            _select(*out, filters.part(part), random.part(part), pdl)
        else:
            _draw(*out, _entries(min_p, part), min_p_value, random.part(part), pdl)


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
) -> None:
    """ids[i] from the softmax of row indices[i] of logits [rows, vocab]; valid[i]: some logit of it is above -inf."""
    random, chunks, overlap = Random(seed, seed_value, offset, offset_value), chunks_of(logits.shape[1]), _pdl(logits, pdl)
    for part in _slices(len(ids), chunks.length, False):
        rows, count, state = _entries(indices, part), part.stop - part.start, random.part(part)
        sums = logits.new_empty((count, 2, chunks.padded), dtype=torch.float32)
        where = {"INDIRECT": rows is not None, **chunks.keywords}
        draw.exp_sums_kernel[(count * chunks.count,)](
            sums, logits, logits.stride(0), rows, chunks.length, chunks.count, None, 1.0,
            TEMPERATURES=False, ENABLE_PDL=overlap, **where, num_warps=CHUNK_WARPS,
        )  # fmt: skip
        draw.draw_from_logits_kernel[(count,)](
            ids[part], valid[part], sums, logits, logits.stride(0), rows, chunks.length, chunks.count,
            *state.arguments, state.first, **where, **state.keywords, **_after(overlap), num_warps=ROW_WARPS,
        )  # fmt: skip


def softmax(
    out: Tensor, logits: Tensor, temperature: Tensor | None, temperature_value: float, pdl: bool | None = None
) -> None:
    """out = softmax(logits / temperature) [rows, vocab], fp32; zeros for a row of -inf alone."""
    if not len(logits):
        return
    chunks, overlap, num_rows = chunks_of(logits.shape[1]), _pdl(logits, pdl), len(logits)
    grid = (num_rows * chunks.count,)
    heat = {"TEMPERATURES": temperature is not None}
    sums = None
    if chunks.count > 1:
        sums = logits.new_empty((num_rows, 2, chunks.padded), dtype=torch.float32)
        draw.exp_sums_kernel[grid](
            sums, logits, logits.stride(0), None, chunks.length, chunks.count, temperature, temperature_value,
            INDIRECT=False, ENABLE_PDL=overlap, **heat, **chunks.keywords, num_warps=CHUNK_WARPS,
        )  # fmt: skip
    draw.softmax_kernel[grid](
        out, sums, logits, logits.stride(0), chunks.length, chunks.count, temperature, temperature_value,
        **heat, **chunks.keywords, **_after(overlap and chunks.count > 1), num_warps=CHUNK_WARPS,
    )  # fmt: skip


def renorm_probs(
    out: Tensor,
    probs: Tensor,
    top_k: Tensor | None,
    top_k_value: int,
    top_p: Tensor | None,
    top_p_value: float,
    pdl: bool | None = None,
) -> None:
    """out = the probabilities that are kept, relative to their sum [rows, vocab], fp32; NaN in a row that has none."""
    filters = Filters(top_k, top_k_value, top_p, top_p_value)
    for part in _slices(len(probs), probs.shape[1], True):
        x = probs[part]
        chunks, from_value, kept = _thresholds(x, filters.part(part), signed=False, mass=True, pdl=pdl)
        draw.renorm_kernel[(len(x) * chunks.count,)](
            out[part], x, x.stride(0), from_value, kept, chunks.length, chunks.count,
            CHUNK=chunks.size, num_warps=CHUNK_WARPS,
        )  # fmt: skip


def mask_logits(out: Tensor, logits: Tensor, top_k: Tensor | None, top_k_value: int, pdl: bool | None = None) -> None:
    """out = logits [rows, vocab], fp32, with -inf below the k-th largest of the row."""
    for part in _slices(len(logits), logits.shape[1], True):
        x = logits[part]
        filters = Filters(top_k, top_k_value).part(part)
        chunks, from_value, _ = _thresholds(x, filters, signed=True, mass=False, pdl=pdl)
        draw.mask_kernel[(len(x) * chunks.count,)](
            out[part], x, x.stride(0), from_value, chunks.length, chunks.count, CHUNK=chunks.size, num_warps=CHUNK_WARPS
        )


def top_k(
    ids: Tensor,
    input: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    prefer_large_ids: bool,
    pdl: bool | None = None,
) -> None:
    """ids [rows, k]: the k largest of input[r, start : start + length], as rising positions from start, padded with -1."""
    k = ids.shape[1]
    for part in _slices(len(input), input.shape[1], True):
        x, begins, sizes = input[part], _entries(starts, part), _entries(lengths, part)
        windows = begins is not None or sizes is not None
        filters = Filters(top_k_value=k)
        chunks, from_value, _ = _thresholds(x, filters, signed=True, mass=False, starts=begins, lengths=sizes, pdl=pdl)
        counts = ids.new_empty((len(x), 2, chunks.padded))
        grid = (len(x) * chunks.count,)
        select_ids.count_kernel[grid](
            counts, x, x.stride(0), from_value, sizes, begins, chunks.length, chunks.count,
            WINDOW=windows, **chunks.keywords, num_warps=CHUNK_WARPS,
        )  # fmt: skip
        select_ids.write_ids_kernel[grid](
            ids[part], ids.stride(0), k, x, x.stride(0), from_value, counts, sizes, begins, chunks.length, chunks.count,
            WINDOW=windows, LARGE_IDS=prefer_large_ids, BLOCK_K=1024, **chunks.keywords, num_warps=CHUNK_WARPS,
        )  # fmt: skip


def chain_speculative(
    ids: Tensor,
    accepted: Tensor,
    emitted: Tensor,
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    seed: Tensor | None,
    seed_value: int,
    offset: Tensor | None,
    offset_value: int,
) -> None:
    """ids [batch, n + 1] from proposals [batch, n]; the counters [batch] are added to."""
    batch_size, num_tokens = draft_token_ids.shape
    if not batch_size:
        return
    random, chunks = Random(seed, seed_value, offset, offset_value), chunks_of(draft_probs.shape[2])
    ends = ids.new_empty(batch_size)
    masses = ids.new_empty((batch_size, 2, chunks.padded), dtype=torch.float32)
    probs = (
        draft_probs, draft_probs.stride(0), draft_probs.stride(1), target_probs, target_probs.stride(0), target_probs.stride(1)
    )  # fmt: skip
    speculative.accept_kernel[(batch_size,)](
        ids, ids.stride(0), accepted, accepted.stride(0), emitted, emitted.stride(0), ends,
        *probs[:3], draft_token_ids, *probs[3:], num_tokens, *random.arguments,
        **random.keywords, BLOCK=triton.next_power_of_2(num_tokens + 1), num_warps=1,
    )  # fmt: skip
    speculative.last_masses_kernel[(batch_size * chunks.count,)](
        masses, ends, *probs, num_tokens, chunks.length, chunks.count, **chunks.keywords, num_warps=CHUNK_WARPS
    )
    speculative.last_token_kernel[(batch_size,)](
        ids, ids.stride(0), masses, ends, *probs, num_tokens, chunks.length, chunks.count, *random.arguments,
        **random.keywords, **chunks.keywords, num_warps=ROW_WARPS,
    )  # fmt: skip


def _draw(
    ids: Tensor, valid: Tensor, probs: Tensor, indices: Tensor | None, min_p: Tensor | None, min_p_value: float,
    random: Random, pdl: bool | None,
) -> None:  # fmt: skip
    """Tokens of rows without a threshold to search."""
    chunks, overlap, count = chunks_of(probs.shape[1]), _pdl(probs, pdl), len(ids)
    use_min_p = 2 if min_p is not None else int(min_p_value > 0)
    where = {"INDIRECT": indices is not None, **chunks.keywords}
    masses, maxima = probs.new_empty((2, count, chunks.padded), dtype=torch.float32)
    thresholds = probs.new_empty(count, dtype=torch.float32)
    if use_min_p:
        draw.max_kernel[(count * chunks.count,)](
            maxima, probs, probs.stride(0), indices, chunks.length, chunks.count,
            ENABLE_PDL=overlap, **where, num_warps=CHUNK_WARPS,
        )  # fmt: skip
    draw.mass_kernel[(count * chunks.count,)](
        masses, thresholds, maxima, probs, probs.stride(0), indices, chunks.length, chunks.count, min_p, min_p_value,
        USE_MIN_P=use_min_p, **where, **_after(overlap, bool(use_min_p)), num_warps=CHUNK_WARPS,
    )  # fmt: skip
    draw.draw_kernel[(count,)](
        ids, valid, masses, thresholds, probs, probs.stride(0), indices, chunks.length, chunks.count,
        *random.arguments, random.first, USE_THRESHOLD=bool(use_min_p), **where, **random.keywords, **_after(overlap),
        num_warps=ROW_WARPS,
    )  # fmt: skip


def _select(
    ids: Tensor, valid: Tensor, probs: Tensor, indices: Tensor | None, filters: Filters, random: Random, pdl: bool | None
) -> None:  # fmt: skip
    """Tokens of rows under top-k and top-p."""
    _search(
        probs, len(ids), filters, outputs=(ids, valid, None, None), signed=False, mass=True, random=random,
        indices=indices, pdl=pdl,
    )  # fmt: skip


def _thresholds(
    x: Tensor, filters: Filters, *, signed: bool, mass: bool, starts: Tensor | None = None, lengths: Tensor | None = None,
    pdl: bool | None = None,
) -> tuple[Chunks, Tensor, Tensor]:  # fmt: skip
    """The chunks of rows x, their thresholds [rows] and (mass) the mass kept [rows]."""
    thresholds, kept = x.new_empty((2, len(x)), dtype=torch.float32)
    chunks = _search(
        x, len(x), filters, outputs=(None, None, thresholds, kept), signed=signed, mass=mass, random=None,
        starts=starts, lengths=lengths, pdl=pdl,
    )  # fmt: skip
    return chunks, thresholds, kept


def _search(
    x: Tensor, num_outputs: int, filters: Filters, *, outputs: tuple[Tensor | None, ...], signed: bool, mass: bool,
    random: Random | None, indices: Tensor | None = None, starts: Tensor | None = None, lengths: Tensor | None = None,
    pdl: bool | None = None,
) -> Chunks:  # fmt: skip
    """The three steps of threshold.py; one is enough for rows of one chunk."""
    chunks, overlap = chunks_of(x.shape[1]), _pdl(x, pdl)
    on = filters.keywords(x.shape[1])
    rows = x, x.stride(0), indices, lengths, starts, chunks.length
    where = {"INDIRECT": indices is not None, "WINDOW": starts is not None or lengths is not None}
    whole = chunks.count == 1
    work: tuple[Tensor | None, ...] = (None,) * 4
    if not whole:
        slots, counts, masses, brackets = work = _workspace(x, num_outputs, chunks)
        sample = sample_size(chunks.length)
        threshold.guess_kernel[(num_outputs,)](
            brackets, *rows, *filters.arguments(), **where, **on, SIGNED=signed, SAMPLE=sample,
            ENABLE_PDL=overlap, num_warps=sample // 512,
        )  # fmt: skip
        threshold.sweep_kernel[(num_outputs * chunks.count,)](
            slots, counts, masses, brackets, *rows, chunks.count, **where, MASS=mass, SLOTS=SLOTS,
            **chunks.keywords, **_after(overlap), num_warps=CHUNK_WARPS,
        )  # fmt: skip
    state = random or Random(None, 0, None, 0)
    threshold.select_kernel[(num_outputs,)](
        *outputs, *work, *rows, chunks.count, *filters.arguments(), *state.arguments, state.first,
        **where, **on, SIGNED=signed, MASS=mass, DRAW=random is not None, WHOLE=whole, SLOTS=SLOTS,
        WIDTH=SLOT_TILE // min(chunks.padded, SLOT_TILE), **state.keywords, **chunks.keywords,
        **_after(overlap and not whole), num_warps=ROW_WARPS,
    )  # fmt: skip
    return chunks


def _workspace(x: Tensor, num_outputs: int, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots, counts, masses and brackets, as threshold.py describes them."""
    shape = num_outputs, chunks.padded
    slots, masses = (x.new_empty((*shape, n), dtype=torch.float32) for n in (SLOTS, 3))
    return slots, x.new_empty((*shape, 2), dtype=torch.int32), masses, x.new_empty((num_outputs, 2), dtype=torch.float32)


def _slices(num_outputs: int, length: int, search: bool) -> Iterator[slice]:
    """The outputs in runs whose workspace stays within bounds."""
    chunks = chunks_of(length)
    row_bytes = chunks.padded * 4 * (SLOTS + 8 if search and chunks.count > 1 else 2)
    step = max(1, WORKSPACE_BYTES // row_bytes)
    for begin in range(0, num_outputs, step):
        yield slice(begin, min(begin + step, num_outputs))


def _entries(x: Tensor | None, outputs: slice) -> Tensor | None:
    """The entries of these outputs, if x has one for each."""
    return x if x is None or x.shape[0] == 1 else x[outputs]


def _per_row(x: Tensor | None) -> int:
    return 0 if x is None else 1 if len(x) == 1 else 2


def _pdl(x: Tensor, pdl: bool | None) -> bool:
    return config.capability(x.device) >= (9, 0) if pdl is None else pdl


def _after(overlap: bool, wait: bool = True) -> dict[str, Any]:
    """Keywords of a launch that may overlap the one before it; wait: what it does depends on that one's results."""
    return {"ENABLE_PDL": overlap, **({"launch_pdl": True} if overlap and wait else {})}


def compile_cases() -> Iterator[CompileCase]:
    """The launches of each op: vocabularies of one chunk, of Llama-2 and of Llama-3, with and without overlap."""
    for name, launch in _launches():
        called: list[Any] = []
        with _stubbed({kernel: called.append for kernel in _KERNELS}):
            launch()
        for kernel in called:
            with _stubbed({other: None for other in called if other is not kernel}):
                yield recorded(f"{kernel.__name__} {name}", kernel, launch, min_capability=90 if "pdl" in name else 80)


def _launches() -> Iterator[tuple[str, Callable[[], None]]]:
    def rows(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((8, length), dtype=dtype, device="meta")

    ids, shares, state = rows(1, torch.int32)[:, 0], rows(1)[:, 0], (None, 2**40, None, 0)
    valid = ids.bool()
    sample = partial(sample_from_probs, ids, valid)
    for vocab_size, pdl in ((1000, False), (32000, False), (128256, False), (128256, True)):
        name, probs = f"vocab={vocab_size}{' pdl' * pdl}", rows(vocab_size)
        filters = {"top_p": (0, 0.9, False), "top_k": (40, 1.0, False), "first": (40, 0.9, False), "joint": (40, 0.9, True)}
        for label, (k, p, joint) in filters.items():
            yield f"{label} {name}", partial(sample, probs, None, None, k, None, p, None, 0.0, joint, *state, pdl=pdl)
        yield f"{name}", partial(sample, probs, None, None, 0, None, 1.0, None, 0.0, False, *state, pdl=pdl)
        yield f"logits {name}", partial(sample_from_logits, ids, valid, probs, None, *state, pdl=pdl)
    tensors, probs = (ids, 0, shares, 1.0, None, 0.0, False, ids.long(), 0, ids.long(), 0), rows(128256, torch.bfloat16)
    yield "tensors bf16", partial(sample, probs, ids, *tensors, pdl=False)
    yield "min_p bf16", partial(sample, probs, ids, None, 0, None, 1.0, shares, 0.0, False, *state, pdl=False)
    out = rows(128256)
    yield "softmax", partial(softmax, out, probs, shares, 0.0, pdl=False)
    yield "renorm", partial(renorm_probs, out, probs, None, 40, None, 0.9, pdl=False)
    yield "mask", partial(mask_logits, out, probs, None, 40, pdl=False)
    yield "top_k", partial(top_k, rows(2048, torch.int32), probs, ids, ids, True, pdl=False)
    chain = torch.empty((8, 5, 128256), device="meta")
    tokens = rows(5, torch.int32)
    yield "chain", partial(chain_speculative, tokens, ids, ids, chain[:, :4], tokens[:, :4], chain, *state)


_KERNELS = tuple(
    x for module in (draw, select_ids, speculative, threshold) for n, x in vars(module).items() if n.endswith("_kernel")
)


@contextmanager
def _stubbed(kernels: dict[Any, Callable[[Any], None] | None]) -> Iterator[None]:
    """Launches of these kernels call the function given instead, with the kernel, or do nothing."""

    def stub(kernel: Any, call: Callable[[Any], None] | None) -> Callable[..., None]:
        return lambda *args, **kwargs: call(kernel) if call else None

    for kernel, call in kernels.items():
        kernel.run = stub(kernel, call)
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.run  # back to the method of its class
