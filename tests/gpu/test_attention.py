"""The attention cases on a CUDA device: the portable family in three dtypes, with and without split KV; contracts."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from flashtile.config import CHAINED_TOKENS, Config, capability, portable
from flashtile.kernels.copied import move
from flashtile.plan.encoding import Rope
from flashtile.plan.plan import Lengths, make_plan
from flashtile.plan.problem import Problem, Workload
from flashtile.reference.attention import rotated
from flashtile.reference.rope import frequencies
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


def run(case: AttentionCase, dtype: torch.dtype, kv_chunk: int, **forced: object) -> None:
    x = make_inputs(case, dtype, "cuda")
    lens = case.query_lens
    problem = problem_of(case, dtype)
    work = Workload(len(lens), sum(lens), max(lens), sum(case.kv_lens), max(case.kv_lens))
    config = replace(portable(problem, work, capability(x.q.device)), kv_chunk=kv_chunk, **forced)
    out, lse = run_case(x, make_wrapper(x, "cuda", config=config))
    oracle, oracle_lse = expected(x, torch.float64)
    peer, peer_lse = expected(x, dtype)
    assert_close(out, oracle, peer, "out")
    assert_close(lse, oracle_lse, peer_lse, "lse")


@pytest.mark.parametrize("kv_chunk", [0, 64], ids=["auto", "split64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_portable(case: AttentionCase, dtype: torch.dtype, kv_chunk: int) -> None:
    run(case, dtype, kv_chunk)


LONG = AttentionCase("long", kv_lens=(20_000, 15_000), heads=(32, 8), head_dim=128, page_size=16)


RAGGED = replace(LONG, name="long.ragged", page_size=0, qo_lens=(1, 1), causal=False)


@pytest.mark.parametrize(
    "case",
    [
        LONG,
        replace(LONG, name="long.page1", page_size=1),
        replace(LONG, name="long.rope", rope=Rope()),
        replace(LONG, name="long.page1.rope", page_size=1, rope=Rope()),
        replace(LONG, name="long.alibi", alibi=True),
        RAGGED,
        replace(RAGGED, name="long.ragged.alone", kv_lens=(40_000,), qo_lens=(1,)),
        replace(RAGGED, name="long.ragged.rope", rope=Rope()),
    ],
    ids=str,
)
def test_longer_steps(case: AttentionCase) -> None:
    """Few tiles that walk long KV, as config.py serves them; those of ragged KV would not fit in shared memory."""
    work = Workload(len(case.kv_lens), len(case.kv_lens), 1, sum(case.kv_lens), max(case.kv_lens))
    config = portable(problem_of(case, torch.bfloat16), work, capability(torch.device("cuda")))
    assert capability(torch.device("cuda")) < (9, 0) or config.block_n == (128 if case.page_size else 64)
    run(case, torch.bfloat16, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 40])
def test_chains_of_angles(batch_size: int, beyond: int, dtype: torch.dtype) -> None:
    """Keys as far from the start as chains go, and one further, where each angle is found for itself."""
    n = CHAINED_TOKENS[dtype] + beyond
    case = replace(LONG, kv_lens=(n,), heads=(4, 1), rope=Rope(), window_left=511)
    work = Workload(batch_size, batch_size, 1, n * batch_size, n)
    problem = replace(problem_of(case, dtype), num_qo_heads=32, num_kv_heads=8)
    config = portable(problem, work, capability(torch.device("cuda")))
    assert config.chained == (beyond == 0)
    names = ("chained", "block_n", "num_warps", "num_stages", "ctas_per_sm", "max_registers")
    run(case, dtype, 0, **{name: getattr(config, name) for name in names})


NARROW = [
    replace(c, heads=(8, 4))
    for c in CASES
    if c.name.startswith("decode.int") and c.heads[1] in (1, 2) and c.head_dim in (64, 128) and c.v_cache != "plain"
    and c.window_left < 0 and not c.logits_soft_cap and c.rope is None
]  # fmt: skip


@pytest.mark.parametrize("kv_chunk", [0, 64], ids=["auto", "split64"])
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_several_heads(case: AttentionCase, kv_chunk: int) -> None:
    heads = 4 if case.k_cache == case.v_cache == "int4" else 2
    forced = {"ways": 4, "heads": heads, "num_warps": 4, "num_stages": 5, "raw": True, "max_registers": None}
    run(case, torch.bfloat16, kv_chunk, block_n=64, **forced)


MANY = [
    replace(c, name=f"{c.name}.{layout.lower()}", kv_layout=layout)
    for c in CASES
    for layout in ("NHD", "HND")
    if c.name.startswith("decode.") and c.head_dim in (64, 128) and c.kv_layout == "NHD" and c.heads == (4, 2)
]


@pytest.mark.parametrize("kv_chunk", [0, 64], ids=["auto", "split64"])
@pytest.mark.parametrize("requests", [256, 1024])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_requests(case: AttentionCase, requests: int, kv_chunk: int) -> None:
    """What config.py chooses for many requests: small CTAs, or several heads in one."""
    work = Workload(requests, requests, 1, requests * 4096, 4096)
    config = portable(problem_of(case, torch.bfloat16), work, capability(torch.device("cuda")))
    changed = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("family", "block_m", "pack")}
    run(case, torch.bfloat16, **(changed | {"kv_chunk": kv_chunk}))


def test_rotation_up_to_position_1e6() -> None:
    """By the function for 16-bit products, but with fp32 tensors around it: pairs (1, 0) become (cos, sin)."""
    n, dim, half = 1_000_000, 16, torch.bfloat16
    problem = Problem(1, 1, dim, dim, half, half, half, rope=Rope(theta=5e5))
    config = Config("portable", 64, 64, 1, copy_first=True)
    lengths = Lengths(np.array([0, 1]), np.array([0]), np.array([n]))
    pages = torch.zeros(1, dtype=torch.int32, device="cuda")
    plan = make_plan(problem, config, lengths, pages, torch.device("cuda"))
    assert plan.moves is not None
    x = torch.zeros(n, 1, dim, device="cuda")
    x[..., : dim // 2] = 1
    out = torch.empty_like(x)
    move(plan, out, x, plan.moves.kv, True, False)
    exact = rotated(x.double(), torch.arange(n, device="cuda"), frequencies(dim, 1.0, 5e5).cuda())
    assert (out - exact).abs().max() < 2**-19


@pytest.mark.parametrize(
    "name", ["decode", "alone", "alone.window.sinks", "append", "ragged", "append.window_left=16", "decode.rope.plain"]
)
def test_same_bits_100_times(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    x = make_inputs(case, torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda")
    first = run_case(x, wrapper)
    for _ in range(100):
        again = run_case(x, wrapper)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_page_near_two_to_31_elements() -> None:
    page_size, heads, dim = 16, 8, 128
    pages = 2**31 // (page_size * heads * dim) + 8
    cache = torch.full((pages, 2, page_size, heads, dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    case = AttentionCase("far", kv_lens=(50,), heads=(32, 8), head_dim=dim)
    x = make_inputs(case, torch.bfloat16, "cuda")
    k, v = x.cache
    ids = torch.arange(pages - 4, pages, dtype=torch.int32)
    near = x.kv_indices[:4].long()
    cache[ids.long(), 0], cache[ids.long(), 1] = k[near], v[near]
    expected_out, _ = run_case(x, make_wrapper(x, "cuda"))
    x.cache, x.kv_indices = cache, ids
    out, _ = run_case(x, make_wrapper(x, "cuda"))
    assert torch.equal(out, expected_out)


def test_side_stream_and_graph() -> None:
    x = make_inputs(CASES[0], torch.float16, "cuda")
    wrapper = make_wrapper(x, "cuda")
    expected_out, _ = run_case(x, wrapper)
    out = torch.empty_like(expected_out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(x.q, x.cache, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected_out)


def test_run_never_waits_for_the_gpu() -> None:
    x = make_inputs(CASES[2], torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda")
    run_case(x, wrapper)
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapper.run(x.q, x.cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
