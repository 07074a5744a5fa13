"""Online softmax (arXiv:1805.02867) in log2 units, and the (out, lse) state that all partial results share."""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_step(s, m, l, acc, MASKED: tl.constexpr):
    """Fold logits s [BLOCK_M, BLOCK_N], in log2 units, into the running m, l [BLOCK_M] and acc [BLOCK_M, BLOCK_DV].

    MASKED: s may hold -inf, so that a row may have seen no key yet.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    m_ref = m_new
    if MASKED:
        m_ref = tl.where(m_new == NEG_INF, 0.0, m_new)  # exp2(-inf - 0) = 0, where -inf - -inf would be NaN
    p = tl.exp2(s - m_ref[:, None])
    alpha = tl.exp2(m - m_ref)
    return p, m_new, l * alpha + tl.sum(p, 1), acc * alpha[:, None]


@triton.jit
def add_sink(m, l, acc, sink):
    """Let one more logit per row, sink [BLOCK_M] in log2 units, join the maximum and the sum; it has no value."""
    m_new = tl.maximum(m, sink)
    m_ref = tl.where(m_new == NEG_INF, 0.0, m_new)
    alpha = tl.exp2(m - m_ref)
    return m_new, l * alpha + tl.exp2(sink - m_ref), acc * alpha[:, None]


@triton.jit
def finish(m, l, acc):
    """(out, lse) of a state: out [BLOCK_M, BLOCK_DV]; lse [BLOCK_M], base 2. A row that saw no key: out 0, lse -inf."""
    empty = l == 0.0
    out = acc * tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l))[:, None]
    return out, tl.where(empty, NEG_INF, m + tl.log2(tl.where(empty, 1.0, l)))
