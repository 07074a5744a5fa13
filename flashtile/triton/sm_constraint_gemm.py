"""Matrix products on a limited number of SMs, so that communication or another stream can use the rest of the GPU.

Defined by reference/gemm.py. One kernel serves all of them: a persistent one, whose grid is the number of SMs.
"""

import torch
from torch import Tensor

from flashtile import checks
from flashtile.gemm import product


def gemm_persistent(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """alpha a b + beta c, on at most num_sms SMs.

    Args:
        a: [m, k], fp16, bf16, fp32 or fp8; rows may be strided.
        b: [k, n], dtype of a; rows or columns must be contiguous.
        c: [m, n], dtype out_dtype: read if beta is not 0, and written. Default: a new tensor.
        alpha: factor on the product.
        beta: factor on c.
        out_dtype: float16, bfloat16 or float32. Default: bfloat16 for fp8 inputs, else the dtype of a.
        num_sms: how many SMs may be used. Default: all.

    Returns:
        c.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; beta without c; num_sms below 1.
        NotImplementedError: fp8 on a GPU older than compute capability 8.9.
    """
    return product(a, b, c, alpha, beta, out_dtype, num_sms)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`gemm_persistent` on all SMs."""
    return product(a, b, c, alpha, beta, out_dtype, None)


def gemm_descriptor_persistent(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
    num_sms: int | None = None,
    EPILOGUE_SUBTILE: bool = False,
) -> Tensor:
    """`gemm_persistent` for b [n, k]: alpha a b^T + beta c.

    Descriptors (TMA) are used where GPU, shapes and strides allow, here as in the other functions. EPILOGUE_SUBTILE is
    a hint: the Hopper kernel always stores a tile in parts.
    """
    checks.check_shape("a", a, ("m", "k"))
    checks.check_shape("b", b, ("n", a.shape[1]))
    return product(a, b.t(), c, alpha, beta, out_dtype, num_sms)
