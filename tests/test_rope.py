"""Rotary embeddings on the CPU: against the oracle, laws, graphs, errors."""

import pytest
import torch

from flashtile import rope
from flashtile.testing import cases_rope as cases


@pytest.mark.parametrize("case", [*cases.CASES, cases.LONG], ids=str)
def test_pos_ids(case: cases.RopeCase) -> None:
    cases.check_pos_ids(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_cos_sin_cache(case: cases.RopeCase) -> None:
    cases.check_cos_sin_cache(case, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_ragged(case: cases.RopeCase) -> None:
    cases.check_ragged(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_llama31(case: cases.RopeCase) -> None:
    cases.check_llama31(case, "cpu")


@pytest.mark.parametrize("case", cases.QUANTIZE_CASES, ids=str)
def test_quantize(case: cases.QuantizeCase) -> None:
    cases.check_quantize(case, "cpu")


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("case", cases.SMALL_QUANTIZE_CASES, ids=str)
def test_quantize_append(case: cases.QuantizeCase, kv_layout: str) -> None:
    cases.check_quantize_append(case, kv_layout, "cpu")


def test_position_zero_changes_nothing() -> None:
    cases.check_position_zero_changes_nothing("cpu")


def test_compiles_as_one_graph() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, pos_ids: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        q, k = rope.apply_rope_pos_ids(q, k, pos_ids)
        rope.apply_rope_pos_ids_inplace(q, k, pos_ids)
        q, k = rope.apply_rope_with_cos_sin_cache(pos_ids, q, k, 8, cache)
        rope.apply_rope_with_cos_sin_cache_inplace(pos_ids, q, k, 8, cache)
        return q * k

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    args = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.arange(3), torch.randn(4, 8)
    assert torch.equal(compiled(*args), layer(*args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 8)}, r"q: expected shape \[nnz, num_qo_heads, head_dim\], got \[3, 8\]"),
        ({"k": torch.ones(4, 1, 8)}, r"k: expected shape \[3, num_kv_heads, 8\], got \[4, 1, 8\]"),
        ({"k": torch.ones(3, 1, 8).half()}, "k: expected the dtype of q"),
        ({"q": torch.ones(3, 8, 2).mT}, "q: the last dimension must be contiguous"),
        ({"pos_ids": torch.arange(4)}, r"pos_ids: expected shape \[3\], got \[4\]"),
        ({"pos_ids": torch.ones(3)}, "pos_ids: expected dtype int32 or int64, got float32"),
        ({"pos_ids": torch.tensor([0, 5, -2])}, r"pos_ids: expected values from 0 to .*, got -2 at token 2"),
        ({"rotary_dim": 5}, "rotary_dim: expected an even number from 2 to head_dim = 8, got 5"),
        ({"rotary_dim": 10}, "rotary_dim: expected an even number from 2 to head_dim = 8, got 10"),
    ],
)
def test_errors(change: dict[str, torch.Tensor], message: str) -> None:
    args = {"q": torch.ones(3, 2, 8), "k": torch.ones(3, 1, 8), "pos_ids": torch.arange(3)} | change
    with pytest.raises(ValueError, match=message):
        rope.apply_rope_pos_ids(**args)


def test_ragged_errors() -> None:
    q, k = torch.ones(3, 2, 8), torch.ones(3, 1, 8)
    with pytest.raises(ValueError, match=r"nnz: expected append_indptr\[-1\] = 2, got 3"):
        rope.apply_rope(q, k, torch.tensor([0, 2]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"indptr: expected shape \[2\], got \[3\]"):
        rope.apply_rope(q, k, torch.tensor([0, 2, 3]), torch.tensor([0]))
    with pytest.raises(ValueError, match="pos_ids: expected values from 0 to .*, got -1 at token 0"):
        rope.apply_rope_inplace(q, k, torch.tensor([0, 3]), torch.tensor([-1]))
    with pytest.raises(ValueError, match="high_freq_factor: expected more than low_freq_factor = 4.0, got 4.0"):
        rope.apply_llama31_rope_pos_ids(q, k, torch.arange(3), low_freq_factor=4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_rope": torch.ones(3, 4)}, r"k_rope: expected shape \[3, num_kv_heads, 8\], got \[3, 1, 4\]"),
        ({"q_nope": torch.ones(3, 1, 8)}, r"q_nope: expected shape \[3, 2, nope_dim\], got \[3, 1, 8\]"),
        ({"k_nope": torch.ones(3, 8).half()}, "k_nope: expected the dtype of q_rope"),
        ({"backend": "cute-dsl"}, "backend: expected one of cuda, cutile, got 'cute-dsl'"),
        ({"quantize_dtype": torch.float16}, "quantize_dtype: expected torch.float8_e4m3fn or torch.float8_e5m2, got"),
        ({"q_rope_out": torch.ones(3, 2, 8).to(torch.float8_e5m2)}, "q_rope_out: expected dtype float8_e4m3fn, got"),
        ({"cos_sin_cache": torch.ones(4, 4)}, r"cos_sin_cache: expected shape \[max_position, 8\], got \[4, 4\]"),
        ({"pos_ids": torch.tensor([0, 4, 0])}, "pos_ids: expected values from 0 to 3, got 4 at token 1"),
    ],
)
def test_quantize_errors(change: dict[str, object], message: str) -> None:
    parts = {"q_rope": torch.ones(3, 2, 8), "k_rope": torch.ones(3, 8), "q_nope": None, "k_nope": None}
    args = parts | {"cos_sin_cache": torch.ones(4, 8), "pos_ids": torch.arange(3)}
    args |= {"quantize_dtype": torch.float8_e4m3fn} | change
    with pytest.raises(ValueError, match=message):
        rope.rope_quantize_fp8(**args)  # type: ignore[arg-type]


def test_append_of_latents_needs_a_tuple_of_caches() -> None:
    parts = torch.ones(2, 2, 8), torch.ones(2, 8), torch.ones(2, 2, 4), torch.ones(2, 4)
    index, cache = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 16, 8).to(torch.float8_e4m3fn)
    for wrong in ([cache, cache], torch.stack([cache, cache])):
        with pytest.raises(KeyError, match=r"Unrecognized paged_kv_cache type \w+: expected a tuple \(ckv, kpe\)"):
            rope.rope_quantize_fp8_append_paged_kv_cache(
                *parts, None, torch.ones(4, 8), index, wrong, index, torch.tensor([0, 1]), index, torch.arange(2)
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(3, 9)}, "query: expected rows of a multiple of head_size = 8 elements, got 9"),
        ({"key": torch.ones(3, 1, 4)}, r"key: expected shape \[nnz, num_heads, 8\], got \[3, 1, 4\]"),
        ({"cos_sin_cache": torch.ones(4, 8).half()}, "cos_sin_cache: expected dtype float32, got float16"),
        ({"positions": torch.tensor([0, 4, 1])}, "positions: expected values from 0 to 3, got 4 at token 1"),
    ],
)
def test_cache_errors(change: dict[str, torch.Tensor], message: str) -> None:
    tensors = {"query": torch.ones(3, 16), "key": torch.ones(3, 8), "positions": torch.arange(3)}
    args = tensors | {"head_size": 8, "cos_sin_cache": torch.ones(4, 8)} | change
    with pytest.raises(ValueError, match=message):
        rope.apply_rope_with_cos_sin_cache(**args)
