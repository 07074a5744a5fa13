"""The definition of attention: one request and one head at a time, in the dtype of the inputs (pass fp32 or fp64)."""

import math

import torch
from torch import Tensor

from flashtile.reference.rope import rotate


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slope of each query head (arXiv:2108.12409), [num_heads] fp64: a geometric sequence from 2 ** (-8 / n) to
    2 ** -8 for the largest power of 2, n, that is not above num_heads; then every second one of that for 2 n."""
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2.0 ** (-8 * i / (2 * n)) for i in range(1, 2 * n, 2)]
    return torch.tensor(slopes[:num_heads], dtype=torch.float64)


def rotated(x: Tensor, position: Tensor, freqs: Tensor) -> Tensor:
    """x [nnz, num_heads, head_dim] turned by position [nnz] * freqs [head_dim / 2]. By definition the angles are fp32:
    the frequencies and the products are rounded; what follows is in the dtype of x."""
    angles = (position[:, None].float() * freqs.float()).double()
    return rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sm_scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    rope_freqs: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one request.

    Args:
        q: [qo_len, num_qo_heads, head_dim_qk].
        k, v: [kv_len, num_kv_heads, head_dim_qk], [kv_len, num_kv_heads, head_dim_vo].
        sm_scale: factor on q.k; default head_dim_qk ** -0.5.
        causal: key j is visible to row i iff j <= i + kv_len - qo_len.
        window_left: key j is visible iff j >= i + kv_len - qo_len - window_left; -1: off.
        logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
        rope_freqs: [head_dim_qk / 2], radians per token: q is rotated at i + kv_len - qo_len, key j at j.
        slopes: [num_qo_heads], ALiBi: slope * (j - i) is added to the scaled logit of row i and key j, before the cap.
        sinks: [num_qo_heads], one more logit per head that joins the softmax's sum and has no value.

    Returns:
        out [qo_len, num_qo_heads, head_dim_vo] and lse [qo_len, num_qo_heads], base 2. A row without a visible key
        gives out 0 and lse -inf.
    """
    qo_len, num_qo_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    out = q.new_zeros(qo_len, num_qo_heads, v.shape[-1])
    lse = q.new_full((qo_len, num_qo_heads), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    position = torch.arange(qo_len)[:, None] + kv_len - qo_len
    key = torch.arange(kv_len)[None, :]
    distance = key - torch.arange(qo_len)[:, None]
    if rope_freqs is not None:
        freqs = rope_freqs.to(q.device)
        q = rotated(q, position[:, 0].to(q.device), freqs)
        k = rotated(k, key[0].to(q.device), freqs)
    visible = torch.ones(qo_len, kv_len, dtype=torch.bool)
    if causal:
        visible &= key <= position
    if window_left >= 0:
        visible &= key >= position - window_left
    visible = visible.to(q.device)
    for h in range(num_qo_heads):
        g = h // (num_qo_heads // num_kv_heads)
        logits = (q[:, h] @ k[:, g].T) * scale
        if slopes is not None:
            logits = logits + slopes[h].to(logits) * distance.to(logits)
        if logits_soft_cap > 0:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        logits = logits.masked_fill(~visible, -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[h].to(logits).expand(qo_len, 1)], dim=1)
        row_lse = torch.logsumexp(logits.to(lse.dtype), dim=1)
        some = row_lse > -math.inf
        p = torch.softmax(logits[some], dim=1)[:, :kv_len]
        out[some, h] = p @ v[:, g]
        lse[:, h] = row_lse / math.log(2)
    return out, lse
