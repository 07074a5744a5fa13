"""Matrix products through Triton's interpreter: the small cases of the CPU tests."""

import pytest

from flashtile.testing import cases_gemm as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("case", cases.SMALL_SEGMENTS, ids=str)
def test_segment_gemm(case: cases.SegmentCase) -> None:
    cases.check_segments(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_FP8, ids=str)
def test_bmm_fp8(case: cases.Fp8Case) -> None:
    cases.check_bmm_fp8(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_GEMMS, ids=str)
def test_gemm_persistent(case: cases.GemmCase) -> None:
    cases.check_gemm(case, "cpu")
