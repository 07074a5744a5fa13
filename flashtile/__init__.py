"""flashtile: attention and companion kernels for LLM serving, in pure Python.

Triton on every CUDA GPU, Gluon on Hopper, PyTorch on the CPU, behind FlashInfer's public names. Importing the package
needs neither a GPU nor Triton: kernels are imported on their first use.
"""

from flashtile.activation import silu_and_mul
from flashtile.cascade import merge_state, merge_state_in_place, merge_states
from flashtile.decode import BatchDecodeWithPagedKVCacheWrapper, single_decode_with_kv_cache
from flashtile.gemm import SegmentGEMMWrapper, bmm_fp8
from flashtile.norm import fused_add_rmsnorm, rmsnorm
from flashtile.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from flashtile.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from flashtile.rope import (
    apply_rope_pos_ids,
    apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
)
from flashtile.sampling import sampling_from_probs, top_k_top_p_sampling_from_probs

__version__ = "0.1.0"

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "SegmentGEMMWrapper",
    "append_paged_kv_cache",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "bmm_fp8",
    "fused_add_rmsnorm",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "rmsnorm",
    "sampling_from_probs",
    "silu_and_mul",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "top_k_top_p_sampling_from_probs",
]
