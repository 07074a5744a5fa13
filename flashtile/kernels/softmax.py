"""Online softmax (arXiv:1805.02867) in log2 units, and the (out, lse) state that all partial results share."""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_step(s, m, MASKED: tl.constexpr):
    """Probabilities p of the logits s [BLOCK_M, BLOCK_N], in log2 units, relative to the new running maximum; that
    maximum [BLOCK_M]; and alpha [BLOCK_M], which brings what was summed relative to m to the new one. Dimensions in
    front are
    kept.

    MASKED: s may hold -inf, so that a row may have seen no key yet.
    """
    m_new = tl.maximum(m, tl.max(s, -1))
    m_ref = m_new
    if MASKED:
        m_ref = tl.where(m_new == NEG_INF, 0.0, m_new)  # exp2(-inf - 0) = 0, where -inf - -inf would be NaN
    return tl.exp2(s - tl.expand_dims(m_ref, -1)), m_new, tl.exp2(m - m_ref)


@triton.jit
def add_sink(m, l, sink):
    """Let one more logit per row, sink [BLOCK_M] in log2 units, join the maximum and the sum; it has no value.

    Returns the new m and l, and alpha as of softmax_step.
    """
    m_new = tl.maximum(m, sink)
    m_ref = tl.where(m_new == NEG_INF, 0.0, m_new)
    alpha = tl.exp2(m - m_ref)
    return m_new, l * alpha + tl.exp2(sink - m_ref), alpha


@triton.jit
def finish(m, l):
    """Of a state (m, l, acc): the factor on acc that gives out, and lse, base 2; [BLOCK_M] both. For a row that saw no
    key they are 0 and -inf."""
    empty = l == 0.0
    safe = tl.where(empty, 1.0, l)
    return tl.where(empty, 0.0, 1.0 / safe), tl.where(empty, NEG_INF, m + tl.log2(safe))
