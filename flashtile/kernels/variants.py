"""What happens to a logit: one small function per variant, passed to the mainloop."""

import triton
import triton.language as tl

from flashtile.kernels.softmax import LOG2_E


@triton.jit
def plain(s, params):
    """sm_scale * q.k in log2 units; s [BLOCK_M, BLOCK_N] holds raw q.k in fp32. params: (sm_scale, soft_cap)."""
    sm_scale, _ = params
    return s * (sm_scale * LOG2_E)


@triton.jit
def soft_capped(s, params):
    """soft_cap * tanh(sm_scale * q.k / soft_cap) in log2 units."""
    sm_scale, soft_cap = params
    return (soft_cap * LOG2_E) * tanh(s * (sm_scale / soft_cap))


@triton.jit
def tanh(x):
    """tanh to about 2 ulp: 1 - 2 / (exp(2x) + 1) is exact to rounding at both ends but cancels near 0, where the series
    to x**9 takes over (its next term is below 1e-8 of x there)."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)
