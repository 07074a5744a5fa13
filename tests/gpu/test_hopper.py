"""The Hopper family on a GPU of compute capability 9.0: the attention cases that it serves, longer ones, and its
contracts."""

from dataclasses import replace

import pytest
import torch

from flashtile.config import CHAINED_TOKENS, TURNED_DIMS, Config, hopper, hopper_refusal
from flashtile.plan.encoding import Rope
from flashtile.plan.problem import Workload
from flashtile.testing.cases_attention import (
    CASES,
    AttentionCase,
    Inputs,
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

_RAGGED = AttentionCase("ragged", kv_lens=(700, 130, 1), qo_lens=(300, 130, 1), heads=(4, 2), head_dim=128, page_size=0)
_PAGED = replace(_RAGGED, name="paged", page_size=16)
_ALIGNED = replace(_RAGGED, name="aligned", kv_lens=(384, 256, 200), qo_lens=(384, 128, 200))
# prefill beside decode rows, whose tiles hold all heads of a group
_MIXED = replace(_PAGED, name="mixed", kv_lens=(700, 900, 130, 257, 1, 0), qo_lens=(300, 1, 130, 1, 1, 1), heads=(8, 2))
LONG_CASES = [
    _MIXED,
    replace(_MIXED, name="mixed.page1", page_size=1),
    replace(_MIXED, name="mixed.ragged", page_size=0),
    replace(_MIXED, name="mixed.not_causal", causal=False),
    replace(_MIXED, name="mixed.window", window_left=100),
    replace(_MIXED, name="mixed.soft_cap", logits_soft_cap=20.0),
    replace(_MIXED, name="mixed.sinks", sinks=True),
    replace(_MIXED, name="mixed.strided", strided=True),
    replace(_MIXED, name="mixed.aligned", kv_lens=(384, 129, 1, 513), qo_lens=(384, 1, 1, 1), page_size=0),
    replace(_MIXED, name="mixed.group3", heads=(6, 2)),
    replace(_MIXED, name="mixed.group32", kv_lens=(200, 300), qo_lens=(130, 1), heads=(32, 1)),
    *[replace(_MIXED, name=f"mixed.dim{d}", head_dim=d) for d in (64, 96, 256)],
    _ALIGNED,
    replace(_ALIGNED, name="aligned.not_causal", causal=False),
    replace(_ALIGNED, name="aligned.dim64", head_dim=64),
    replace(_ALIGNED, name="aligned.dim256", head_dim=256),
    replace(_ALIGNED, name="aligned.empty", kv_lens=(384, 0, 128), qo_lens=(128, 128, 384)),
    _RAGGED,
    replace(_RAGGED, name="ragged.not_causal", causal=False),
    replace(_RAGGED, name="ragged.window", window_left=200),
    replace(_RAGGED, name="ragged.window.not_causal", window_left=65, causal=False),
    replace(_RAGGED, name="ragged.soft_cap", logits_soft_cap=20.0),
    replace(_RAGGED, name="ragged.sinks", sinks=True),
    replace(_RAGGED, name="ragged.hnd", kv_layout="HND"),
    replace(_RAGGED, name="ragged.strided", strided=True),
    replace(_RAGGED, name="ragged.group1", heads=(3, 3)),
    replace(_RAGGED, name="ragged.large_logits", q_gain=100.0),
    replace(_RAGGED, name="ragged.many", kv_lens=(50,) * 300, qo_lens=(33,) * 300),
    *[replace(_RAGGED, name=f"ragged.dim{d}", head_dim=d) for d in (64, 96, 256)],
    replace(_RAGGED, name="ragged.dim192x128", head_dim=192, head_dim_vo=128),
    *[replace(_PAGED, name=f"paged.page{n}", page_size=n) for n in (1, 3, 8, 16, 17, 64, 128, 256)],
    replace(_PAGED, name="paged.not_causal", causal=False),
    replace(_PAGED, name="paged.one_tensor", one_tensor=True),
    replace(_PAGED, name="paged.hnd", kv_layout="HND"),
    replace(_PAGED, name="paged.strided", strided=True),
    replace(_PAGED, name="paged.page1.window", page_size=1, window_left=100),
    replace(_PAGED, name="paged.page1.strided", page_size=1, strided=True),
    *[replace(_PAGED, name=f"paged.dim{d}", head_dim=d) for d in (64, 96, 256)],
    *[replace(_PAGED, name=f"paged.page1.dim{d}", page_size=1, head_dim=d) for d in (64, 96, 256)],
    replace(_PAGED, name="paged.append", kv_lens=(700, 1500, 64), qo_lens=(16, 3, 16), heads=(8, 2)),
    replace(_PAGED, name="paged.append64", kv_lens=(700, 1500, 64), qo_lens=(64, 33, 16), heads=(10, 2)),
    replace(_PAGED, name="paged.append.page1", kv_lens=(700, 1500, 64), qo_lens=(16, 3, 16), heads=(8, 2), page_size=1),
]


def served(case: AttentionCase) -> bool:
    """Whether the family takes the case."""
    plain = case.k_cache == case.v_cache == "plain" and case.scale in ("none", "float") and not case.zero
    return plain and not hopper_refusal(problem_of(case, torch.bfloat16), (9, 0))


def config_of(case: AttentionCase, dtype: torch.dtype) -> Config:
    """The family's own choice; with a rope, behind the rotation."""
    lens = case.query_lens
    work = Workload(len(lens), sum(lens), max(lens), sum(case.kv_lens), max(case.kv_lens))
    problem = problem_of(case, dtype)
    if case.rope is not None:
        served = hopper(replace(problem, rope=None, page_size=0), work)
        turn_q = case.head_dim in TURNED_DIMS
        chained = turn_q and max(case.kv_lens) <= CHAINED_TOKENS[dtype]
        return replace(served, copy_first=True, turn_q=turn_q, chained=chained)
    return hopper(problem, work)


def check(case: AttentionCase, dtype: torch.dtype, **forced: object) -> None:
    x = make_inputs(case, dtype, "cuda")
    config = replace(config_of(case, dtype), **forced)
    out, lse = run_case(x, make_wrapper(x, "cuda", config=config))
    oracle, oracle_lse = expected(x, torch.float64)
    peer, peer_lse = expected(x, dtype)
    assert_close(out, oracle, peer, "out")
    assert_close(lse, oracle_lse, peer_lse, "lse")


SERVED = [c for c in CASES if served(c)]
SMALL = [replace(c, head_dim=128) for c in SERVED if c.head_dim == 64 and not c.head_dim_vo]


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long(case: AttentionCase) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_cases(case: AttentionCase) -> None:
    check(case, torch.float16)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_dim128(case: AttentionCase) -> None:
    check(case, torch.bfloat16)


ROPE_CASES = [
    replace(case, name=f"{case.name}.rope", rope=rope)
    for case, rope in (
        (_ALIGNED, Rope()), (_RAGGED, Rope(8.0, 5e5, (1.0, 4.0, 64.0))), (replace(_RAGGED, strided=True), Rope()),
        (_PAGED, Rope()), (replace(_PAGED, page_size=1, window_left=100), Rope()),
        (replace(_PAGED, sinks=True, logits_soft_cap=20.0, kv_layout="HND"), Rope()),
        (replace(_PAGED, head_dim=64), Rope()), (replace(_RAGGED, head_dim=192, head_dim_vo=128), Rope()),
        (replace(_PAGED, head_dim=256), Rope()), (replace(_MIXED, window_left=300), Rope()),
        (replace(_PAGED, kv_lens=(700, 1500, 64), qo_lens=(64, 33, 16), heads=(10, 2)), Rope()),
        (replace(_PAGED, kv_lens=(700, 1500, 64), qo_lens=(16, 3, 16), heads=(8, 2)), Rope()),
        (replace(_ALIGNED, kv_lens=(384, 0, 128), qo_lens=(128, 128, 384)), Rope()),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", [replace(c, name=f"{c.name}{i}") for i, c in enumerate(ROPE_CASES)], ids=str)
def test_rotated_first(case: AttentionCase) -> None:
    check(case, torch.bfloat16)
    check(case, torch.float16)
    check(case, torch.bfloat16, turn_q=False)
    check(case, torch.bfloat16, chained=False)
    check(case, torch.bfloat16, kv_chunk=128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_rotated_as_far_as_chains_go(dtype: torch.dtype) -> None:
    case = replace(_ALIGNED, kv_lens=(CHAINED_TOKENS[dtype],), qo_lens=(384,), heads=(4, 1), window_left=511)
    check(replace(case, name="chained.rope", rope=Rope()), dtype)


@pytest.mark.parametrize("dim", [64, 256])
def test_rotated_by_three_consumers_and_by_chunks_of_rows(dim: int) -> None:
    case = replace(_RAGGED, rope=Rope(), head_dim=dim)
    check(case, torch.bfloat16, **({"block_m": 192, "num_stages": 3} if dim == 64 else {}))


@pytest.mark.parametrize("case", [_RAGGED, _PAGED], ids=str)
def test_rotated_by_the_portable_family_where_the_kernel_cannot(case: AttentionCase) -> None:
    """Queries at odd elements, and logits of a negative scale: the keys are then turned in passing, and no more."""
    check(replace(case, rope=Rope(), sm_scale=-0.2), torch.bfloat16)
    x = make_inputs(replace(case, rope=Rope()), torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda", config=config_of(x.case, torch.bfloat16))
    first = run_case(x, wrapper)
    wide = torch.zeros(*x.q.shape[:2], x.q.shape[2] + 1, dtype=x.q.dtype, device="cuda")
    wide[..., 1:] = x.q
    x.q = wide[..., 1:]
    again = run_case(x, wrapper)
    torch.testing.assert_close(first[0], again[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("case", [c for c in LONG_CASES if c.name.startswith("paged")], ids=str)
def test_gathered_first(case: AttentionCase) -> None:
    problem, lens = problem_of(case, torch.bfloat16), case.query_lens
    work = Workload(len(lens), sum(lens), max(lens), sum(case.kv_lens), max(case.kv_lens))
    x = make_inputs(case, torch.bfloat16, "cuda")
    config = replace(hopper(replace(problem, page_size=0), work), copy_first=True)
    out, lse = run_case(x, make_wrapper(x, "cuda", config=config))
    again, again_lse = run_case(x, make_wrapper(x, "cuda", config=config_of(case, torch.bfloat16)))
    assert_close(out, *(expected(x, dtype)[0] for dtype in (torch.float64, torch.bfloat16)), "out")
    torch.testing.assert_close(again, out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(again_lse, lse, atol=1e-3, rtol=1e-3)


def test_rotated_first_is_chosen_where_there_is_room() -> None:
    x = make_inputs(replace(_ALIGNED, rope=Rope()), torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda")
    plan = wrapper._planned()
    assert plan.config.copy_first
    assert plan.config.family == "hopper"
    out, lse = run_case(x, wrapper)
    need = wrapper.workspace_size()
    wrapper.reset_workspace_buffer(torch.empty(need - 1, dtype=torch.uint8, device="cuda"))
    wrapper.plan(x.qo_indptr, x.kv_indptr, 4, 2, 128, causal=True, q_data_type=x.q.dtype,
                 pos_encoding_mode="ROPE_LLAMA")  # fmt: skip
    assert wrapper._planned().config.family == "portable"
    again = run_case(x, wrapper)
    torch.testing.assert_close(again[0], out, atol=2e-2, rtol=2e-2)
    graph = torch.cuda.CUDAGraph()
    wrapper = make_wrapper(x, "cuda")
    got = torch.full_like(out, float("nan"))
    wrapper.run(x.q, *x.cache, out=got)
    with torch.cuda.graph(graph):
        wrapper.run(x.q, *x.cache, out=got)
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, out)


@pytest.mark.parametrize("forced", [{"kv_chunk": 128}, {"section_tiles": 8}], ids=["split", "sections"])
@pytest.mark.parametrize("case", [c for c in LONG_CASES if c.head_dim == 128 and c.dim_vo == 128], ids=str)
def test_schedules(case: AttentionCase, forced: dict[str, object]) -> None:
    check(case, torch.bfloat16, **forced)


@pytest.mark.parametrize("forced", [{}, {"kv_chunk": 128}], ids=["whole", "split"])
@pytest.mark.parametrize(("dim", "block_n"), [(64, 128), (96, 64)])
@pytest.mark.parametrize("case", [c for c in LONG_CASES if c.head_dim == 128 and c.dim_vo == 128], ids=str)
def test_three_consumers(case: AttentionCase, dim: int, block_n: int, forced: dict[str, object]) -> None:
    check(replace(case, head_dim=dim), torch.bfloat16, block_m=192, block_n=block_n, num_stages=3, **forced)


def rising(case: AttentionCase, steepness: float, loud: float) -> Inputs:
    """Inputs whose logits grow towards the first keys, which a tile meets last; every third row of q is `loud` times as
    large as the others."""
    x = make_inputs(case, torch.bfloat16, "cuda")
    x.q[::3] *= loud
    ramps = [torch.linspace(steepness, 1, len(k), device="cuda").to(k.dtype)[:, None, None] for k in x.ks]
    x.ks = [k * ramp for k, ramp in zip(x.ks, ramps, strict=True)]
    x.cache = (torch.cat(x.ks), x.cache[1])
    return x


def apart(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, dim], its heads no whole number of tokens apart: beyond TMA, but not beyond copies of rows."""
    tokens, heads, dim = x.shape
    wide = torch.zeros(heads, tokens * dim + 8, dtype=x.dtype, device=x.device)
    found = wide.as_strided((tokens, heads, dim), (dim, tokens * dim + 8, 1))
    found.copy_(x)
    return found


@pytest.mark.parametrize("rows", [False, True], ids=["tma", "rows"])
@pytest.mark.parametrize("loud", [1.0, 10.0])
@pytest.mark.parametrize("steepness", [3.0, 30.0])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
def test_maxima_that_grow(dims: tuple[int, int], causal: bool, steepness: float, loud: float, rows: bool) -> None:
    case = replace(_RAGGED, kv_lens=(1500, 130, 1), causal=causal, head_dim=dims[0], head_dim_vo=dims[1])
    x = rising(case, steepness, loud)
    if rows:
        x.cache = apart(x.cache[0]), apart(x.cache[1])
    wrapper = make_wrapper(x, "cuda", config=config_of(case, torch.bfloat16))
    out, lse = run_case(x, wrapper)
    (oracle, oracle_lse), (peer, peer_lse) = expected(x, torch.float64), expected(x, torch.bfloat16)
    assert_close(out, oracle, peer, "out")
    assert_close(lse, oracle_lse, peer_lse, "lse")
    x.q[::3] = x.q[::3] / 2  # the other rows of a warp: their bits are their own
    again, again_lse = run_case(x, wrapper)
    for i in (1, 2):
        assert torch.equal(again[i::3], out[i::3])
        assert torch.equal(again_lse[i::3], lse[i::3])


_ROWS = replace(_PAGED, page_size=1)
GATHERED_CASES = [
    *[c for c in LONG_CASES if c.page_size in (1, 3)],
    replace(_ALIGNED, name="page1.aligned", page_size=1),
    replace(_ALIGNED, name="page1.aligned.empty", kv_lens=(384, 0, 128), qo_lens=(128, 128, 384), page_size=1),
    replace(_ROWS, name="page1.short", kv_lens=(50,) * 300, qo_lens=(33,) * 300),  # a tile is one block
    replace(_ROWS, name="page1.short.dim64", kv_lens=(50,) * 300, qo_lens=(33,) * 300, head_dim=64),
    replace(_ROWS, name="page1.cap.sinks", logits_soft_cap=20.0, sinks=True, window_left=200),
    replace(_ROWS, name="page1.hnd", kv_layout="HND"),
    replace(_ROWS, name="page1.append64", kv_lens=(700, 1500, 64), qo_lens=(64, 33, 16), heads=(10, 2)),
    # sinks and tiles cut along KV: the most shared memory that rows copied one by one take
    *[replace(_PAGED, name=f"page{n}.sinks", page_size=n, sinks=True) for n in (1, 3)],
    replace(_ROWS, name="page1.append.sinks", kv_lens=(700, 1500, 64), qo_lens=(64, 33, 16), heads=(10, 2), sinks=True),
    *[replace(_ROWS, name=f"page1.sinks.dim{d}", head_dim=d, sinks=True) for d in (64, 96, 256)],
    replace(_PAGED, name="page3.append", kv_lens=(700, 1500, 64), qo_lens=(16, 3, 16), heads=(8, 2), page_size=3),
]


@pytest.mark.parametrize("forced", [{}, {"kv_chunk": 128}], ids=["whole", "split"])
@pytest.mark.parametrize("case", GATHERED_CASES, ids=str)
def test_gathered(case: AttentionCase, forced: dict[str, object]) -> None:
    check(case, torch.bfloat16, **forced)


@pytest.mark.parametrize(
    "name",
    ["aligned", "ragged", "mixed", "mixed.page1", "paged.page1", "paged.append", "paged.append.page1", "aligned.rope"],
)
def test_same_bits_100_times(name: str) -> None:
    case = next(c for c in (*LONG_CASES, *ROPE_CASES) if c.name == name)
    x = make_inputs(case, torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda", config=config_of(case, torch.bfloat16))
    first = run_case(x, wrapper)
    for _ in range(100):
        again = run_case(x, wrapper)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("case", [_PAGED, _RAGGED, replace(_PAGED, page_size=1)], ids=str)
def test_scales_in_tensors(case: AttentionCase) -> None:
    x = make_inputs(case, torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda", config=config_of(case, torch.bfloat16))
    x.scales = {"k_scale": 0.5, "v_scale": 2.0}
    numbers = run_case(x, wrapper)
    x.scales = {name: torch.tensor(value, device="cuda") for name, value in x.scales.items()}
    tensors = run_case(x, wrapper)
    torch.testing.assert_close(tensors[0], numbers[0], atol=4e-2, rtol=2e-2)
    torch.testing.assert_close(tensors[1], numbers[1], atol=1e-3, rtol=1e-3)


def test_decode_rows_share_a_tile_however_q_is_laid_out() -> None:
    """By TMA where heads are a whole number of rows apart, else by copies of rows: the same bits; and those of a plan
    whose tiles hold one head each, but for the order of sums."""
    x = make_inputs(_MIXED, torch.bfloat16, "cuda")
    config = config_of(_MIXED, torch.bfloat16)
    assert config.pack_decode
    wrapper = make_wrapper(x, "cuda", config=config)
    first = run_case(x, wrapper)
    apart = run_case(x, make_wrapper(x, "cuda", config=replace(config, pack_decode=False)))
    torch.testing.assert_close(first[0], apart[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(first[1], apart[1], atol=1e-3, rtol=1e-3)
    tokens, heads, dim = x.q.shape
    q = x.q
    for width in (heads * dim + 2 * dim, heads * dim + 8):  # heads of another tensor beside; no whole number of heads
        wide = torch.full((tokens, width), float("nan"), dtype=q.dtype, device="cuda")
        wide[:, : heads * dim] = q.flatten(1)
        x.q = wide[:, : heads * dim].view(tokens, heads, dim)
        again = run_case(x, wrapper)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("sm_scale", [0.0, -0.2])
def test_scale_that_the_kernel_does_not_take(sm_scale: float) -> None:
    check(replace(_RAGGED, sm_scale=sm_scale), torch.bfloat16)


def test_unaligned_rows() -> None:
    x = make_inputs(_PAGED, torch.bfloat16, "cuda")
    wrapper = make_wrapper(x, "cuda", config=config_of(_PAGED, torch.bfloat16))
    first = run_case(x, wrapper)
    wide = torch.zeros(*x.q.shape[:2], x.q.shape[2] + 1, dtype=x.q.dtype, device="cuda")
    wide[..., 1:] = x.q
    x.q = wide[..., 1:]  # rows at odd elements
    again = run_case(x, wrapper)
    torch.testing.assert_close(first[0], again[0], atol=2e-2, rtol=2e-2)
