"""FlashInfer's names for single Triton kernels on a CUDA device: the cases of the CPU tests."""

import pytest
import torch

from flashtile.testing import cases_triton as cases


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rms_norm(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    cases.check_rms_norm(dtype, out_dtype, "cuda")


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rms_norm_add_residual(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    cases.check_rms_norm_add_residual(dtype, out_dtype, "cuda")


@pytest.mark.parametrize("out_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_silu_and_mul(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    cases.check_silu_and_mul(dtype, out_dtype, "cuda")
