"""Compile cases from real launches: a launcher runs on meta tensors, its kernels are recorded instead of started."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from flashtile.testing.compile import CompileCase

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def recorded(name: str, kernel: Any, launch: Callable[[], None], **fields: Any) -> CompileCase:
    """The case of the one launch of `kernel` within `launch()`, specialised as Triton would: pointers and integers that
    are multiples of 16, integers that are 1. `fields`: further fields of the case, e.g. min_capability."""
    (case,) = recordings(lambda kernel: name, (kernel,), launch, **fields)
    return case


def recordings(
    name: Callable[[Any], str], kernels: Iterable[Any], launch: Callable[[], None], **fields: Any
) -> list[CompileCase]:
    """As `recorded`, the cases of all launches of these kernels within `launch()`, which may launch no other; `name` of
    a kernel's case."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def recorder(kernel: Any) -> Callable[..., None]:
        return lambda *args, grid, warmup, **kwargs: calls.append((kernel, args, kwargs))

    kernels = list(kernels)
    for kernel in kernels:
        kernel.run = recorder(kernel)
    try:
        launch()
    finally:
        for kernel in kernels:
            del kernel.run  # back to the method of its class
    return [_case(name(kernel), kernel, args, kwargs, fields) for kernel, args, kwargs in calls]


def _case(name: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fields: dict[str, Any]) -> CompileCase:
    signature: dict[str, Any] = {}
    constexprs: dict[str, Any] = {}
    aligned: list[str] = []
    options = {k: kwargs.pop(k) for k in [*kwargs] if k not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for parameter in kernel.params:
        value = values[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            constexprs[parameter.name] = value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(_type(part) for part in value)
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _type(value)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = _type(value)
            aligned += [parameter.name] if specialise and value % 16 == 0 else []
    own = {k: options.pop(k) for k in _OPTIONS if k in options}
    return CompileCase(name, kernel, signature, constexprs, aligned=tuple(aligned), options=options, **own, **fields)


def _type(value: torch.Tensor | int) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "i32" if abs(value) < 2**31 else "i64"
