"""What only a GPU can show of the ops around attention: no sync, CUDA graphs, other devices, streams, huge caches."""

from collections.abc import Callable

import pytest
import torch

import flashtile.activation
import flashtile.cascade
import flashtile.norm
import flashtile.page
import flashtile.quantization
import flashtile.rope

TOKENS = 8


def calls(device: str) -> dict[str, Callable[[], object]]:
    """One call of every op, by name, over fixed inputs."""
    half, size = torch.bfloat16, 64
    x, residual, out = (torch.randn(TOKENS, size, dtype=half, device=device) for _ in range(3))
    weight, fp8 = torch.randn(size, device=device), torch.empty(TOKENS, size, dtype=torch.float8_e4m3fn, device=device)
    q, k = (torch.randn(TOKENS, heads, size, dtype=half, device=device) for heads in (4, 2))
    pos_ids, table = torch.arange(TOKENS, device=device), torch.randn(TOKENS, size, device=device)
    index = torch.zeros(TOKENS, dtype=torch.int32, device=device)
    cache = torch.zeros(4, 2, 16, 2, size, dtype=half, device=device)
    int8_cache, scales = cache.to(torch.int8), torch.zeros(4, 2, 16, 2, device=device)
    fp8_cache = tuple(cache.to(torch.float8_e4m3fn).unbind(1))
    indptr, one = (torch.tensor(ints, dtype=torch.int32, device=device) for ints in ([0, 1], [TOKENS]))
    lens = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
    v, s = torch.randn(TOKENS, 3, 4, size, dtype=half, device=device), torch.randn(TOKENS, 3, 4, device=device)
    f = flashtile
    return {
        "rmsnorm": lambda: f.norm.rmsnorm(x, weight, out=out),
        "rmsnorm pdl": lambda: f.norm.rmsnorm(x, weight, out=out, enable_pdl=True),
        "fused_add_rmsnorm": lambda: f.norm.fused_add_rmsnorm(out, residual, weight),
        "rmsnorm_quant": lambda: f.norm.rmsnorm_quant(fp8, x, weight, 0.5),
        "rmsnorm_quant by tensor": lambda: f.norm.rmsnorm_quant(fp8, x, weight, weight[:1]),
        "layernorm": lambda: f.norm.layernorm(x, weight, weight),
        "silu_and_mul": lambda: f.activation.silu_and_mul(x),
        "apply_rope": lambda: f.rope.apply_rope(q, k, lens, index[:1]),
        "apply_rope_pos_ids": lambda: f.rope.apply_rope_pos_ids(q, k, pos_ids),
        "apply_rope_with_cos_sin_cache": lambda: f.rope.apply_rope_with_cos_sin_cache(pos_ids, q, k, size, table),
        "rope_quantize_fp8": lambda: f.rope.rope_quantize_fp8(q, k, None, None, table, pos_ids),
        "rope_quantize_fp8_append": lambda: f.rope.rope_quantize_fp8_append_paged_kv_cache(
            q, k, None, None, k, table, pos_ids, fp8_cache, index, indptr, index, pos_ids
        ),
        "append": lambda: f.page.append_paged_kv_cache(k, k, index, pos_ids, cache, index, indptr, one),
        "append, quantised": lambda: f.page.append_paged_kv_cache(
            k, k, index, pos_ids, int8_cache, index, indptr, one, k_scale=scales[:, 0], v_scale=scales[:, 1]
        ),
        "quantize_kv_fp8": lambda: f.quantization.quantize_kv_fp8(k, 0.5),
        "quantize_kv_int4": lambda: f.quantization.quantize_kv_int4(k, 32),
        "get_batch_indices_positions": lambda: f.page.get_batch_indices_positions(lens, one, TOKENS),
        "merge_state": lambda: f.cascade.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1]),
        "merge_states": lambda: f.cascade.merge_states(v, s),
        "packbits": lambda: f.quantization.packbits(x[0] > 0),
    }


def values(result: object) -> list[torch.Tensor]:
    """The tensors of a result, as floats."""
    if result is None:
        return []
    return [t.float() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", calls("cpu"))
def test_no_sync_and_captured(name: str) -> None:
    call = calls("cuda")[name]
    call()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = values(call())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    if name != "fused_add_rmsnorm":  # adds again at each call
        assert all(torch.equal(a, b) for a, b in zip(eager, values(result), strict=True))


def test_pdl_changes_no_bit() -> None:
    x, weight = torch.randn(300, 4096, dtype=torch.bfloat16, device="cuda"), torch.randn(4096, device="cuda")
    plain, dependent = x, x
    for _ in range(20):
        plain = flashtile.norm.rmsnorm(plain, weight)
        dependent = flashtile.norm.rmsnorm(dependent, weight, enable_pdl=True)
    assert torch.equal(plain, dependent)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", calls("cpu"))
def test_other_device(name: str) -> None:
    torch.manual_seed(0)
    expected = values(calls("cuda:0")[name]())
    torch.manual_seed(0)
    got = values(calls("cuda:1")[name]())
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, got, strict=True))


def test_cache_beyond_2_to_the_31_elements() -> None:
    num_pages = 2**31 // (16 * 8 * 128) + 8
    cache = torch.zeros(num_pages, 2, 16, 8, 128, dtype=torch.float8_e4m3fn, device="cuda")
    key, value = (torch.randn(2, 8, 128, device="cuda").to(cache.dtype) for _ in range(2))
    table = [torch.tensor(ints).int().cuda() for ints in ([num_pages - 1, 5], [0, 1, 2], [16, 1])]
    batch_indices, positions = torch.tensor([0, 1], device="cuda"), torch.tensor([15, 0], device="cuda")
    flashtile.page.append_paged_kv_cache(key, value, batch_indices, positions, cache, table[0], table[1], table[2])
    for row, page, slot in ((0, num_pages - 1, 15), (1, 5, 0)):
        assert torch.equal(cache[page, 0, slot].float(), key[row].float())
        assert torch.equal(cache[page, 1, slot].float(), value[row].float())
    assert int(cache.view(torch.int64).count_nonzero()) <= 2 * 2 * 8 * 128 // 8


def test_tokens_out_of_range_are_skipped() -> None:
    cache = torch.zeros(4, 2, 2, 1, 8, device="cuda")
    rows = torch.ones(6, 1, 8, device="cuda")
    batch_indices, positions = torch.tensor([0, 1, 2, -1, 0, 0]), torch.tensor([4, 0, 0, 0, -1, 1])
    pages, indptr, last_page_len = torch.tensor([1, 2, 9]), torch.tensor([0, 2, 3]), torch.tensor([2, 1])
    tokens = batch_indices.cuda(), positions.cuda()  # page 9 is not in the cache
    flashtile.page.append_paged_kv_cache(rows, rows, *tokens, cache, pages.cuda(), indptr.cuda(), last_page_len.cuda())
    expected = torch.zeros_like(cache)
    expected[1, :, 1] = 1.0
    assert torch.equal(cache, expected)


def test_debugging_names_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.ones(3, 2, 8, device="cuda"), torch.ones(3, 1, 8, device="cuda")
    pos_ids = torch.tensor([0, 9, 1], device="cuda")
    table = torch.ones(4, 8, device="cuda")
    assert flashtile.rope.apply_rope_with_cos_sin_cache(pos_ids, q, k, 8, table)[0][1].isnan().all()
    monkeypatch.setenv("FLASHTILE_DEBUG", "1")
    with pytest.raises(IndexError, match="positions: expected values from 0 to 3, got 9 at token 1"):
        flashtile.rope.apply_rope_with_cos_sin_cache(pos_ids, q, k, 8, table)
