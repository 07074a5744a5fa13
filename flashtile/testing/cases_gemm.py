"""Cases of the matrix products, and what must hold for each: run by tests/ on the CPU, in Triton's interpreter and on a
GPU."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashtile.gemm import SegmentGEMMWrapper, bmm_fp8
from flashtile.reference import gemm as reference
from flashtile.testing.tensors import name, poison, poisoned, randn, strided
from flashtile.testing.tolerance import assert_close
from flashtile.triton.sm_constraint_gemm import gemm, gemm_descriptor_persistent, gemm_persistent

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class SegmentCase:
    """lens: rows of each segment; before, after: rows of no segment; weights: how many there are to choose from (0: one
    for each segment)."""

    lens: tuple[int, ...]
    d_in: int
    d_out: int
    dtype: torch.dtype = torch.float16
    column_major: bool = True
    weights: int = 0
    before: int = 0
    after: int = 0
    strided: bool = False

    def __str__(self) -> str:
        lens = ",".join(map(str, self.lens)) if len(self.lens) <= 6 else f"{len(self.lens)}x..{max(self.lens)}"
        parts = [f"lens={lens} {self.d_in}x{self.d_out} {name(self.dtype)} {'col' if self.column_major else 'row'}"]
        parts += [f"weights={self.weights}"] if self.weights else []
        parts += [f"outside={self.before}+{self.after}"] if self.before or self.after else []
        return " ".join(parts + (["strided"] if self.strided else []))

    @property
    def indptr(self) -> list[int]:
        """Offsets of the segments."""
        return [self.before + sum(self.lens[:i]) for i in range(len(self.lens) + 1)]

    @property
    def indices(self) -> list[int] | None:
        """The weight of each segment; the first weight is nobody's where there are enough others."""
        if not self.weights:
            return None
        return [(3 * i + 1) % self.weights or self.weights - 1 for i in range(len(self.lens))]


SMALL_SEGMENTS = (
    SegmentCase((5,), 32, 24),
    SegmentCase((3, 0, 20, 1), 40, 72, column_major=False, before=2, after=3),
    SegmentCase((0, 0), 16, 16, after=4),
    SegmentCase((17, 33), 130, 100, torch.float32, strided=True),
    SegmentCase((4, 70, 2), 64, 136, weights=3, before=1),
    SegmentCase((100, 30), 72, 144, column_major=False, weights=2, strided=True),
    SegmentCase((2,) * 9, 24, 7, after=1, weights=4, strided=True),
    SegmentCase((), 16, 16, after=3),
    SegmentCase((0,), 16, 16),
    SegmentCase((6, 2), 0, 16, column_major=False),
)
SEGMENTS = SMALL_SEGMENTS + tuple(
    replace(case, dtype=dtype, column_major=column_major)
    for case in (
        SegmentCase((16,) * 8, 512, 256),
        SegmentCase((1, 200, 0, 130, 64, 300), 256, 384, weights=5, before=3, after=77),
        SegmentCase((300, 129), 512, 520, strided=True),
        SegmentCase((700, 500), 192, 640),
        SegmentCase((16, 1, 40), 1024, 16),
        SegmentCase((500, 3, 64), 16, 1024, weights=4),
        SegmentCase((129, 255), 100, 260),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for column_major in (True, False)
) + (SegmentCase(tuple(i % 5 for i in range(1100)), 64, 48, weights=16, before=1),)  # fmt: skip


def run_segments(
    case: SegmentCase, x: Tensor, weights: Tensor, out: Tensor | None = None, index: torch.dtype = torch.int64
) -> Tensor:
    """The product of a case, of segments given by offsets."""
    wrapper = SegmentGEMMWrapper(x)
    indptr = torch.tensor(case.indptr, dtype=index, device=x.device)
    indices = None if case.indices is None else torch.tensor(case.indices, dtype=index, device=x.device)
    return wrapper.run(
        x, weights, len(case.lens), case.column_major, out=out, seg_indptr=indptr, weight_indices=indices
    )


def check_segments(case: SegmentCase, device: str) -> None:
    """Against the oracle, with NaN in rows of no segment, in weights of no segment and in the output beforehand; into a
    strided output and with other index types the same bits."""
    x = randn(case.before + sum(case.lens) + case.after, case.d_in, dtype=case.dtype, device=device, seed=1)
    shape = (case.d_out, case.d_in) if case.column_major else (case.d_in, case.d_out)
    weights = randn(case.weights or len(case.lens), *shape, dtype=case.dtype, device=device, seed=2)
    oracle, peer = (
        reference.segment_gemm(*operands, case.indptr, case.column_major, case.indices)
        for operands in ((x.double(), weights.double()), (x, weights))
    )
    for i in set(range(weights.shape[0])) - set(case.indices or range(len(case.lens))):
        poison(weights[i])
    poison(x[: case.before])
    poison(x[case.indptr[-1] :])
    if case.strided:
        x, weights = strided(x), strided(weights)
    got = run_segments(case, x, weights)
    assert_close(got, oracle, peer)
    outside = torch.cat([got[: case.before], got[case.indptr[-1] :]])
    assert torch.equal(outside, torch.zeros_like(outside))
    out = strided(poisoned(got.shape, got.dtype, device))
    assert run_segments(case, x, weights, out, torch.int32) is out
    assert torch.equal(out, got)
    if case.before == 0:
        lens = torch.tensor(case.lens, dtype=torch.int32, device=device)
        indices = None if case.indices is None else torch.tensor(case.indices, device=device)
        wrapper = SegmentGEMMWrapper(x, backend="sm80" if device == "cpu" else "auto")
        again = wrapper.forward(x, weights, len(case.lens), case.column_major, seg_lens=lens, weight_indices=indices)
        assert torch.equal(again, got)


@dataclass(frozen=True)
class Fp8Case:
    """A batched product [m, k] x [k, n] of fp8 matrices."""

    batch_size: int
    m: int
    k: int
    n: int
    a_dtype: torch.dtype = E4M3
    b_dtype: torch.dtype = E4M3
    dtype: torch.dtype = torch.bfloat16
    column_major: bool = True

    def __str__(self) -> str:
        shape = f"b={self.batch_size} m={self.m} k={self.k} n={self.n}"
        types = " ".join(name(t) for t in (self.a_dtype, self.b_dtype, self.dtype))
        return f"{shape} {types}{'' if self.column_major else ' row'}"


SMALL_FP8 = (
    Fp8Case(1, 5, 32, 16, dtype=torch.float16),
    Fp8Case(3, 20, 80, 48, E5M2, dtype=torch.float16),
    Fp8Case(2, 33, 130, 100, b_dtype=E5M2, dtype=torch.float16),
    Fp8Case(2, 16, 64, 24, dtype=torch.float16, column_major=False),
    Fp8Case(2, 20, 64, 32, E5M2, E5M2, torch.float16),
    Fp8Case(0, 16, 64, 24),
)
FP8 = SMALL_FP8 + tuple(
    Fp8Case(*shape, a, b, dtype)
    for shape in ((1, 48, 64, 80), (16, 128, 256, 64), (4, 300, 128, 384), (2, 257, 384, 520))
    for a, b in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2))
    for dtype in (torch.bfloat16, torch.float16)
)


def check_bmm_fp8(case: Fp8Case, device: str) -> None:
    """Against the oracle over the same fp8 values; strided operands and output, numbers as scales: the same bits."""
    a = randn(case.batch_size, case.m, case.k, dtype=torch.float32, device=device, seed=1).to(case.a_dtype)
    b = randn(case.batch_size, case.n, case.k, dtype=torch.float32, device=device, seed=2).to(case.b_dtype)
    b = b.transpose(1, 2) if case.column_major else b.transpose(1, 2).contiguous()
    scales = (0.25, 0.75)
    oracle = (
        reference.bmm(a.double(), b.double(), *scales) if case.batch_size else a.new_zeros(0, case.m, case.n).double()
    )
    a_scale, b_scale = (torch.tensor(s, device=device) for s in scales)
    got = bmm_fp8(a, b, a_scale, b_scale[None], case.dtype)
    assert_close(got, oracle, oracle.to(case.dtype))
    out = strided(poisoned(got.shape, got.dtype, device))
    apart = a.new_empty(case.batch_size, 2 * case.m, case.k + 16)[:, ::2, :-16].copy_(a)
    assert bmm_fp8(apart, b, *scales, case.dtype, out=out) is out
    assert torch.equal(out, got)


@dataclass(frozen=True)
class GemmCase:
    """alpha [m, k] x [k, n] + beta c."""

    m: int
    k: int
    n: int
    dtype: torch.dtype = torch.float16
    out_dtype: torch.dtype | None = None
    alpha: float = 1.0
    beta: float = 0.0
    num_sms: int | None = None

    def __str__(self) -> str:
        out = "" if self.out_dtype is None else f"->{name(self.out_dtype)}"
        sms = "" if self.num_sms is None else f" sms={self.num_sms}"
        return f"{self.m}x{self.k}x{self.n} {name(self.dtype)}{out} alpha={self.alpha} beta={self.beta}{sms}"


SMALL_GEMMS = (
    GemmCase(1, 16, 16),
    GemmCase(20, 40, 72, alpha=0.5, beta=1.5, num_sms=3),
    GemmCase(130, 72, 140, num_sms=1),
    GemmCase(33, 64, 48, torch.float32, torch.float16, beta=1.0),
    GemmCase(17, 32, 40, E4M3, torch.float32, alpha=2.0),
    GemmCase(0, 16, 16),
    GemmCase(4, 0, 16, beta=2.0),
)
GEMMS = SMALL_GEMMS + (
    GemmCase(256, 1024, 512, torch.bfloat16),
    GemmCase(512, 256, 1024, torch.float16, num_sms=16),
    GemmCase(1000, 512, 1000, torch.bfloat16, torch.float32, alpha=0.5, num_sms=33),
    GemmCase(300, 512, 700, torch.float16, alpha=0.25, beta=2.0),
    GemmCase(129, 100, 257, torch.float32),
    GemmCase(384, 512, 640, E4M3, torch.float16, num_sms=8),
)


def check_gemm(case: GemmCase, device: str) -> None:
    """The three functions against the oracle, for both majors of b; c is not read without beta."""
    narrow = case.dtype.itemsize == 1
    start = torch.float16 if narrow else case.dtype
    a = randn(case.m, case.k, dtype=start, device=device, seed=1).to(case.dtype)
    b = randn(case.n, case.k, dtype=start, device=device, seed=2).to(case.dtype)
    out_dtype = case.out_dtype or (torch.bfloat16 if narrow else case.dtype)
    c = randn(case.m, case.n, dtype=out_dtype, device=device, seed=3)
    oracle = reference.gemm(a.double(), b.double().t(), c.double(), case.alpha, case.beta)
    if narrow:  # the products of fp8 values are exact
        peer = oracle.to(out_dtype)
    else:
        wide = torch.promote_types(case.dtype, out_dtype)
        peer = reference.gemm(a.to(wide), b.to(wide).t(), c.to(wide), case.alpha, case.beta).to(out_dtype)
        peer = reference.gemm(a, b.t(), c, case.alpha, case.beta) if out_dtype == case.dtype else peer

    def target() -> Tensor:
        return strided(c if case.beta else poisoned(c.shape, c.dtype, device))

    got = target()
    factors: dict[str, Any] = {"alpha": case.alpha, "beta": case.beta, "out_dtype": case.out_dtype}
    assert gemm_persistent(a, b.t(), got, num_sms=case.num_sms, **factors) is got
    assert_close(got, oracle, peer)
    assert torch.equal(gemm_descriptor_persistent(a, b, target(), num_sms=case.num_sms, **factors), got)
    assert torch.equal(gemm(a, b.t(), target(), **factors), got)
    assert_close(gemm(strided(a), strided(b.t().contiguous()), target(), **factors), oracle, peer, "row major")
    if not case.beta:
        assert torch.equal(gemm(a, b.t(), **factors), got)
