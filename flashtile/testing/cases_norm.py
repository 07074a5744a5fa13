"""Cases of the norms, and what must hold for each: run by tests/ on the CPU, in Triton's interpreter and on a GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtile import norm
from flashtile.reference import norm as reference
from flashtile.reference import rope as rope_reference
from flashtile.reference.activation import silu
from flashtile.testing.fp8 import FP8_DTYPES, assert_fp8_close
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
    NormCase((2,), 17000),  # longer than what a kernel keeps in registers
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
    norm.fused_add_rmsnorm(x, residual, weight, EPS)
    assert_close(x, oracle_out, peer_out, "input")
    assert_close(residual, oracle_sum, peer_sum, "residual")
    assert torch.equal(residual, expected_sum)


def check_gemma_forms(case: NormCase, device: str) -> None:
    """The weight is 1 + w, added in fp32: w is small, and would be lost in a rounded sum."""
    x, residual, weight = case.input(device, 1), case.input(device, 2), case.weight(device) * 1e-3
    oracle_weight = weight.double() + 1
    oracle, oracle_sum = reference.fused_add_rmsnorm(x.double(), residual.double(), oracle_weight, EPS)
    peer = reference.rmsnorm((x.float() + residual.float()).to(x.dtype), weight + 1, EPS)
    got = norm.gemma_rmsnorm(x, weight, EPS)
    assert_close(got, reference.rmsnorm(x.double(), oracle_weight, EPS), reference.rmsnorm(x, weight + 1, EPS))
    norm.gemma_fused_add_rmsnorm(x, residual, weight, EPS)
    assert_close(x, oracle, peer, "input")
    assert_close(residual, oracle_sum, oracle_sum.to(x.dtype), "residual")


def check_layernorm(case: NormCase, device: str) -> None:
    """Against the oracle, also where the mean is a hundred times the deviation; weights are fp32."""
    x, weight, bias = case.input(device, 1), case.weight(device).float(), randn(case.dim, device=device, seed=8)
    for shifted in (x, x + 100 * x.abs().amax() if x.numel() else x):
        if case.dim == 1 and shifted is not x:
            continue  # one value is its own mean
        got = norm.layernorm(shifted, weight, bias, EPS)
        oracle = reference.layernorm(shifted.double(), weight.double(), bias.double(), EPS)
        peer = reference.layernorm(shifted.float(), weight, bias, EPS).to(x.dtype)
        assert_close(got, oracle, peer)


def check_quantising_forms(case: NormCase, device: str) -> None:
    """fp8 outputs against the oracle, with a number and with a tensor as scale; small scales saturate."""
    x, residual, weight = case.input(device, 1), case.input(device, 2), case.weight(device)
    bias = randn(case.dim, device=device, seed=8)
    oracle, oracle_sum = reference.fused_add_rmsnorm(x.double(), residual.double(), weight.double(), EPS)
    for dtype in FP8_DTYPES:
        out = strided(poisoned(x.shape, dtype, device)) if case.strided else poisoned(x.shape, dtype, device)
        for scale in (0.37, torch.tensor([2e-3], device=device), torch.tensor(1.0, device=device)):
            value = float(scale)
            norm.rmsnorm_quant(out, x, weight, scale, EPS)
            assert_fp8_close(out, reference.rmsnorm(x.double(), weight.double(), EPS), value, "rmsnorm_quant")
            total = residual.clone()
            norm.fused_add_rmsnorm_quant(out, x, total, weight, scale, EPS)
            assert_fp8_close(out, oracle, value, "fused_add_rmsnorm_quant")
            assert torch.equal(total, (x.float() + residual.float()).to(x.dtype))
            norm.layernorm_quant(out, x, weight, bias, scale, EPS)
            exact = reference.layernorm(x.double(), weight.double(), bias.double(), EPS)
            assert_fp8_close(out, exact, value, "layernorm_quant")


def check_rmsnorm_silu(case: NormCase, device: str) -> None:
    """Against the oracle, in the dtype of the input and in fp8."""
    x, weight = case.input(device, 1), case.weight(device)
    oracle = silu(reference.rmsnorm(x.double(), weight.double(), EPS))
    got = norm.fused_rmsnorm_silu(x, weight, EPS)
    assert_close(got, oracle, silu(reference.rmsnorm(x, weight, EPS)))
    out = poisoned(x.shape, torch.float8_e4m3fn, device)
    assert norm.fused_rmsnorm_silu(x, weight, EPS, out=out) is out
    assert_fp8_close(out, oracle, 1.0)


@dataclass(frozen=True)
class PatchCase:
    """grid: frames, rows and columns of patches; channels: of a head, for each; heads: of q, k and v; yarn: factor,
    low and high."""

    grid: tuple[int, int, int]
    channels: tuple[int, int, int]
    heads: tuple[int, int, int]
    interleave: bool = True
    dtype: torch.dtype = torch.float16
    batch_size: int = 2
    yarn: tuple[float, float, float] = (1.0, 0.0, 0.0)
    attention_factor: float = 1.0

    def __str__(self) -> str:
        parts: dict[str, tuple[float, ...]] = {"grid": self.grid, "channels": self.channels, "heads": self.heads}
        if any(self.yarn[1:]):
            parts["yarn"] = (*self.yarn, self.attention_factor)
        words = [f"{word}={','.join(str(n) for n in numbers)}" for word, numbers in parts.items()]
        return " ".join([*words, "interleave" if self.interleave else "halves", name(self.dtype)])


PATCH_CASES = (
    PatchCase((2, 3, 2), (8, 4, 4), (3, 3, 3)),
    PatchCase((1, 4, 3), (24, 20, 20), (2, 1, 1), interleave=False, dtype=torch.float32),
    PatchCase((3, 2, 2), (44, 42, 42), (5, 2, 2), batch_size=1),
    PatchCase((3, 2, 5), (12, 20, 16), (2, 1, 1), yarn=(4.0, 1.0, 5.0), attention_factor=1.1386),
    PatchCase((2, 4, 3), (16, 24, 24), (1, 2, 1), False, torch.float32, yarn=(8.0, -0.5, 20.25), attention_factor=0.75),
    PatchCase((2, 3, 4), (8, 16, 8), (2, 2, 1), False, yarn=(2.5, 0.5, 0.5)),  # a step, and no attention_factor
    PatchCase((4, 2, 3), (8, 0, 24), (1, 1, 1), True, torch.float32, yarn=(0.5, 0.0, 3.0), attention_factor=1.25),
    PatchCase((2, 2, 2), (8, 4, 4), (1, 1, 1), yarn=(1.0, 1.0, 3.0)),  # off, whatever the ramp
)


def check_qk_rmsnorm_rope(case: PatchCase, device: str) -> None:
    """Against the oracle, with the norm and without, batched and flat, in the input's dtype and in fp8."""
    head_dim, seq_len = sum(case.channels), case.grid[0] * case.grid[1] * case.grid[2]
    qkv = randn(case.batch_size, seq_len, sum(case.heads) * head_dim, dtype=case.dtype, device=device)
    weights = [randn(n * head_dim, dtype=case.dtype, device=device, seed=i) for i, n in enumerate(case.heads[:2], 1)]
    places = torch.cartesian_prod(*(torch.arange(n) for n in case.grid)).repeat(case.batch_size, 1)
    freqs = [rope_reference.yarn_frequencies(n, 1e4, *case.yarn).float() for n in case.channels]
    angles = torch.cat([places[:, i, None].float() * freqs[i] for i in range(3)], dim=-1).double().to(device)
    cos, sin = (x * case.attention_factor for x in (angles.cos(), angles.sin()))
    parts = torch.split(qkv.flatten(0, 1).double(), [n * head_dim for n in case.heads], dim=-1)
    keys: dict[str, Any] = dict(
        zip(("num_frame_channels", "num_height_channels", "num_width_channels"), case.channels, strict=True)
    )
    keys |= dict(zip(("num_heads_q", "num_heads_k", "num_heads_v"), case.heads, strict=True))
    keys |= dict(zip(("ppf", "pph", "ppw"), case.grid, strict=True))
    keys |= dict(zip(("factor", "low", "high"), case.yarn, strict=True))
    keys |= {"attention_factor": case.attention_factor, "interleave": case.interleave}
    for is_qk_norm in (True, False):
        exact = []
        for x, num_heads, weight in zip(parts, case.heads, [*weights, None], strict=True):
            if weight is not None and is_qk_norm:
                x = reference.rmsnorm(x, weight.double(), EPS)
            x = x.view(-1, num_heads, head_dim)
            turned = rope_reference.rotate(x, cos, sin, case.interleave)
            exact.append(x if weight is None else turned)
        got = norm.fused_qk_rmsnorm_rope(qkv, *weights, **keys, head_dim=head_dim, eps=EPS, is_qk_norm=is_qk_norm)
        flat = norm.fused_qk_rmsnorm_rope(
            qkv.flatten(0, 1), *weights, **keys, head_dim=head_dim, eps=EPS, is_qk_norm=is_qk_norm,
            output_fp8=True, output_quant_scale=0.5, v_quant_scale=2.0,
        )  # fmt: skip
        for i, part in enumerate(("q", "k", "v")):
            assert got[i].shape == (case.batch_size, seq_len, case.heads[i], head_dim)
            assert_close(got[i].flatten(0, 1), exact[i], exact[i].to(case.dtype), part)
            assert_fp8_close(flat[i], exact[i], 2.0 if part == "v" else 0.5, part)


def check_norm_reads_the_unrounded_sum(device: str) -> None:
    """fp16 stores 2048 + 1 as 2048: the norm must still see 2049."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float16, device=device)
    residual = torch.tensor([[2048.0, 704.0]], dtype=torch.float16, device=device)
    norm.fused_add_rmsnorm(x, residual, torch.ones(2, device=device), 0.0)
    assert residual.tolist() == [[2048.0, 704.0]]
    expected, of_rounded_sum = (704 / ((top**2 + 704**2) / 2) ** 0.5 for top in (2049, 2048))
    assert abs(x[0, 1].item() - expected) < abs(x[0, 1].item() - of_rounded_sum)
