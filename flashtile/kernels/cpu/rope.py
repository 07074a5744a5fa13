"""Rotary embeddings in PyTorch: angles, sines and products in fp32, rounded once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtile.kernels.frequencies import frequencies


def rope(
    q_out: Tensor,
    k_out: Tensor,
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int,
    rope_scale: float,
    rope_theta: float,
    llama31: Sequence[float] | None,
    interleave: bool,
) -> None:
    """q and k [nnz, num_heads, head_dim] turned by pos_ids [nnz] times the frequencies; outputs may be the inputs."""
    llama31 = None if llama31 is None else tuple(llama31)
    angles = torch.outer(pos_ids.float(), frequencies(rotary_dim, rope_scale, rope_theta, llama31, q.device))
    rotate(q_out, k_out, q, k, angles.cos(), angles.sin(), interleave)


def rope_inplace(q: Tensor, k: Tensor, *args) -> None:
    """`rope`, written into q and k."""
    rope(q, k, q, k, *args)


def rope_cached(
    q_out: Tensor, k_out: Tensor, q: Tensor, k: Tensor, pos_ids: Tensor, cos_sin_cache: Tensor, interleave: bool
) -> None:
    """The same; row p of cos_sin_cache [max_position, rotary_dim] is cos, then sin, of the angles at position p."""
    cos, sin = cos_sin_cache.index_select(0, pos_ids).chunk(2, dim=-1)
    rotate(q_out, k_out, q, k, cos, sin, interleave)


def rope_cached_inplace(q: Tensor, k: Tensor, *args) -> None:
    """`rope_cached`, written into q and k."""
    rope_cached(q, k, q, k, *args)


def rotate(q_out: Tensor, k_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> None:
    """q and k [nnz, num_heads, head_dim] turned by angles whose cos and sin are given, [nnz, rotary_dim / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    for out, x in ((q_out, q), (k_out, k)):
        if out.dtype != torch.float32:
            y = x.float()
        else:
            y = out if out is x else out.copy_(x)
        first, second = _pairs(y, rotary_dim, interleave)
        crossed = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(crossed)
        if y is not out:
            out.copy_(y)


def _pairs(x: Tensor, rotary_dim: int, interleave: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second element of each pair."""
    if interleave:
        return x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
