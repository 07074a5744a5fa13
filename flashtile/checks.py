"""Argument checks shared by all public functions: every message names the argument, what came and what was expected.

No check reads the values of a CUDA tensor, so none of them can stall the GPU.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = ("NHD", "HND")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def check_tensor(name: str, x: object) -> Tensor:
    """`x` itself, if it is a tensor; TypeError otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    return x


def check_shape(name: str, x: Tensor, expected: Sequence[int | str]) -> None:
    """Compare `x.shape` with `expected`; a word stands for a free dimension, a number for a fixed one.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: another rank or size.
    """
    check_tensor(name, x)
    fits = x.dim() == len(expected)
    for size, wanted in zip(x.shape, expected, strict=False):  # a plain loop: this runs many times per launch
        fits = fits and (size == wanted or isinstance(wanted, str))
    if not fits:
        raise ValueError(f"{name}: expected shape [{', '.join(str(e) for e in expected)}], got {list(x.shape)}")


def check_dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """ValueError unless `x.dtype` is one of `allowed`."""
    if x.dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name}: expected dtype {wanted}, got {str(x.dtype).removeprefix('torch.')}")


def check_same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors share a dtype."""
    if x.dtype != other.dtype:
        raise ValueError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """ValueError unless `x` is on `device`."""
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless `x` has the shape, dtype and device of `other` and a contiguous last dimension."""
    check_tensor(name, x)
    if x.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {list(other.shape)}, got {list(x.shape)}")
    check_same_dtype(name, x, other_name, other)
    check_device(name, x, other.device)
    check_inner_contiguous(name, x)


def check_inner_contiguous(name: str, x: Tensor) -> None:
    """ValueError unless the last dimension has stride 1 (or at most one element)."""
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: the last dimension must be contiguous, got strides {tuple(x.stride())}; call .contiguous()"
        )


def check_layout(kv_layout: str) -> None:
    """KeyError unless the KV layout is NHD or HND."""
    if kv_layout not in LAYOUTS:
        raise KeyError(f"Invalid kv_layout {kv_layout!r}: expected 'NHD' or 'HND'")


def check_cos_sin_cache(x: Tensor, device: torch.device) -> None:
    """ValueError unless x is [max_position, rotary_dim] fp32 on `device`."""
    check_shape("cos_sin_cache", x, ("max_position", "rotary_dim"))
    check_dtype("cos_sin_cache", x, (torch.float32,))
    check_inner_contiguous("cos_sin_cache", x)
    check_device("cos_sin_cache", x, device)


def debugging() -> bool:
    """Whether the values of CUDA tensors are checked too, at the price of a sync each: FLASHTILE_DEBUG=1."""
    return os.environ.get("FLASHTILE_DEBUG", "0") not in ("", "0")


def index_tensor(name: str, x: Tensor, device: torch.device, size: int | str = "n") -> Tensor:
    """`x` [size] as a contiguous tensor of int32 or int64 on `device`; strided ones and those elsewhere are copied.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: another shape, or no integers.
    """
    check_shape(name, x, (size,))
    check_dtype(name, x, INDEX_DTYPES)
    return (x if x.device == device else x.to(device)).contiguous()


def reads_values(x: Tensor) -> bool:
    """Whether the values of `x` are checked: of host tensors, but not while torch.compile traces; of CUDA tensors with
    FLASHTILE_DEBUG=1."""
    return x.numel() > 0 and not torch.compiler.is_compiling() and (not x.is_cuda or debugging())


def check_between(name: str, x: Tensor, low: int, high: int, what: str = "index") -> None:
    """If `reads_values(x)`: every value of `x` [n] must be from low to high - 1. `what`: what an element stands for.

    Raises:
        ValueError: a host tensor holds another value; the message names the first.
        IndexError: a CUDA tensor does.
    """
    if not reads_values(x):
        return
    smallest, largest = (int(v) for v in x.aminmax())
    if smallest < low or largest >= high:
        i = int(((x.long() < low) | (x.long() >= high)).int().argmax())
        raise value_error(x, f"{name}: expected values from {low} to {high - 1}, got {int(x[i])} at {what} {i}")


def check_offsets(name: str, x: Tensor, total: int) -> None:
    """If `reads_values(x)`: offsets must not decrease, and stay between 0 and `total`.

    Raises:
        ValueError: a host tensor does otherwise; the message names the place. IndexError: a CUDA tensor does.
    """
    check_between(name, x, 0, total + 1, "offset")
    if reads_values(x) and (falls := x.diff() < 0).any():
        i = int(falls.int().argmax())
        raise value_error(x, f"{name}: offsets must not decrease, got {int(x[i])} then {int(x[i + 1])} at offset {i}")


def value_error(x: Tensor, message: str) -> Exception:
    """The error for a wrong value in `x`: ValueError on the host; IndexError on CUDA, where only debugging finds it."""
    return IndexError(message) if x.is_cuda else ValueError(message)


def pdl(enable_pdl: bool | None, x: Tensor) -> bool:
    """Whether to launch with programmatic dependent launch: if asked to, where the GPU has it (sm_90 and later)."""
    return bool(enable_pdl) and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def not_implemented(argument: str, what: str = "") -> NotImplementedError:
    """The error for an argument that exists in the API but is not built yet; raise what this returns."""
    return NotImplementedError(f"{argument} is not implemented yet" + (f": {what}" if what else ""))
