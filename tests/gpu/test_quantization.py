"""Packed bits on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_quantization as cases


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_packbits(n: int) -> None:
    cases.check_packbits(n, "cuda")


@pytest.mark.parametrize("lengths", cases.SEGMENTS, ids=str)
def test_segment_packbits(lengths: tuple[int, ...]) -> None:
    cases.check_segment_packbits(lengths, "cuda")
