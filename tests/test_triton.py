"""FlashInfer's names for single Triton kernels, on the CPU: against the oracle, errors."""

import pytest
import torch

from flashtile import cascade
from flashtile.testing import cases_triton as cases
from flashtile.triton import activation, norm
from flashtile.triton import cascade as triton_cascade


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rms_norm(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    cases.check_rms_norm(dtype, out_dtype, "cpu")


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rms_norm_add_residual(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    cases.check_rms_norm_add_residual(dtype, out_dtype, "cpu")


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_silu_and_mul(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    cases.check_silu_and_mul(dtype, out_dtype, "cpu")


def test_cascade_is_the_same() -> None:
    for name in triton_cascade.__all__:
        assert getattr(triton_cascade, name) is getattr(cascade, name)


def test_errors() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"x: expected shape \[num_tokens, hidden_size\], got \[8\]"):
        norm.rms_norm(x[0], weight, x[0], 1e-6)
    with pytest.raises(ValueError, match=r"out: expected shape \[3, 8\], got \[3, 4\]"):
        norm.rms_norm(x, weight, x[:, :4], 1e-6)
    with pytest.raises(ValueError, match="x's scale: expected a number or a tensor of one element, got shape"):
        norm.rms_norm(x, weight, x, 1e-6, torch.ones(2))
    with pytest.raises(ValueError, match=r"residual: expected shape \[3, 8\], got \[2, 8\]"):
        norm.rms_norm_add_residual(x, x[:2], weight, 1e-6)
    with pytest.raises(ValueError, match=r"input: expected shape \[\.\.\., 2 \* d\], gate then up, got \[3, 7\]"):
        activation.silu_and_mul(torch.ones(3, 7))
    with pytest.raises(ValueError, match="dtype: expected dtype float16 or .*, got int32"):
        activation.silu_and_mul(x, dtype=torch.int32)
