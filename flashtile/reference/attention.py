"""The definition of attention: one request and one head at a time, in the dtype of the inputs (pass fp32 or fp64)."""

import math

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Attention of one request.

    Args:
        q: [qo_len, num_qo_heads, head_dim_qk].
        k, v: [kv_len, num_kv_heads, head_dim_qk], [kv_len, num_kv_heads, head_dim_vo].
        sm_scale: factor on q.k; default head_dim_qk ** -0.5.
        causal: key j is visible to row i iff j <= i + kv_len - qo_len.
        window_left: key j is visible iff j >= i + kv_len - qo_len - window_left; -1: off.
        logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c).
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
    visible = torch.ones(qo_len, kv_len, dtype=torch.bool)
    if causal:
        visible &= key <= position
    if window_left >= 0:
        visible &= key >= position - window_left
    visible = visible.to(q.device)
    for h in range(num_qo_heads):
        g = h // (num_qo_heads // num_kv_heads)
        logits = (q[:, h] @ k[:, g].T) * scale
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
