"""FlashInfer's argument names, orders and defaults of what stands around attention: the compatibility surface."""

import importlib
import inspect
from typing import Any

import pytest

RAGGED, BY_IDS = "q, k, indptr, offsets", "q, k, pos_ids"
ROPE = "rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0"
LLAMA31 = (
    "rotary_dim=None, interleave=False, rope_scale=8, rope_theta=500000.0, low_freq_factor=1, high_freq_factor=4, "
    "old_context_len=8192"
)
CACHED = "positions, query, key, head_size, cos_sin_cache, is_neox=True"
QUANTIZE = (
    "q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox=True, quantize_dtype=None, quant_scale_q=1.0, "
    "quant_scale_kv=1.0, q_rope_out=None, k_rope_out=None, q_nope_out=None, k_nope_out=None, enable_pdl=False"
)
SAMPLE = "indices=None, deterministic=True, generator=None, check_nan=False, seed=None, offset=None, return_valid=False"
BOTH = "top_k, top_p, indices=None, filter_apply_order='top_k_first', " + SAMPLE.partition(", ")[2]
TOP_K = "deterministic=False, tie_break=0, dsa_graph_safe=False"
GEMM = "a, b, c=None, alpha=1.0, beta=0.0, out_dtype=None"

SIGNATURES = {
    # page; the scales and zero points are ours
    "append_paged_kv_cache": (
        "append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, "
        "kv_layout='NHD', *, k_scale=None, v_scale=None, k_zero=None, v_zero=None"
    ),
    "append_paged_mla_kv_cache": (
        "append_ckv, append_kpe, batch_indices, positions, ckv_cache, kpe_cache, kv_indices, kv_indptr, "
        "kv_last_page_len"
    ),
    "get_batch_indices_positions": "append_indptr, seq_lens, nnz, batch_indices=None, positions=None",
    "get_seq_lens": "kv_indptr, kv_last_page_len, page_size",
    # rope
    "apply_rope": f"{RAGGED}, {ROPE}",
    "apply_rope_inplace": f"{RAGGED}, {ROPE}",
    "apply_rope_pos_ids": f"{BY_IDS}, {ROPE}",
    "apply_rope_pos_ids_inplace": f"{BY_IDS}, {ROPE}",
    "apply_llama31_rope": f"{RAGGED}, {LLAMA31}",
    "apply_llama31_rope_inplace": f"{RAGGED}, {LLAMA31}",
    "apply_llama31_rope_pos_ids": f"{BY_IDS}, {LLAMA31}",
    "apply_llama31_rope_pos_ids_inplace": f"{BY_IDS}, {LLAMA31}",
    "apply_rope_with_cos_sin_cache": CACHED,
    "apply_rope_with_cos_sin_cache_inplace": CACHED,
    "rope_quantize_fp8": f"{QUANTIZE}, backend='cuda'",
    "mla_rope_quantize_fp8": QUANTIZE,
    "rope_quantize_fp8_append_paged_kv_cache": (
        "q_rope, k_rope, q_nope, k_nope, v, cos_sin_cache, pos_ids, paged_kv_cache, kv_indices, kv_indptr, "
        "batch_indices, positions, is_neox=True, quantize_dtype=None, quant_scale_q=1.0, quant_scale_kv=1.0, "
        "page_size=16, kv_layout='NHD', q_rope_out=None, q_nope_out=None, enable_pdl=False"
    ),
    # norm
    "rmsnorm": "input, weight, eps=1e-06, out=None, enable_pdl=None",
    "gemma_rmsnorm": "input, weight, eps=1e-06, out=None, enable_pdl=None",
    "fused_add_rmsnorm": "input, residual, weight, eps=1e-06, enable_pdl=None",
    "gemma_fused_add_rmsnorm": "input, residual, weight, eps=1e-06, enable_pdl=None",
    "rmsnorm_quant": "out, input, weight, scale, eps=1e-06, enable_pdl=None",
    "fused_add_rmsnorm_quant": "out, input, residual, weight, scale, eps=1e-06, enable_pdl=None",
    "layernorm": "input, gemma, beta, eps=1e-06",
    "layernorm_quant": "out, input, gemma, beta, scale, eps=1e-06",
    "fused_rmsnorm_silu": "input, weight, eps=1e-06, out=None, block_scale=None",
    "fused_qk_rmsnorm_rope": (
        "qkv, q_weight, k_weight, *, ppf, pph, ppw, num_frame_channels, num_height_channels, num_width_channels, "
        "num_heads_q, num_heads_k, num_heads_v, head_dim, eps=1e-06, base=10000.0, interleave=True, factor=1.0, "
        "low=0.0, high=0.0, attention_factor=1.0, is_qk_norm=True, output_fp8=False, output_quant_scale=1.0, "
        "v_quant_scale=1.0, q_out=None, k_out=None, v_out=None"
    ),
    # activation; the scale is ours
    "silu_and_mul": "input, out=None, enable_pdl=None, *, scale=None",
    "gelu_and_mul": "input, out=None, enable_pdl=None, *, scale=None",
    "gelu_tanh_and_mul": "input, out=None, enable_pdl=None, *, scale=None",
    # sampling
    "sampling_from_probs": f"probs, {SAMPLE}",
    "sampling_from_logits": f"logits, {SAMPLE}",
    "top_p_sampling_from_probs": f"probs, top_p, {SAMPLE}",
    "top_k_sampling_from_probs": f"probs, top_k, {SAMPLE}",
    "min_p_sampling_from_probs": f"probs, min_p, {SAMPLE}",
    "top_k_top_p_sampling_from_probs": f"probs, {BOTH}",
    "top_k_top_p_sampling_from_logits": f"logits, {BOTH}",
    "top_p_renorm_probs": "probs, top_p, is_deterministic=False",
    "top_k_renorm_probs": "probs, top_k",
    "top_k_mask_logits": "logits, top_k",
    "softmax": "logits, temperature=None, enable_pdl=None",
    "chain_speculative_sampling": (
        "draft_probs, draft_token_ids, target_probs, maybe_output_accepted_token_num=None, "
        "maybe_output_emitted_draft_token_num=None, deterministic=True, generator=None, seed=None, offset=None"
    ),
    "sampling.top_p_renorm_prob": "probs, top_p, is_deterministic=False",
    "sampling.top_k_renorm_prob": "probs, top_k",
    "top_k": f"input, k, sorted=False, {TOP_K}",
    "top_k_page_table_transform": (
        f"input, src_page_table, lengths, k, row_to_batch=None, {TOP_K}, row_starts=None, page_table_row_starts=None, "
        "*, page_size=1, out=None, out_raw_indices=None"
    ),
    "top_k_ragged_transform": f"input, offsets, lengths, k, {TOP_K}, row_starts=None",
    "top_k_varlen": (
        "logits, seq_lens, top_k, pre_idx=None, compress_ratio=1, next_n=1, return_values=False, out_indices=None, "
        "out_values=None, backend='auto', load_balance=True, workspace=None"
    ),
    # LogitsPipe
    "logits_processor.LogitsPipe": (
        "processors, compile=True, input_type=None, custom_fusion_rules=None, custom_validity_checks=None"
    ),
    "logits_processor.LogitsPipe.compile": "self, custom_fusion_rules=None, custom_validity_checks=None",
    "logits_processor.Temperature": "**params",
    "logits_processor.Softmax": "enable_pdl=None, **params",
    "logits_processor.TopK": "joint_topk_topp=False, **params",
    "logits_processor.TopP": "**params",
    "logits_processor.MinP": "**params",
    "logits_processor.Sample": "deterministic=True, **params",
    "logits_processor.FusionRule": "pattern, guard, build, prio=0",
    "logits_processor.TaggedTensor": "data, type",
    "logits_processor.compile_pipeline": "ops, custom_fusion_rules=None, custom_validity_checks=None",
    "logits_processor.Compiler.compile": "self, ops",
    # quantization
    "packbits": "x, bitorder='big'",
    "segment_packbits": "x, indptr, bitorder='big'",
    # gemm
    "SegmentGEMMWrapper": "float_workspace_buffer, backend='auto'",
    "SegmentGEMMWrapper.run": (
        "self, x, weights, batch_size, weight_column_major, out=None, seg_lens=None, seg_indptr=None, "
        "weight_indices=None"
    ),
    "bmm_fp8": "A, B, A_scale, B_scale, dtype, out=None, backend='cublas'",
    "triton.sm_constraint_gemm.gemm": GEMM,
    "triton.sm_constraint_gemm.gemm_persistent": f"{GEMM}, num_sms=None",
    "triton.sm_constraint_gemm.gemm_descriptor_persistent": f"{GEMM}, num_sms=None, EPILOGUE_SUBTILE=False",
    "triton.activation.silu_and_mul": "x, x_scale=None, o_scale=None, dtype=None",
    "triton.norm.rms_norm": "x, weight, out, eps, in_scale=None, out_scale=None",
    "triton.norm.rms_norm_add_residual": ("x, residual, weight, eps, x_out=None, x_in_scale=None, x_out_scale=None"),
    # merges
    "merge_state": "v_a, s_a, v_b, s_b",
    "merge_state_in_place": "v, s, v_other, s_other, mask=None",
    "merge_states": "v, s",
    "triton.cascade.variable_length_merge_states": "v, s, indptr",
}


def find(name: str) -> Any:
    """A name of flashtile; the modules on its way are imported."""
    found: Any = importlib.import_module("flashtile")
    path = "flashtile"
    for part in name.split("."):
        path += f".{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


def signature(public: Any) -> str:
    """The parameters without their types, numbers as FlashInfer writes them."""
    words, keyword_only = [], False
    for p in inspect.signature(public).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        default = "" if p.default is p.empty else f"={p.default!r}"
        words.append(f"{'**' if p.kind is p.VAR_KEYWORD else ''}{p.name}{default}")
    return ", ".join(words)


def same_numbers(text: str) -> str:
    """Without the difference between 1 and 1.0, or an enumeration's member and its number."""
    return text.replace("<TopKTieBreak.NONE: 0>", "0").replace(".0,", ",").removesuffix(".0")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert same_numbers(signature(find(name))) == same_numbers(SIGNATURES[name])
