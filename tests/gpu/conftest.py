"""The cases of the CPU tests on a CUDA device; skipped where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder `gpu`, and skip it where there is no CUDA device."""
    missing = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)
