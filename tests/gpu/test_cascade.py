"""Merging attention states on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_merge as cases


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_merge_states(case: cases.MergeCase) -> None:
    cases.check_merge_states(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_merge_state(case: cases.MergeCase) -> None:
    cases.check_merge_state(case, "cuda")


def test_empty_states() -> None:
    cases.check_empty_states("cuda")


def test_any_split_gives_the_whole() -> None:
    cases.check_any_split_gives_the_whole("cuda")
