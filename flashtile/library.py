"""Public operations as `torch.library` ops, so that torch.compile(fullgraph=True) can trace them.

Eager calls go straight to the launcher (about 1 us); the op is used only while the compiler traces (a dispatch through
`torch.library` costs about 6 us). A public function chooses with `torch.compiler.is_compiling()`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashtile.backend import kernels

_LIBRARY: Any = torch.library.Library("flashtile", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `flashtile::<name>` from its schema, e.g. "rmsnorm(Tensor input, Tensor weight, float eps) -> Tensor".

    `impl` serves CPU and CUDA; `fake` returns outputs of the right shape and dtype without computing (None for an op
    that only mutates arguments, which the schema marks, e.g. "Tensor(a!) q").

    Returns:
        The op, to be called as torch.ops.flashtile.<name>.default would be.
    """
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashtile::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.flashtile, name).default


def launcher(area: str, schema: str) -> Callable[..., None]:
    """The launcher that `schema` names, from kernels/<area> of the device of its first argument; also an op.

    The schema lists the outputs first, allocated by the caller and marked as mutated, and returns nothing, e.g.
    "rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, float eps) -> ()".
    """
    name = schema.partition("(")[0]

    def launch(out: Tensor, *args: Any) -> None:
        run = getattr(kernels(area, out.device), name)
        if out.is_cuda and out.device.index != torch.cuda.current_device():
            with torch.cuda.device(out.device):
                run(out, *args)
        elif torch.is_grad_enabled():  # weights may be parameters; no op here has a gradient
            with torch.no_grad():
                run(out, *args)
        else:
            run(out, *args)

    op = define(schema, launch, lambda *args: None)

    def call(out: Tensor, *args: Any) -> None:
        if torch.compiler.is_compiling():
            op(out, *args)
        else:
            launch(out, *args)

    return call
