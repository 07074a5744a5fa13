"""Norms of rows, by definition: root mean square (arXiv:1910.07467), layer norm (arXiv:1607.06450).

All compute in the dtype of their inputs: give fp64 for an oracle, the kernel's dtype for a peer."""

import torch
from torch import Tensor


def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """input / sqrt(mean(input^2) + eps) * weight over the last dimension; input [..., d], weight [d]."""
    mean_square = (input * input).mean(-1, keepdim=True)
    return input / torch.sqrt(mean_square + eps) * weight


def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rmsnorm(input + residual), input + residual)."""
    total = input + residual
    return rmsnorm(total, weight, eps), total


def layernorm(input: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    difference = input - input.mean(-1, keepdim=True)
    return difference / torch.sqrt((difference * difference).mean(-1, keepdim=True) + eps) * weight + bias
