"""Conversions to narrow formats in PyTorch and numpy."""

import numpy as np
import torch
from torch import Tensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def store(out: Tensor, x: Tensor, scale: Tensor | None = None, factor: float = 1.0) -> None:
    """out = x; if out is fp8, x * factor / scale, what is too large for it becoming its largest (NaN stays NaN)."""
    if out.dtype in FP8_DTYPES:
        largest = torch.finfo(out.dtype).max
        x = (x * (factor if scale is None else factor / scale.float())).clamp(-largest, largest)
    out.copy_(x)


def packbits(out: Tensor, x: Tensor, little: bool) -> None:
    """out [ceil(n / 8)] = the flags x [n], bool or uint8."""
    out.copy_(torch.from_numpy(np.packbits(x.numpy(), bitorder="little" if little else "big")))


def segment_packbits(out: Tensor, x: Tensor, indptr: Tensor, out_indptr: Tensor, little: bool) -> None:
    """The same for segments from indptr[i] to indptr[i + 1], whose bytes start at out_indptr[i]."""
    begin, first_byte = indptr.numpy(), out_indptr.numpy()
    place = np.arange(begin[0], begin[-1]) + np.repeat(first_byte[:-1] * 8 - begin[:-1], np.diff(begin))
    flags = np.zeros(out.shape[0] * 8, dtype=bool)
    flags[place] = x.numpy()[begin[0] : begin[-1]]
    packbits(out, torch.from_numpy(flags), little)
