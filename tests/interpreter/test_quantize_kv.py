"""Quantised keys and values through Triton's interpreter: the small cases of the CPU tests, equal bit by bit."""

import pytest
import torch

from flashtile.testing import cases_quantize_kv as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("case", cases.SMALL_FORMAT_CASES, ids=str)
def test_quantize_kv(case: cases.FormatCase) -> None:
    cases.check_quantize_kv(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_value_in_fp8(dtype: torch.dtype) -> None:
    cases.check_every_value_in_fp8(dtype, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_quantize_append(case: cases.QuantiseCase) -> None:
    cases.check_quantize_append(case, "cpu")
