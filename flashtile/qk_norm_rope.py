"""Query-key norm and rotary embedding over a grid of patches (video models), fused with the copy of the values.
Defined by reference/norm.py and reference/rope.py. fp32 inside, rounded once. Inference only: no gradients."""

import math

import torch
from torch import Tensor

from flashtile import checks, library

_qk_norm_rope = library.launcher(
    "qk_norm_rope",
    "qk_norm_rope(Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!) v_out, Tensor qkv, Tensor q_weight, Tensor k_weight,"
    " int[] grid, int[] channels, float eps, float base, float[] yarn, float attention_factor, bool interleave,"
    " bool normalise, float qk_factor, float v_factor) -> ()",
)


def fused_qk_rmsnorm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    ppf: int,
    pph: int,
    ppw: int,
    num_frame_channels: int,
    num_height_channels: int,
    num_width_channels: int,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float = 1e-6,
    base: float = 10000.0,
    interleave: bool = True,
    factor: float = 1.0,
    low: float = 0.0,
    high: float = 0.0,
    attention_factor: float = 1.0,
    is_qk_norm: bool = True,
    output_fp8: bool = False,
    output_quant_scale: float = 1.0,
    v_quant_scale: float = 1.0,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of q and of k over all their heads, rotation by the patch a token stands for, and a copy of v.

    Tokens run over frames, then rows, then columns of patches. A head's leading num_frame_channels turn with the frame,
    the next num_height_channels with the row, the rest with the column; pair i of an axis of c channels turns by
    base^(-2 i / c) radians per patch, if YaRN (arXiv:2309.00071) does not slow it.

    Args:
        qkv: [batch_size, seq_len, (num_heads_q + num_heads_k + num_heads_v) * head_dim] with seq_len = ppf * pph * ppw,
            or [num_tokens, ...] with whole grids of tokens; fp16, bf16 or fp32; contiguous.
        q_weight: [num_heads_q * head_dim], k_weight: [num_heads_k * head_dim]; fp16, bf16 or fp32.
        ppf, pph, ppw: frames, rows and columns of patches.
        num_frame_channels, num_height_channels, num_width_channels: even; head_dim together.
        eps: added to the mean square.
        interleave: pairs are (2 i, 2 i + 1); False: (i, i + head_dim / 2), in the same order of axes.
        factor, low, high: YaRN. Of each axis, pairs i <= low keep their frequency, those from high on turn factor times
            slower, and between the two frequencies are mixed linearly in i; low = high is a step. factor=1: off.
        attention_factor: YaRN's factor on cos and sin, so on q and on k; 1 with factor=1.
        is_qk_norm: False: rotation only.
        output_fp8: outputs are float8_e4m3fn: q and k divided by output_quant_scale, v by v_quant_scale, values too
            large becoming the largest.
        q_out, k_out, v_out: where to write. Default: new tensors of qkv's dtype, or float8_e4m3fn.

    Returns:
        q, k and v, each [batch_size, seq_len, num_heads, head_dim], or [num_tokens, num_heads, head_dim].

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; a base or factor that is not positive; low above
            high; attention_factor without YaRN; a scale without output_fp8.
        NotImplementedError: output_fp8 on a GPU older than compute capability 8.9.
    """
    for name, x in (("base", base), ("factor", factor), ("attention_factor", attention_factor)):
        if not 0 < x < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {x}")
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"low, high: expected numbers of pairs with low <= high, got {low} and {high}")
    if factor == 1.0 and attention_factor != 1.0:
        raise ValueError(f"attention_factor: expected 1.0 with factor=1.0 (no YaRN), got {attention_factor}")
    if not output_fp8 and (output_quant_scale != 1.0 or v_quant_scale != 1.0):
        raise ValueError("output_quant_scale, v_quant_scale: expected output_fp8=True to go with them")
    heads, channels = (
        (num_heads_q, num_heads_k, num_heads_v),
        (num_frame_channels, num_height_channels, num_width_channels),
    )
    _check_input(qkv, sum(heads) * head_dim, (ppf, pph, ppw))
    if sum(channels) != head_dim or any(n % 2 or n < 0 for n in channels):
        raise ValueError(
            f"num_frame_channels, num_height_channels, num_width_channels: expected even numbers with the sum "
            f"head_dim = {head_dim}, got {channels}"
        )
    for name, weight, num_heads in (("q_weight", q_weight, num_heads_q), ("k_weight", k_weight, num_heads_k)):
        checks.check_shape(name, weight, (num_heads * head_dim,))
        checks.check_dtype(name, weight, checks.FLOAT_DTYPES)
        checks.check_inner_contiguous(name, weight)
        checks.check_device(name, weight, qkv.device)
    dtype = torch.float8_e4m3fn if output_fp8 else qkv.dtype
    outs = [
        _output(name, out, (*qkv.shape[:-1], num_heads, head_dim), dtype, qkv.device)
        for name, out, num_heads in zip(("q_out", "k_out", "v_out"), (q_out, k_out, v_out), heads, strict=True)
    ]
    by_token = [out.view(-1, *out.shape[-2:]) for out in outs]
    rows = qkv.view(-1, qkv.shape[-1])
    _qk_norm_rope(
        *by_token, rows, q_weight, k_weight, (ppf, pph, ppw), channels, eps, base, (factor, low, high),
        attention_factor, interleave, is_qk_norm, 1.0 / output_quant_scale, 1.0 / v_quant_scale,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


def _check_input(qkv: Tensor, width: int, grid: tuple[int, int, int]) -> None:
    checks.check_tensor("qkv", qkv)
    tokens = grid[0] * grid[1] * grid[2]
    if qkv.dim() == 3:
        checks.check_shape("qkv", qkv, ("batch_size", tokens, width))
    else:
        checks.check_shape("qkv", qkv, ("num_tokens", width))
    if tokens < 1 or qkv.shape[-2] % tokens:
        raise ValueError(f"qkv: expected whole grids of ppf * pph * ppw = {tokens} tokens, got {qkv.shape[-2]} tokens")
    checks.check_dtype("qkv", qkv, checks.FLOAT_DTYPES)
    if not qkv.is_contiguous():
        raise ValueError(f"qkv: expected a contiguous tensor, got strides {tuple(qkv.stride())}; call .contiguous()")


def _output(name: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    checks.check_shape(name, out, shape)
    checks.check_dtype(name, out, (dtype,))
    checks.check_device(name, out, device)
    if not out.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(out.stride())}")
    return out
