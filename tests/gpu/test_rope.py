"""Rotary embeddings on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_rope as cases


@pytest.mark.parametrize("case", [*cases.CASES, cases.LONG], ids=str)
def test_pos_ids(case: cases.RopeCase) -> None:
    cases.check_pos_ids(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_cos_sin_cache(case: cases.RopeCase) -> None:
    cases.check_cos_sin_cache(case, "cuda")


def test_position_zero_changes_nothing() -> None:
    cases.check_position_zero_changes_nothing("cuda")
