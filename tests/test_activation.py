"""Gated activations on the CPU: against the oracle, laws, graphs, errors."""

import pytest
import torch

from flashtile import activation
from flashtile.testing import cases_activation as cases


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_activation(op: str, case: cases.ActivationCase) -> None:
    cases.check_activation(op, case, "cpu")


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_quantised(op: str, case: cases.ActivationCase) -> None:
    cases.check_quantised(op, case, "cpu")


@pytest.mark.parametrize("op", cases.OPS)
def test_extremes(op: str) -> None:
    cases.check_extremes(op, "cpu")


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(activation.silu_and_mul, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8)
    assert torch.equal(compiled(x), activation.silu_and_mul(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(3, 7)}, r"input: expected shape \[\.\.\., 2 \* d\], gate then up, got \[3, 7\]"),
        ({"input": torch.ones(3, 8).int()}, "input: expected dtype float16 or bfloat16 or float32, got int32"),
        ({"input": torch.ones(8, 4).t()}, "input: the last dimension must be contiguous"),
        ({"input": torch.ones(3, 4, 16)[:, ::2, :8]}, r"out: expected shape \[3, 2, 4\], got \[3, 4\]"),
        ({"out": torch.ones(3, 8)}, r"out: expected shape \[3, 4\], got \[3, 8\]"),
        ({"out": torch.ones(3, 4).half()}, "out: expected dtype float32 or float8_e4m3fn or float8_e5m2, got float16"),
        ({"scale": 2.0}, "scale: expected an fp8 out to go with it, got torch.float32"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    args = {"input": torch.ones(3, 8), "out": torch.empty(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        activation.silu_and_mul(**args)
