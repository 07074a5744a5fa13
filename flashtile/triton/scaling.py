"""Scales as these functions take them: factors, of what comes in as of what goes out."""

import torch
from torch import Tensor

from flashtile import checks

Factor = float | Tensor | None  # a number, or a tensor of one element on the device of what it multiplies

INPUT_DTYPES = (*checks.FLOAT_DTYPES, *checks.FP8_DTYPES)


def scaled(name: str, x: Tensor, factor: Factor) -> Tensor:
    """x * factor, fp32; x itself, if there is no factor and x is not fp8."""
    checks.check_dtype(name, checks.check_tensor(name, x), INPUT_DTYPES)
    if factor is None and x.dtype in checks.FLOAT_DTYPES:
        return x
    wide = x.float()
    return wide if factor is None else wide * _number(f"{name}'s scale", factor, x)


def divisor(name: str, factor: Factor, x: Tensor) -> float | Tensor:
    """1 / factor, 1 without one: what functions that divide by a scale take."""
    return 1.0 if factor is None else 1.0 / _number(name, factor, x)


def store(out: Tensor, x: Tensor, factor: Factor) -> None:
    """out = x * factor, what is too large for its dtype becoming its largest."""
    if factor is not None:
        x = x * _number("the output's scale", factor, x)
    if out.dtype in checks.FP8_DTYPES or factor is not None:
        largest = torch.finfo(out.dtype).max
        x = x.clamp(-largest, largest)
    out.copy_(x)


def _number(name: str, factor: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(factor, Tensor):
        return float(factor)
    if factor.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {list(factor.shape)}")
    checks.check_device(name, factor, x.device)
    return factor.float().reshape(())
