"""What must hold for flashtile.triton's norms and activation: run by tests/ on the CPU and on a GPU."""

import torch
from torch import Tensor

from flashtile.reference import activation as activation_reference
from flashtile.reference import norm as norm_reference
from flashtile.testing.fp8 import FP8_DTYPES, assert_fp8_close
from flashtile.testing.tensors import poisoned, randn, strided
from flashtile.testing.tolerance import assert_close
from flashtile.triton import activation, norm

DTYPES = (torch.float16, torch.bfloat16, torch.float32, *FP8_DTYPES)
SCALES = ((None, None), (0.5, None), (None, 3.0), (0.25, 1.5))  # of what comes in, of what goes out; exact in any dtype
EPS = 1e-5


def _inputs(dtype: torch.dtype, width: int, device: str) -> Tensor:
    x = randn(5, width, dtype=torch.float32, device=device, seed=1).to(dtype)
    return strided(x) if dtype in (torch.float16, torch.float32) else x


def _factor(scale: float | None, device: str) -> Tensor | None:
    return None if scale is None else torch.tensor([scale], device=device)


def _assert_scaled(got: Tensor, exact: Tensor, scale: float | None) -> None:
    """got is exact * scale in its dtype."""
    scale = scale or 1.0
    if got.dtype in FP8_DTYPES:
        assert_fp8_close(got, exact, 1 / scale)
    else:
        assert_close(got, exact * scale, (exact * scale).to(got.dtype))


def check_rms_norm(dtype: torch.dtype, out_dtype: torch.dtype, device: str) -> None:
    """Against the oracle, with each scale and without."""
    x, weight = _inputs(dtype, 72, device), randn(72, device=device, seed=2)
    for in_scale, out_scale in SCALES:
        exact = norm_reference.rmsnorm(x.double() * (in_scale or 1.0), weight.double(), EPS)
        out = strided(poisoned(x.shape, out_dtype, device))
        norm.rms_norm(x, weight, out, EPS, _factor(in_scale, device), _factor(out_scale, device))
        _assert_scaled(out, exact, out_scale)


def check_rms_norm_add_residual(dtype: torch.dtype, out_dtype: torch.dtype, device: str) -> None:
    """Against the oracle, in place and into another tensor."""
    start, weight = _inputs(dtype, 72, device), randn(72, device=device, seed=2)
    wide = dtype if dtype not in FP8_DTYPES else torch.bfloat16
    for in_scale, out_scale in SCALES:
        x = strided(start.clone()) if start.stride(0) != start.shape[1] else start.clone()
        residual = randn(5, 72, dtype=wide, device=device, seed=3)
        exact, total = norm_reference.fused_add_rmsnorm(
            x.double() * (in_scale or 1.0), residual.double(), weight.double(), EPS
        )
        out = None if out_dtype == dtype else poisoned(x.shape, out_dtype, device)
        norm.rms_norm_add_residual(x, residual, weight, EPS, out, _factor(in_scale, device), _factor(out_scale, device))
        _assert_scaled(x if out is None else out, exact, out_scale)
        assert_close(residual, total, total.to(wide))


def check_silu_and_mul(dtype: torch.dtype, out_dtype: torch.dtype, device: str) -> None:
    """Against the oracle, with each scale and without; the default dtype is the input's."""
    x = _inputs(dtype, 48, device)
    for x_scale, o_scale in SCALES:
        exact = activation_reference.silu_and_mul(x.double() * (x_scale or 1.0))
        wanted = None if out_dtype == dtype else out_dtype
        got = activation.silu_and_mul(x, _factor(x_scale, device), _factor(o_scale, device), wanted)
        assert got.dtype == out_dtype
        _assert_scaled(got, exact, o_scale)
