"""The paged cache on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_page as cases


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_append(case: cases.PageCase) -> None:
    cases.check_append(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_append_mla(case: cases.PageCase) -> None:
    cases.check_append_mla(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_batch_indices_positions(case: cases.PageCase) -> None:
    cases.check_batch_indices_positions(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_seq_lens(case: cases.PageCase) -> None:
    cases.check_seq_lens(case, "cuda")
