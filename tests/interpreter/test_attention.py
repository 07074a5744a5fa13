"""The portable attention family through Triton's interpreter: the cases of the CPU tests, with and without split KV."""

from dataclasses import replace

import pytest
import torch

from flashtile.config import Config, portable
from flashtile.plan.encoding import Rope
from flashtile.plan.problem import Workload
from flashtile.testing.cases_attention import (
    CASES,
    AttentionCase,
    expected,
    make_inputs,
    make_wrapper,
    problem_of,
    run_case,
)
from flashtile.testing.tolerance import assert_close

DTYPES = (torch.float16, torch.float32)


def config_for(case: AttentionCase, dtype: torch.dtype, sm: tuple[int, int] = (8, 0), **forced: int) -> Config:
    problem = problem_of(case, dtype)
    lens = case.query_lens
    work = Workload(len(lens), sum(lens), max(lens, default=0), sum(case.kv_lens), max(case.kv_lens))
    return replace(portable(problem, work, sm), overlap=False, **forced)


def check(case: AttentionCase, dtype: torch.dtype, kv_chunk: int, sm: tuple[int, int] = (8, 0), **forced: int) -> None:
    x = make_inputs(case, dtype)
    wrapper = make_wrapper(x, "cpu", config=config_for(case, dtype, sm, kv_chunk=kv_chunk, **forced))
    out, lse = run_case(x, wrapper)
    oracle, oracle_lse = expected(x, torch.float64)
    peer, peer_lse = expected(x, dtype)
    assert_close(out, oracle, peer, "out")
    assert_close(lse, oracle_lse, peer_lse, "lse")


TURNED = [c for c in CASES if c.rope and c.k_cache == c.v_cache == "plain" and c.kv_lens[0] < 1000]


@pytest.mark.parametrize("case", TURNED, ids=str)
def test_rotated_first(case: AttentionCase) -> None:
    check(case, torch.float16, 0, copy_first=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_portable(case: AttentionCase) -> None:
    check(case, torch.float16, 0)


NARROW_V = [c for c in CASES if c.qo_lens and (c.dim_vo < c.head_dim or c.k_cache != c.v_cache)]


@pytest.mark.parametrize("case", NARROW_V, ids=str)
def test_portable_for_wgmma(case: AttentionCase) -> None:
    """V is laid out differently there where it is narrower than K (tile_widths)."""
    check(case, torch.float16, 0, (9, 0))


@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim == 64 and c.heads == (4, 2)], ids=str)
def test_portable_split(case: AttentionCase) -> None:
    check(case, torch.float32, 64)


def in_one_tile(case: AttentionCase) -> bool:
    """Whether a tile of 16 rows holds all query rows of a KV head."""
    return max(case.query_lens) * case.heads[0] // case.heads[1] <= 16


WAYS = [(case, heads) for case in CASES if in_one_tile(case) for heads in (1, 2) if case.heads[1] % heads == 0]


@pytest.mark.parametrize(("case", "heads"), WAYS, ids=[f"{case}-{heads}" for case, heads in WAYS])
def test_portable_ways(case: AttentionCase, heads: int) -> None:
    """Warps with keys, and heads, of their own."""
    check(case, torch.float16, 64, num_warps=4, ways=4, heads=heads)


LONG_STEPS = [
    AttentionCase("long", kv_lens=(300, 1, 513), heads=(4, 2), head_dim=64, page_size=16),
    AttentionCase("long.rope", kv_lens=(300, 1, 513), heads=(4, 2), head_dim=64, page_size=1, rope=Rope()),
]


@pytest.mark.parametrize("kv_chunk", [0, 256])
@pytest.mark.parametrize("case", LONG_STEPS, ids=str)
def test_portable_long_steps(case: AttentionCase, kv_chunk: int) -> None:
    """128 keys a step, as where few tiles walk long KV."""
    check(case, torch.float16, kv_chunk, block_n=128, num_warps=8 if case.rope else 4, num_stages=5)


INTEGERS = [c for c in CASES if {"int8", "int4"} & {c.k_cache, c.v_cache}]


@pytest.mark.parametrize("ways", [1, 4])
@pytest.mark.parametrize("case", [c for c in INTEGERS if in_one_tile(c)], ids=str)
def test_portable_raw(case: AttentionCase, ways: int) -> None:
    """int8 and int4 multiplied as they are."""
    heads = 2 if ways > 1 and case.heads[1] % 2 == 0 else 1
    check(case, torch.float16, 64, num_warps=4, ways=ways, heads=heads, raw=True)
