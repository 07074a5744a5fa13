"""Merging attention states (arXiv:2501.01005), by definition.

A state is the output v over some keys and the log-sum-exp s (base 2) of their logits; states over disjoint keys merge
into the state over all of them. Without keys: v = 0, s = -inf."""

import torch
from torch import Tensor


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """v [n, num_states, num_heads, dim], s [n, num_states, num_heads] -> [n, num_heads, dim], [n, num_heads]."""
    if v.shape[1] == 0:
        return v.new_zeros(v.shape[0], *v.shape[2:]), s.new_full((s.shape[0], s.shape[2]), -torch.inf)
    top = s.amax(1)
    top = torch.where(torch.isinf(top), 0.0, top)
    weight = torch.exp2(s - top[:, None])
    total = weight.sum(1)
    share = torch.where(total[:, None] > 0, weight / total[:, None], 0.0).to(v.dtype)
    return (v * share[..., None]).sum(1), torch.log2(total) + top


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """v [n, num_heads, head_dim], s [n, num_heads] of two states."""
    return merge_states(torch.stack([v_a, v_b], 1), torch.stack([s_a, s_b], 1))
