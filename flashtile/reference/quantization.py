"""Narrow formats, by definition."""

import torch
from torch import Tensor


def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """x / scale rounded to an fp8 dtype; what is too large becomes its largest."""
    largest = torch.finfo(dtype).max
    return (x / scale).clamp(-largest, largest).to(dtype)


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """Eight flags (not 0: set) to a byte, the last byte filled up with zeros; "little": the first in the lowest bit."""
    flags = [int(flag != 0) for flag in x.tolist()]
    flags += [0] * (-len(flags) % 8)
    places = range(8) if bitorder == "little" else range(7, -1, -1)
    groups = [flags[i : i + 8] for i in range(0, len(flags), 8)]
    return torch.tensor([sum(f << p for f, p in zip(g, places, strict=True)) for g in groups], dtype=torch.uint8)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """Each segment packed alone, and where its bytes start."""
    offsets = indptr.tolist()
    parts = [packbits(x[begin:end], bitorder) for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]
    sizes = torch.tensor([0] + [len(part) for part in parts])
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts]), sizes.cumsum(0).int()
