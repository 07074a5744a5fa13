"""Attention on the CPU backend against the oracle, and the contracts that hold for every family."""

import pytest
import torch

from flashtile.testing.cases_attention import CASES, AttentionCase, expected, make_inputs, make_wrapper, run_case
from flashtile.testing.tolerance import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype)
    out, lse = run_case(x, make_wrapper(x, "cpu"))
    oracle, oracle_lse = expected(x, torch.float64)
    peer, peer_lse = expected(x, dtype)
    assert_close(out, oracle, peer, "out")
    assert_close(lse, oracle_lse, peer_lse, "lse")
