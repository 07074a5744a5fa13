"""Rotary position embeddings (arXiv:2104.09864), by definition.

Element pairs of a head are rotated by an angle that is linear in the token's position. A pair is
(i, i + rotary_dim / 2), or (2 i, 2 i + 1) if interleaved. Dimensions from rotary_dim on are left as they are."""

import math

import torch
from torch import Tensor


def frequencies(
    rotary_dim: int,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    old_context_len: int = 8192,
) -> Tensor:
    """Radians per token of each pair, [rotary_dim / 2], fp64.

    Plain: theta^(-2 i / rotary_dim) / scale. With the factors, Llama 3.1's rule: wavelengths below
    old_context_len / high_freq_factor keep the unscaled frequency, those above old_context_len / low_freq_factor are
    scaled, and in between the two are mixed linearly in old_context_len / wavelength.
    """
    plain = torch.tensor([rope_theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)], dtype=torch.float64)
    if low_freq_factor is None or high_freq_factor is None:
        return plain / rope_scale
    turns = old_context_len * plain / (2 * math.pi)  # how often the pair turns within the old context
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - kept) * plain / rope_scale + kept * plain


def yarn_frequencies(rotary_dim: int, rope_theta: float, factor: float, low: float, high: float) -> Tensor:
    """YaRN's radians per token of each pair (arXiv:2309.00071), [rotary_dim / 2], fp64.

    Pairs up to low keep their frequency, those from high on are slowed by factor, and between the two the share of the
    slowed frequency grows linearly with the pair's index. The ramp is at least 0.001 pairs long: low = high is a step.
    """
    freqs = []
    for i in range(rotary_dim // 2):
        plain = rope_theta ** (-2 * i / rotary_dim)
        slowed = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
        freqs.append((1 - slowed) * plain + slowed * plain / factor)
    return torch.tensor(freqs, dtype=torch.float64)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """x [nnz, num_heads, head_dim] turned by the angles whose cos and sin are given, [nnz, rotary_dim / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleave else (slice(half), slice(half, 2 * half))
    )
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def apply_rope_pos_ids(
    q: Tensor, k: Tensor, pos_ids: Tensor, freqs: Tensor, interleave: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k [nnz, num_heads, head_dim] turned by pos_ids [nnz] * freqs [rotary_dim / 2]; angles in freqs' dtype."""
    angles = pos_ids[:, None].to(freqs.dtype) * freqs
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    return rotate(q, cos, sin, interleave), rotate(k, cos, sin, interleave)


def apply_rope_with_cos_sin_cache(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor, interleave: bool = False
) -> tuple[Tensor, Tensor]:
    """The same with cos and sin looked up: row p of cos_sin_cache [max_position, rotary_dim] is cos, then sin, at p."""
    cos, sin = cos_sin_cache[positions.long()].to(q.dtype).chunk(2, dim=-1)
    return rotate(q, cos, sin, interleave), rotate(k, cos, sin, interleave)
