"""Matrix products around attention, by definition: one product per segment, batched products with scales, c = a b + c.

All compute in the dtype of their inputs: give fp64 for an oracle, the kernel's dtype for a peer (fp8 must be converted
before)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_gemm(
    x: Tensor,
    weights: Tensor,
    seg_indptr: Sequence[int],
    weight_column_major: bool,
    weight_indices: Sequence[int] | None = None,
) -> Tensor:
    """[rows, d_out]: rows seg_indptr[i] .. seg_indptr[i + 1] - 1 of x [rows, d_in] times the weight of segment i, which
    is weights[i], or weights[weight_indices[i]]; 0 for rows of no segment.

    weights: [num_weights, d_out, d_in] if weight_column_major, else [num_weights, d_in, d_out].
    """
    matrices = weights.transpose(1, 2) if weight_column_major else weights
    out = x.new_zeros(x.shape[0], matrices.shape[2])
    for i in range(len(seg_indptr) - 1):
        rows = slice(seg_indptr[i], seg_indptr[i + 1])
        out[rows] = x[rows] @ matrices[i if weight_indices is None else weight_indices[i]]
    return out


def bmm(a: Tensor, b: Tensor, a_scale: float, b_scale: float) -> Tensor:
    """[batch, m, n]: a [batch, m, k] times b [batch, k, n], times both scales."""
    return torch.stack([x @ y for x, y in zip(a, b, strict=True)]) * (a_scale * b_scale)


def gemm(a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha a b + beta c, for a [m, k], b [k, n], c [m, n]; c counts only if beta is not 0."""
    product = alpha * (a @ b)
    return product if c is None or beta == 0 else product + beta * c
