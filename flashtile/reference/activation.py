"""Gated activations, by definition. Computes in the dtype of its input: fp64 for an oracle."""

import math

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x * torch.sigmoid(x)


def silu_and_mul(input: Tensor) -> Tensor:
    """silu(gate) * up with input = [gate, up]: [..., 2 * d] -> [..., d]."""
    gate, up = input.chunk(2, dim=-1)
    return silu(gate) * up


def gelu_and_mul(input: Tensor) -> Tensor:
    """The same with gelu(x) = x * (1 + erf(x / sqrt(2))) / 2."""
    gate, up = input.chunk(2, dim=-1)
    return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up


def gelu_tanh_and_mul(input: Tensor) -> Tensor:
    """The same with gelu(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2."""
    gate, up = input.chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
    return gate * (1 + torch.tanh(inner)) / 2 * up
