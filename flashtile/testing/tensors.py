"""Test tensors: random, poisoned, strided. Values do not depend on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normally distributed values."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return values.to(dtype).to(device)


def poison(x: Tensor) -> Tensor:
    """`x`, filled with NaN (the largest value, for integers): what memory that was never written may hold."""
    return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A new poisoned tensor."""
    return poison(torch.empty(tuple(shape), dtype=dtype, device=device))


def strided(x: Tensor) -> Tensor:
    """The values of `x` as a view into a larger poisoned tensor: every dimension but the last has gaps."""
    grown = [2 * n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 16]
    view = poisoned(grown, x.dtype, str(x.device))[tuple(slice(1, None, 2) for _ in x.shape[:-1]) + (slice(8, -8),)]
    return view.copy_(x)


def name(dtype: torch.dtype) -> str:
    """A short name for test ids."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
