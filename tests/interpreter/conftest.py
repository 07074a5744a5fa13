"""Kernels through Triton's CPU interpreter: the variable must be set before Triton is imported, so these tests have
a pytest process of their own (`make test` starts it)."""

import os
from collections.abc import Iterator

import pytest

from flashtile import backend

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Public functions given CPU tensors launch the Triton kernels."""
    monkeypatch.setitem(backend._PACKAGES, "cpu", "flashtile.kernels")
    backend._module.cache_clear()
    yield
    backend._module.cache_clear()
