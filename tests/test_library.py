"""The ops of the library: PyTorch's checks of each, and one compilation for all lengths of what is built on them."""

import pytest

from flashtile.testing import cases_library as cases


def test_every_op_has_arguments() -> None:
    assert set(cases.op_arguments("cpu")) == cases.registered_ops()


@pytest.mark.parametrize("name", sorted(cases.op_arguments("cpu")))
def test_op(name: str) -> None:
    cases.check_op(name, "cpu")


@pytest.mark.parametrize("name", sorted(cases.compiled_calls("cpu")))
def test_one_compilation_for_all_lengths(name: str) -> None:
    cases.check_one_compilation(name, "cpu")
