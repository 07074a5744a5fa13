"""Speculative sampling of chains: tests, masses of what may be drawn at the end of the chain, and that draw."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.config import SamplingConfig
from flashtile.kernels.sampling.rows import (
    Random,
    chunks_of,
    find_chunk,
    first_above,
    load_chunk,
    uniform,
)
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recordings


@triton.jit(do_not_specialize=["seed", "offset", "first_output"])
def accept_kernel(
    ids_ptr, stride_ids, accepted_ptr, stride_accepted, emitted_ptr, stride_emitted, ends_ptr,
    draft_ptr, stride_draft_batch, stride_draft_token, tokens_ptr, target_ptr, stride_target_batch, stride_target_token,
    num_tokens, seed_ptr, seed, offset_ptr, offset, first_output,
    SEEDS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each request: its proposals up to the first that fails, -1 after it, and the counters.

    ends: the number of proposals emitted, which is the place of the token drawn at the end.
    """
    request = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    mask = place < num_tokens
    token = tl.load(tokens_ptr + request.to(tl.int64) * num_tokens + place, mask=mask, other=0).to(tl.int64)
    draft = draft_ptr + request.to(tl.int64) * stride_draft_batch + place.to(tl.int64) * stride_draft_token + token
    target = target_ptr + request.to(tl.int64) * stride_target_batch + place.to(tl.int64) * stride_target_token + token
    p_draft = tl.load(draft, mask=mask, other=0.0).to(tl.float64)
    p_target = tl.load(target, mask=mask, other=0.0).to(tl.float64)
    u = uniform(seed_ptr, seed, offset_ptr, offset, request, first_output, place, SEEDS, OFFSETS)
    passed = mask & (u * p_draft < p_target)
    end = tl.min(tl.where(passed, num_tokens, place), 0)
    end = tl.minimum(end, num_tokens)
    ids = tl.where(place < end, token, -1).to(tl.int32)
    tl.store(ids_ptr + request.to(tl.int64) * stride_ids + place, ids, mask=place <= num_tokens)
    tl.store(ends_ptr + request, end)
    accepted_ptr += request.to(tl.int64) * stride_accepted
    emitted_ptr += request.to(tl.int64) * stride_emitted
    tl.store(accepted_ptr, tl.load(accepted_ptr) + tl.sum(passed.to(tl.int32), 0))
    tl.store(emitted_ptr, tl.load(emitted_ptr) + end)


@triton.jit
def last_chunk(
    draft_ptr, stride_draft_batch, stride_draft_token, target_ptr, stride_target_batch, stride_target_token,
    request, end, num_tokens, chunk, length, CHUNK: tl.constexpr,
):  # fmt: skip
    """(target, residual) [CHUNK] for the token after `end` proposals; past the last proposal the residual is 0."""
    request = request.to(tl.int64)
    step = end.to(tl.int64)
    target = load_chunk(target_ptr + request * stride_target_batch + step * stride_target_token, chunk, length, CHUNK)
    drafted = tl.where(end < num_tokens, length, 0)  # the bonus row has no draft
    draft = load_chunk(draft_ptr + request * stride_draft_batch + step * stride_draft_token, chunk, drafted, CHUNK)
    target = tl.maximum(target, 0.0)
    return target, tl.where(end < num_tokens, tl.maximum(target - tl.maximum(draft, 0.0), 0.0), 0.0)


@triton.jit
def last_masses_kernel(
    masses_ptr, ends_ptr, draft_ptr, stride_draft_batch, stride_draft_token,
    target_ptr, stride_target_batch, stride_target_token, num_tokens, length, num_chunks,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """masses [batch, 2, NUM_CHUNKS], fp32: of target and of the residual, in each chunk."""
    request = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    target, residual = last_chunk(
        draft_ptr, stride_draft_batch, stride_draft_token, target_ptr, stride_target_batch, stride_target_token,
        request, tl.load(ends_ptr + request), num_tokens, chunk, length, CHUNK,
    )  # fmt: skip
    place = request.to(tl.int64) * 2 * NUM_CHUNKS + chunk
    tl.store(masses_ptr + place, tl.sum(target, 0))
    tl.store(masses_ptr + place + NUM_CHUNKS, tl.sum(residual, 0))


@triton.jit(do_not_specialize=["seed", "offset", "first_output"])
def last_token_kernel(
    ids_ptr, stride_ids, masses_ptr, ends_ptr, draft_ptr, stride_draft_batch, stride_draft_token,
    target_ptr, stride_target_batch, stride_target_token, num_tokens, length, num_chunks,
    seed_ptr, seed, offset_ptr, offset, first_output, SEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The token at the end of each chain: from the residual, or from target where that has no mass."""
    request = tl.program_id(0)
    u = uniform(seed_ptr, seed, offset_ptr, offset, request, first_output, num_tokens, SEEDS, OFFSETS)
    chunks = tl.arange(0, NUM_CHUNKS)
    place = request.to(tl.int64) * 2 * NUM_CHUNKS + chunks
    of_target = tl.load(masses_ptr + place, mask=chunks < num_chunks, other=0.0)
    of_residual = tl.load(masses_ptr + place + NUM_CHUNKS, mask=chunks < num_chunks, other=0.0)
    use_residual = tl.sum(of_residual, 0) > 0
    chunk, rest, good = find_chunk(tl.where(use_residual, of_residual, of_target), u, NUM_CHUNKS)
    end = tl.load(ends_ptr + request)
    target, residual = last_chunk(
        draft_ptr, stride_draft_batch, stride_draft_token, target_ptr, stride_target_batch, stride_target_token,
        request, end, num_tokens, chunk, length, CHUNK,
    )  # fmt: skip
    token = chunk * CHUNK + first_above(tl.where(use_residual, residual, target), rest, CHUNK)
    tl.store(ids_ptr + request.to(tl.int64) * stride_ids + end, tl.where(good, token, 0))


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
    config: SamplingConfig | None = None,
) -> None:
    """ids [batch, n + 1] from proposals [batch, n]; the counters [batch] are added to."""
    batch_size, num_tokens = draft_token_ids.shape
    if not batch_size:
        return
    random = Random(seed, seed_value, offset, offset_value)
    chunks = chunks_of(draft_probs.shape[2], config, draft_probs.device)
    ends = ids.new_empty(batch_size)
    masses = ids.new_empty((batch_size, 2, chunks.padded), dtype=torch.float32)
    probs = (
        draft_probs, draft_probs.stride(0), draft_probs.stride(1),
        target_probs, target_probs.stride(0), target_probs.stride(1),
    )  # fmt: skip
    accept_kernel[(batch_size,)](
        ids, ids.stride(0), accepted, accepted.stride(0), emitted, emitted.stride(0), ends,
        *probs[:3], draft_token_ids, *probs[3:], num_tokens, *random.arguments,
        **random.keywords, BLOCK=triton.next_power_of_2(num_tokens + 1), num_warps=1,
    )  # fmt: skip
    last_masses_kernel[(batch_size * chunks.count,)](
        masses, ends, *probs, num_tokens, chunks.length, chunks.count,
        **chunks.keywords, num_warps=chunks.config.chunk_warps,
    )  # fmt: skip
    last_token_kernel[(batch_size,)](
        ids, ids.stride(0), masses, ends, *probs, num_tokens, chunks.length, chunks.count, *random.arguments,
        **random.keywords, **chunks.keywords, num_warps=chunks.config.draw_warps,
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """A chain of four proposals over Llama-3's vocabulary."""
    chain = torch.empty((8, 5, 128256), device="meta")
    ids = torch.empty((8, 5), dtype=torch.int32, device="meta")
    launch = partial(
        chain_speculative, ids, ids[:, 0], ids[:, 0], chain[:, :4], ids[:, :4], chain, None, 2**40, None, 0
    )
    yield from recordings(
        lambda kernel: kernel.__name__, (accept_kernel, last_masses_kernel, last_token_kernel), launch
    )
