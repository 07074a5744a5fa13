"""What happens to a logit: one small function per variant, passed to the mainloop.

s [BLOCK_M, BLOCK_N] holds raw q.k in fp32; the result is in log2 units. q_pos [BLOCK_M], kv_pos [BLOCK_N]: positions in
the KV sequence. params: (sm_scale, soft_cap, slope, ahead); for ALiBi (arXiv:2108.12409) slope [BLOCK_M, 1] is that of
the row's head, and ahead is kv_len - qo_len: row i of the request is at q_pos = i + ahead.
"""

import triton
import triton.language as tl

from flashtile.kernels.softmax import LOG2_E


@triton.jit
def plain(s, q_pos, kv_pos, params):
    """sm_scale * q.k."""
    return s * (params[0] * LOG2_E)


@triton.jit
def soft_capped(s, q_pos, kv_pos, params):
    """soft_cap * tanh(sm_scale * q.k / soft_cap)."""
    sm_scale, soft_cap, _, _ = params
    return (soft_cap * LOG2_E) * tanh(s * (sm_scale / soft_cap))


@triton.jit
def alibi(s, q_pos, kv_pos, params):
    """sm_scale * q.k + slope * (kv_pos - q_pos), which is slope * ahead less than ALiBi's logit. Out does not depend on
    that; the keys that count have a small bias and keep their bits, and lse gets it at the end (lse_shift)."""
    sm_scale, _, slope, _ = params
    return s * (sm_scale * LOG2_E) + (slope * LOG2_E) * distance(q_pos, kv_pos)


@triton.jit
def alibi_soft_capped(s, q_pos, kv_pos, params):
    """The cap of sm_scale * q.k + slope * (kv_pos - i), for row i of the request."""
    sm_scale, soft_cap, slope, ahead = params
    logit = s * sm_scale + slope * distance(q_pos - ahead, kv_pos)
    return (soft_cap * LOG2_E) * tanh(logit / soft_cap)


@triton.jit
def distance(q_pos, kv_pos):
    """kv_pos - q_pos, [BLOCK_M, BLOCK_N] fp32: exact below 2**24."""
    return tl.expand_dims(kv_pos.to(tl.float32), -2) - tl.expand_dims(q_pos.to(tl.float32), -1)


@triton.jit
def lse_shift(slope, ahead):
    """What `alibi` left out of the logits of a row, in log2 units."""
    return slope * (ahead.to(tl.float32) * LOG2_E)


@triton.jit
def tanh(x):
    """tanh to about 2 ulp: 1 - 2 / (exp(2x) + 1) is exact to rounding at both ends but cancels near 0, where the series
    to x**9 takes over (its next term is below 1e-8 of x there)."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)
