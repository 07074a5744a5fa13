"""Which kernels serve a device: PyTorch on the CPU, Triton on CUDA. Kernel modules are imported on first use only,
so that `import flashtile` needs neither Triton nor a GPU."""

from functools import cache
from importlib import import_module
from typing import Any

import torch

_PACKAGES = {"cpu": "flashtile.kernels.cpu", "cuda": "flashtile.kernels"}


@cache
def _module(device_type: str, area: str) -> Any:
    return import_module(f"{_PACKAGES[device_type]}.{area}")


def kernels(area: str, device: torch.device) -> Any:
    """The module of launchers for one area ("norm", "rope", ...) on a device.

    Both packages hold modules of the same names with the same functions: a launcher takes checked tensors with the
    outputs already allocated, and returns nothing.

    Raises:
        ValueError: no kernels exist for this kind of device.
    """
    if device.type not in _PACKAGES:
        raise ValueError(f"device: expected a CPU or CUDA tensor, got {device}; move the inputs to one of these")
    return _module(device.type, area)


_FAMILIES = {
    "cpu": "flashtile.kernels.cpu.attention",
    "portable": "flashtile.kernels.attention",
    "hopper": "flashtile.kernels.hopper.attention",
    "narrow": "flashtile.kernels.hopper.narrow.attention",
    "copied": "flashtile.kernels.copied",
}


@cache
def attention_family(family: str) -> Any:
    """The attention launchers of a kernel family: "cpu", "portable", "hopper" or "narrow"; "copied": what comes before
    one."""
    return import_module(_FAMILIES[family])
