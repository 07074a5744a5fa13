"""Decode attention: one query token per request. Defined by reference/attention.py.

FlashAttention-2 (arXiv:2307.08691) with the KV of a request split among CTAs where the batch is small (Flash-Decoding).
"""

from functools import partialmethod
from typing import Any

import numpy as np
from torch import Tensor

from flashtile.attention import (
    DType,
    KVDType,
    PagedKV,
    cache_dtypes,
    host_ints,
    reject,
    single,
    split_paged_cache,
    to_dtype,
    without_page_dim,
)
from flashtile.checks import check_shape
from flashtile.legacy import LegacyDecode
from flashtile.plan.problem import Problem
from flashtile.pos_encoding import read_pos_encoding
from flashtile.scales import Scale


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    k_zero: Scale = None,
    v_zero: Scale = None,
    *,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    old_context_len: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one token over the KV of one request (arXiv:2307.08691).

    Args:
        q: [num_qo_heads, head_dim], fp16, bf16 or fp32.
        k, v: NHD [kv_len, num_kv_heads, head_dim] or HND [num_kv_heads, kv_len, head_dim]; v's head_dim may differ.
            Each of q's dtype, fp8 (e4m3 or e5m2), int8, or uint8 with two int4 a byte (head_dim / 2 bytes).
        kv_layout: "NHD" or "HND".
        pos_encoding_mode: "NONE"; "ROPE_LLAMA": q and k hold no positions yet, q is rotated (arXiv:2104.09864) to
            position kv_len - 1 and key j to j: dims d and d + head_dim / 2 by rope_theta ** (-2 d / head_dim) /
            rope_scale radians a token, angles in fp32 (a GPU may add them up: docs/contracts.md); "ALIBI"
            (arXiv:2108.12409): slope[head] * j is added to the scaled logit of key j, before the soft cap. Slopes:
            utils.get_alibi_slopes.
        use_tensor_cores: a hint; results do not depend on it.
        q_scale: factor on the logits: a number, or a tensor of one element.
        k_scale, v_scale, k_zero, v_zero: a number n of k or v stands for (n - zero) * scale. Numbers or tensors: one
            element, [num_kv_heads], or k's shape without head_dim, then also with groups of 32, 64 or 128 elements of
            head_dim as one more dimension; scales in fp32, fp16 or bf16, of which fp32 is read fastest. Default: 1, and
            0 (8 for int4). Zero points are for int8 and int4.
        window_left: the token sees itself and this many keys before it; -1: all.
        logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
        sm_scale: factor on q.k; default head_dim ** -0.5.
        rope_scale, rope_theta: of ROPE_LLAMA; default 1 and 1e4.
        low_freq_factor, high_freq_factor, old_context_len: flashtile's own, Llama 3.1's frequencies for ROPE_LLAMA, as
            of apply_llama31_rope: both factors together; old_context_len is 8192 by default.

    Returns:
        out [num_qo_heads, head_dim_vo]; with return_lse also lse [num_qo_heads], fp32, base 2.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. KeyError: an unknown layout or mode.
    """
    encoding = read_pos_encoding(
        pos_encoding_mode, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
    )
    check_shape("q", q, ("num_qo_heads", "head_dim"))
    out, lse = single(
        q[None],
        k,
        v,
        kv_layout=kv_layout,
        causal=False,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        encoding=encoding,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        k_zero=k_zero,
        v_zero=v_zero,
    )
    return (out[0], lse[0]) if return_lse else out[0]


class BatchDecodeWithPagedKVCacheWrapper(LegacyDecode):
    """Decode attention of a batch over a paged KV cache: plan() once a step, run() once a layer.

    Args:
        float_workspace_buffer: scratch memory on the device, any dtype; `workspace_size()` tells what a plan needs.
        kv_layout: "NHD" (cache [pages, page_size, heads, dim]) or "HND" ([pages, heads, page_size, dim]).
        use_tensor_cores: a hint; results do not depend on it.
        backend: "auto", "fa2" (the portable family) or "fa3" (the Hopper family).
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        reject(
            use_cuda_graph=use_cuda_graph,
            paged_kv_indptr_buffer=paged_kv_indptr_buffer,
            paged_kv_indices_buffer=paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            jit_args=jit_args,
        )
        super().__init__(float_workspace_buffer, kv_layout, backend)
        self._use_tensor_cores = use_tensor_cores

    @property
    def use_tensor_cores(self) -> bool:
        """The hint given at construction."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: DType | None = None,
        kv_data_type: KVDType = None,
        data_type: DType | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        o_data_type: DType | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        head_dim_vo: int | None = None,
        *,
        low_freq_factor: float | None = None,
        high_freq_factor: float | None = None,
        old_context_len: int | None = None,
    ) -> None:
        """Schedule a batch. Host tensors are preferred: lengths on the GPU stall it while they are read.

        Args:
            indptr: [batch_size + 1], offsets of the requests in `indices`.
            indices: page ids of all requests, one after the other; may be longer than needed.
            last_page_len: [batch_size], tokens in each request's last page, 1..page_size (0 for a request without
                pages).
            head_dim: of q and k, and of v unless head_dim_vo is given; a multiple of 8 from 16 to 512.
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, low_freq_factor,
                high_freq_factor, old_context_len: as of single_decode_with_kv_cache.
            q_data_type: default float16. kv_data_type: default q_data_type; or float8_e4m3fn, float8_e5m2, int8, uint8
                (packed int4), or a tuple of K's and V's. data_type: both, where they are not given.
            o_data_type: of the output, default q_data_type.
            non_blocking: taken for compatibility; copies never block.

        Raises:
            ValueError: sizes, dtypes, offsets, last page lengths or page ids out of range, or a workspace too small.
            KeyError: an unknown mode. NotImplementedError: an argument that is not built yet.
        """
        encoding = read_pos_encoding(
            pos_encoding_mode, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
        )
        reject(
            block_tables=block_tables,
            seq_lens=seq_lens,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
        )
        q_dtype = to_dtype("q_data_type", q_data_type or data_type or "float16")
        k_dtype, v_dtype = cache_dtypes(kv_data_type or data_type, q_dtype)
        if page_size < 1:
            raise ValueError(f"page_size: expected at least 1 token, got {page_size}")
        kv_indptr = host_ints("indptr", indptr)
        problem = Problem(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            head_dim_vo=head_dim_vo or head_dim,
            q_dtype=q_dtype,
            kv_dtype=k_dtype,
            v_dtype=v_dtype if v_dtype != k_dtype else None,
            o_dtype=to_dtype("o_data_type", o_data_type or q_dtype),
            page_size=page_size,
            kv_heads_first=self._kv_layout == "HND",
            window_left=window_left,
            logits_soft_cap=logits_soft_cap or 0.0,
            rope=encoding.rope,
            alibi=encoding.alibi,
        )
        last = host_ints("last_page_len", last_page_len, max(len(kv_indptr) - 1, 0))
        self._schedule_paged(problem, np.arange(len(kv_indptr)), kv_indptr, indices, last, sm_scale)

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
        """Attend each request's token to its whole cache. Launches only: no host sync.

        Args:
            q: [batch_size, num_qo_heads, head_dim].
            paged_kv_cache: (k, v), each [pages, page_size, num_kv_heads, head_dim] (NHD) or [pages, num_kv_heads,
                page_size, head_dim] (HND), or one tensor with K and V in dimension 1. Any strides, the last dimension
                contiguous.
            q_scale: factor on the logits: a number, or a tensor of one element.
            k_scale, v_scale, k_zero, v_zero: as of single_decode_with_kv_cache; per token, shaped as the caches
                without head_dim.
            out: [batch_size, num_qo_heads, head_dim_vo]; lse: [batch_size, num_qo_heads], fp32: written if given.
            window_left: must equal the planned one if given.
            sinks: [num_qo_heads], one more logit per head that joins the softmax's sum and has no value.
            enable_pdl: a hint on launch overlap; results do not depend on it.

        Returns:
            out; with return_lse also lse, base 2. A request without KV gives out 0 and lse -inf.

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
