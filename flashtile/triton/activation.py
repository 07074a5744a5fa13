"""A gated activation with scales for what comes in and what goes out. Defined by reference/activation.py."""

import torch
from torch import Tensor

from flashtile import activation, checks
from flashtile.triton.scaling import INPUT_DTYPES, Factor, divisor, scaled, store


def silu_and_mul(x: Tensor, x_scale: Factor = None, o_scale: Factor = None, dtype: torch.dtype | None = None) -> Tensor:
    """silu(gate) * up * o_scale, where gate, up are the halves of the rows of x * x_scale.

    Args:
        x: [num_tokens, 2 * d]; fp16, bf16, fp32 or fp8; rows may be strided.
        x_scale, o_scale: numbers, or tensors of one element on the device of x. Default: 1.
        dtype: of the result: fp16, bf16, fp32 or fp8, where values too large become the largest. Default: that of x.

    Returns:
        [num_tokens, d], a new tensor.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    checks.check_shape("x", x, ("num_tokens", "2 * d"))
    checks.check_inner_contiguous("x", x)
    rows = scaled("x", x, x_scale)
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=dtype or x.dtype, device=x.device)
    checks.check_dtype("dtype", out, INPUT_DTYPES)
    if out.dtype in checks.FP8_DTYPES:
        activation.silu_and_mul(rows, out, scale=divisor("o_scale", o_scale, x))
    elif out.dtype == rows.dtype and o_scale is None:
        activation.silu_and_mul(rows, out)
    else:
        store(out, activation.silu_and_mul(rows.float()), o_scale)
    return out
