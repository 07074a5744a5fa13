"""Position encodings that attention applies itself: their parameters, and the fp32 numbers that a kernel reads."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of q and k (arXiv:2104.09864): dims d and d + head_dim / 2 are turned by position * frequency.

    scale divides the frequencies theta ** (-2 d / head_dim). llama31: (low_freq_factor, high_freq_factor,
    old_context_len), see `frequencies`.
    """

    scale: float = 1.0
    theta: float = 1e4
    llama31: tuple[float, ...] | None = None

    def check(self) -> None:
        """Raise ValueError for parameters that give no frequencies."""
        for name, x in (("rope_scale", self.scale), ("rope_theta", self.theta)):
            if not 0 < x < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {x}")
        if self.llama31 is not None and not self.llama31[0] < self.llama31[1]:
            low, high = self.llama31[:2]
            raise ValueError(f"high_freq_factor: expected more than low_freq_factor = {low}, got {high}")


def frequencies(rotary_dim: int, rope: Rope) -> Tensor:
    """Radians per token of each rotated pair, [rotary_dim / 2] fp64.

    fp64 until the end: an error of one part in 2**24 turns the fastest pair by 0.06 radians at position 1e6.
    With llama31 (arXiv:2407.21783), pairs that turn at least high_freq_factor times within the old context keep their
    frequency, those that turn at most low_freq_factor times are slowed by the scale, those between are mixed linearly.
    """
    plain = rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / -rotary_dim)
    scaled = plain / rope.scale
    if rope.llama31 is None:
        return scaled
    low, high, old_context_len = rope.llama31
    turns = plain * (old_context_len / (2 * math.pi))
    return torch.lerp(scaled, plain, ((turns - low) / (high - low)).clamp(0, 1))


def yarn_frequencies(rotary_dim: int, theta: float, factor: float, low: float, high: float) -> Tensor:
    """`frequencies` by YaRN (arXiv:2309.00071), [rotary_dim / 2] fp64: pairs up to low keep theirs, those from high on
    are slowed by factor, those between are mixed linearly in the pair's index."""
    plain = frequencies(rotary_dim, Rope(theta=theta))
    pair = torch.arange(rotary_dim // 2, dtype=torch.float64)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)  # low = high: a step behind pair low
    return torch.lerp(plain, plain / factor, ramp)


def alibi_slopes(num_heads: int) -> Tensor:
    """The slope of each query head (ALiBi, arXiv:2108.12409), [num_heads] fp64.

    Of n heads, a power of 2: 2 ** (-8 i / n) for i = 1..n. Of other numbers: those of the next lower power of 2, then
    every second one of twice as many heads.
    """
    n = 1 << (num_heads.bit_length() - 1)
    whole = torch.arange(1, n + 1, dtype=torch.float64) * (-8 / n)
    between = torch.arange(1, 2 * (num_heads - n) + 1, 2, dtype=torch.float64) * (-4 / n)
    return torch.exp2(torch.cat([whole, between]))
