"""Matrix products in PyTorch: one call per segment, rounded once."""

import torch
from torch import Tensor


def grouped_gemm(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    seg_indptr: Tensor | None,
    weight_indices: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    alpha: float,
    beta: float,
    num_sms: int,
    backend: str,
) -> None:
    """out = alpha x weight + beta out for each batch entry, or each segment of the only one; see flashtile/gemm.py."""
    for scale in (x_scale, weight_scale):
        alpha *= 1.0 if scale is None else float(scale)
    if seg_indptr is None:
        for rows, inputs, weight in zip(out, x, weights, strict=True):
            _product(rows, inputs, weight, alpha, beta)
        return
    bounds = seg_indptr.tolist()
    chosen = range(len(bounds) - 1) if weight_indices is None else weight_indices.tolist()
    out[0, : bounds[0]] = 0
    out[0, bounds[-1] :] = 0
    for begin, end, i in zip(bounds, bounds[1:], chosen, strict=False):
        if begin < end:
            _product(out[0, begin:end], x[0, begin:end], weights[i], alpha, beta)


def _product(out: Tensor, x: Tensor, weight: Tensor, alpha: float, beta: float) -> None:
    if alpha == 1 and beta == 0 and out.dtype == x.dtype:  # PyTorch accumulates 16-bit products in fp32 itself
        out.copy_(x @ weight)
        return
    exact = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    product = (x.to(exact) @ weight.to(exact)).mul_(alpha)
    out.copy_(product if beta == 0 else product.add_(out, alpha=beta))
