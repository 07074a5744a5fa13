"""Gated activations on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_activation as cases


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_activation(op: str, case: cases.ActivationCase) -> None:
    cases.check_activation(op, case, "cuda")


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_quantised(op: str, case: cases.ActivationCase) -> None:
    cases.check_quantised(op, case, "cuda")


@pytest.mark.parametrize("op", cases.OPS)
def test_extremes(op: str) -> None:
    cases.check_extremes(op, "cuda")
