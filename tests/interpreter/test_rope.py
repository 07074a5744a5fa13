"""Rotary embeddings through Triton's interpreter: the small cases of the CPU tests."""

import pytest

from flashtile.testing import cases_rope as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("case", [*cases.SMALL_CASES, cases.LONG], ids=str)
def test_pos_ids(case: cases.RopeCase) -> None:
    cases.check_pos_ids(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_cos_sin_cache(case: cases.RopeCase) -> None:
    cases.check_cos_sin_cache(case, "cpu")


def test_position_zero_changes_nothing() -> None:
    cases.check_position_zero_changes_nothing("cpu")
