"""Packed bits through Triton's interpreter: the small cases of the CPU tests."""

import pytest

from flashtile.testing import cases_quantization as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("n", cases.SMALL_LENGTHS)
def test_packbits(n: int) -> None:
    cases.check_packbits(n, "cpu")


@pytest.mark.parametrize("lengths", cases.SEGMENTS, ids=str)
def test_segment_packbits(lengths: tuple[int, ...]) -> None:
    cases.check_segment_packbits(lengths, "cpu")
