"""Query-key norm and rotary embedding over a grid of patches, in PyTorch; fp32 inside."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtile.kernels.cpu.norm import normalised
from flashtile.kernels.cpu.quantization import store
from flashtile.kernels.cpu.rope import rotate
from flashtile.kernels.frequencies import grid_frequencies


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
    sizes = [x.shape[1] * x.shape[2] for x in (q_out, k_out, v_out)]
    q, k, v = (x.float() for x in qkv.split(sizes, dim=1))
    if normalise:
        q, k = normalised(q, q_weight, eps), normalised(k, k_weight, eps)
    token = torch.arange(qkv.shape[0])
    _, rows, columns = grid
    axes = (token // (rows * columns) % grid[0], token // columns % rows, token % columns)
    repeats = torch.tensor([n // 2 for n in channels])
    positions = torch.stack(axes, dim=1).float().repeat_interleave(repeats, dim=1)  # [num_tokens, head_dim / 2]
    factor, low, high = yarn
    angles = positions * grid_frequencies(tuple(channels), base, (factor, low, high), qkv.device)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    q, k = q.view(q_out.shape).clone(), k.view(k_out.shape).clone()
    rotate(q, k, q, k, cos, sin, interleave)
    store(q_out, q, factor=qk_factor)
    store(k_out, k, factor=qk_factor)
    store(v_out, v.view(v_out.shape), factor=v_factor)
