"""The paged cache through Triton's interpreter: the small cases of the CPU tests."""

import pytest

from flashtile.testing import cases_page as cases

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_append(case: cases.PageCase) -> None:
    cases.check_append(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_append_mla(case: cases.PageCase) -> None:
    cases.check_append_mla(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_batch_indices_positions(case: cases.PageCase) -> None:
    cases.check_batch_indices_positions(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_seq_lens(case: cases.PageCase) -> None:
    cases.check_seq_lens(case, "cpu")
