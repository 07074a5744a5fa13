"""Matrix products on the CPU: against the oracle, graphs, errors."""

from typing import Any

import pytest
import torch

from flashtile import gemm
from flashtile.config import Product, choose_gemm
from flashtile.testing import cases_gemm as cases
from flashtile.triton import sm_constraint_gemm


@pytest.mark.parametrize("case", cases.SEGMENTS, ids=str)
def test_segment_gemm(case: cases.SegmentCase) -> None:
    cases.check_segments(case, "cpu")


@pytest.mark.parametrize("case", cases.FP8, ids=str)
def test_bmm_fp8(case: cases.Fp8Case) -> None:
    cases.check_bmm_fp8(case, "cpu")


@pytest.mark.parametrize("case", cases.GEMMS, ids=str)
def test_gemm_persistent(case: cases.GemmCase) -> None:
    cases.check_gemm(case, "cpu")


def test_indptr_counts_if_both_are_given() -> None:
    x, weights = torch.randn(6, 4), torch.randn(2, 4, 3)
    lens, indptr = torch.tensor([1, 1]), torch.tensor([0, 4, 6])
    wrapper = gemm.SegmentGEMMWrapper(x)
    got = wrapper.run(x, weights, 2, False, seg_lens=lens, seg_indptr=indptr)
    assert torch.equal(got, wrapper.run(x, weights, 2, False, seg_indptr=indptr))


def test_parameters_need_no_grad_mode() -> None:
    weights = torch.nn.Parameter(torch.randn(1, 4, 4))
    out = gemm.SegmentGEMMWrapper(weights).run(torch.randn(2, 4), weights, 1, True, seg_lens=torch.tensor([2]))
    assert not out.requires_grad


def test_compiles_as_one_graph() -> None:
    wrapper = gemm.SegmentGEMMWrapper(torch.empty(1))

    def layer(x: torch.Tensor, weights: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        hidden = wrapper.run(x, weights, 2, True, seg_lens=lens)
        return sm_constraint_gemm.gemm_persistent(hidden, weights[0], alpha=0.5, num_sms=2)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    arguments = (torch.randn(5, 8), torch.randn(2, 8, 8), torch.tensor([2, 3]))
    assert torch.equal(compiled(*arguments), layer(*arguments))


@pytest.mark.parametrize("sm", [(0, 0), (8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_every_shape_has_a_configuration(sm: tuple[int, int], itemsize: int) -> None:
    """Tiles of the tensor cores' sizes, all of which the launch's bound counts; buffers that fit in shared memory."""
    for hopper in {False, sm == (9, 0) and itemsize < 4}:
        for rows in (0, 1, 16, 17, 64, 65, 256, 4096):
            for d_in, d_out in ((16, 4096), (64, 96), (4096, 16), (4096, 1), (4096, 4096), (0, 7)):
                p = Product(8, rows, d_in, d_out, itemsize)
                config = choose_gemm(p, sm, 132, hopper)
                assert hopper or config.family == "portable"
                assert min(config.block_m, config.block_n, config.block_k * itemsize) >= 16
                assert config.max_tiles(8, 8 * rows, d_out) >= p.tiles(config.block_m, config.block_n)
                buffers = config.num_stages if sm[0] == 9 else max(config.num_stages - 1, 1)
                kilobytes = buffers * (config.block_m + config.block_n) * config.block_k * itemsize // 1024
                assert kilobytes <= (227 if sm[0] == 9 else 99)  # 99: of sm_86 and sm_89


def run(**change: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "x": torch.ones(6, 8),
        "weights": torch.ones(2, 4, 8),
        "batch_size": 2,
        "weight_column_major": True,
        "seg_indptr": torch.tensor([0, 2, 6]),
    }
    return gemm.SegmentGEMMWrapper(torch.empty(1)).run(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(8)}, r"x: expected shape \[num_tokens, d_in\], got \[8\]"),
        ({"x": torch.ones(6, 8).int()}, "x: expected dtype float16 or bfloat16 or float32, got int32"),
        ({"x": torch.ones(8, 6).t()}, "x: the last dimension must be contiguous"),
        ({"x": torch.ones(6, 8, device="meta")}, "x: expected a tensor on cpu, got one on meta"),
        ({"weight_column_major": False}, r"weights: expected shape \[num_weights, 8, d_out\], got \[2, 4, 8\]"),
        ({"weights": torch.ones(2, 4, 8).half()}, "weights: expected the dtype of x"),
        ({"weights": torch.ones(2, 8, 4).transpose(1, 2)}, "weights: the last dimension must be contiguous"),
        (
            {"weights": torch.ones(1, 4, 8)},
            "weights: expected one for each of the 2 segments, got 1; give weight_indices",
        ),
        ({"batch_size": 3}, r"seg_indptr: expected shape \[4\], got \[3\]"),
        ({"seg_indptr": None}, "seg_lens: expected seg_lens or seg_indptr, got neither"),
        ({"seg_indptr": torch.tensor([0, 3, 2])}, "seg_indptr: offsets must not decrease, got 3 then 2 at offset 1"),
        ({"seg_indptr": torch.tensor([0, 3, 7])}, "seg_indptr: expected values from 0 to 6, got 7 at offset 2"),
        ({"seg_indptr": torch.tensor([0.0, 3.0, 6.0])}, "seg_indptr: expected dtype int32 or int64, got float32"),
        ({"seg_indptr": None, "seg_lens": torch.tensor([3, 4])}, "seg_lens: expected at most 6 rows in all, .* got 7"),
        ({"seg_indptr": None, "seg_lens": torch.tensor([-1, 4])}, "seg_lens: expected values from 0 to 6, got -1"),
        ({"weight_indices": torch.tensor([0])}, r"weight_indices: expected shape \[2\], got \[1\]"),
        ({"weight_indices": torch.tensor([0, 2])}, "weight_indices: expected values from 0 to 1, got 2 at segment 1"),
        ({"out": torch.ones(6, 5)}, r"out: expected shape \[6, 4\], got \[6, 5\]"),
        ({"out": torch.ones(6, 4).half()}, "out: expected dtype float32, got float16"),
    ],
)
def test_segment_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**change)


def test_wrapper_errors() -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, sm80, sm90, got 'cutlass'"):
        gemm.SegmentGEMMWrapper(torch.empty(1), backend="cutlass")
    with pytest.raises(TypeError, match="float_workspace_buffer: expected a torch.Tensor, got NoneType"):
        gemm.SegmentGEMMWrapper(None)
    wrapper = gemm.SegmentGEMMWrapper(torch.empty(1))
    with pytest.raises(ValueError, match="int_workspace_buffer: expected a tensor on cpu, got one on meta"):
        wrapper.reset_workspace_buffer(torch.empty(1), torch.empty(1, device="meta"))
    with pytest.raises(TypeError, match="weights: expected a torch.Tensor, got list"):
        run(weights=[1.0])


def test_gemm_backend_is_a_matter_of_cuda_devices() -> None:
    with pytest.raises(ValueError, match="device: expected a CUDA device, got cpu"):
        gemm.determine_gemm_backend(torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(2, 3, 16)}, "A: expected dtype float8_e4m3fn or float8_e5m2, got float32"),
        ({"A": torch.ones(3, 16).to(cases.E4M3)}, r"A: expected shape \[batch_size, m, k\], got \[3, 16\]"),
        ({"B": torch.ones(2, 8, 4).to(cases.E4M3)}, r"B: expected shape \[2, 16, n\], got \[2, 8, 4\]"),
        ({"B": torch.ones(2, 16, 8).to(cases.E4M3)[..., ::2]}, "B: rows or columns must be contiguous"),
        ({"A_scale": torch.ones(2)}, r"A_scale: expected a number or a tensor of one element, got shape \[2\]"),
        ({"B_scale": torch.ones(1).half()}, "B_scale: expected dtype float32, got float16"),
        ({"dtype": torch.float32}, "dtype: expected torch.bfloat16 or torch.float16, got torch.float32"),
        ({"backend": "numpy"}, "backend: expected one of auto, cublas, cudnn, cutlass, got 'numpy'"),
        ({"out": torch.ones(2, 3, 4)}, "out: expected dtype bfloat16, got float32"),
    ],
)
def test_fp8_errors(change: dict[str, Any], message: str) -> None:
    a, b = torch.ones(2, 3, 16).to(cases.E4M3), torch.ones(2, 4, 16).to(cases.E4M3).transpose(1, 2)
    arguments = {"A": a, "B": b, "A_scale": 1.0, "B_scale": 1.0, "dtype": torch.bfloat16} | change
    with pytest.raises(ValueError, match=message):
        gemm.bmm_fp8(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(8)}, r"a: expected shape \[m, k\], got \[8\]"),
        ({"b": torch.ones(7, 4)}, r"b: expected shape \[8, n\], got \[7, 4\]"),
        ({"b": torch.ones(8, 4).half()}, "b: expected the dtype of a"),
        ({"b": torch.ones(16, 8)[::2, ::2]}, "b: rows or columns must be contiguous"),
        ({"beta": 1.0}, r"c: expected a tensor of shape \[3, 4\] since beta is 1.0, got None"),
        ({"num_sms": 0}, "num_sms: expected at least 1, got 0"),
        ({"out_dtype": torch.int8}, "out_dtype: expected float16, bfloat16 or float32, got torch.int8"),
        ({"c": torch.ones(3, 5)}, r"c: expected shape \[3, 4\], got \[3, 5\]"),
    ],
)
def test_gemm_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"a": torch.ones(3, 8), "b": torch.ones(8, 4)} | change
    with pytest.raises(ValueError, match=message):
        sm_constraint_gemm.gemm_persistent(**arguments)
