"""flashtile: attention and companion kernels for LLM serving, in pure Python.

Triton on every CUDA GPU, Gluon on Hopper, PyTorch on the CPU, behind FlashInfer's public names. Importing the package
needs neither a GPU nor Triton: kernels are imported on their first use.
"""

from flashtile.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from flashtile.cascade import merge_state, merge_state_in_place, merge_states
from flashtile.decode import BatchDecodeWithPagedKVCacheWrapper, single_decode_with_kv_cache
from flashtile.gemm import SegmentGEMMWrapper, bmm_fp8
from flashtile.key_transform import KeyTransform
from flashtile.norm import (
    fused_add_rmsnorm,
    fused_add_rmsnorm_quant,
    fused_qk_rmsnorm_rope,
    fused_rmsnorm_silu,
    gemma_fused_add_rmsnorm,
    gemma_rmsnorm,
    layernorm,
    layernorm_quant,
    rmsnorm,
    rmsnorm_quant,
)
from flashtile.page import append_paged_kv_cache, append_paged_mla_kv_cache, get_batch_indices_positions, get_seq_lens
from flashtile.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from flashtile.quantization import (
    dequantize_kv_fp8,
    dequantize_kv_int4,
    dequantize_kv_int8,
    packbits,
    quantize_kv_fp8,
    quantize_kv_int4,
    quantize_kv_int8,
    segment_packbits,
)
from flashtile.rope import (
    apply_llama31_rope,
    apply_llama31_rope_inplace,
    apply_llama31_rope_pos_ids,
    apply_llama31_rope_pos_ids_inplace,
    apply_rope,
    apply_rope_inplace,
    apply_rope_pos_ids,
    apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
    mla_rope_quantize_fp8,
    rope_quantize_fp8,
    rope_quantize_fp8_append_paged_kv_cache,
)
from flashtile.sampling import (
    chain_speculative_sampling,
    min_p_sampling_from_probs,
    sampling_from_logits,
    sampling_from_probs,
    softmax,
    top_k_mask_logits,
    top_k_renorm_probs,
    top_k_sampling_from_probs,
    top_k_top_p_sampling_from_logits,
    top_k_top_p_sampling_from_probs,
    top_p_renorm_probs,
    top_p_sampling_from_probs,
)
from flashtile.topk import TopKTieBreak, top_k, top_k_page_table_transform, top_k_ragged_transform, top_k_varlen

__version__ = "0.1.0"

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "KeyTransform",
    "SegmentGEMMWrapper",
    "TopKTieBreak",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "bmm_fp8",
    "chain_speculative_sampling",
    "dequantize_kv_fp8",
    "dequantize_kv_int4",
    "dequantize_kv_int8",
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "fused_qk_rmsnorm_rope",
    "fused_rmsnorm_silu",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "get_batch_indices_positions",
    "get_seq_lens",
    "layernorm",
    "layernorm_quant",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "min_p_sampling_from_probs",
    "mla_rope_quantize_fp8",
    "packbits",
    "quantize_kv_fp8",
    "quantize_kv_int4",
    "quantize_kv_int8",
    "rmsnorm",
    "rmsnorm_quant",
    "rope_quantize_fp8",
    "rope_quantize_fp8_append_paged_kv_cache",
    "sampling_from_logits",
    "sampling_from_probs",
    "segment_packbits",
    "silu_and_mul",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "softmax",
    "top_k",
    "top_k_mask_logits",
    "top_k_page_table_transform",
    "top_k_ragged_transform",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_k_varlen",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]
