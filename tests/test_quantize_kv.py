"""Quantised keys and values on the CPU, alone and on their way into the paged cache: cases, errors."""

import pytest
import torch

import flashtile
from flashtile.testing import cases_quantize_kv as cases


@pytest.mark.parametrize("case", cases.FORMAT_CASES, ids=str)
def test_quantize_kv(case: cases.FormatCase) -> None:
    cases.check_quantize_kv(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_quantize_append(case: cases.QuantiseCase) -> None:
    cases.check_quantize_append(case, "cpu")
