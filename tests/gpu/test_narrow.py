"""The narrow family on a GPU of compute capability 9.0: the decode cases over 8 and 4 bits that it serves, longer ones,
and its contracts."""

from dataclasses import replace

import pytest
import torch

from flashtile.config import Config, choose, narrow, narrow_refusal, num_sms
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

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def work_of(case: AttentionCase) -> Workload:
    lens = case.query_lens
    return Workload(len(lens), sum(lens), max(lens), sum(case.kv_lens), max(case.kv_lens))


def config_of(case: AttentionCase, dtype: torch.dtype, heads: int) -> Config:
    """The family's row for few tiles, by 4 heads, or for many, by 8."""
    requests = 1 if heads == 4 else 1024
    return narrow(problem_of(case, dtype), replace(work_of(case), batch_size=requests), 132)


def check(case: AttentionCase, dtype: torch.dtype, heads: int, **forced: object) -> None:
    x = make_inputs(case, dtype, "cuda")
    config = replace(config_of(case, dtype, heads), **forced)
    assert config.heads == heads
    out, lse = run_case(x, make_wrapper(x, "cuda", config=config))
    oracle, oracle_lse = expected(x, torch.float64)
    peer, peer_lse = expected(x, dtype)
    assert_close(out, oracle, peer, "out")
    assert_close(lse, oracle_lse, peer_lse, "lse")


def with_more_heads(case: AttentionCase) -> AttentionCase:
    """The same group, over 4 or 8 KV heads."""
    group = case.heads[0] // case.heads[1]
    num_kv_heads = 8 if case.heads[1] == 8 else 4
    return replace(case, heads=(group * num_kv_heads, num_kv_heads))


SMALL = [
    case
    for case in map(with_more_heads, CASES)
    if narrow_refusal(problem_of(case, torch.bfloat16), work_of(case), (9, 0)) is None
]
_LONG = AttentionCase("int8", kv_lens=(700, 1500, 64, 0, 1, 97), heads=(32, 8), head_dim=128, k_cache="int8",
                      v_cache="int8", scale="token")  # fmt: skip
_INT4 = replace(_LONG, name="int4", k_cache="int4", v_cache="int4")
_FP8 = replace(_LONG, name="e4m3", k_cache="e4m3", v_cache="e4m3", scale="float")
_ALL = {"window_left": 333, "logits_soft_cap": 20.0, "sinks": True}
LONG = [
    _LONG, _INT4, _FP8,
    replace(_FP8, name="e5m2", k_cache="e5m2", v_cache="e5m2", scale="token"),
    *[replace(case, name=f"{case.name}.page{n}", page_size=n)
      for case in (_LONG, _INT4, _FP8) for n in (1, 3, 8, 17, 64, 256)],
    *[replace(case, name=f"{case.name}.ragged", page_size=0, qo_lens=(1,) * 6, causal=False)
      for case in (_LONG, _INT4, _FP8)],
    *[replace(case, name=f"{case.name}.hnd.page{n}", kv_layout="HND", page_size=n)
      for case in (_LONG, _INT4, _FP8) for n in (3, 16)],
    *[replace(case, name=f"{case.name}.all.page{n}", page_size=n, **_ALL)
      for case in (_LONG, _INT4, _FP8) for n in (1, 16)],
    *[replace(case, name=f"{case.name}.head", scale="head") for case in (_LONG, _FP8)],
    *[replace(case, name=f"{case.name}.group{g}", heads=(8 * g, 8)) for case in (_LONG, _INT4) for g in (1, 5, 8)],
    *[replace(case, name=f"{case.name}.dim64", head_dim=64) for case in (_LONG, _INT4, _FP8)],
    *[replace(case, name=f"{case.name}.dim64.page1", head_dim=64, page_size=1) for case in (_LONG, _INT4, _FP8)],
    *[replace(case, name=f"{case.name}.strided.page{n}", strided=True, page_size=n)
      for case in (_LONG, _INT4, _FP8) for n in (1, 16)],
    replace(_LONG, name="int8.one_tensor", one_tensor=True),
    replace(_INT4, name="int4.v_gain", v_gain=1e4), replace(_INT4, name="int4.v_gain.small", v_gain=1e-4),
    replace(_INT4, name="int4.many", kv_lens=(50, 900, 20) * 40, heads=(8, 8)),
    *[replace(case, name=f"{case.name}.zero.page{n}", zero=True, page_size=n)
      for case in (_LONG, _INT4) for n in (1, 16)],
    replace(_INT4, name="int4.zero.all", zero=True, **_ALL),
    replace(_INT4, name="int4.zero.dim64", zero=True, head_dim=64),
    replace(_LONG, name="int8.head.zero", scale="head", zero=True),
    *[replace(case, name=f"{case.name}.half.page{n}", scale="half", page_size=n)
      for case in (_LONG, _INT4) for n in (1, 16)],
    replace(_INT4, name="int4.half.zero", scale="half", zero=True),
    # what it leaves to the portable family
    replace(_INT4, name="int4.group32", scale="group32"),
    replace(_INT4, name="int4.group32.zero", scale="group32", zero=True),
]  # fmt: skip


@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("kv_chunk", [0, 128], ids=["auto", "split128"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long(case: AttentionCase, kv_chunk: int, heads: int) -> None:
    check(case, torch.bfloat16, heads, kv_chunk=kv_chunk)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cases(case: AttentionCase) -> None:
    check(case, torch.float16, 4)
    check(replace(case, heads=(case.heads[0] * 8 // case.heads[1], 8)), torch.bfloat16, 8)


@pytest.mark.parametrize("case", [_LONG, replace(_INT4, page_size=1), _FP8], ids=str)
@pytest.mark.parametrize("heads", [4, 8])
def test_same_bits_100_times(case: AttentionCase, heads: int) -> None:
    x = make_inputs(case, torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda", config=replace(config_of(case, torch.bfloat16, heads), kv_chunk=256))
    first = run_case(x, wrapper)
    for _ in range(100):
        again = run_case(x, wrapper)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_chosen_for_long_batches() -> None:
    device = torch.device("cuda")
    problem = problem_of(_INT4, torch.bfloat16)
    long, short = Workload(64, 64, 1, 64 * 4096, 4096), Workload(1, 1, 1, 100, 100)
    assert choose(problem, long, device).family == "narrow"
    assert choose(problem, short, device).family == "portable"
    assert choose(problem, short, device, "fa3").family == "narrow"
    assert choose(problem, long, device, "fa2").family == "portable"
    assert choose(problem, replace(long, batch_size=1024), device).tiling(problem, num_sms(device)).persistent


def test_next_plan_expects_scales_of_the_same_kind() -> None:
    x = make_inputs(replace(_INT4, kv_lens=(3000,) * 20, scale="group32"), torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda")
    outs = {}
    for family in ("narrow", "portable"):
        assert wrapper._planned().config.family == family
        outs[family], _ = run_case(x, wrapper)
        wrapper.plan(x.kv_indptr, x.kv_indices, x.last_page_len, 32, 8, 128, 16, q_data_type=torch.bfloat16,
                     kv_data_type=torch.uint8)  # fmt: skip
    assert torch.equal(outs["narrow"], outs["portable"])


def test_in_a_graph() -> None:
    x = make_inputs(_LONG, torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda", config=config_of(_LONG, torch.bfloat16, 4))
    first = run_case(x, wrapper)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_case(x, wrapper)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
