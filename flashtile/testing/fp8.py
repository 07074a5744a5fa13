"""Comparison of fp8 results: by steps of the format, for two correct programs may round a near-tie differently."""

import os

import torch
from torch import Tensor

from flashtile.reference.quantization import quantise

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def _ordinal(x: Tensor) -> Tensor:
    """Neighbours of the format as neighbouring integers."""
    code = x.contiguous().view(torch.uint8).int()
    return (code & 0x7F) * (1 - 2 * (code >> 7))


def assert_fp8_close(got: Tensor, exact: Tensor, scale: float, name: str = "result") -> None:
    """`got` must be exact / scale in its dtype, saturated: never more than one step off, and that for one value in 20
    at most. Triton's interpreter loses the carry when a mantissa is rounded up to 2: there a binade off is accepted."""
    ideal = quantise(exact.double().cpu(), scale, got.dtype)
    steps = (_ordinal(got.cpu()) - _ordinal(ideal)).abs()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    allowed = int(1 / torch.finfo(got.dtype).eps) if interpreted else 1
    assert int(steps.max() if steps.numel() else 0) <= allowed, f"{name}: {int(steps.max())} steps of {got.dtype} off"
    off = int((steps > 0).sum())
    assert interpreted or off <= max(1, steps.numel() // 20), f"{name}: {off} of {steps.numel()} values are off"
