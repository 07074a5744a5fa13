"""The frequencies of rotary embeddings (arXiv:2104.09864), with Llama 3.1's smoothing: one small table per model."""

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def frequencies(
    rotary_dim: int, rope_scale: float, rope_theta: float, llama31: tuple[float, ...] | None, device: torch.device
) -> Tensor:
    """Radians per token of each rotated pair, [rotary_dim / 2] fp32 on `device`; kept, as every layer asks again.

    fp64 inside: an error of one part in 2**24 turns the fastest pair by 0.06 radians at position 1e6.
    llama31: (low_freq_factor, high_freq_factor, old_context_len): pairs that turn at least high_freq_factor times
    within the old context keep their frequency, those that turn at most low_freq_factor times are slowed by rope_scale,
    and those between are mixed linearly.
    """
    plain = rope_theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / -rotary_dim)
    scaled = plain / rope_scale
    if llama31 is not None:
        low, high, old_context_len = llama31
        turns = plain * (old_context_len / (2 * math.pi))
        scaled = torch.lerp(scaled, plain, ((turns - low) / (high - low)).clamp(0, 1))
    return scaled.float().to(device)


@lru_cache(maxsize=64)
def grid_frequencies(channels: tuple[int, ...], base: float, device: torch.device) -> Tensor:
    """Radians per patch of each pair, [head_dim / 2] fp32, where each axis of a grid has its own leading channels."""
    return torch.cat([frequencies(n, 1.0, base, None, device) for n in channels if n])
