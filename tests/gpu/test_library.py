"""The ops of the library on a CUDA device: the cases of the CPU tests."""

import pytest

from flashtile.testing import cases_library as cases


@pytest.mark.parametrize("name", sorted(cases.op_arguments("cpu")))
def test_op(name: str) -> None:
    cases.check_op(name, "cuda")


@pytest.mark.parametrize("name", sorted(cases.compiled_calls("cpu")))
def test_one_compilation_for_all_lengths(name: str) -> None:
    cases.check_one_compilation(name, "cuda")


@pytest.mark.parametrize("name", sorted(cases.compiled_calls("cpu")))
def test_no_sync_and_captured(name: str) -> None:
    cases.check_no_sync_and_captured(name)
