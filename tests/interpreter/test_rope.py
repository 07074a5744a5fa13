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


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_ragged(case: cases.RopeCase) -> None:
    cases.check_ragged(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_llama31(case: cases.RopeCase) -> None:
    cases.check_llama31(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_QUANTIZE_CASES, ids=str)
def test_quantize(case: cases.QuantizeCase) -> None:
    cases.check_quantize(case, "cpu")


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("case", cases.SMALL_QUANTIZE_CASES, ids=str)
def test_quantize_append(case: cases.QuantizeCase, kv_layout: str) -> None:
    cases.check_quantize_append(case, kv_layout, "cpu")


def test_position_zero_changes_nothing() -> None:
    cases.check_position_zero_changes_nothing("cpu")
