"""Prefill and append attention: several query tokens per request, over ragged or paged KV. Defined by
reference/attention.py; FlashAttention-2 (arXiv:2307.08691) and, on Hopper, FlashAttention-3 (arXiv:2407.08608)."""

from functools import partial, partialmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtile.attention import (
    DType,
    KVDType,
    PagedKV,
    cache_dtypes,
    check_indptr,
    host_ints,
    reject,
    single,
    split_paged_cache,
    to_dtype,
    without_page_dim,
)
from flashtile.checks import check_tensor
from flashtile.legacy import LegacyPrefill, LegacyRaggedPrefill
from flashtile.plan.plan import Lengths
from flashtile.plan.problem import Problem
from flashtile.plan.worklist import Ints
from flashtile.pos_encoding import PosEncoding, read_pos_encoding
from flashtile.scales import Scale


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    kv_cache_sf: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    k_zero: Scale = None,
    v_zero: Scale = None,
    *,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    old_context_len: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last qo_len tokens of one request over its KV (arXiv:2307.08691).

    Args:
        q: [qo_len, num_qo_heads, head_dim_qk], fp16, bf16 or fp32.
        k, v: NHD [kv_len, num_kv_heads, head_dim] or HND [num_kv_heads, kv_len, head_dim]; v's head_dim may differ.
            Each of q's dtype, fp8 (e4m3 or e5m2), int8, or uint8 with two int4 a byte (head_dim / 2 bytes).
        o_dtype: of the output, default q's.
        causal: key j is visible to row i iff j <= i + kv_len - qo_len.
        kv_layout: "NHD" or "HND".
        pos_encoding_mode: "NONE"; "ROPE_LLAMA": q and k hold no positions yet, row i is rotated (arXiv:2104.09864) to
            position i + kv_len - qo_len and key j to j: dims d and d + head_dim / 2 by rope_theta ** (-2 d / head_dim)
            / rope_scale radians a token, angles in fp32 (a GPU may add them up: docs/contracts.md); "ALIBI"
            (arXiv:2108.12409): slope[head] * (j - i) is added to the scaled logit of row i and key j, before the soft
            cap. Slopes: utils.get_alibi_slopes.
        rope_scale, rope_theta: of ROPE_LLAMA; default 1 and 1e4.
        low_freq_factor, high_freq_factor, old_context_len: flashtile's own, Llama 3.1's frequencies for ROPE_LLAMA, as
            of apply_llama31_rope: both factors together; old_context_len is 8192 by default.
        use_fp16_qk_reduction: a permitted speed-up; results do not depend on it here.
        sm_scale: factor on q.k; default head_dim_qk ** -0.5.
        window_left: keys before a row's position that it sees; -1: all.
        logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
        backend: "auto", "fa2" (the portable family) or "fa3" (the Hopper family).
        k_scale, v_scale, k_zero, v_zero: as of single_decode_with_kv_cache.
        scale_q, scale_k, scale_v, kv_cache_sf, custom_mask, packed_custom_mask: not implemented yet.

    Returns:
        out [qo_len, num_qo_heads, head_dim_vo]; with return_lse also lse [qo_len, num_qo_heads], fp32, base 2.
        A row without a visible key gives out 0 and lse -inf.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. KeyError: an unknown layout or mode.
        NotImplementedError: an argument that is not built yet.
    """
    encoding = read_pos_encoding(
        pos_encoding_mode, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
    )
    reject(
        scale_q=scale_q,
        scale_k=scale_k,
        scale_v=scale_v,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        kv_cache_sf=kv_cache_sf,
    )
    out, lse = single(
        q,
        k,
        v,
        kv_layout=kv_layout,
        causal=causal,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        encoding=encoding,
        backend=backend,
        o_dtype=o_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
        k_zero=k_zero,
        v_zero=v_zero,
    )
    return (out, lse) if return_lse else out


single_prefill_with_kv_cache_return_lse = partial(single_prefill_with_kv_cache, return_lse=True)


class BatchPrefillWithPagedKVCacheWrapper(LegacyPrefill):
    """Prefill or append attention of a batch over a paged KV cache: plan() once a step, run() once a layer.

    Args:
        float_workspace_buffer: scratch memory on the device, any dtype; `workspace_size()` tells what a plan needs.
        kv_layout: "NHD" (cache [pages, page_size, heads, dim]) or "HND" ([pages, heads, page_size, dim]).
        backend: "auto", "fa2" (the portable family) or "fa3" (the Hopper family).
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        reject(
            use_cuda_graph=use_cuda_graph,
            qo_indptr_buf=qo_indptr_buf,
            paged_kv_indptr_buf=paged_kv_indptr_buf,
            paged_kv_indices_buf=paged_kv_indices_buf,
            paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
        )
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DType = "float16",
        kv_data_type: KVDType = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        block_tables: Tensor | None = None,
        o_data_type: DType | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        low_freq_factor: float | None = None,
        high_freq_factor: float | None = None,
        old_context_len: int | None = None,
    ) -> None:
        """Schedule a batch. Host tensors are preferred: lengths on the GPU stall it while they are read.

        Args:
            qo_indptr: [batch_size + 1], offsets of the requests in query tokens.
            paged_kv_indptr: [batch_size + 1], offsets of the requests in `paged_kv_indices`.
            paged_kv_indices: page ids of all requests, one after the other; may be longer than needed.
            paged_kv_last_page_len: [batch_size], tokens in each last page, 1..page_size (0 for a request without
                pages).
            head_dim_qk, head_dim_vo: multiples of 8 from 16 to 512; head_dim_vo defaults to head_dim_qk.
            causal, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta, low_freq_factor,
                high_freq_factor, old_context_len: as of single_prefill_with_kv_cache.
            q_data_type: default float16; o_data_type: default q_data_type. kv_data_type: default q_data_type; or
                float8_e4m3fn, float8_e5m2, int8, uint8 (packed int4), or a tuple of K's and V's.
            non_blocking: taken for compatibility; copies never block.

        Raises:
            ValueError: sizes, dtypes, offsets, last page lengths or page ids out of range, or a workspace too small.
            NotImplementedError: an argument that is not built yet.
        """
        encoding = read_pos_encoding(
            pos_encoding_mode, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
        )
        reject(
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
            seq_lens=seq_lens,
            block_tables=block_tables,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
        )
        if page_size < 1:
            raise ValueError(f"page_size: expected at least 1 token, got {page_size}")
        problem = _problem(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_vo,
            causal,
            window_left,
            logits_soft_cap,
            encoding,
            (q_data_type, kv_data_type, o_data_type),
            page_size,
            self._kv_layout,
        )
        qo = _qo_offsets(qo_indptr)
        kv_indptr = host_ints("paged_kv_indptr", paged_kv_indptr)
        if len(kv_indptr) != len(qo):
            raise ValueError(
                "The length of qo_indptr and paged_kv_indptr should be the same: "
                f"batch_size + 1, got {len(qo)} and {len(kv_indptr)}"
            )
        last = host_ints("paged_kv_last_page_len", paged_kv_last_page_len, len(qo) - 1)
        self._schedule_paged(problem, qo, kv_indptr, paged_kv_indices, last, sm_scale)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: PagedKV,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        k_zero: Scale = None,
        v_zero: Scale = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend each request's query tokens to its cache. Launches only: no host sync.

        Args:
            q: [nnz_qo, num_qo_heads, head_dim_qk].
            paged_kv_cache: (k, v), each [pages, page_size, num_kv_heads, head_dim] (NHD) or [pages, num_kv_heads,
                page_size, head_dim] (HND), or one tensor with K and V in dimension 1. Any strides, the last dimension
                contiguous.
            q_scale: factor on the logits: a number, or a tensor of one element.
            k_scale, v_scale, k_zero, v_zero: as of single_decode_with_kv_cache; per token, shaped as the caches
                without head_dim.
            out: [nnz_qo, num_qo_heads, head_dim_vo]; lse: [nnz_qo, num_qo_heads], fp32: written if given.
            window_left: must equal the planned one if given.
            sinks: [num_qo_heads], one more logit per head that joins the softmax's sum and has no value.
            enable_pdl: a hint on launch overlap; results do not depend on it.

        Returns:
            out; with return_lse also lse, base 2. A row without a visible key gives out 0 and lse -inf.

        Raises:
            ValueError: a tensor that does not fit the plan. RuntimeError: no plan. KeyError: a cache of another type.
        """
        reject(args=args or None)
        plan = self._planned()
        if window_left is not None and window_left != plan.problem.window_left:
            raise ValueError(f"window_left: expected the planned {plan.problem.window_left}, got {window_left}")
        k, v = split_paged_cache(paged_kv_cache, self._kv_layout)
        short = without_page_dim(paged_kv_cache)
        out, lse = self._launch(q, k, v, out, lse, sinks, short, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale,
                                k_zero=k_zero, v_zero=v_zero)  # fmt: skip
        return (out, lse) if return_lse else out

    run_return_lse = partialmethod(run, return_lse=True)


class BatchPrefillWithRaggedKVCacheWrapper(LegacyRaggedPrefill):
    """Prefill or append attention of a batch whose K and V lie one request after the other: plan() once, run() per
    layer.

    Args:
        float_workspace_buffer: scratch memory on the device, any dtype; `workspace_size()` tells what a plan needs.
        kv_layout: "NHD" (k, v [nnz_kv, heads, dim]) or "HND" ([heads, nnz_kv, dim]).
        backend: "auto", "fa2" (the portable family) or "fa3" (the Hopper family).
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        reject(
            use_cuda_graph=use_cuda_graph,
            qo_indptr_buf=qo_indptr_buf,
            kv_indptr_buf=kv_indptr_buf,
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_args=jit_args,
            jit_kwargs=jit_kwargs,
        )
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DType = "float16",
        kv_data_type: KVDType = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        o_data_type: DType | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        low_freq_factor: float | None = None,
        high_freq_factor: float | None = None,
        old_context_len: int | None = None,
    ) -> None:
        """Schedule a batch. Host tensors are preferred: offsets on the GPU stall it while they are read.

        Args:
            qo_indptr, kv_indptr: [batch_size + 1], offsets of the requests in query tokens and in KV tokens.
            head_dim_qk, head_dim_vo: multiples of 8 from 16 to 512; head_dim_vo defaults to head_dim_qk.
            causal, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta, low_freq_factor,
                high_freq_factor, old_context_len: as of single_prefill_with_kv_cache.
            q_data_type: default float16; o_data_type: default q_data_type. kv_data_type: default q_data_type; or
                float8_e4m3fn, float8_e5m2, int8, uint8 (packed int4), or a tuple of K's and V's.
            non_blocking: taken for compatibility; copies never block.

        Raises:
            ValueError: sizes, dtypes or offsets out of range, or a workspace too small.
            NotImplementedError: an argument that is not built yet.
        """
        encoding = read_pos_encoding(
            pos_encoding_mode, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
        )
        reject(
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len,
            max_item_len_ptr=max_item_len_ptr,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
        )
        problem = _problem(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_vo,
            causal,
            window_left,
            logits_soft_cap,
            encoding,
            (q_data_type, kv_data_type, o_data_type),
            0,
            self._kv_layout,
        )
        qo = _qo_offsets(qo_indptr)
        kv = host_ints("kv_indptr", kv_indptr)
        if len(kv) != len(qo):
            raise ValueError(
                f"The length of qo_indptr and kv_indptr should be the same: batch_size + 1, got {len(qo)} and {len(kv)}"
            )
        check_indptr("kv_indptr", kv)
        last = int(np.diff(kv).nonzero()[0][-1]) if kv[-1] else 0
        no_pages = torch.empty(1, dtype=torch.int32, device=self.device)
        self._schedule(problem, Lengths(qo, kv[:-1], np.diff(kv)), no_pages, sm_scale, int(kv[-1]), last)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        o_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        sinks: Tensor | None = None,
        k_zero: Scale = None,
        v_zero: Scale = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend each request's query tokens to its KV. Launches only: no host sync.

        Args:
            q: [nnz_qo, num_qo_heads, head_dim_qk].
            k, v: [nnz_kv, num_kv_heads, head_dim] (NHD) or [num_kv_heads, nnz_kv, head_dim] (HND); any strides, the
                last dimension contiguous.
            q_scale: factor on the logits: a number, or a tensor of one element.
            k_scale, v_scale, k_zero, v_zero: as of single_decode_with_kv_cache; per token, shaped as the caches
                without head_dim.
            out: [nnz_qo, num_qo_heads, head_dim_vo]; lse: [nnz_qo, num_qo_heads], fp32: written if given.
            sinks: [num_qo_heads], one more logit per head that joins the softmax's sum and has no value.
            enable_pdl: a hint on launch overlap; results do not depend on it.

        Returns:
            out; with return_lse also lse, base 2. A row without a visible key gives out 0 and lse -inf.

        Raises:
            ValueError: a tensor that does not fit the plan. RuntimeError: no plan.
        """
        reject(args=args or None, o_scale=o_scale)
        if self._kv_layout == "HND":
            k, v = (check_tensor(n, x).transpose(0, 1) for n, x in (("k", k), ("v", v)))
        out, lse = self._launch(q, k, v, out, lse, sinks, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale,
                                k_zero=k_zero, v_zero=v_zero)  # fmt: skip
        return (out, lse) if return_lse else out

    run_return_lse = partialmethod(run, return_lse=True)


def _qo_offsets(qo_indptr: Tensor) -> Ints:
    offsets = host_ints("qo_indptr", qo_indptr)
    check_indptr("qo_indptr", offsets)
    return offsets


def _problem(
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None,
    causal: bool,
    window_left: int,
    logits_soft_cap: float | None,
    encoding: PosEncoding,
    dtypes: tuple[DType, KVDType, DType | None],
    page_size: int,
    kv_layout: str,
) -> Problem:
    q_dtype = to_dtype("q_data_type", dtypes[0])
    k_dtype, v_dtype = cache_dtypes(dtypes[1], q_dtype)
    return Problem(
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo or head_dim_qk,
        q_dtype=q_dtype,
        kv_dtype=k_dtype,
        v_dtype=v_dtype if v_dtype != k_dtype else None,
        o_dtype=to_dtype("o_data_type", dtypes[2] or q_dtype),
        page_size=page_size,
        kv_heads_first=kv_layout == "HND",
        window_left=window_left,
        window_right=0 if causal else -1,
        logits_soft_cap=logits_soft_cap or 0.0,
        rope=encoding.rope,
        alibi=encoding.alibi,
    )
