"""Quantised keys and values on a CUDA device: the cases of the CPU tests, equal bit by bit, and what only a GPU can
show."""

import pytest
import torch

import flashtile
from flashtile.kernels import quantize_kv as kernels
from flashtile.testing import cases_quantize_kv as cases


@pytest.mark.parametrize("case", cases.FORMAT_CASES, ids=str)
def test_quantize_kv(case: cases.FormatCase) -> None:
    cases.check_quantize_kv(case, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_quantize_append(case: cases.QuantiseCase) -> None:
    cases.check_quantize_append(case, "cuda")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("has_fp8", [False, True])
def test_every_value_in_fp8(dtype: torch.dtype, has_fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this GPU converts, and by the bits, as older ones do."""
    if has_fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9 or later")
    monkeypatch.setattr(kernels, "_has_fp8", lambda device: has_fp8)
    cases.check_every_value_in_fp8(dtype, "cuda")


def test_tokens_out_of_range_are_skipped() -> None:
    cache = torch.zeros(4, 2, 2, 1, 32, dtype=torch.uint8, device="cuda")
    factors = {name: torch.zeros(4, 2, 1, 2, device="cuda") for name in ("k_scale", "v_scale", "k_zero", "v_zero")}
    rows = torch.arange(64.0, device="cuda").expand(6, 1, 64)
    batch_indices, positions = torch.tensor([0, 1, 2, -1, 0, 0]), torch.tensor([4, 0, 0, 0, -1, 1])
    pages, indptr, last_page_len = torch.tensor([1, 2, 9]), torch.tensor([0, 2, 3]), torch.tensor([2, 1])
    tokens = batch_indices.cuda(), positions.cuda()  # page 9 is not in the cache
    flashtile.append_paged_kv_cache(
        rows, rows, *tokens, cache, pages.cuda(), indptr.cuda(), last_page_len.cuda(), "NHD", **factors
    )
    numbers, scale, zero = flashtile.quantize_kv_int4(rows[0], 32)
    assert zero is not None
    expected = torch.zeros_like(cache)
    expected[1, :, 1] = numbers
    assert torch.equal(cache, expected)
    for name, value in zip(factors, (scale, scale, zero, zero), strict=True):
        want = torch.zeros_like(factors[name])
        want[1, 1] = value
        assert torch.equal(factors[name], want)


def test_cache_beyond_2_to_the_31_elements() -> None:
    num_pages = 2**31 // (16 * 8 * 128) + 8
    cache = torch.zeros(num_pages, 2, 16, 8, 128, dtype=torch.int8, device="cuda")
    scales = torch.zeros(num_pages, 16, 8, device="cuda"), torch.zeros(num_pages, 16, 8, device="cuda")
    key = torch.randn(2, 8, 128, device="cuda")
    table = [torch.tensor(ints).int().cuda() for ints in ([num_pages - 1, 5], [0, 1, 2], [16, 1])]
    batch_indices, positions = torch.tensor([0, 1], device="cuda"), torch.tensor([15, 0], device="cuda")
    flashtile.append_paged_kv_cache(
        key, -key, batch_indices, positions, cache, table[0], table[1], table[2], k_scale=scales[0], v_scale=scales[1]
    )
    numbers, scale, _ = flashtile.quantize_kv_int8(key)
    for row, page, slot in ((0, num_pages - 1, 15), (1, 5, 0)):
        assert torch.equal(cache[page, 0, slot], numbers[row])
        assert torch.equal(cache[page, 1, slot], -numbers[row])
        assert all(torch.equal(x[page, slot], scale[row]) for x in scales)
    assert int(cache.view(torch.int64).count_nonzero()) <= 2 * 2 * 8 * 128 // 8
