"""Rotary embeddings, fp8 quantisation and the cache append in one Triton kernel: a program takes heads of one token."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.page import find_slot
from flashtile.kernels.quantization import convert
from flashtile.kernels.rope import cos_sin, head_splits, load_pairs, store_rotated
from flashtile.kernels.tiles import alignment, check_output_dtype, start_after_previous, strides
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded


@triton.jit
def quantise_rows(out_ptrs, row_ptrs, row_mask, found, factor, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows [DIM] at row_ptrs times factor, in fp8, to out_ptrs, where `found`."""
    if DIM > 0:
        cols = tl.arange(0, BLOCK_DIM)
        mask = row_mask[:, None] & (cols < DIM)[None, :]
        x = tl.load(row_ptrs[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        y = convert(x, factor, out_ptrs.dtype.scalar.element_ty)
        tl.store(out_ptrs[:, None] + cols[None, :], y, mask=mask & found)


@triton.jit(do_not_specialize=["num_positions", "batch_size", "num_pages"])
def rope_quantize_kernel(
    q_rope_out_ptr, q_nope_out_ptr, k_rope_out_ptr, k_nope_out_ptr, v_out_ptr,
    q_rope_ptr, q_nope_ptr, k_rope_ptr, k_nope_ptr, v_ptr, pos_ids_ptr, cos_sin_cache_ptr,
    batch_indices_ptr, positions_ptr, kv_indices_ptr, kv_indptr_ptr,
    stride_cache, num_positions, batch_size, num_pages, factor_q, factor_kv,
    stride_q_rope_out_token, stride_q_rope_out_head, stride_q_nope_out_token, stride_q_nope_out_head,
    stride_k_rope_out_page, stride_k_rope_out_slot, stride_k_rope_out_head,
    stride_k_nope_out_page, stride_k_nope_out_slot, stride_k_nope_out_head,
    stride_v_out_page, stride_v_out_slot, stride_v_out_head,
    stride_q_rope_token, stride_q_rope_head, stride_q_nope_token, stride_q_nope_head,
    stride_k_rope_token, stride_k_rope_head, stride_k_nope_token, stride_k_nope_head, stride_v_token, stride_v_head,
    NUM_QO_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, ROPE_DIM: tl.constexpr, NOPE_DIM_Q: tl.constexpr,
    NOPE_DIM_K: tl.constexpr, DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, INTERLEAVE: tl.constexpr,
    UNIT: tl.constexpr, ENABLE_PDL: tl.constexpr, SPLITS: tl.constexpr, BLOCK_QO_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_NOPE_Q: tl.constexpr,
    BLOCK_NOPE_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Rotate the rope parts of q and k, then write all parts and v times their factor as fp8: q by token, the others by
    token too (PAGE_SIZE 0), or to the token's slot of a paged cache. SPLITS programs per token; strides in units."""
    start_after_previous(ENABLE_PDL)
    HALF: tl.constexpr = ROPE_DIM // 2
    token = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    q_head = split * BLOCK_QO_HEADS + tl.arange(0, BLOCK_QO_HEADS)
    k_head = split * BLOCK_KV_HEADS + tl.arange(0, BLOCK_KV_HEADS)
    q_mask, k_mask = q_head < NUM_QO_HEADS, k_head < NUM_KV_HEADS
    q_rope_ptrs = q_rope_ptr + (token * stride_q_rope_token + q_head * stride_q_rope_head) * UNIT
    q_nope_ptrs = q_nope_ptr + (token * stride_q_nope_token + q_head * stride_q_nope_head) * UNIT
    k_rope_ptrs = k_rope_ptr + (token * stride_k_rope_token + k_head * stride_k_rope_head) * UNIT
    k_nope_ptrs = k_nope_ptr + (token * stride_k_nope_token + k_head * stride_k_nope_head) * UNIT
    v_ptrs = v_ptr + (token * stride_v_token + k_head * stride_v_head) * UNIT
    q_first, q_second = load_pairs(q_rope_ptrs, q_mask, INTERLEAVE, HALF, BLOCK_HALF)
    k_first, k_second = load_pairs(k_rope_ptrs, k_mask, INTERLEAVE, HALF, BLOCK_HALF)
    if PAGE_SIZE > 0:
        page, slot, found = find_slot(
            token,
            True,
            batch_indices_ptr,
            positions_ptr,
            kv_indices_ptr,
            kv_indptr_ptr,
            batch_size,
            num_pages,
            PAGE_SIZE,
        )
    else:
        page, slot, found = token, 0, True
    position = tl.load(pos_ids_ptr + token)
    cos, sin = cos_sin(position, cos_sin_cache_ptr, stride_cache, num_positions, True, HALF, BLOCK_HALF)

    q_to = q_rope_out_ptr + (token * stride_q_rope_out_token + q_head * stride_q_rope_out_head) * UNIT
    store_rotated(q_to, q_mask, q_first, q_second, cos, sin, factor_q, INTERLEAVE, HALF, BLOCK_HALF)
    q_to = q_nope_out_ptr + (token * stride_q_nope_out_token + q_head * stride_q_nope_out_head) * UNIT
    quantise_rows(q_to, q_nope_ptrs, q_mask, True, factor_q, NOPE_DIM_Q, BLOCK_NOPE_Q)

    at = page * stride_k_rope_out_page + slot * stride_k_rope_out_slot
    k_to = k_rope_out_ptr + (at + k_head * stride_k_rope_out_head) * UNIT
    store_rotated(k_to, k_mask & found, k_first, k_second, cos, sin, factor_kv, INTERLEAVE, HALF, BLOCK_HALF)
    at = page * stride_k_nope_out_page + slot * stride_k_nope_out_slot
    k_to = k_nope_out_ptr + (at + k_head * stride_k_nope_out_head) * UNIT
    quantise_rows(k_to, k_nope_ptrs, k_mask, found, factor_kv, NOPE_DIM_K, BLOCK_NOPE_K)
    v_to = v_out_ptr + (page * stride_v_out_page + slot * stride_v_out_slot + k_head * stride_v_out_head) * UNIT
    quantise_rows(v_to, v_ptrs, k_mask, found, factor_kv, DIM_V, BLOCK_V)


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
    k_rope_out, k_nope_out = k_rope_out.unsqueeze(1), k_nope_out.unsqueeze(1)  # pages of one token
    outputs = (q_rope_out, q_nope_out, k_rope_out, k_nope_out, k_rope_out[..., :0])
    inputs = (q_rope, q_nope, k_rope, k_nope, k_rope[..., :0])
    scales = (quant_scale_q, quant_scale_kv)
    _launch(outputs, inputs, pos_ids, cos_sin_cache, interleave, scales, enable_pdl, None)


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
    outputs = (q_rope_out, q_nope_out, k_rope_cache, k_nope_cache, v_cache)
    inputs = (q_rope, q_nope, k_rope, k_nope, v)
    indices = (batch_indices, positions, kv_indices, kv_indptr)
    scales = (quant_scale_q, quant_scale_kv)
    _launch(outputs, inputs, pos_ids, cos_sin_cache, interleave, scales, enable_pdl, indices)


def _launch(
    outputs: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    pos_ids: Tensor,
    cos_sin_cache: Tensor,
    interleave: bool,
    scales: tuple[float, float],
    enable_pdl: bool,
    indices: tuple[Tensor, ...] | None,
) -> None:
    """outputs: q_rope and q_nope by token, k_rope, k_nope and v by page and slot; inputs: the same five by token."""
    q_rope, q_nope, k_rope, k_nope, v = inputs
    nnz, num_qo_heads, rope_dim = q_rope.shape
    num_kv_heads = k_rope.shape[1]
    if nnz == 0:
        return
    check_output_dtype(outputs[0])
    cols = rope_dim + max(q_nope.shape[2], k_nope.shape[2] + v.shape[2])
    splits = head_splits(nnz, num_qo_heads, cols)
    block_qo_heads, block_kv_heads = (
        triton.next_power_of_2(max(1, triton.cdiv(n, splits))) for n in (num_qo_heads, num_kv_heads)
    )
    unit = alignment(*outputs, *inputs)
    by_slot = [stride // unit for x in outputs[2:] for stride in x.stride()[:3]]
    rope_quantize_kernel[(nnz * splits,)](
        *outputs, *inputs, pos_ids, cos_sin_cache, *(indices or (None,) * 4), cos_sin_cache.stride(0),
        cos_sin_cache.shape[0], indices[3].shape[0] - 1 if indices else 0, outputs[2].shape[0], *scales,
        *strides(outputs[0], unit), *strides(outputs[1], unit), *by_slot,
        *(s for x in inputs for s in strides(x, unit)),
        NUM_QO_HEADS=num_qo_heads, NUM_KV_HEADS=num_kv_heads, ROPE_DIM=rope_dim, NOPE_DIM_Q=q_nope.shape[2],
        NOPE_DIM_K=k_nope.shape[2], DIM_V=v.shape[2], PAGE_SIZE=outputs[2].shape[1] if indices else 0,
        INTERLEAVE=interleave, UNIT=unit, ENABLE_PDL=enable_pdl, SPLITS=splits,
        BLOCK_QO_HEADS=block_qo_heads, BLOCK_KV_HEADS=block_kv_heads,
        BLOCK_HALF=triton.next_power_of_2(rope_dim // 2), BLOCK_NOPE_Q=_block(q_nope), BLOCK_NOPE_K=_block(k_nope),
        BLOCK_V=_block(v), num_warps=min(8, triton.next_power_of_2(triton.cdiv(block_qo_heads * cols, 1536))),
        **({"launch_pdl": True} if enable_pdl else {}),
    )  # fmt: skip


def _block(x: Tensor) -> int:
    return triton.next_power_of_2(max(1, x.shape[2]))


def compile_cases() -> Iterator[CompileCase]:
    """MLA and GQA with a partial rotation, by token and into a cache."""
    half, fp8 = torch.bfloat16, torch.float8_e4m3fn
    for nnz, num_qo_heads, num_kv_heads, rope_dim, nope_dim, dim_v in (
        (4096, 128, 1, 64, 512, 0),
        (1, 128, 1, 64, 512, 0),
        (4096, 32, 8, 128, 0, 128),
        (64, 32, 8, 64, 64, 128),
    ):
        shapes = [(num_qo_heads, rope_dim), (num_qo_heads, nope_dim)]
        shapes += [(num_kv_heads, dim) for dim in (rope_dim, nope_dim, dim_v)]
        inputs = [torch.empty(nnz, *shape, dtype=half, device="meta") for shape in shapes]
        outputs = [torch.empty(nnz, *shape, dtype=fp8, device="meta") for shape in shapes]
        caches = [torch.empty(512, 16, *shape, dtype=fp8, device="meta") for shape in shapes]
        index = torch.empty(nnz, dtype=torch.int32, device="meta")
        how = (index, torch.empty(8192, rope_dim, device="meta"), nope_dim == 64, 1.0, 1.0, False)
        name = f"nnz={nnz} heads={num_qo_heads}:{num_kv_heads} dims={rope_dim},{nope_dim},{dim_v}"
        alone = partial(rope_quantize, *outputs[:4], *inputs[:4], *how)
        yield recorded(f"rope_quantize {name}", rope_quantize_kernel, alone, min_capability=90)
        append = partial(rope_quantize_append, *outputs[:2], *caches[2:], *inputs, *how, *[index] * 4)
        yield recorded(f"rope_quantize_append {name}", rope_quantize_kernel, append, min_capability=90)
