"""Cases of the gated activations, and what must hold for each: on the CPU, in Triton's interpreter and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile import activation
from flashtile.reference import activation as reference
from flashtile.testing.fp8 import FP8_DTYPES, assert_fp8_close
from flashtile.testing.tensors import name, poisoned, randn, strided
from flashtile.testing.tolerance import assert_close

OPS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (activation.silu_and_mul, reference.silu_and_mul),
    "gelu": (activation.gelu_and_mul, reference.gelu_and_mul),
    "gelu_tanh": (activation.gelu_tanh_and_mul, reference.gelu_tanh_and_mul),
}


@dataclass(frozen=True)
class ActivationCase:
    """rows: the leading dimensions; dim: size of an output row, half of an input row."""

    rows: tuple[int, ...]
    dim: int
    dtype: torch.dtype = torch.float16
    strided: bool = False

    def __str__(self) -> str:
        rows = "x".join(str(n) for n in self.rows)
        return f"rows={rows} dim={self.dim} {name(self.dtype)}{' strided' if self.strided else ''}"

    def input(self, device: str) -> Tensor:
        """Gates up to some +-40, where exp(-x) ranges over 35 decades."""
        x = (randn(*self.rows, 2 * self.dim, dtype=torch.float32) * 10).to(self.dtype).to(device)
        return strided(x) if self.strided else x


SMALL_CASES = (
    ActivationCase((3,), 64),
    ActivationCase((5,), 100, strided=True),
    ActivationCase((4,), 7, torch.float32),
    ActivationCase((2, 3), 40),
    ActivationCase((0,), 64),
    ActivationCase((1,), 1536, torch.float32),
)
CASES = SMALL_CASES + tuple(
    ActivationCase(rows, dim, dtype, with_strides)
    for rows, dim, with_strides in (((129,), 1536, True), ((300,), 64, True), ((17,), 14336, False), ((9,), 1, False))
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
)


def check_activation(op: str, case: ActivationCase, device: str) -> None:
    """Against the oracle; into a strided output with the same bits."""
    run, define = OPS[op]
    x = case.input(device)
    got = run(x)
    assert_close(got, define(x.double()), define(x))
    out = poisoned(got.shape, got.dtype, device)
    if x.dim() == 2:
        out = strided(out)
    assert run(x, out=out) is out
    assert torch.equal(out, got)


def check_quantised(op: str, case: ActivationCase, device: str) -> None:
    """fp8 outputs against the oracle, with a number and with a tensor as scale."""
    run, define = OPS[op]
    x = case.input(device)
    for dtype in FP8_DTYPES:
        out = poisoned((*case.rows, case.dim), dtype, device)
        for scale in (None, 0.37, torch.tensor([3.0], device=device)):
            assert run(x, out, scale=scale) is out
            assert_fp8_close(out, define(x.double()), 1.0 if scale is None else float(scale))


def check_extremes(op: str, device: str) -> None:
    """Gates far out neither overflow nor give NaN."""
    run, define = OPS[op]
    gate = torch.tensor([-1e4, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 6e4])
    x = torch.cat([gate, torch.ones(8)])[None].half().to(device)
    assert_close(run(x), define(x.double()), define(x))
