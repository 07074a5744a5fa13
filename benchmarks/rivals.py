"""Attention of other libraries, where they can be imported: FlashAttention-3 and PyTorch's own."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")  # the wheel fa3-fwd, and FlashAttention's own build
SDPA_BACKENDS = {"sdpa.flash": SDPBackend.FLASH_ATTENTION, "sdpa.cudnn": SDPBackend.CUDNN_ATTENTION}


@cache
def fa3() -> Any:
    """FlashAttention-3's module, or None. It serves CUDA devices only."""
    if not torch.cuda.is_available():
        return None
    return next((import_module(name) for name in FA3_MODULES if find_spec(name)), None)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], object]]:
    """Rivals for uniform batches: q, k, v [batch_size, seq_len, heads, head_dim]."""
    calls: dict[str, Callable[[], object]] = {}
    if q.is_cuda and fa3() is not None:
        calls["fa3_fwd"] = lambda: fa3().flash_attn_func(q, k, v, causal=causal)
    q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))
    for name, backend in (SDPA_BACKENDS if q.is_cuda else {"sdpa": SDPBackend.FLASH_ATTENTION}).items():
        calls[name] = _sdpa(backend, q_t, k_t, v_t, causal)
    return calls


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor, kv_indptr: Tensor
) -> dict[str, Callable[[], object]]:
    """Rivals for causal batches of any lengths: q [nnz_qo, heads, head_dim], k and v [nnz_kv, ...]."""
    if not q.is_cuda or fa3() is None:
        return {}
    offsets = [x.to(q.device) for x in (qo_indptr, kv_indptr)]
    longest = [int(x.diff().max()) for x in (qo_indptr, kv_indptr)]
    return {"fa3_fwd": lambda: fa3().flash_attn_varlen_func(q, k, v, *offsets, *longest, causal=True)}


def dense_cache_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], object]]:
    """Rivals over caches without pages: q [batch_size, qo_len, heads, head_dim], k and v [batch_size, kv_len, ...]."""
    if not q.is_cuda or fa3() is None:
        return {}
    return {"fa3_fwd.dense": lambda: fa3().flash_attn_with_kvcache(q, k, v, causal=causal)}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], object]:
    def call() -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return call
