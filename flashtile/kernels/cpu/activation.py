"""Gated activations in PyTorch, fp32 inside."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtile.kernels.cpu.quantization import store


def silu_and_mul(out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float, enable_pdl: bool) -> None:
    """out [n, d] = silu(input[:, :d]) * input[:, d:]; fp8 out is scaled by out_factor / out_scale."""
    _act_and_mul(F.silu, out, input, out_scale, out_factor)


def gelu_and_mul(out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float, enable_pdl: bool) -> None:
    """The same with gelu."""
    _act_and_mul(F.gelu, out, input, out_scale, out_factor)


def gelu_tanh_and_mul(
    out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float, enable_pdl: bool
) -> None:
    """The same with gelu by tanh."""
    _act_and_mul(lambda x: F.gelu(x, approximate="tanh"), out, input, out_scale, out_factor)


def _act_and_mul(
    act: Callable[[Tensor], Tensor], out: Tensor, input: Tensor, out_scale: Tensor | None, out_factor: float
) -> None:
    gate, up = input.float().chunk(2, dim=-1)
    if out.dtype == torch.float32:
        torch.mul(act(gate), up, out=out)
    else:
        store(out, act(gate).mul_(up), out_scale, out_factor)
