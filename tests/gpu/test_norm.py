"""Norms on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_norm as cases


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_rmsnorm(case: cases.NormCase) -> None:
    cases.check_rmsnorm(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_fused_add_rmsnorm(case: cases.NormCase) -> None:
    cases.check_fused_add_rmsnorm(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_gemma_forms(case: cases.NormCase) -> None:
    cases.check_gemma_forms(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_layernorm(case: cases.NormCase) -> None:
    cases.check_layernorm(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_quantising_forms(case: cases.NormCase) -> None:
    cases.check_quantising_forms(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_rmsnorm_silu(case: cases.NormCase) -> None:
    cases.check_rmsnorm_silu(case, "cuda")


@pytest.mark.parametrize("case", cases.PATCH_CASES, ids=str)
def test_qk_rmsnorm_rope(case: cases.PatchCase) -> None:
    cases.check_qk_rmsnorm_rope(case, "cuda")


def test_norm_reads_the_unrounded_sum() -> None:
    cases.check_norm_reads_the_unrounded_sum("cuda")
