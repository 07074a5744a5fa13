"""Matrix products on a CUDA device: the cases of the CPU tests, CUDA graphs, the Hopper kernel's tiles."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flashtile.config import GemmConfig, capability
from flashtile.gemm import SegmentGEMMWrapper, bmm_fp8, determine_gemm_backend
from flashtile.testing import cases_gemm as cases
from flashtile.testing.tensors import poisoned, randn
from flashtile.testing.tolerance import assert_close
from flashtile.triton.sm_constraint_gemm import gemm_persistent


@pytest.mark.parametrize("case", cases.SEGMENTS, ids=str)
def test_segment_gemm(case: cases.SegmentCase) -> None:
    cases.check_segments(case, "cuda")


@pytest.mark.parametrize("case", cases.FP8, ids=str)
def test_bmm_fp8(case: cases.Fp8Case) -> None:
    cases.check_bmm_fp8(case, "cuda")


@pytest.mark.parametrize("case", cases.GEMMS, ids=str)
def test_gemm_persistent(case: cases.GemmCase) -> None:
    cases.check_gemm(case, "cuda")


def test_a_graph_follows_the_segments() -> None:
    """A captured product reads lengths and weight indices at replay."""
    x, weights = (randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((512, 256), (3, 512, 256)))
    wrapper = SegmentGEMMWrapper(x)
    lens, indices = torch.tensor([100, 300], device="cuda"), torch.tensor([0, 1], device="cuda")
    out = poisoned((512, 512), x.dtype, "cuda")

    def run() -> torch.Tensor:
        return wrapper.run(x, weights, 2, True, out=out, seg_lens=lens, weight_indices=indices)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    lens.copy_(torch.tensor([260, 7]))
    indices.copy_(torch.tensor([2, 0]))
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, run())
    assert not replayed[267:].any()


def test_backends_agree() -> None:
    """Both families, where the Hopper one exists; asking for it elsewhere is an error."""
    case = cases.SegmentCase((300, 129), 512, 520, torch.bfloat16)
    x, weights = randn(429, 512, dtype=case.dtype, device="cuda"), randn(2, 520, 512, dtype=case.dtype, device="cuda")
    indptr = torch.tensor(case.indptr, device="cuda")
    if determine_gemm_backend(x.device) != "sm90":
        with pytest.raises(ValueError, match="backend: sm90 needs compute capability 9.x"):
            SegmentGEMMWrapper(x, backend="sm90")
        return
    first, second = (
        SegmentGEMMWrapper(x, backend=backend).run(x, weights, 2, True, seg_indptr=indptr)
        for backend in ("sm80", "sm90")
    )
    assert_close(first, second.double(), second)


def test_results_do_not_depend_on_the_grid() -> None:
    a, b = (randn(600, 512, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (1, 2))
    all_sms = gemm_persistent(a, b.t())
    assert all(torch.equal(gemm_persistent(a, b.t(), num_sms=n), all_sms) for n in (1, 7, 64))


HOPPER = [
    GemmConfig("hopper", m, n, 64, num_stages=stages, group_m=group_m)
    for m, n, stages, group_m in (
        (128, 256, 4, 16),
        (128, 128, 6, 2),
        (64, 256, 5, 16),
        (64, 256, 4, 1),
        (64, 128, 8, 16),
        (64, 64, 10, 8),
    )
]


@pytest.mark.parametrize("config", HOPPER, ids=lambda c: f"{c.block_m}x{c.block_n}x{c.num_stages}")
@pytest.mark.parametrize("column_major", [True, False])
def test_hopper_tiles(config: GemmConfig, column_major: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile of the Hopper kernel on ragged segments; depths that end within a step, columns within a tile."""
    if capability(torch.device("cuda", torch.cuda.current_device()))[0] != 9:
        pytest.skip("needs a Hopper GPU")
    from flashtile.kernels import gemm as kernels

    monkeypatch.setattr(kernels, "choose", lambda *args: config)
    base = cases.SegmentCase((1, 200, 0, 130, 64, 700), 320, 392, torch.bfloat16, column_major, 5, before=3, after=77)
    for case in (
        base,
        replace(base, d_in=100 if column_major else 64),
        replace(base, lens=(2,) * 40, dtype=torch.float16),
    ):
        d_in = case.d_in // 8 * 8
        cases.check_segments(replace(case, d_in=d_in), "cuda")


def fp8_reference(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a[0], b[0], one, one, out_dtype=torch.bfloat16, use_fast_accum=True)[None]


def test_bmm_fp8_of_large_depth() -> None:
    """Sums as exact as the vendor's in its fast mode."""
    a = randn(1, 512, 4096, dtype=torch.float32, device="cuda", seed=1).to(cases.E4M3)
    b = randn(1, 768, 4096, dtype=torch.float32, device="cuda", seed=2).to(cases.E4M3).transpose(1, 2)
    got = bmm_fp8(a, b, 1.0, 1.0, torch.bfloat16)
    assert_close(got, a.double() @ b.double(), fp8_reference(a, b)())
