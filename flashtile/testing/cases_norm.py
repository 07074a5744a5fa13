"""Cases of the norms, and what must hold for each: run by tests/ on the CPU, in Triton's interpreter and on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile import norm
from flashtile.reference import norm as reference
from flashtile.testing.tensors import name, poisoned, randn, strided
from flashtile.testing.tolerance import assert_close

EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """rows: (num_tokens,) or (num_tokens, num_heads); dim: size of a row."""

    rows: tuple[int, ...]
    dim: int
    dtype: torch.dtype = torch.float16
    strided: bool = False

    def __str__(self) -> str:
        rows = "x".join(str(n) for n in self.rows)
        return f"rows={rows} dim={self.dim} {name(self.dtype)}{' strided' if self.strided else ''}"

    def input(self, device: str, seed: int) -> Tensor:
        """Rows of very different size."""
        x = randn(*self.rows, self.dim, dtype=torch.float32, seed=seed)
        scale = torch.logspace(-2, 2, self.rows[0])[(...,) + (None,) * len(self.rows)]
        x = (x * scale).to(self.dtype).to(device)
        return strided(x) if self.strided else x

    def weight(self, device: str) -> Tensor:
        """One per column."""
        return randn(self.dim, dtype=self.dtype, device=device, seed=9) + 1


SMALL_CASES = (
    NormCase((3,), 64),
    NormCase((1,), 576),
    NormCase((5,), 100, strided=True),
    NormCase((4,), 7, torch.float32),
    NormCase((3, 5), 40, strided=True),
    NormCase((2, 3), 128, torch.float32),
    NormCase((0,), 64),
)
CASES = SMALL_CASES + tuple(
    NormCase(rows, dim, dtype, with_strides)
    for rows, dim, with_strides in (
        ((7,), 1, False),
        ((129,), 576, True),
        ((300, 9), 64, True),
        ((17,), 8192, False),
        ((2,), 70000, False),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
)


def check_rmsnorm(case: NormCase, device: str) -> None:
    """Against the oracle; into a strided output, and in place, with the same bits."""
    x, weight = case.input(device, 1), case.weight(device)
    before = x.clone()
    got = norm.rmsnorm(x, weight, EPS)
    assert_close(got, reference.rmsnorm(x.double(), weight.double(), EPS), reference.rmsnorm(x, weight, EPS))
    assert torch.equal(x, before)
    out = strided(poisoned(x.shape, x.dtype, device))
    assert norm.rmsnorm(x, weight, EPS, out=out) is out
    assert torch.equal(out, got)
    norm.rmsnorm(x, weight, EPS, out=x)
    assert torch.equal(x, got)


def check_fused_add_rmsnorm(case: NormCase, device: str) -> None:
    """Against the oracle: the sum rounded once, the norm of the unrounded sum rounded once."""
    x, residual, weight = case.input(device, 1), case.input(device, 2), case.weight(device)
    oracle_out, oracle_sum = reference.fused_add_rmsnorm(x.double(), residual.double(), weight.double(), EPS)
    peer_out, peer_sum = reference.fused_add_rmsnorm(x, residual, weight, EPS)
    expected_sum = (x.float() + residual.float()).to(x.dtype)
    assert norm.fused_add_rmsnorm(x, residual, weight, EPS) is None
    assert_close(x, oracle_out, peer_out, "input")
    assert_close(residual, oracle_sum, peer_sum, "residual")
    assert torch.equal(residual, expected_sum)


def check_norm_reads_the_unrounded_sum(device: str) -> None:
    """fp16 stores 2048 + 1 as 2048: the norm must still see 2049."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float16, device=device)
    residual = torch.tensor([[2048.0, 704.0]], dtype=torch.float16, device=device)
    norm.fused_add_rmsnorm(x, residual, torch.ones(2, device=device), 0.0)
    assert residual.tolist() == [[2048.0, 704.0]]
    expected, of_rounded_sum = (704 / ((top**2 + 704**2) / 2) ** 0.5 for top in (2049, 2048))
    assert abs(x[0, 1].item() - expected) < abs(x[0, 1].item() - of_rounded_sum)
