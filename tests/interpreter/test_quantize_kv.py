"""Quantised keys and values through Triton's interpreter: the small cases of the CPU tests, equal bit by bit."""

import pytest

from flashtile.testing import cases_quantize_kv as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("case", cases.SMALL_FORMAT_CASES, ids=str)
def test_quantize_kv(case: cases.FormatCase) -> None:
    cases.check_quantize_kv(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_quantize_append(case: cases.QuantiseCase) -> None:
    cases.check_quantize_append(case, "cpu")
