"""The frequencies of rotary embeddings (arXiv:2104.09864) on the device: one small table per model."""

from functools import lru_cache

import torch
from torch import Tensor

from flashtile.plan import encoding
from flashtile.plan.encoding import Rope


@lru_cache(maxsize=64)
def frequencies(
    rotary_dim: int, rope_scale: float, rope_theta: float, llama31: tuple[float, ...] | None, device: torch.device
) -> Tensor:
    """Radians per token of each rotated pair, [rotary_dim / 2] fp32 on `device`; kept, as every layer asks again.

    llama31: (low_freq_factor, high_freq_factor, old_context_len), see plan/encoding.py.
    """
    return encoding.frequencies(rotary_dim, Rope(rope_scale, rope_theta, llama31)).float().to(device)


@lru_cache(maxsize=64)
def grid_frequencies(
    channels: tuple[int, ...], base: float, yarn: tuple[float, float, float], device: torch.device
) -> Tensor:
    """Radians per patch of each pair, [head_dim / 2] fp32, where each axis of a grid has its own leading channels.

    yarn: (factor, low, high), see plan/encoding.py; low and high count the pairs of an axis.
    """
    return torch.cat([encoding.yarn_frequencies(n, base, *yarn) for n in channels]).float().to(device)
