"""Normalisation of rows: root mean square (arXiv:1910.07467) and layer norm (arXiv:1607.06450), alone and fused with
what stands next to them in a transformer. Defined by reference/norm.py.

Sums are fp32; results are rounded once. Inference only: no gradients."""

import torch
from torch import Tensor

from flashtile import checks, library
from flashtile.qk_norm_rope import fused_qk_rmsnorm_rope
from flashtile.quantization import output_scale

__all__ = [
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "fused_qk_rmsnorm_rope",
    "fused_rmsnorm_silu",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "layernorm_quant",
    "rmsnorm",
    "rmsnorm_quant",
]

_ROWS = "Tensor input, Tensor weight, float eps"
_SCALE = "Tensor? out_scale, float out_factor"

_rmsnorm = library.launcher(
    "norm", f"rmsnorm(Tensor(a!) out, {_ROWS}, float weight_offset, bool silu, {_SCALE}, bool enable_pdl) -> ()"
)
_fused_add_rmsnorm = library.launcher(
    "norm",
    "fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, float weight_offset,"
    " bool enable_pdl) -> ()",
)
_fused_add_rmsnorm_quant = library.launcher(
    "norm",
    f"fused_add_rmsnorm_quant(Tensor(a!) out, Tensor(b!) residual, {_ROWS}, {_SCALE}, bool enable_pdl) -> ()",
)
_layernorm = library.launcher(
    "norm",
    f"layernorm(Tensor(a!) out, Tensor input, Tensor weight, Tensor bias, float eps, {_SCALE}) -> ()",
)


def rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """input / sqrt(mean(input^2) + eps) * weight over the last dimension.

    Args:
        input: [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim]; fp16, bf16 or fp32; rows may be strided.
        weight: [hidden_size] or [head_dim]; fp16, bf16 or fp32.
        eps: added to the mean square.
        out: where to write, shaped as input and of its dtype; may be input itself. Default: a new tensor.
        enable_pdl: let the next kernel start while this one ends (programmatic dependent launch, sm_90 and later;
            elsewhere there is nothing to enable). None: off. Results do not depend on it.

    Returns:
        out.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    return _rmsnorm_of(input, weight, eps, out, enable_pdl, weight_offset=0.0)


def gemma_rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """`rmsnorm` with 1 + weight, added in fp32, in place of weight."""
    return _rmsnorm_of(input, weight, eps, out, enable_pdl, weight_offset=1.0)


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """residual += input, then input = rmsnorm(residual), both in place.

    The norm reads the fp32 sum, not the rounded one that is stored in residual.

    Args:
        input: [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim]; fp16, bf16 or fp32; rows may be strided.
        residual: shaped as input and of its dtype; its strides may differ.
        weight, eps, enable_pdl: as for `rmsnorm`.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    _check_add(input, residual, weight)
    _fused_add_rmsnorm(input, residual, weight, eps, 0.0, checks.pdl(enable_pdl, input))


def gemma_fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`fused_add_rmsnorm` with 1 + weight, added in fp32, in place of weight."""
    _check_add(input, residual, weight)
    _fused_add_rmsnorm(input, residual, weight, eps, 1.0, checks.pdl(enable_pdl, input))


def rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """out = rmsnorm(input) / scale in fp8; values too large for it become its largest.

    Args:
        out: shaped as input, float8_e4m3fn or float8_e5m2; rows may be strided.
        scale: what `out` is to be multiplied with to get the norm back: a number, or a tensor of one element on the
            device of input.
        input, weight, eps, enable_pdl: as for `rmsnorm`.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
        NotImplementedError: fp8 out on a GPU older than compute capability 8.9.
    """
    _check_rows(input, weight)
    _check_fp8_out(out, input)
    pdl = checks.pdl(enable_pdl, input)
    _rmsnorm(out, input, weight, eps, 0.0, False, *output_scale("scale", scale, input.device), pdl)


def fused_add_rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """residual += input, then out = rmsnorm(residual) / scale in fp8; input keeps its values.

    The norm reads the fp32 sum. Arguments and errors as for `rmsnorm_quant` and `fused_add_rmsnorm`.
    """
    _check_add(input, residual, weight)
    _check_fp8_out(out, input)
    pdl = checks.pdl(enable_pdl, input)
    _fused_add_rmsnorm_quant(out, residual, input, weight, eps, *output_scale("scale", scale, input.device), pdl)


def layernorm(input: Tensor, gemma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * gemma + beta over the last dimension.

    Args:
        input: [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim]; fp16, bf16 or fp32; rows may be strided.
        gemma: [hidden_size] or [head_dim], the weight; fp16, bf16 or fp32.
        beta: the bias, shaped as gemma.
        eps: added to the variance.

    Returns:
        A new tensor, shaped as input and of its dtype.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    _check_layernorm(input, gemma, beta)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _layernorm(out, input, gemma, beta, eps, None, 1.0)
    return out


def layernorm_quant(
    out: Tensor, input: Tensor, gemma: Tensor, beta: Tensor, scale: float | Tensor, eps: float = 1e-6
) -> None:
    """out = layernorm(input) / scale in fp8. Arguments and errors as for `rmsnorm_quant` and `layernorm`."""
    _check_layernorm(input, gemma, beta)
    _check_fp8_out(out, input)
    _layernorm(out, input, gemma, beta, eps, *output_scale("scale", scale, input.device))


def fused_rmsnorm_silu(
    input: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
    block_scale: Tensor | None = None,
) -> Tensor:
    """silu(rmsnorm(input)), where silu(x) = x / (1 + exp(-x)).

    Args:
        input, weight, eps: as for `rmsnorm`.
        out: shaped as input, of its dtype or fp8, into which values are cast as they are, those too large for it to its
            largest. Default: a new tensor of input's dtype.
        block_scale: for fp4 output, which is not built.

    Returns:
        out.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
        NotImplementedError: block_scale is given, or out is fp8 on a GPU older than compute capability 8.9.
    """
    if block_scale is not None:
        raise checks.not_implemented("block_scale", "fp4 output; give an out of input's dtype or fp8")
    _check_rows(input, weight)
    if isinstance(out, Tensor) and out.dtype in checks.FP8_DTYPES:
        _check_fp8_out(out, input)
    else:
        out = _output(out, input)
    _rmsnorm(out, input, weight, eps, 0.0, True, None, 1.0, False)
    return out


def _rmsnorm_of(
    input: Tensor, weight: Tensor, eps: float, out: Tensor | None, enable_pdl: bool | None, weight_offset: float
) -> Tensor:
    _check_rows(input, weight)
    out = _output(out, input)
    _rmsnorm(out, input, weight, eps, weight_offset, False, None, 1.0, checks.pdl(enable_pdl, input))
    return out


def _check_rows(input: Tensor, weight: Tensor, weight_name: str = "weight") -> None:
    checks.check_tensor("input", input)
    if input.dim() not in (2, 3):
        raise ValueError(
            "input: expected shape [num_tokens, hidden_size] or [num_tokens, num_heads, head_dim], "
            f"got {list(input.shape)}"
        )
    checks.check_dtype("input", input, checks.FLOAT_DTYPES)
    checks.check_inner_contiguous("input", input)
    checks.check_shape(weight_name, weight, (input.shape[-1],))
    checks.check_dtype(weight_name, weight, checks.FLOAT_DTYPES)
    checks.check_inner_contiguous(weight_name, weight)
    checks.check_device(weight_name, weight, input.device)


def _check_add(input: Tensor, residual: Tensor, weight: Tensor) -> None:
    _check_rows(input, weight)
    checks.check_like("residual", residual, "input", input)


def _check_layernorm(input: Tensor, gemma: Tensor, beta: Tensor) -> None:
    _check_rows(input, gemma, "gemma")
    _check_rows(input, beta, "beta")


def _check_fp8_out(out: Tensor, input: Tensor) -> None:
    checks.check_shape("out", out, input.shape)
    checks.check_dtype("out", out, checks.FP8_DTYPES)
    checks.check_device("out", out, input.device)
    checks.check_inner_contiguous("out", out)


def _output(out: Tensor | None, input: Tensor) -> Tensor:
    if out is None:
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)
    checks.check_like("out", out, "input", input)
    return out
