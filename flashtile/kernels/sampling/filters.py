"""Rows with what the filters remove taken out: renormalised probabilities, masked logits."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import SamplingConfig
from flashtile.kernels.sampling.rows import chunks_of, load_chunk
from flashtile.kernels.sampling.threshold import KERNELS, Filters, thresholds
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recordings


@triton.jit
def renorm_kernel(
    out_ptr, x_ptr, stride_x, thresholds_ptr, kept_ptr, length, num_chunks,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = the entries not below the threshold, divided by their sum; NaN in a row without mass."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    x = tl.maximum(load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK), 0.0)
    kept = tl.load(kept_ptr + row * NUM_CHUNKS + tl.arange(0, NUM_CHUNKS))
    total = tl.sum(kept.to(tl.float64), 0).to(tl.float32)
    total = tl.where((total > 0) & (total < float("inf")), total, float("nan"))
    x = tl.where(x < tl.load(thresholds_ptr + row), 0.0, x)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(out_ptr + row * length + offs, x / total, mask=offs < length)


@triton.jit
def mask_kernel(out_ptr, x_ptr, stride_x, thresholds_ptr, length, num_chunks, CHUNK: tl.constexpr):
    """out = x, with -inf below the threshold."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    x = load_chunk(x_ptr + row * stride_x, chunk, length, CHUNK)
    x = tl.where(x < tl.load(thresholds_ptr + row), -float("inf"), x)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(out_ptr + row * length + offs, x, mask=offs < length)


def renorm_probs(
    out: Tensor,
    probs: Tensor,
    top_k: Tensor | None,
    top_k_value: int,
    top_p: Tensor | None,
    top_p_value: float,
    pdl: bool | None = None,
    config: SamplingConfig | None = None,
) -> None:
    """out = the probabilities that are kept, relative to their sum [rows, vocab], fp32; NaN in a row that has none."""
    if not len(probs):
        return
    chunks = chunks_of(probs.shape[1], config, probs.device)
    filters = Filters(top_k, top_k_value, top_p, top_p_value)
    from_value, kept = thresholds(probs, filters, chunks, signed=False, mass=True, pdl=pdl)
    renorm_kernel[(len(probs) * chunks.count,)](
        out, probs, probs.stride(0), from_value, kept, chunks.length, chunks.count,
        **chunks.keywords, num_warps=chunks.config.chunk_warps,
    )  # fmt: skip


def mask_logits(
    out: Tensor,
    logits: Tensor,
    top_k: Tensor | None,
    top_k_value: int,
    pdl: bool | None = None,
    config: SamplingConfig | None = None,
) -> None:
    """out = logits [rows, vocab], fp32, with -inf below the k-th largest of the row."""
    if not len(logits):
        return
    chunks = chunks_of(logits.shape[1], config, logits.device)
    from_value, _ = thresholds(logits, Filters(top_k, top_k_value), chunks, signed=True, mass=False, pdl=pdl)
    mask_kernel[(len(logits) * chunks.count,)](
        out, logits, logits.stride(0), from_value, chunks.length, chunks.count,
        CHUNK=chunks.size, num_warps=chunks.config.chunk_warps,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Rows of fp32 and bf16; the search has cases of its own."""
    kernels = (renorm_kernel, mask_kernel, *KERNELS)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty((8, 128256), dtype=dtype, device="meta")
        out = x.float()
        for launch in (
            partial(renorm_probs, out, x, None, 40, None, 0.9, pdl=False),
            partial(mask_logits, out, x, None, 40, pdl=False),
        ):
            cases = recordings(lambda kernel, dtype=dtype: f"{kernel.__name__} {dtype}", kernels, launch)
            yield from (case for case in cases if case.kernel in (renorm_kernel, mask_kernel))
