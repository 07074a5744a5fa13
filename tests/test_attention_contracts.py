"""Contracts of the attention entry points: errors, index tensors, workspaces, bit equality, single functions."""

from typing import Any

import pytest
import torch

import flashtile
from flashtile.reference.attention import attention
from flashtile.testing.cases_attention import CASES, expected, make_inputs, make_wrapper, run_case
from flashtile.testing.tolerance import assert_close

BY_NAME = {c.name: c for c in CASES}


def workspace(n: int = 1 << 20) -> torch.Tensor:
    return torch.empty(n, dtype=torch.uint8)


def decode_plan(**change: Any) -> flashtile.BatchDecodeWithPagedKVCacheWrapper:
    arguments: dict[str, Any] = {
        "indptr": torch.tensor([0, 2, 3]), "indices": torch.tensor([4, 1, 2]), "last_page_len": torch.tensor([3, 16]),
        "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "q_data_type": torch.float32,
    }  # fmt: skip
    wrapper = flashtile.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.plan(**{**arguments, **change})
    return wrapper


BAD_PLANS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"indptr": torch.tensor([0, 2, 1])}, ValueError, r"indptr.*2 then 1 at request 1"),
    ({"indptr": torch.tensor([1, 2, 3])}, ValueError, "first offset to be 0"),
    ({"indptr": torch.tensor([[0, 2, 3]])}, ValueError, "indptr: expected a 1-D tensor"),
    ({"indptr": torch.tensor([0.0, 2, 3])}, ValueError, "indptr: expected int32 or int64"),
    ({"indptr": [0, 2, 3]}, TypeError, "indptr: expected a torch.Tensor, got list"),
    ({"indptr": torch.tensor([0, 2, 9])}, ValueError, "counts 9 pages, got only 3"),
    ({"last_page_len": torch.tensor([3, 17])}, ValueError, r"last_page_len: expected 1..16.*request 1, got 17"),
    ({"last_page_len": torch.tensor([0, 1])}, ValueError, r"request 0, got 0"),
    ({"last_page_len": torch.tensor([3])}, ValueError, r"last_page_len: expected shape \[2\]"),
    ({"indices": torch.tensor([4, -1, 2])}, ValueError, r"must not be negative, got -1 for request 0"),
    ({"num_qo_heads": 5}, ValueError, "5 should be divisible by num_kv_heads 2"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
    ({"head_dim": 60}, ValueError, "head_dim_qk: expected a multiple of 8"),
    ({"head_dim": 520}, ValueError, "from 16 to 512, got 520"),
    ({"page_size": 0}, ValueError, "page_size: expected at least 1"),
    ({"window_left": -2}, ValueError, "window_left"),
    ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap"),
    ({"q_data_type": 7}, TypeError, "q_data_type"),
    ({"q_data_type": "float99"}, TypeError, "float99"),
    ({"q_data_type": torch.int8}, ValueError, "q dtype"),
    ({"pos_encoding_mode": "ROTARY"}, KeyError, "Invalid pos_encoding_mode"),
    ({"rope_theta": 1e4}, ValueError, "rope_theta: only pos_encoding_mode='ROPE_LLAMA' reads it, got 10000.0"),
    ({"pos_encoding_mode": "ALIBI", "rope_scale": 2.0}, ValueError, "rope_scale: only pos_encoding_mode"),
    ({"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 0.0}, ValueError, "rope_scale: expected a positive number"),
    ({"pos_encoding_mode": "ROPE_LLAMA", "low_freq_factor": 1.0}, ValueError, "need both, got 1.0 and None"),
    (
        {"pos_encoding_mode": "ROPE_LLAMA", "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        ValueError,
        "high_freq_factor: expected more than low_freq_factor = 4.0",
    ),
    ({"fixed_split_size": 64}, NotImplementedError, "fixed_split_size"),
    ({"kv_data_type": "int16"}, ValueError, "kv_data_type: expected the dtype of q"),
    ({"kv_data_type": "float16"}, ValueError, "kv_data_type: expected the dtype of q, torch.float32"),
    ({"kv_data_type": ("int8", 8)}, TypeError, "kv_data_type"),
    ({"kv_data_type": ("int8",)}, TypeError, "a tuple of K's and V's"),
]


@pytest.mark.parametrize(
    ("change", "error", "match"), BAD_PLANS, ids=lambda x: str(next(iter(x))) if isinstance(x, dict) else ""
)
def test_bad_plans(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        decode_plan(**change)


def good_run() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 64), torch.randn(5, 2, 16, 2, 64)


BAD_RUNS: list[tuple[str, Any, type[Exception], str]] = [
    ("tokens", lambda q, kv: (q[:1], kv, {}), ValueError, r"q: expected shape \[2, 4, 64\], got \[1, 4, 64\]"),
    ("heads", lambda q, kv: (q[:, :2], kv, {}), ValueError, "q: expected shape"),
    ("dtype", lambda q, kv: (q.half(), kv, {}), ValueError, "does not match the q_data_type"),
    ("kv_dtype", lambda q, kv: (q, kv.half(), {}), ValueError, "does not match the kv_data_type"),
    ("device", lambda q, kv: (q.to("meta"), kv, {}), ValueError, "q: expected a tensor on cpu"),
    (
        "stride",
        lambda q, kv: (q.transpose(0, 2).contiguous().transpose(0, 2), kv, {}),
        ValueError,
        "last dimension must be",
    ),
    ("pages", lambda q, kv: (q, kv[:4], {}), ValueError, r"k: the plan reads page 4 \(request 0\), got only 4"),
    ("page_size", lambda q, kv: (q, kv[:, :, :8], {}), ValueError, "k: expected shape"),
    ("rank", lambda q, kv: (q, kv[0, 0], {}), ValueError, "must be 4D or 5D"),
    ("list", lambda q, kv: (q, [kv[:, 0], kv[:, 1]], {}), KeyError, "Unrecognized paged_kv_cache type list"),
    ("tuple_rank", lambda q, kv: (q, (kv[0, 0, 0], kv[0, 1, 0]), {}), ValueError, "must be 3D or 4D"),
    ("no_tensor", lambda q, kv: (None, kv, {}), TypeError, "q: expected a torch.Tensor"),
    ("out", lambda q, kv: (q, kv, {"out": q[:1]}), ValueError, "Invalid shape of out: expected"),
    ("lse", lambda q, kv: (q, kv, {"lse": torch.empty(2, 4).half()}), ValueError, "Invalid shape of lse: expected"),
    ("window", lambda q, kv: (q, kv, {"window_left": 5}), ValueError, "window_left: expected the planned -1, got 5"),
    ("sinks", lambda q, kv: (q, kv, {"sinks": torch.zeros(3)}), ValueError, r"sinks: expected shape \[4\]"),
]


@pytest.mark.parametrize(("bad", "error", "match"), [r[1:] for r in BAD_RUNS], ids=[r[0] for r in BAD_RUNS])
def test_bad_runs(bad: Any, error: type[Exception], match: str) -> None:
    wrapper = decode_plan()
    q, kv, more = bad(*good_run())
    with pytest.raises(error, match=match):
        wrapper.run(q, kv, **more)


def test_run_before_plan() -> None:
    with pytest.raises(RuntimeError, match="run\\(\\) before plan\\(\\)"):
        flashtile.BatchDecodeWithPagedKVCacheWrapper(workspace()).run(*good_run())


@pytest.mark.parametrize(
    "wrapper",
    [
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
    ],
)
def test_bad_wrappers(wrapper: str) -> None:
    make = getattr(flashtile, wrapper)
    with pytest.raises(KeyError, match="Invalid kv_layout"):
        make(workspace(), "NDH")
    with pytest.raises(ValueError, match="backend: expected one of"):
        make(workspace(), backend="fa9")
    with pytest.raises(NotImplementedError, match="use_cuda_graph"):
        make(workspace(), use_cuda_graph=True)
    with pytest.raises(TypeError, match="float_workspace_buffer"):
        make(1024)


def test_prefill_offsets_must_agree() -> None:
    ragged = flashtile.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    with pytest.raises(ValueError, match="length of qo_indptr and kv_indptr should be the same"):
        ragged.plan(torch.tensor([0, 3]), torch.tensor([0, 3, 4]), 4, 2, 64)
    with pytest.raises(ValueError, match="qo_indptr: offsets must not decrease"):
        ragged.plan(torch.tensor([0, 3, 1]), torch.tensor([0, 3, 4]), 4, 2, 64)
    for name in ("custom_mask", "packed_custom_mask"):
        with pytest.raises(NotImplementedError, match=name):
            ragged.plan(torch.tensor([0, 3]), torch.tensor([0, 3]), 4, 2, 64, **{name: torch.ones(9, dtype=torch.bool)})


def test_workspace_of_exactly_the_stated_size_works_and_less_is_refused() -> None:
    case = BY_NAME["append"]
    x = make_inputs(case, torch.float32)
    x.case = case
    full = make_wrapper(x, "cpu")
    config = full._planned().config
    from dataclasses import replace

    small = replace(config, kv_chunk=64)
    cut = make_wrapper(x, "cpu", config=small)
    need = cut.workspace_size()
    assert need > 0
    for size, fits in ((need, True), (need - 1, False)):
        wrapper = flashtile.BatchPrefillWithPagedKVCacheWrapper(workspace(size))
        wrapper._config = small
        arguments = (
            x.qo_indptr,
            x.kv_indptr,
            x.kv_indices,
            x.last_page_len,
            *case.heads,
            case.head_dim,
            case.page_size,
        )
        options = {"causal": True, "q_data_type": torch.float32}
        if fits:
            wrapper.plan(*arguments, **options)
            assert torch.equal(run_case(x, wrapper)[0], run_case(x, cut)[0])
        else:
            with pytest.raises(ValueError, match=f"needs {need} bytes"):
                wrapper.plan(*arguments, **options)


@pytest.mark.parametrize("name", ["decode", "append", "ragged"])
def test_index_tensors_of_any_kind_give_the_same_bits(name: str) -> None:
    case = BY_NAME[name]
    x = make_inputs(case, torch.float32)
    want = run_case(x, make_wrapper(x, "cpu"))
    for change in (lambda t: t.long(), lambda t: torch.stack([t, t + 7], 1).flatten()[::2]):
        y = make_inputs(case, torch.float32)
        y.qo_indptr, y.kv_indptr, y.kv_indices, y.last_page_len = (
            change(t) for t in (y.qo_indptr, y.kv_indptr, y.kv_indices, y.last_page_len)
        )
        got = run_case(y, make_wrapper(y, "cpu"))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", ["decode", "append", "ragged", "decode.empty_request", "append.window_left=16"])
def test_repeats_and_other_garbage_give_the_same_bits(name: str) -> None:
    x = make_inputs(BY_NAME[name], torch.float32)
    wrapper = make_wrapper(x, "cpu")
    want = run_case(x, wrapper)
    for _ in range(5):
        assert torch.equal(run_case(x, wrapper)[0], want[0])
    if (
        isinstance(x.cache, tuple) and x.case.page_size
    ):  # zeros instead of NaN and infinities where nobody owns the memory
        for c in x.cache:
            c[~torch.isfinite(c)] = 0.0
        got = run_case(x, make_wrapper(x, "cpu"))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_neighbours_of_an_empty_request_keep_their_bits() -> None:
    x = make_inputs(BY_NAME["decode.empty_request"], torch.float32)
    out, lse = run_case(x, make_wrapper(x, "cpu"))
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    alone = flashtile.BatchDecodeWithPagedKVCacheWrapper(workspace())
    alone.plan(torch.tensor([0, 2]), x.kv_indices, torch.tensor([1]), 4, 2, 64, 16, q_data_type=torch.float32)
    assert torch.equal(alone.run(x.q[1:2], x.cache), out[1:2])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_single_functions(layout: str, causal: bool) -> None:
    q, k, v = torch.randn(7, 6, 40), torch.randn(23, 2, 40), torch.randn(23, 2, 24)
    kk, vv = (k, v) if layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1))
    oracle = attention(q.double(), k.double(), v.double(), causal=causal, logits_soft_cap=3.0)
    peer = attention(q, k, v, causal=causal, logits_soft_cap=3.0)
    out, lse = flashtile.single_prefill_with_kv_cache(
        q, kk, vv, causal=causal, kv_layout=layout, logits_soft_cap=3.0, return_lse=True
    )
    assert_close(out, oracle[0], peer[0], "out")
    assert_close(lse, oracle[1], peer[1], "lse")
    out, lse = flashtile.single_decode_with_kv_cache(
        q[-1], kk, vv, kv_layout=layout, logits_soft_cap=3.0, q_scale=0.5, k_scale=2.0, v_scale=3.0, return_lse=True
    )
    last = attention(q[-1:].double(), k.double(), v.double(), logits_soft_cap=3.0)
    assert_close(out, last[0][0] * 3, attention(q[-1:], k, v, logits_soft_cap=3.0)[0][0] * 3, "out")
    assert_close(lse, last[1][0], last[1][0].float(), "lse")


def test_single_refuses_what_does_not_fit() -> None:
    q, k = torch.randn(7, 4, 64), torch.randn(9, 2, 64)
    with pytest.raises(KeyError, match="Invalid kv_layout"):
        flashtile.single_prefill_with_kv_cache(q, k, k, kv_layout="HDN")
    with pytest.raises(ValueError, match="k: expected shape"):
        flashtile.single_prefill_with_kv_cache(q, k[..., :32], k)
    with pytest.raises(ValueError, match="should be divisible"):
        flashtile.single_prefill_with_kv_cache(q[:, :3], k, k)
    with pytest.raises(NotImplementedError, match="custom_mask"):
        flashtile.single_prefill_with_kv_cache(q, k, k, custom_mask=torch.ones(7, 9))
    with pytest.raises(ValueError, match="q: expected shape"):
        flashtile.single_decode_with_kv_cache(q, k, k)


def test_sharded_kv_merges_to_the_whole() -> None:
    q, k, v = torch.randn(5, 4, 64), torch.randn(200, 2, 64), torch.randn(200, 2, 64)
    whole, whole_lse = flashtile.single_prefill_with_kv_cache(q, k, v, return_lse=True)
    shards = [
        flashtile.single_prefill_with_kv_cache(q, k[a : a + 40], v[a : a + 40], return_lse=True)
        for a in range(0, 200, 40)
    ]
    out, lse = flashtile.merge_states(torch.stack([s[0] for s in shards], 1), torch.stack([s[1] for s in shards], 1))
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-6)


def test_lse_is_base_two() -> None:
    x = make_inputs(BY_NAME["decode"], torch.float32)
    _, lse = run_case(x, make_wrapper(x, "cpu"))
    logits = torch.einsum("hd,nd->hn", x.q[0, :2], x.ks[0][:, 0]) / 8
    torch.testing.assert_close(lse[0, :2] * torch.log(torch.tensor(2.0)), torch.logsumexp(logits, 1))
    assert expected(x, torch.float64)[1].dtype == torch.float64
