"""Cases of packed bits, and what must hold for each: on the CPU, in Triton's interpreter and on a GPU."""

import numpy as np
import torch
from torch import Tensor

from flashtile import quantization
from flashtile.reference import quantization as reference

SMALL_LENGTHS = (0, 1, 7, 8, 9, 64, 77)
LENGTHS = (*SMALL_LENGTHS, 4096, 5001)
SEGMENTS = ((), (5,), (0, 3, 0, 16, 9), (8, 8), (1,) * 20)


def flags(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random; as bytes, every other value is a zero and the rest are not all ones."""
    values = torch.randint(-4, 4, (n,), generator=torch.Generator().manual_seed(n)).clamp_min(0)
    return values.to(dtype).to(device)


def check_packbits(n: int, device: str) -> None:
    """Equal to the definition and to numpy, from bool, bytes and strided flags."""
    for dtype in (torch.bool, torch.uint8):
        x = flags(n, dtype, device)
        for bitorder in ("big", "little"):
            got = quantization.packbits(x, bitorder)
            assert torch.equal(got.cpu(), reference.packbits(x, bitorder))
            assert np.array_equal(got.cpu().numpy(), np.packbits(x.cpu().numpy(), bitorder=bitorder))
            assert torch.equal(quantization.packbits(torch.stack([x, x], 1)[:, 0], bitorder), got)


def check_segment_packbits(lengths: tuple[int, ...], device: str) -> None:
    """Equal to the definition; the flags before the first segment and after the last do not matter."""
    indptr = 3 + torch.tensor([0, *lengths]).cumsum(0)
    x = flags(int(indptr[-1]) + 5, torch.bool, device)
    for bitorder in ("big", "little"):
        expected, expected_indptr = reference.segment_packbits(x, indptr, bitorder)
        for dtype in (torch.int32, torch.int64):
            got, got_indptr = quantization.segment_packbits(x, indptr.to(dtype).to(device), bitorder)
            assert got_indptr.dtype == torch.int32
            assert torch.equal(got.cpu(), expected)
            assert torch.equal(got_indptr.cpu(), expected_indptr)
