"""Rotary position embeddings (RoPE, arXiv:2104.09864). Defined by reference/rope.py.

A head's dimensions below rotary_dim are rotated in pairs by position * frequency: pairs are (i, i + rotary_dim / 2), or
(2 i, 2 i + 1) with interleave=True. Frequencies are computed in fp64 and rounded to fp32; angles, sines and products
are fp32, rounded once to the tensors' dtype. Inference only: no gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtile import checks, library
from flashtile.page import get_batch_indices_positions
from flashtile.rope_quantize import (
    mla_rope_quantize_fp8,
    rope_quantize_fp8,
    rope_quantize_fp8_append_paged_kv_cache,
)

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "mla_rope_quantize_fp8",
    "rope_quantize_fp8",
    "rope_quantize_fp8_append_paged_kv_cache",
]

_OUT_OF_PLACE = "Tensor(a!) q_out, Tensor(b!) k_out, Tensor q, Tensor k"
_IN_PLACE = "Tensor(a!) q, Tensor(b!) k"
_BY_FREQUENCY = "Tensor pos_ids, int rotary_dim, float rope_scale, float rope_theta, float[]? llama31, bool interleave"
_BY_CACHE = "Tensor pos_ids, Tensor cos_sin_cache, bool interleave"

_rope = library.launcher("rope", f"rope({_OUT_OF_PLACE}, {_BY_FREQUENCY}) -> ()")
_rope_inplace = library.launcher("rope", f"rope_inplace({_IN_PLACE}, {_BY_FREQUENCY}) -> ()")
_rope_cached = library.launcher("rope", f"rope_cached({_OUT_OF_PLACE}, {_BY_CACHE}) -> ()")
_rope_cached_inplace = library.launcher("rope", f"rope_cached_inplace({_IN_PLACE}, {_BY_CACHE}) -> ()")


def apply_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """q and k rotated by their positions in a ragged batch: token t of request i is at offsets[i] + t.

    Args:
        indptr: [batch_size + 1] int32 or int64, offsets of each request in the tokens of q and k.
        offsets: [batch_size] int32 or int64, position of each request's first token.
        q, k, rotary_dim, interleave, rope_scale, rope_theta: as for `apply_rope_pos_ids`.

    Returns:
        New tensors, shaped as q and k.

    Raises:
        ValueError: a shape, dtype, device, stride or rotary_dim that does not fit; on the host also an indptr that does
            not end at the number of tokens, or a negative position.
    """
    pos_ids = _ragged_positions(q, indptr, offsets)
    return _apply(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)


def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope`, written into q and k."""
    _apply_inplace(q, k, _ragged_positions(q, indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta)


def apply_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """q and k rotated by their positions.

    Args:
        q: [nnz, num_qo_heads, head_dim]; fp16, bf16 or fp32; any strides, the last dimension contiguous.
        k: [nnz, num_kv_heads, head_dim], of q's dtype.
        pos_ids: [nnz] int32 or int64, tokens from 0.
        rotary_dim: how many leading dimensions of a head are rotated, even; the rest is copied. Default: head_dim.
        interleave: pairs are neighbours (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
        rope_scale: divides all frequencies.
        rope_theta: pair i turns by theta^(-2 i / rotary_dim) / rope_scale radians per token.

    Returns:
        New tensors, shaped as q and k.

    Raises:
        ValueError: a shape, dtype, device, stride or rotary_dim that does not fit; a negative position on the host.
    """
    return _apply(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)


def apply_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids`, written into q and k."""
    _apply_inplace(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)


def apply_llama31_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`apply_rope` with Llama 3.1's frequencies, see `apply_llama31_rope_pos_ids`."""
    llama31 = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    pos_ids = _ragged_positions(q, indptr, offsets)
    return _apply(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, llama31)


def apply_llama31_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope`, written into q and k."""
    llama31 = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    pos_ids = _ragged_positions(q, indptr, offsets)
    _apply_inplace(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, llama31)


def apply_llama31_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`apply_rope_pos_ids` with Llama 3.1's frequencies (arXiv:2407.21783).

    A pair that turns at least high_freq_factor times within old_context_len tokens keeps its frequency, one that turns
    at most low_freq_factor times is slowed by rope_scale, and between the two the frequency is mixed linearly.

    Raises:
        ValueError: as for `apply_rope_pos_ids`; high_freq_factor not above low_freq_factor.
    """
    llama31 = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    return _apply(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, llama31)


def apply_llama31_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope_pos_ids`, written into q and k."""
    llama31 = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    _apply_inplace(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, llama31)


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    """query and key rotated by angles whose cosines and sines are given.

    Args:
        positions: [nnz] int32 or int64, rows of cos_sin_cache. One outside it is a ValueError on the host; on CUDA,
            where values are not read, its token becomes NaN.
        query: [nnz, num_qo_heads * head_size] or [nnz, num_qo_heads, head_size]; fp16, bf16 or fp32; rows may be
            strided.
        key: [nnz, num_kv_heads * head_size] or [nnz, num_kv_heads, head_size], of query's dtype.
        head_size: dimensions of a head.
        cos_sin_cache: [max_position, rotary_dim] fp32: rotary_dim / 2 cosines, then as many sines.
        is_neox: pairs are (i, i + rotary_dim / 2); False: neighbours (2 i, 2 i + 1).

    Returns:
        New tensors, shaped as query and key.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; a host position outside the cache.
    """
    query_out, key_out = _new(query), _new(key)
    q, k, positions = _check_cached(positions, query, key, head_size, cos_sin_cache)
    _rope_cached(query_out.view(q.shape), key_out.view(k.shape), q, k, positions, cos_sin_cache, not is_neox)
    return query_out, key_out


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    """`apply_rope_with_cos_sin_cache`, written into query and key."""
    q, k, positions = _check_cached(positions, query, key, head_size, cos_sin_cache)
    _rope_cached_inplace(q, k, positions, cos_sin_cache, not is_neox)


def _apply(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None,
    interleave: bool,
    rope_scale: float,
    rope_theta: float,
    llama31: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    pos_ids, rotary_dim = _check(q, k, "pos_ids", pos_ids, rotary_dim)
    q_out, k_out = _new(q), _new(k)
    _rope(q_out, k_out, q, k, pos_ids, rotary_dim, rope_scale, rope_theta, llama31, interleave)
    return q_out, k_out


def _apply_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None,
    interleave: bool,
    rope_scale: float,
    rope_theta: float,
    llama31: Sequence[float] | None = None,
) -> None:
    pos_ids, rotary_dim = _check(q, k, "pos_ids", pos_ids, rotary_dim)
    _rope_inplace(q, k, pos_ids, rotary_dim, rope_scale, rope_theta, llama31, interleave)


def _ragged_positions(q: Tensor, indptr: Tensor, offsets: Tensor) -> Tensor:
    """offsets[i] + t for token t of request i, [nnz] int32."""
    checks.check_tensor("q", q)
    offsets = checks.index_tensor("offsets", offsets, q.device, "batch_size")
    indptr = checks.index_tensor("indptr", indptr, q.device, offsets.shape[0] + 1)
    checks.check_offsets("indptr", indptr, q.shape[0])
    return get_batch_indices_positions(indptr, offsets + indptr.diff(), q.shape[0])[1]


def _llama31(low_freq_factor: float, high_freq_factor: float, old_context_len: int) -> list[float]:
    if high_freq_factor <= low_freq_factor:
        raise ValueError(
            f"high_freq_factor: expected more than low_freq_factor = {low_freq_factor}, got {high_freq_factor}"
        )
    return [float(low_freq_factor), float(high_freq_factor), float(old_context_len)]


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check_cached(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """query and key by heads, and positions fit for a kernel."""
    q, k = _by_heads("query", query, head_size), _by_heads("key", key, head_size)
    checks.check_cos_sin_cache(cos_sin_cache, q.device)
    positions, _ = _check(q, k, "positions", positions, cos_sin_cache.shape[1], len(cos_sin_cache))
    return q, k, positions


def _by_heads(name: str, x: Tensor, head_size: int) -> Tensor:
    checks.check_tensor(name, x)
    if x.dim() == 3:
        checks.check_shape(name, x, ("nnz", "num_heads", head_size))
        return x
    checks.check_shape(name, x, ("nnz", "num_heads * head_size"))
    if x.shape[1] % head_size:
        raise ValueError(f"{name}: expected rows of a multiple of head_size = {head_size} elements, got {x.shape[1]}")
    checks.check_inner_contiguous(name, x)
    return x.view(x.shape[0], x.shape[1] // head_size, head_size)


def _check(
    q: Tensor, k: Tensor, pos_name: str, pos_ids: Tensor, rotary_dim: int | None, max_position: int = 2**31
) -> tuple[Tensor, int]:
    """pos_ids fit for a kernel, and rotary_dim."""
    checks.check_shape("q", q, ("nnz", "num_qo_heads", "head_dim"))
    checks.check_dtype("q", q, checks.FLOAT_DTYPES)
    checks.check_inner_contiguous("q", q)
    nnz, _, head_dim = q.shape
    checks.check_shape("k", k, (nnz, "num_kv_heads", head_dim))
    checks.check_same_dtype("k", k, "q", q)
    checks.check_device("k", k, q.device)
    checks.check_inner_contiguous("k", k)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim: expected an even number from 2 to head_dim = {head_dim}, got {rotary_dim}")
    pos_ids = checks.index_tensor(pos_name, pos_ids, q.device, nnz)
    checks.check_between(pos_name, pos_ids, 0, max_position, "token")
    return pos_ids, rotary_dim
