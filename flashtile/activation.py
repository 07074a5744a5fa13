"""Gated activations of MLPs (arXiv:2002.05202): act(gate) * up of a row that holds gate, then up.

Defined by reference/activation.py. fp32 inside, rounded once. Inference only: no gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from flashtile import checks, library
from flashtile.quantization import output_scale

_ARGUMENTS = "(Tensor(a!) out, Tensor input, Tensor? out_scale, float out_factor, bool enable_pdl) -> ()"
_silu_and_mul = library.launcher("activation", f"silu_and_mul{_ARGUMENTS}")
_gelu_and_mul = library.launcher("activation", f"gelu_and_mul{_ARGUMENTS}")
_gelu_tanh_and_mul = library.launcher("activation", f"gelu_tanh_and_mul{_ARGUMENTS}")


def silu_and_mul(
    input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None, *, scale: float | Tensor | None = None
) -> Tensor:
    """silu(input[..., :d]) * input[..., d:], where silu(x) = x / (1 + exp(-x)).

    Args:
        input: [..., 2 * d]; fp16, bf16 or fp32; rows may be strided.
        out: [..., d], of input's dtype; or float8_e4m3fn or float8_e5m2, where values too large become the largest.
            Default: a new tensor of input's dtype.
        enable_pdl: let the next kernel start while this one ends (programmatic dependent launch, sm_90 and later;
            elsewhere there is nothing to enable). None: off. Results do not depend on it.
        scale: only for an fp8 out, which is divided by it: a number, or a tensor of one element on input's device.

    Returns:
        out.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; an odd last dimension; a scale without fp8 out.
        NotImplementedError: fp8 out on a GPU older than compute capability 8.9.
    """
    return _run(_silu_and_mul, input, out, enable_pdl, scale)


def gelu_and_mul(
    input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None, *, scale: float | Tensor | None = None
) -> Tensor:
    """gelu(input[..., :d]) * input[..., d:], where gelu(x) = x * (1 + erf(x / sqrt(2))) / 2; see `silu_and_mul`."""
    return _run(_gelu_and_mul, input, out, enable_pdl, scale)


def gelu_tanh_and_mul(
    input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None, *, scale: float | Tensor | None = None
) -> Tensor:
    """gelu(input[..., :d]) * input[..., d:], where gelu(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2;
    see `silu_and_mul`."""
    return _run(_gelu_tanh_and_mul, input, out, enable_pdl, scale)


def _run(
    launch: Callable[..., None],
    input: Tensor,
    out: Tensor | None,
    enable_pdl: bool | None,
    scale: float | Tensor | None,
) -> Tensor:
    checks.check_tensor("input", input)
    checks.check_dtype("input", input, checks.FLOAT_DTYPES)
    if input.dim() == 0 or input.shape[-1] % 2:
        raise ValueError(f"input: expected shape [..., 2 * d], gate then up, got {list(input.shape)}")
    checks.check_inner_contiguous("input", input)
    shape = (*input.shape[:-1], input.shape[-1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=input.dtype, device=input.device)
    checks.check_shape("out", out, shape)
    checks.check_dtype("out", out, (input.dtype, *checks.FP8_DTYPES))
    checks.check_device("out", out, input.device)
    checks.check_inner_contiguous("out", out)
    if scale is not None and out.dtype not in checks.FP8_DTYPES:
        raise ValueError(f"scale: expected an fp8 out to go with it, got {out.dtype}")
    out_scale = output_scale("scale", 1.0 if scale is None else scale, input.device)
    launch(_rows("out", out), _rows("input", input), *out_scale, checks.pdl(enable_pdl, input))
    return out


def _rows(name: str, x: Tensor) -> Tensor:
    """x [..., d] as a view [n, d]."""
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{name}: strides {tuple(x.stride())} of shape {list(x.shape)} do not flatten to rows; call .contiguous()"
        ) from None
