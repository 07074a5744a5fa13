"""Norms on the CPU: against the oracle, laws, graphs, errors."""

import math
from typing import Any

import pytest
import torch

from flashtile import norm
from flashtile.plan import encoding
from flashtile.reference import rope as rope_reference
from flashtile.testing import cases_norm as cases


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_rmsnorm(case: cases.NormCase) -> None:
    cases.check_rmsnorm(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_fused_add_rmsnorm(case: cases.NormCase) -> None:
    cases.check_fused_add_rmsnorm(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_gemma_forms(case: cases.NormCase) -> None:
    cases.check_gemma_forms(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_layernorm(case: cases.NormCase) -> None:
    cases.check_layernorm(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_quantising_forms(case: cases.NormCase) -> None:
    cases.check_quantising_forms(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_rmsnorm_silu(case: cases.NormCase) -> None:
    cases.check_rmsnorm_silu(case, "cpu")


@pytest.mark.parametrize("case", cases.PATCH_CASES, ids=str)
def test_qk_rmsnorm_rope(case: cases.PatchCase) -> None:
    cases.check_qk_rmsnorm_rope(case, "cpu")


@pytest.mark.parametrize("factor", [4.0, 40.0])
def test_yarn_frequencies_are_those_of_transformers(factor: float) -> None:
    """With low and high where a pair turns 32 times and once in the old context, which is how models give them."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    how = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 4096}
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=how)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    low, high = (64 * math.log(4096 / (2 * math.pi * turns), 1e4) for turns in (32, 1))
    for frequencies in (rope_reference.yarn_frequencies, encoding.yarn_frequencies):
        got = frequencies(128, 1e4, factor, math.floor(low), math.ceil(high))
        torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=0.0)


def test_norm_reads_the_unrounded_sum() -> None:
    cases.check_norm_reads_the_unrounded_sum("cpu")


def test_parameters_need_no_grad_mode() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    assert not norm.rmsnorm(torch.randn(2, 8), weight).requires_grad


def test_compiles_as_one_graph() -> None:
    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        norm.fused_add_rmsnorm(x, residual, weight)
        return norm.rmsnorm(x, weight) + residual

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    assert torch.equal(compiled(x.clone(), residual.clone(), weight), layer(x.clone(), residual.clone(), weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(8)}, r"input: expected shape \[num_tokens, hidden_size\] or .*got \[8\]"),
        ({"input": torch.ones(3, 8).int()}, "input: expected dtype float16 or bfloat16 or float32, got int32"),
        ({"input": torch.ones(8, 3).t()}, "input: the last dimension must be contiguous"),
        ({"weight": torch.ones(7)}, r"weight: expected shape \[8\], got \[7\]"),
        ({"weight": torch.ones(16)[::2]}, "weight: the last dimension must be contiguous"),
        ({"weight": torch.ones(8, device="meta")}, "weight: expected a tensor on cpu"),
        ({"out": torch.ones(4, 8)}, r"out: expected the shape of input, \[3, 8\], got \[4, 8\]"),
        ({"out": torch.ones(3, 8).half()}, "out: expected the dtype of input"),
    ],
)
def test_errors(change: dict[str, torch.Tensor], message: str) -> None:
    args = {"input": torch.ones(3, 8), "weight": torch.ones(8)} | change
    with pytest.raises(ValueError, match=message):
        norm.rmsnorm(**args)


def test_residual_errors() -> None:
    with pytest.raises(ValueError, match=r"residual: expected the shape of input, \[3, 8\], got \[3, 4\]"):
        norm.fused_add_rmsnorm(torch.ones(3, 8), torch.ones(3, 4), torch.ones(8))
    with pytest.raises(TypeError, match=r"residual: expected a torch.Tensor, got list"):
        norm.fused_add_rmsnorm(torch.ones(3, 8), [1.0], torch.ones(8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.0}, r"factor: expected a positive number, got 0.0"),
        ({"factor": math.nan}, r"factor: expected a positive number, got nan"),
        ({"base": -1.0}, r"base: expected a positive number, got -1.0"),
        ({"factor": 2.0, "attention_factor": -1.0}, r"attention_factor: expected a positive number, got -1.0"),
        ({"factor": 2.0, "low": 3.0, "high": 1.0}, r"expected numbers of pairs with low <= high, got 3.0 and 1.0"),
        ({"factor": 2.0, "high": math.inf}, r"expected numbers of pairs with low <= high, got 0.0 and inf"),
        ({"attention_factor": 1.2}, r"attention_factor: expected 1.0 with factor=1.0 \(no YaRN\), got 1.2"),
    ],
)
def test_yarn_errors(change: dict[str, Any], message: str) -> None:
    sizes = {f"num_{x}_channels": n for x, n in (("frame", 4), ("height", 2), ("width", 2))}
    sizes |= {"ppf": 1, "pph": 1, "ppw": 2, "num_heads_q": 1, "num_heads_k": 1, "num_heads_v": 1, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        norm.fused_qk_rmsnorm_rope(torch.ones(2, 24), torch.ones(8), torch.ones(8), **{**sizes, **change})
