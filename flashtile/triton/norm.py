"""RMS norms with scales for what comes in and what goes out. Defined by reference/norm.py.

Scales are factors, where those of `flashtile.norm` are divisors. What comes in scaled takes a pass of its own."""

from torch import Tensor

from flashtile import checks
from flashtile.norm import fused_add_rmsnorm, fused_add_rmsnorm_quant, rmsnorm, rmsnorm_quant
from flashtile.triton.scaling import INPUT_DTYPES, Factor, divisor, scaled, store


def rms_norm(
    x: Tensor, weight: Tensor, out: Tensor, eps: float, in_scale: Factor = None, out_scale: Factor = None
) -> None:
    """out = rmsnorm(x * in_scale) * out_scale, what is too large for out's dtype becoming its largest.

    Args:
        x: [num_tokens, hidden_size]; fp16, bf16, fp32 or fp8; rows may be strided.
        weight: [hidden_size]; fp16, bf16 or fp32.
        out: where to write, shaped as x; any of these dtypes.
        eps: added to the mean square.
        in_scale, out_scale: numbers, or tensors of one element on the device of x. Default: 1.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    rows = _rows("x", x, in_scale)
    _check_out("out", out, x)
    if out.dtype in checks.FP8_DTYPES:
        rmsnorm_quant(out, rows, weight, divisor("out_scale", out_scale, x), eps)
    elif out.dtype == rows.dtype and out_scale is None:
        rmsnorm(rows, weight, eps, out=out)
    else:
        store(out, rmsnorm(rows.float(), weight, eps), out_scale)


def rms_norm_add_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    x_out: Tensor | None = None,
    x_in_scale: Factor = None,
    x_out_scale: Factor = None,
) -> None:
    """residual += x * x_in_scale, then x_out = rmsnorm(residual) * x_out_scale. The norm reads the fp32 sum.

    Args:
        residual: shaped as x; fp16, bf16 or fp32.
        x_out: where to write, shaped as x. Default: x itself.
        x, weight, eps, x_in_scale, x_out_scale: as for `rms_norm`.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    rows = _rows("x", x, x_in_scale)
    checks.check_shape("residual", residual, x.shape)
    checks.check_dtype("residual", residual, checks.FLOAT_DTYPES)
    checks.check_device("residual", residual, x.device)
    out = x if x_out is None else x_out
    _check_out("x_out", out, x)
    if rows.dtype == residual.dtype and out.dtype in checks.FP8_DTYPES:
        fused_add_rmsnorm_quant(out, rows, residual, weight, divisor("x_out_scale", x_out_scale, x), eps)
    elif rows is out and rows.dtype == residual.dtype and x_out_scale is None:
        fused_add_rmsnorm(rows, residual, weight, eps)
    else:
        total = rows.float() + residual.float()
        residual.copy_(total)
        store(out, rmsnorm(total, weight, eps), x_out_scale)


def _rows(name: str, x: Tensor, factor: Factor) -> Tensor:
    checks.check_shape(name, x, ("num_tokens", "hidden_size"))
    checks.check_inner_contiguous(name, x)
    return scaled(name, x, factor)


def _check_out(name: str, out: Tensor, x: Tensor) -> None:
    checks.check_shape(name, out, x.shape)
    checks.check_dtype(name, out, INPUT_DTYPES)
    checks.check_device(name, out, x.device)
    checks.check_inner_contiguous(name, out)
