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


def unpack_int4(x: Tensor) -> Tensor:
    """The numbers 0..15 of packed bytes [..., n]: [..., 2n], the lower four bits of a byte first."""
    return torch.stack([x & 15, x >> 4], dim=-1).flatten(-2)


def dequantise_kv(x: Tensor, scale: Tensor | float = 1.0, zero: Tensor | float | None = None) -> Tensor:
    """Rows of a cache [..., num_kv_heads, head_dim] (of bytes with two int4 each: half as many) as fp64: (number -
    zero) * scale.

    scale, zero: one value; [num_kv_heads]; [..., num_kv_heads]; or [..., num_kv_heads, groups], groups of head_dim.
    Without zero: 8 for int4, else 0.
    """
    if zero is None:
        zero = 8.0 if x.dtype == torch.uint8 else 0.0
    numbers = unpack_int4(x).double() if x.dtype == torch.uint8 else x.double()

    def spread(factor: Tensor | float) -> Tensor:
        f = torch.as_tensor(factor).double()
        if f.dim() == numbers.dim():
            return f.repeat_interleave(numbers.shape[-1] // f.shape[-1], dim=-1)
        return f if f.numel() == 1 else f[..., None]

    return (numbers - spread(zero)) * spread(scale)


def quantise_kv(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, groups: int = 1, affine: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [..., dim] for a cache of `dtype` (uint8: two int4 to a byte), each group of dims by itself, in fp32.

    scale: one, or one for each row; None: so that the element farthest from 0 becomes the largest number, 448, 57344,
    127 or 7, or with `affine`, that the smallest element becomes the lowest number and the largest the highest. Returns
    numbers; scales and zero points [..., groups].
    """
    low, high, top, middle = {
        torch.float8_e4m3fn: (-448, 448, 448, 0),
        torch.float8_e5m2: (-57344, 57344, 57344, 0),
        torch.int8: (-128 if affine else -127, 127, 127, 0),
        torch.uint8: (0, 15, 7, 8),
    }[dtype]
    rows = x.float().reshape(-1, groups, x.shape[-1] // groups)
    given = None if scale is None else scale.float().expand(x.shape[:-1]).reshape(-1)
    numbers, scales, zeros = torch.empty_like(rows), torch.empty(rows.shape[:2]), torch.empty(rows.shape[:2])
    for r, g in ((r, g) for r in range(rows.shape[0]) for g in range(groups)):
        group = rows[r, g]
        size = group.max() - group.min() if affine else group.abs().max()
        s = size / (high - low if affine else top) if given is None else given[r]
        s = s if s > 0 else torch.tensor(1.0)
        z = low - group.min() / s if affine else torch.tensor(float(middle))
        n = group / s if dtype.is_floating_point else (group / s + z).round()
        numbers[r, g], scales[r, g], zeros[r, g] = n.clamp(low, high), s, z
    stored = numbers.reshape(x.shape).to(dtype)
    if dtype == torch.uint8:
        stored = stored[..., 0::2] + 16 * stored[..., 1::2]
    shape = (*x.shape[:-1], groups)
    return stored, scales.reshape(shape), zeros.reshape(shape)
