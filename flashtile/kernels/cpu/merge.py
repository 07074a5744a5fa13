"""Merging attention states in PyTorch, fp32 inside. A state without keys (s = -inf) takes no part, whatever its v
holds."""

import torch
from torch import Tensor


def merge_state(v_out: Tensor, s_out: Tensor, v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> None:
    """Two states, v [n, num_heads, head_dim] and s [n, num_heads]; with one empty, the other's very bits."""
    v, s = _merge(v_a, s_a, v_b, s_b)
    v_out.copy_(v)
    s_out.copy_(s)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None) -> None:
    """Merge the other state into (v, s), in rows where mask [n] is True (None: in all)."""
    v_new, s_new = _merge(v, s, v_other, s_other)
    if mask is not None:
        v_new = torch.where(mask[:, None, None], v_new.to(v.dtype), v)
        s_new = torch.where(mask[:, None], s_new, s)
    v.copy_(v_new)
    s.copy_(s_new)


def merge_states(v_out: Tensor, s_out: Tensor, v: Tensor, s: Tensor) -> None:
    """v [n, num_states, num_heads, head_dim] and s [n, num_states, num_heads] into one state per row."""
    if v.shape[1] == 0:
        v_out.zero_()
        s_out.fill_(-torch.inf)
        return
    top = s.amax(1)
    weight, total = _weights(s, top[:, None], dim=1)
    weighted = torch.where(weight[..., None] > 0, v.float() * weight[..., None], 0.0).sum(1)
    v_out.copy_(torch.where(total[..., None] > 0, weighted / total[..., None], 0.0))
    s_out.copy_(top + torch.log2(total))


def merge_ragged_states(v_out: Tensor, s_out: Tensor, v: Tensor, s: Tensor, indptr: Tensor) -> None:
    """The states of row i are v [nnz, num_heads, head_dim] and s [nnz, num_heads] from indptr[i] to indptr[i + 1]."""
    counts = indptr.diff()
    row = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    v, s = v[: len(row)].float(), s[: len(row)]
    index = row[:, None].expand_as(s)
    top = torch.full_like(s_out, -torch.inf).scatter_reduce(0, index, s, "amax")
    weight = torch.exp2(s - torch.where(torch.isinf(top), 0.0, top)[row])
    total = torch.zeros_like(s_out).index_add_(0, row, weight)[..., None]
    weighted = torch.zeros(v_out.shape, dtype=torch.float32)
    weighted.index_add_(0, row, torch.where(weight[..., None] > 0, v * weight[..., None], 0.0))
    v_out.copy_(torch.where(total > 0, weighted / total, 0.0))
    s_out.copy_(top + torch.log2(total[..., 0]))


def _merge(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(s_a, s_b)
    weight, total = _weights(torch.stack([s_a, s_b]), top, dim=0)
    w_a, w_b = (weight / total)[..., None]
    v_a, v_b = v_a.float(), v_b.float()
    v = torch.where(
        w_b == 0, v_a, torch.where(w_a == 0, v_b, v_a * w_a + v_b * w_b)
    )  # select: adding 0 turns -0.0 to 0.0
    return torch.where(top[..., None] == -torch.inf, 0.0, v), top + torch.log2(total)


def _weights(s: Tensor, top: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """exp2(s - top), 0 for empty states, and their sum over `dim`."""
    weight = torch.exp2(s - torch.where(top == -torch.inf, 0.0, top))
    return weight, weight.sum(dim)
