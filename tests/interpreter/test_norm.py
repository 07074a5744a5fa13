"""Norms through Triton's interpreter: the small cases of the CPU tests."""

import pytest

from flashtile.testing import cases_norm as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_rmsnorm(case: cases.NormCase) -> None:
    cases.check_rmsnorm(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_fused_add_rmsnorm(case: cases.NormCase) -> None:
    cases.check_fused_add_rmsnorm(case, "cpu")


def test_norm_reads_the_unrounded_sum() -> None:
    cases.check_norm_reads_the_unrounded_sum("cpu")
