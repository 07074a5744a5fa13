"""Rotary embeddings, fp8 quantisation and the cache append in PyTorch; fp32 inside."""

import torch
from torch import Tensor

from flashtile.kernels.cpu.page import slots
from flashtile.kernels.cpu.quantization import store
from flashtile.kernels.cpu.rope import rope_cached_inplace


def rope_quantize(
    q_rope_out: Tensor,
    q_nope_out: Tensor,
    k_rope_out: Tensor,
    k_nope_out: Tensor,
    q_rope: Tensor,
    q_nope: Tensor,
    k_rope: Tensor,
    k_nope: Tensor,
    pos_ids: Tensor,
    cos_sin_cache: Tensor,
    interleave: bool,
    quant_scale_q: float,
    quant_scale_kv: float,
    enable_pdl: bool,
) -> None:
    """fp8 outputs [nnz, num_heads, dim] = rotated rope parts and unchanged nope parts, times their scale."""
    q, k = q_rope.to(torch.float32, copy=True), k_rope.to(torch.float32, copy=True)
    rope_cached_inplace(q, k, pos_ids, cos_sin_cache, interleave)
    store(q_rope_out, q, factor=quant_scale_q)
    store(q_nope_out, q_nope.float(), factor=quant_scale_q)
    store(k_rope_out, k, factor=quant_scale_kv)
    store(k_nope_out, k_nope.float(), factor=quant_scale_kv)


def rope_quantize_append(
    q_rope_out: Tensor,
    q_nope_out: Tensor,
    k_rope_cache: Tensor,
    k_nope_cache: Tensor,
    v_cache: Tensor,
    q_rope: Tensor,
    q_nope: Tensor,
    k_rope: Tensor,
    k_nope: Tensor,
    v: Tensor,
    pos_ids: Tensor,
    cos_sin_cache: Tensor,
    interleave: bool,
    quant_scale_q: float,
    quant_scale_kv: float,
    enable_pdl: bool,
    batch_indices: Tensor,
    positions: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
) -> None:
    """The same, but keys and v [nnz, num_kv_heads, dim] go to slots of caches [num_pages, page_size, heads, dim]."""
    k_rope_out, k_nope_out, v_out = (torch.empty_like(x, dtype=q_rope_out.dtype) for x in (k_rope, k_nope, v))
    rope_quantize(
        q_rope_out, q_nope_out, k_rope_out, k_nope_out, q_rope, q_nope, k_rope, k_nope,
        pos_ids, cos_sin_cache, interleave, quant_scale_q, quant_scale_kv, enable_pdl,
    )  # fmt: skip
    store(v_out, v.float(), factor=quant_scale_kv)
    where = slots(batch_indices, positions, kv_indices, kv_indptr, k_rope_cache.shape[1])
    for cache, rows in ((k_rope_cache, k_rope_out), (k_nope_cache, k_nope_out), (v_cache, v_out)):
        cache.index_put_(where, rows)
