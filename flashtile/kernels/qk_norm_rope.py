"""Query-key norm and rotary embedding over a grid of patches, in Triton: a program takes q, k or v of a token."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.frequencies import grid_frequencies
from flashtile.kernels.quantization import convert
from flashtile.kernels.rope import cos_sin_of, load_pairs, store_rotated
from flashtile.kernels.tiles import alignment, check_output_dtype, strides
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded


@triton.jit
def norm_and_turn(
    out_ptr, x_ptr, weight_ptr, stride_head, cos, sin, eps, factor, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NORMALISE: tl.constexpr, INTERLEAVE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """out [NUM_HEADS, HEAD_DIM] = x, normalised over all of it if NORMALISE, with every head turned by cos and sin."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.arange(0, BLOCK_HEADS)
    mask = head < NUM_HEADS
    first, second = load_pairs(x_ptr + head * HEAD_DIM, mask, INTERLEAVE, HALF, BLOCK_HALF)
    if NORMALISE:
        weights = load_pairs(weight_ptr + head * HEAD_DIM, mask, INTERLEAVE, HALF, BLOCK_HALF)
        mean_square = tl.sum(tl.sum(first * first + second * second, 1), 0) / (NUM_HEADS * HEAD_DIM)
        scale = tl.rsqrt(mean_square + eps)
        first, second = first * scale * weights[0], second * scale * weights[1]
    store_rotated(out_ptr + head * stride_head, mask, first, second, cos, sin, factor, INTERLEAVE, HALF, BLOCK_HALF)


@triton.jit
def qk_norm_rope_kernel(
    q_out_ptr, k_out_ptr, v_out_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, freqs_ptr,
    stride_q_out_token, stride_q_out_head, stride_k_out_token, stride_k_out_head, stride_v_out_token, stride_v_out_head,
    stride_qkv_token, frames, rows, columns, eps, attention_factor, qk_factor, v_factor,
    NUM_QO_HEADS: tl.constexpr, NUM_KEY_HEADS: tl.constexpr, NUM_VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    FRAME_PAIRS: tl.constexpr, ROW_PAIRS: tl.constexpr, NORMALISE: tl.constexpr, INTERLEAVE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_QO_HEADS: tl.constexpr, BLOCK_KEY_HEADS: tl.constexpr, BLOCK_VALUE_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """q and k of qkv rows normalised and rotated, v copied; pairs below FRAME_PAIRS turn with the frame of the token's
    patch, the next ROW_PAIRS with its row, the rest with its column. Strides in units."""
    token = (tl.program_id(0) // 3).to(tl.int64)
    part = tl.program_id(0) % 3
    x_ptr = qkv_ptr + token * stride_qkv_token * UNIT
    if part == 2:
        head, cols = tl.arange(0, BLOCK_VALUE_HEADS), tl.arange(0, BLOCK_DIM)
        mask = (head < NUM_VALUE_HEADS)[:, None] & (cols < HEAD_DIM)[None, :]
        x_ptr += (NUM_QO_HEADS + NUM_KEY_HEADS) * HEAD_DIM
        v = tl.load(x_ptr + (head * HEAD_DIM)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        out_ptrs = v_out_ptr + ((token * stride_v_out_token + head * stride_v_out_head) * UNIT)[:, None] + cols[None, :]
        tl.store(out_ptrs, convert(v, v_factor, v_out_ptr.dtype.element_ty), mask=mask)
    else:
        pair = tl.arange(0, BLOCK_HALF)
        frame, patch_row, patch_column = token // (rows * columns) % frames, token // columns % rows, token % columns
        place = tl.where(pair < FRAME_PAIRS, frame, tl.where(pair < FRAME_PAIRS + ROW_PAIRS, patch_row, patch_column))
        freqs = tl.load(freqs_ptr + pair, mask=pair < HEAD_DIM // 2, other=0.0)
        cos, sin = cos_sin_of(place.to(tl.float32) * freqs)
        cos, sin = cos * attention_factor, sin * attention_factor
        if part == 0:
            norm_and_turn(
                q_out_ptr + token * stride_q_out_token * UNIT, x_ptr, q_weight_ptr, stride_q_out_head * UNIT, cos, sin,
                eps, qk_factor, NUM_QO_HEADS, HEAD_DIM, NORMALISE, INTERLEAVE, BLOCK_QO_HEADS, BLOCK_HALF,
            )  # fmt: skip
        else:
            norm_and_turn(
                k_out_ptr + token * stride_k_out_token * UNIT, x_ptr + NUM_QO_HEADS * HEAD_DIM, k_weight_ptr,
                stride_k_out_head * UNIT, cos, sin, eps, qk_factor, NUM_KEY_HEADS, HEAD_DIM, NORMALISE, INTERLEAVE,
                BLOCK_KEY_HEADS, BLOCK_HALF,
            )  # fmt: skip


def qk_norm_rope(
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    grid: Sequence[int],
    channels: Sequence[int],
    eps: float,
    base: float,
    yarn: Sequence[float],
    attention_factor: float,
    interleave: bool,
    normalise: bool,
    qk_factor: float,
    v_factor: float,
) -> None:
    """Norm over all heads and rotation of q and k, copy of v, from qkv [num_tokens, all heads * head_dim] to outputs
    [num_tokens, num_heads, head_dim]. Tokens run over grids of (frames, rows, columns), each axis with its channels.
    yarn: (factor, low, high) of `grid_frequencies`; attention_factor multiplies cos and sin."""
    if qkv.numel() == 0:
        return
    check_output_dtype(q_out)
    outs = (q_out, k_out, v_out)
    unit = alignment(*outs, qkv)
    head_dim = q_out.shape[2]
    factor, low, high = yarn
    freqs = grid_frequencies(tuple(channels), base, (factor, low, high), qkv.device)
    blocks = [triton.next_power_of_2(x.shape[1]) for x in outs]
    block_dim = 2 * triton.next_power_of_2(head_dim // 2)
    qk_norm_rope_kernel[(3 * qkv.shape[0],)](
        *outs, qkv, q_weight, k_weight, freqs, *(s for x in outs for s in strides(x, unit)), qkv.stride(0) // unit,
        *grid, eps, attention_factor, qk_factor, v_factor,
        NUM_QO_HEADS=q_out.shape[1], NUM_KEY_HEADS=k_out.shape[1], NUM_VALUE_HEADS=v_out.shape[1], HEAD_DIM=head_dim,
        FRAME_PAIRS=channels[0] // 2, ROW_PAIRS=channels[1] // 2, NORMALISE=normalise, INTERLEAVE=interleave, UNIT=unit,
        BLOCK_QO_HEADS=blocks[0], BLOCK_KEY_HEADS=blocks[1], BLOCK_VALUE_HEADS=blocks[2],
        BLOCK_HALF=block_dim // 2, BLOCK_DIM=block_dim, num_warps=min(16, max(1, max(blocks) * block_dim // 1024)),
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Heads of video models, both pairings, fp8 out."""
    for heads, head_dim, interleave, dtype in ((40, 128, True, torch.bfloat16), (12, 128, False, torch.float8_e4m3fn)):
        outs = [torch.empty(4096, heads, head_dim, dtype=dtype, device="meta") for _ in range(3)]
        qkv = torch.empty(4096, 3 * heads * head_dim, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(heads * head_dim, dtype=torch.bfloat16, device="meta")
        channels = [head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6)]
        how = ([4, 32, 32], channels, 1e-6, 1e4, [4.0, 2.0, 8.0], 1.1, interleave, True, 1.0, 1.0)
        launch = partial(qk_norm_rope, *outs, qkv, weight, weight, *how)
        capability = 80 if dtype == torch.bfloat16 else 90
        yield recorded(f"qk_norm_rope {heads} {dtype}", qk_norm_rope_kernel, launch, min_capability=capability)
