"""Rotary embeddings on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_rope as cases


@pytest.mark.parametrize("case", [*cases.CASES, cases.LONG], ids=str)
def test_pos_ids(case: cases.RopeCase) -> None:
    cases.check_pos_ids(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_cos_sin_cache(case: cases.RopeCase) -> None:
    cases.check_cos_sin_cache(case, "cuda")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_ragged(case: cases.RopeCase) -> None:
    cases.check_ragged(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_llama31(case: cases.RopeCase) -> None:
    cases.check_llama31(case, "cuda")


@pytest.mark.parametrize("case", cases.QUANTIZE_CASES, ids=str)
def test_quantize(case: cases.QuantizeCase) -> None:
    cases.check_quantize(case, "cuda")


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("case", cases.SMALL_QUANTIZE_CASES, ids=str)
def test_quantize_append(case: cases.QuantizeCase, kv_layout: str) -> None:
    cases.check_quantize_append(case, kv_layout, "cuda")


def test_position_zero_changes_nothing() -> None:
    cases.check_position_zero_changes_nothing("cuda")
