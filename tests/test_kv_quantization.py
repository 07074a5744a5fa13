"""The quantisers of KV caches: round trips within half a step, laws of scales and zero points, errors."""

import pytest
import torch

import flashtile
from flashtile.config import portable
from flashtile.kernels.attention import suited
from flashtile.plan.problem import Problem, Workload
from flashtile.plan.scales import Factor, Scales

X = torch.randn(5, 16, 3, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)])
def test_fp8_round_trip(dtype: torch.dtype, bits: int) -> None:
    numbers, scale = flashtile.quantize_kv_fp8(X, dtype=dtype)
    assert numbers.dtype == dtype
    assert scale.shape == X.shape[:-1]
    back = flashtile.dequantize_kv_fp8(numbers, scale)
    top = X.abs().amax(-1, keepdim=True)
    assert ((back - X).abs() <= X.abs() * 2.0 ** -(bits + 1) + top * 2.0**-14).all()


def test_fp8_saturates_with_a_given_scale() -> None:
    numbers, scale = flashtile.quantize_kv_fp8(torch.full((1, 1, 2, 16), 1e6), scale=1.0)
    assert (numbers.float() == 448).all()
    assert (flashtile.dequantize_kv_fp8(numbers, scale) == 448).all()


def test_int8_round_trip() -> None:
    numbers, scale, zero = flashtile.quantize_kv_int8(X)
    assert numbers.dtype == torch.int8
    back = flashtile.dequantize_kv_int8(numbers, scale, zero)
    assert ((back - X).abs() <= 0.51 * scale[..., None]).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_int4_round_trip(group_size: int | None, symmetric: bool) -> None:
    numbers, scale, zero = flashtile.quantize_kv_int4(X, group_size=group_size, symmetric=symmetric)
    assert numbers.shape == (*X.shape[:-1], 64)
    assert numbers.dtype == torch.uint8
    assert (zero is None) == symmetric
    back = flashtile.dequantize_kv_int4(numbers, scale, zero)
    step = scale[..., None] if scale.dim() < X.dim() else scale.repeat_interleave(128 // scale.shape[-1], -1)
    assert ((back - X).abs() <= 0.51 * step).all()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        flashtile.quantize_kv_int4(torch.zeros(1, 1, 12))
    with pytest.raises(ValueError, match="group_size: expected one of"):
        flashtile.quantize_kv_int4(X, group_size=48)
    with pytest.raises(ValueError, match="dtype: expected float8"):
        flashtile.quantize_kv_fp8(X, dtype=torch.int8)
    with pytest.raises(ValueError, match="x: expected dtype"):
        flashtile.dequantize_kv_int8(X, 1.0)


def test_return_lse_form_of_single_prefill() -> None:
    q, k = torch.randn(3, 4, 64), torch.randn(9, 2, 64)
    out, lse = flashtile.single_prefill_with_kv_cache_return_lse(q, k, k, causal=True)
    assert torch.equal(out, flashtile.single_prefill_with_kv_cache(q, k, k, causal=True))
    assert lse.shape == (3, 4)


def test_transformed_keys_leave_attention_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(50, 2, 24, generator=generator) * torch.logspace(-2, 1, 24) + 3 * torch.rand(2, 24)
    k[..., 3] = 0.0  # a channel that is not used
    q = torch.randn(50, 6, 24, generator=generator)
    transform = flashtile.KeyTransform.fit(k[:40], q[:40], groups=2)
    before, after = (
        torch.einsum("nhgd,mhd->hgnm", q.view(50, 2, 3, 24).double(), k.double())
        for q, k in ((q, k), (transform.queries(q), transform.keys(k)))
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_transformed_keys_are_nearer_in_four_bits() -> None:
    """Large channels, alike in all tokens, as in real models: the error of logits falls."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(500, 1, 64, generator=generator)
    k[..., ::16] += 20
    q = torch.randn(500, 1, 64, generator=generator)
    transform = flashtile.KeyTransform.fit(k, q, groups=2)
    errors = []
    for queries, keys in ((q, k), (transform.queries(q), transform.keys(k))):
        rounded = flashtile.dequantize_kv_int4(*flashtile.quantize_kv_int4(keys, 32))
        errors.append((queries[:, 0] @ (rounded - keys)[:, 0].T).square().mean().sqrt().item())
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize(
    ("keys", "queries", "groups", "message"),
    [
        ((9, 2, 24), (9, 6, 16), 2, "queries: expected"),
        ((9, 2, 24), (9, 5, 24), 2, "queries: expected a multiple of num_kv_heads = 2, got 5 heads"),
        ((9, 2, 24), (9, 6, 24), 5, "groups: expected a divisor of head_dim = 24, got 5"),
        ((1, 2, 24), (9, 6, 24), 2, "keys: expected a sample of at least 2 tokens, got 1"),
    ],
)
def test_samples_that_no_transform_fits(
    keys: tuple[int, ...], queries: tuple[int, ...], groups: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flashtile.KeyTransform.fit(torch.randn(keys), torch.randn(queries), groups)


def test_a_transform_refuses_other_heads() -> None:
    transform = flashtile.KeyTransform.fit(torch.randn(9, 2, 24), torch.randn(9, 6, 24), 2)
    with pytest.raises(ValueError, match="k: expected"):
        transform.keys(torch.randn(9, 3, 24))
    with pytest.raises(ValueError, match="q: expected"):
        transform.queries(torch.randn(9, 6, 32))


CACHES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
FORMS = ("none", "head", "token", "half", "group")


def scales_of(form: str) -> Scales:
    if form == "none":
        return Scales()
    dims = {"head": (8,), "group": (64, 16, 8, 4)}.get(form, (64, 16, 8))
    dtype = torch.float16 if form == "half" else torch.float32
    factor = Factor("token" if form == "half" else form, torch.empty(dims, dtype=dtype, device="meta"))
    return Scales(factor, factor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("cache", CACHES)
def test_configurations_that_suit_the_scales(cache: str, page_size: int, layout: str, form: str) -> None:
    """Whatever the scales are, a plan's items and the layout of its partial states stay as they are."""
    half = torch.bfloat16
    problem = Problem(32, 8, 128, 128, half, CACHES[cache], half, page_size, kv_heads_first=layout == "HND")
    for batch, length in ((1, 1024), (1, 65536), (16, 4096), (64, 1024), (64, 4096), (256, 1024), (256, 16384)):
        config = portable(problem, Workload(batch, batch, 1, batch * length, length))
        used = suited(config, scales_of(form))
        for name in ("family", "block_m", "pack", "overlap", "split", "kv_chunk"):
            assert getattr(used, name) == getattr(config, name)
        assert config.heads % used.heads == 0
        assert used.num_warps * 32 * (used.max_registers or 0) <= 65536
        if form == "group":
            assert (used.heads, used.ways) == (1, 1)


def test_int8_without_scales_per_token_is_read_by_two_warps() -> None:
    """Where tiles are many: config.py's row for int8 is known there by its stages."""
    half = torch.bfloat16
    config = portable(
        Problem(32, 8, 128, 128, half, torch.int8, half, page_size=16), Workload(256, 256, 1, 2**18, 1024)
    )
    assert config.num_warps == suited(config, scales_of("token")).num_warps == 1
    assert suited(config, scales_of("head")).num_warps == suited(config, scales_of("none")).num_warps == 2
