"""Position encodings inside attention: laws, single functions, forward(), slopes; the cases are in test_attention."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import flashtile
from flashtile.config import CHAINED_TOKENS, Config, portable
from flashtile.plan.encoding import Rope
from flashtile.plan.plan import Lengths, make_plan
from flashtile.plan.problem import Problem, Workload
from flashtile.reference.attention import alibi_slopes, attention
from flashtile.reference.rope import frequencies
from flashtile.testing.cases_attention import ENCODED_CASES, expected, make_inputs, make_wrapper, run_case
from flashtile.testing.tolerance import assert_close
from flashtile.utils import MaskMode, PosEncodingMode, TensorLayout, get_alibi_slopes

BY_NAME = {c.name: c for c in ENCODED_CASES}
LLAMA31: dict[str, Any] = {
    "rope_scale": 8.0,
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 64,
}


def qkv(qo_len: int = 7, kv_len: int = 90, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, h, dim, generator=gen) for n, h in ((qo_len, 6), (kv_len, 2), (kv_len, 2)))  # type: ignore[return-value]


@pytest.mark.parametrize("requests", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_angles_are_chained_in_short_requests_of_16_bits(dtype: torch.dtype, requests: int) -> None:
    limit = CHAINED_TOKENS.get(dtype, -1)  # fp32: never
    for rope in (Rope(), None):
        problem = Problem(32, 8, 128, 128, dtype, dtype, dtype, page_size=16, rope=rope)
        for longest in (1024, 8192, 8193, 65536, 65537):
            work = Workload(requests, requests, 1, requests * longest, longest)
            assert portable(problem, work).chained == (rope is not None and longest <= limit)


@pytest.mark.parametrize("num_heads", [1, 2, 6, 7, 8, 12, 40, 64, 127])
def test_slopes(num_heads: int) -> None:
    got = get_alibi_slopes(num_heads)
    assert got.dtype == torch.float32
    assert torch.equal(got, alibi_slopes(num_heads).float())
    assert len(got) == num_heads


def test_slopes_of_8_and_12_heads() -> None:
    eight = [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(8).tolist() == eight
    more = torch.tensor([2.0 ** (-i / 2) for i in (1, 3, 5, 7)])
    torch.testing.assert_close(get_alibi_slopes(12), torch.cat([torch.tensor(eight), more]))
    with pytest.raises(ValueError, match="n_heads"):
        get_alibi_slopes(0)


def test_enumerations_have_the_values_of_the_field() -> None:
    assert [(m.name, m.value) for m in PosEncodingMode] == [("NONE", 0), ("ROPE_LLAMA", 1), ("ALIBI", 2)]
    assert [m.value for m in (MaskMode.NON_CAUSAL, MaskMode.CAUSAL, MaskMode.CUSTOM)] == [0, 1, 2]
    assert [(m.name, m.value) for m in TensorLayout] == [("NHD", 0), ("HND", 1)]


@pytest.mark.parametrize("mode", ["rope", "llama31", "alibi"])
@pytest.mark.parametrize("causal", [False, True])
def test_single_functions(mode: str, causal: bool) -> None:
    q, k, v = qkv()
    how: dict[str, Any] = {"pos_encoding_mode": "ALIBI" if mode == "alibi" else "ROPE_LLAMA"}
    parts: dict[str, Any] = {"slopes": alibi_slopes(6)} if mode == "alibi" else {"rope_freqs": frequencies(64)}
    if mode == "llama31":
        how |= LLAMA31
        parts = {"rope_freqs": frequencies(64, 8.0, 5e5, 1.0, 4.0, 64)}
    oracle, peer = (attention(*(x.to(t) for x in (q, k, v)), causal=causal, **parts) for t in (torch.double, q.dtype))
    out, lse = flashtile.single_prefill_with_kv_cache_return_lse(q, k, v, causal=causal, **how)
    assert_close(out, oracle[0], peer[0], "out")
    assert_close(lse, oracle[1], peer[1], "lse")
    how["pos_encoding_mode"] = PosEncodingMode[how["pos_encoding_mode"]]
    out, lse = flashtile.single_decode_with_kv_cache(q[-1], k, v, return_lse=True, **how)
    oracle, peer = (attention(*(x.to(t) for x in (q[-1:], k, v)), **parts) for t in (torch.double, q.dtype))
    assert_close(out, oracle[0][0], peer[0][0], "out")
    assert_close(lse, oracle[1][0], peer[1][0], "lse")


@pytest.mark.parametrize("llama31", [False, True])
def test_rotating_before_the_call_is_the_same(llama31: bool) -> None:
    q, k, v = qkv()
    rotate = flashtile.apply_llama31_rope_pos_ids if llama31 else flashtile.apply_rope_pos_ids
    how = LLAMA31 if llama31 else {"rope_scale": 2.0, "rope_theta": 1e5}
    q_turned, _ = rotate(q, q[:, :2], torch.arange(83, 90), **how)
    k_turned, _ = rotate(k, k, torch.arange(90), **how)
    want = flashtile.single_prefill_with_kv_cache(q_turned, k_turned, v, causal=True)
    got = flashtile.single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA", **how)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_unknown_modes_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(KeyError, match="Invalid pos_encoding_mode 'ROTARY'"):
        flashtile.single_prefill_with_kv_cache(q, k, v, pos_encoding_mode="ROTARY")
    with pytest.raises(KeyError, match="Invalid pos_encoding_mode 'rope_llama'"):
        flashtile.single_decode_with_kv_cache(q[0], k, v, pos_encoding_mode="rope_llama")


@pytest.mark.parametrize(
    "name", ["append.rope.plain", "append.alibi.plain", "decode.alibi.soft_cap", "decode.rope.page3"]
)
@pytest.mark.parametrize("kv_chunk", [64, 128])
def test_cut_kv_gives_the_whole(name: str, kv_chunk: int) -> None:
    x = make_inputs(replace(BY_NAME[name], sinks=True), torch.float32)
    whole = make_wrapper(x, "cpu")
    cut = make_wrapper(x, "cpu", config=replace(whole._planned().config, kv_chunk=kv_chunk))
    assert cut._planned().num_merges > 0 or kv_chunk > 64
    for got, want in zip(run_case(x, cut), run_case(x, whole), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_alibi_keeps_the_bits_of_near_keys_far_into_a_sequence() -> None:
    """The bias of the last keys is some 50,000; out must not lose what fp32 loses at such a size."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 8, 16, generator=gen) for n in (1, 100_000, 100_000))
    out = flashtile.single_decode_with_kv_cache(q[0], k, v, pos_encoding_mode="ALIBI")
    oracle, _ = attention(q.double(), k.double(), v.double(), slopes=alibi_slopes(8))
    torch.testing.assert_close(out.double(), oracle[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("turn_q", [False, True])
@pytest.mark.parametrize("page_size", [0, 16])
def test_moves_bring_each_row_to_its_place_once(page_size: int, turn_q: bool) -> None:
    half = torch.bfloat16
    problem = Problem(4, 2, 64, 32, half, half, half, page_size=page_size, rope=Rope())
    qo_len, kv_len = np.array([3, 0, 100]), np.array([40, 5, 100])
    lengths = Lengths(np.append(0, qo_len.cumsum()), np.array([7, 3, 0]), kv_len)
    config = Config("portable", 64, 64, 2, copy_first=True, turn_q=turn_q)
    plan = make_plan(problem, config, lengths, torch.zeros(1, dtype=torch.int32), torch.device("cpu"))
    assert plan.moves is not None
    assert plan.inner is not None
    assert plan.inner.problem == replace(problem, rope=Rope() if turn_q else None, page_size=0)
    assert plan.num_items == 0
    got = []
    for to, base, first, count, position in plan.moves.kv.tolist():
        got += [(to + t, base, first + t, position + t) for t in range(count)]
    starts = (0, 40, 45)
    assert got == [(starts[r] + t, (7, 3, 0)[r], t, t) for r in range(3) for t in range(kv_len[r])]
    positions = [p + t for *_, count, p in plan.moves.q.tolist() for t in range(count)]
    assert positions == ([] if turn_q else [37, 38, 39, *range(100)])
    moved_q = 0 if turn_q else 103 * 4 * 64
    moved_kv = 145 * 2 * (64 + (32 if page_size else 0))
    assert plan.workspace_size() - plan.inner.workspace_size() == pytest.approx(2 * (moved_q + moved_kv), abs=384)


FORWARD = {
    "decode": ("decode.rope.plain", {}),
    "append": ("append.rope.plain", {"causal": True}),
    "ragged": ("ragged.rope.plain", {"causal": True}),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_overwrites_what_was_planned(name: str) -> None:
    case_name, options = FORWARD[name]
    case = BY_NAME[case_name]
    x = make_inputs(case, torch.float32)
    args: Any = x.cache if not case.page_size else (x.cache,)
    variants: list[tuple[dict[str, Any], Any]] = [
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 1e4}, case),
        ({"pos_encoding_mode": "ALIBI"}, replace(case, rope=None, alibi=True)),
        ({}, replace(case, rope=None)),
        ({"window_left": 9, "logits_soft_cap": 4.0}, replace(case, rope=None, window_left=9, logits_soft_cap=4.0)),
    ]
    wrapper = make_wrapper(x, "cpu")
    for arguments, meant in variants:
        x.case = meant
        out, lse = wrapper.forward_return_lse(x.q, *args, **options, **arguments)
        want = run_case(x, make_wrapper(x, "cpu"))
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])
        assert torch.equal(wrapper.run(x.q, *args), out)
        assert_close(out, expected(x, torch.float64)[0], expected(x, torch.float32)[0], "out")
    scaled = wrapper.forward(x.q, *args, **options, sm_scale=0.5)
    x.case = replace(case, rope=None, sm_scale=0.5)
    assert torch.equal(scaled, run_case(x, make_wrapper(x, "cpu"))[0])
    wrapper.end_forward()
    with pytest.raises(KeyError, match="Invalid pos_encoding_mode"):
        wrapper.forward(x.q, *args, pos_encoding_mode="NEOX")
