"""Merging attention states through Triton's interpreter: the small cases of the CPU tests."""

import pytest

from flashtile.testing import cases_merge as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_merge_states(case: cases.MergeCase) -> None:
    cases.check_merge_states(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_merge_state(case: cases.MergeCase) -> None:
    cases.check_merge_state(case, "cpu")


def test_empty_states() -> None:
    cases.check_empty_states("cpu")


def test_any_split_gives_the_whole() -> None:
    cases.check_any_split_gives_the_whole("cpu")
