"""Norms in PyTorch: few calls over whole tensors, fp32 inside."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtile.kernels.cpu.quantization import store


def rmsnorm(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    silu: bool,
    out_scale: Tensor | None,
    out_factor: float,
    enable_pdl: bool,
) -> None:
    """out = rmsnorm(input) * (weight_offset + weight) [..., d], its silu if asked for; fp8 out is scaled by
    out_factor / out_scale."""
    if weight_offset:
        weight = weight.float() + weight_offset
    if out.dtype == torch.float32 and not silu:
        torch.mul(input, _inverse_rms(input, eps), out=out).mul_(weight)
    else:
        y = normalised(input.float(), weight, eps)
        store(out, F.silu(y) if silu else y, out_scale, out_factor)


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float, enable_pdl: bool
) -> None:
    """residual += input; input = rmsnorm of the unrounded sum."""
    total = _add(residual, input)
    rmsnorm(input, total, weight, eps, weight_offset, False, None, 1.0, enable_pdl)


def fused_add_rmsnorm_quant(
    out: Tensor,
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    eps: float,
    out_scale: Tensor | None,
    out_factor: float,
    enable_pdl: bool,
) -> None:
    """residual += input; out = rmsnorm of the unrounded sum, scaled by out_factor / out_scale, in fp8."""
    store(out, normalised(_add(residual, input), weight, eps), out_scale, out_factor)


def layernorm(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor, eps: float, out_scale: Tensor | None, out_factor: float
) -> None:
    """out = layernorm(input) * weight + bias [..., d]; fp8 out is scaled by out_factor / out_scale."""
    difference = input.float() - input.float().mean(-1, keepdim=True)  # before squaring: a large mean costs no digits
    store(out, normalised(difference, weight, eps).add_(bias.float()), out_scale, out_factor)


def _add(residual: Tensor, input: Tensor) -> Tensor:
    """residual += input; the sum before it is rounded."""
    if input.dtype == torch.float32:
        return residual.add_(input)
    total = input.float() + residual.float()
    residual.copy_(total)
    return total


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * _inverse_rms(x, eps)).mul_(weight.float())
