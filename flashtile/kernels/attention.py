"""The portable attention family: one mainloop, launched over a plan's work list, and the merge of split tiles.

FlashAttention-2 (arXiv:2307.08691) with a work list: prefill, append and decode over ragged or paged KV differ only in
the items of the list and in the small functions of kv.py and variants.py that are passed in.
"""

from dataclasses import astuple, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashtile.config import Config, portable
from flashtile.kernels import codec, kv, rotation, variants
from flashtile.kernels.codec import query_gain, raw_unit
from flashtile.kernels.kv import load_factor, load_factors, load_group_factor, load_rows, of_head, prefetch_pages
from flashtile.kernels.rotation import load_frequencies, turn, turn_chained
from flashtile.kernels.softmax import LOG2_E, NEG_INF, add_sink, finish, softmax_step
from flashtile.kernels.variants import lse_shift
from flashtile.plan.encoding import Rope
from flashtile.plan.plan import Plan
from flashtile.plan.problem import PARTS, Problem, Workload
from flashtile.plan.scales import NO_SCALES, Factor, Scales
from flashtile.plan.worklist import ITEM_STRIDE, MERGE_STRIDE
from flashtile.testing.compile import CompileCase

ITEM = tl.constexpr(ITEM_STRIDE)
MERGE = tl.constexpr(MERGE_STRIDE)


@triton.jit
def dot(a, b, acc, PARTS_OF: tl.constexpr):
    """acc + a @ b in fp32 (in fp64 if the operands are fp32 and acc is None, or fp64); b is one of PARTS_OF parts.

    fp32 operands are multiplied in fp64: sums of TF32 products, or of fp32 ones in a row, err more than twice as much
    as PyTorch's, and fp64 is as fast as fp32 outside of TF32 on the GPUs that serve models.
    """
    if a.dtype == tl.float32:
        if PARTS_OF > 1:
            # a sum of one: Triton fits a product's layout to the 16-bit words that b came from, unless it sees none
            b = tl.sum(tl.expand_dims(b, -1), -1)
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        if acc is None:
            return product
        elif acc.dtype == tl.float64:
            return acc + product
        else:
            return acc + product.to(tl.float32)
    elif acc is None:
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def rescale_groups(
    parts, scale, zero, page, row, in_range, BIAS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    GROUP_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decoded parts of columns from FIRST on, with a scale, and perhaps a zero point, per group of GROUP_WIDTH
    columns."""
    factor = load_group_factor(scale, page, row, in_range, FIRST, WIDTH, GROUP_WIDTH, BLOCK)
    offset = tl.zeros_like(factor)
    if zero is not None:
        offset = load_group_factor(zero, page, row, in_range, FIRST, WIDTH, GROUP_WIDTH, BLOCK) - BIAS
    out = ()
    for i in tl.static_range(len(parts)):
        out = out + ((parts[i].to(tl.float32) - offset) * factor,)
    return out


@triton.jit
def turned(x):
    """The transpose of the last two dimensions."""
    if len(x.shape) == 2:
        return tl.trans(x)
    else:
        return tl.trans(x, 0, 2, 1)


@triton.jit
def split_scale(scale):
    """A scale [BLOCK_N] fp32 as mantissa * 2**power: power, 2**-power and the mantissa, fp32. The power is at least
    -100, so that sums of 2**-power are finite even where V is all zeros, and its scale with it."""
    bits = tl.maximum(scale.to(tl.int32, bitcast=True) & 0x7F800000, 27 << 23)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    return (bits >> 23).to(tl.float32) - 127.0, inverse, scale * inverse


@triton.jit
def whole(parts):
    """One tile from the parts of codec.py, the dims in order."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return tl.interleave(parts[0], parts[1])
    else:
        return tl.interleave(tl.interleave(parts[0], parts[2]), tl.interleave(parts[1], parts[3]))


@triton.jit
def less_zero(parts, zero):
    """Decoded parts [BLOCK_N, BLOCK_K] less a zero point per token [BLOCK_N], in fp32."""
    out = ()
    for i in tl.static_range(len(parts)):
        out = out + (parts[i].to(tl.float32) - tl.expand_dims(zero, -1),)
    return out


@triton.jit
def attend(
    q, q_sum, q_pos, k, v, kv_base, kv_indices_ptr, logit_params, freqs, window_left, window_right, begin, end,
    m, l, acc, shift,
    KV_ROW: tl.constexpr, COS_SIN: tl.constexpr, K_GAIN: tl.constexpr, CHAIN: tl.constexpr, LOGITS: tl.constexpr,
    K_DECODE: tl.constexpr, V_DECODE: tl.constexpr, K_FORM: tl.constexpr, V_FORM: tl.constexpr, K_BIAS: tl.constexpr,
    V_BIAS: tl.constexpr, K_OFFSET: tl.constexpr, V_OFFSET: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, K_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WAYS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold KV tokens [begin, end) into m, l [BLOCK_M] and acc, a tuple of tiles, all fp32: [BLOCK_M, BLOCK_V] for each
    part of V, or one of all its dims.

    With WAYS > 1 each warp walks the keys alone that are its part of a step: states and tiles have one more dimension,
    WAYS, in front, and no step waits for what another warp found. Below, -1 and -2 are the last dimensions in either
    case. The first WAYS / HEADS warps share the keys of one KV head, the next ones those of the next head, and so on.

    q: tuple of tiles [BLOCK_M, BLOCK_K], one per part of K; q_sum [BLOCK_M]: its sum over all dims, for the zero point;
    q_pos [BLOCK_M]: position in the KV sequence. k, v: (pointer, stride of a page, stride of a row, scale, zero point).
    freqs, COS_SIN: of rotation.py, or (), None. With them q is rotated, its tiles are those of half a row, then of the
    other, and so are those of K, which is rotated here.
    shift [BLOCK_M]: what V's zero points take from each dim of acc. Without MASKED, all rows see all of [begin, end)
    and its length is a multiple of BLOCK_N.
    """
    k_ptr, stride_kp, stride_kn, k_scale, k_zero = k
    v_ptr, stride_vp, stride_vn, v_scale, v_zero = v
    cols_k = tl.arange(0, BLOCK_K)
    cols_v = tl.arange(0, BLOCK_V)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        kv_pos = start + tl.arange(0, BLOCK_N)
        if WAYS > 1:
            kv_pos = tl.reshape(to_ways(kv_pos, 1, HEADS), [WAYS, BLOCK_N * HEADS // WAYS])
        in_range = kv_pos < end
        page, row = KV_ROW(kv_pos, in_range, kv_base, kv_indices_ptr, PAGE_SIZE, MASKED)
        k_rows = page * stride_kp + row * stride_kn
        v_rows = k_rows  # K and V are most often of one shape: half the address arithmetic
        if not ALIKE:
            v_rows = page * stride_vp + row * stride_vn

        keys = K_DECODE(load_rows(k_ptr, k_rows, cols_k, in_range, MASKED, K_WIDTH, BLOCK_K))
        PARTS_OF: tl.constexpr = len(keys)
        if K_FORM == "group":
            keys = rescale_groups(keys, k_scale, k_zero, page, row, in_range, K_BIAS, 0, K_WIDTH, K_GROUP, BLOCK_K)
        if COS_SIN is not None:
            far = K_DECODE(load_rows(k_ptr + K_WIDTH, k_rows, cols_k, in_range, MASKED, K_WIDTH, BLOCK_K))
            if K_FORM == "group":
                far = rescale_groups(
                    far, k_scale, k_zero, page, row, in_range, K_BIAS, K_WIDTH, K_WIDTH, K_GROUP, BLOCK_K
                )
            elif k_zero is not None:  # q.(R zero) would depend on the position
                zero = load_factor(k_zero, page, row, in_range, MASKED) - K_BIAS
                keys, far = less_zero(keys, zero), less_zero(far, zero)
            if CHAIN > 1 and keys[0].dtype == K_TYPE:
                keys = turn_chained(keys, far, start, freqs, COS_SIN, K_GAIN, CHAIN)
            else:
                keys = turn(keys, far, kv_pos, freqs, COS_SIN, K_GAIN)
        s = None
        if K_OFFSET > 0:  # what raw numbers add is taken off first
            s = tl.expand_dims(q_sum * (-K_OFFSET * raw_unit(PARTS_OF - 1, PARTS_OF)), -1)
            s = tl.broadcast_to(s, [BLOCK_M, BLOCK_N] if WAYS == 1 else [WAYS, BLOCK_M, BLOCK_N * HEADS // WAYS])
        s = dot(q[0], turned(keys[0].to(K_TYPE)), s, PARTS_OF)
        for i in tl.static_range(1, len(keys)):
            s = dot(q[i], turned(keys[i].to(K_TYPE)), s, PARTS_OF)
        s = s.to(tl.float32)
        FP16: tl.constexpr = q[0].dtype == tl.float16
        PAIRED: tl.constexpr = K_FORM == "token" and V_FORM == "token" and WAYS == 1 and BLOCK_N < 128 and FP16
        if PAIRED:
            k_factor, v_factor = load_factors(k_scale, v_scale, page, row, in_range, MASKED)
        elif K_FORM == "token":
            k_factor = load_factor(k_scale, page, row, in_range, MASKED)
        if K_FORM != "group":
            if k_zero is not None and COS_SIN is None:
                zero = load_factor(k_zero, page, row, in_range, MASKED) - K_BIAS
                s -= tl.expand_dims(q_sum, -1) * tl.expand_dims(zero, -2)
            if K_FORM == "token":
                s *= tl.expand_dims(k_factor, -2)
        s = LOGITS(s, q_pos, kv_pos, logit_params)  # [BLOCK_M, BLOCK_N], log2 units
        if MASKED:
            keep = tl.expand_dims(in_range, -2)
            if LEFT:
                keep &= tl.expand_dims(kv_pos, -2) >= tl.expand_dims(q_pos - window_left, -1)
            if RIGHT:
                keep &= tl.expand_dims(kv_pos, -2) <= tl.expand_dims(q_pos + window_right, -1)
            s = tl.where(keep, s, NEG_INF)

        if V_FORM == "token":
            # the scale's exponent joins the logit, so that p * scale is below 2 and fits fp16 whatever the scales are
            if not PAIRED:
                v_factor = load_factor(v_scale, page, row, in_range, MASKED)
            power, inverse, mantissa = split_scale(v_factor)
            p, m, alpha = softmax_step(s + tl.expand_dims(power, -2), m, MASKED)
            l = l * alpha + tl.sum(p * tl.expand_dims(inverse, -2), -1)
            p *= tl.expand_dims(mantissa, -2)
        else:
            p, m, alpha = softmax_step(s, m, MASKED)
            l = l * alpha + tl.sum(p, -1)
        values = V_DECODE(load_rows(v_ptr, v_rows, cols_v, in_range, MASKED, V_WIDTH, BLOCK_V))
        if V_FORM == "group":
            values = rescale_groups(values, v_scale, v_zero, page, row, in_range, V_BIAS, 0, V_WIDTH, V_GROUP, BLOCK_V)
        if len(acc) < len(values):
            values = (whole(values),)
        p = p.to(V_TYPE)
        if V_FORM != "group" and v_zero is not None:
            zero = load_factor(v_zero, page, row, in_range, MASKED) - V_BIAS
            shift = shift * alpha + tl.sum(p.to(tl.float32) * tl.expand_dims(zero, -2), -1)
        if V_OFFSET > 0:  # sums of what is multiplied, rounded as it is
            ones = tl.full([BLOCK_N, 8] if WAYS == 1 else [WAYS, BLOCK_N * HEADS // WAYS, 8], 1.0, V_TYPE)
            extra = tl.max(tl.dot(p, ones), -1) * V_OFFSET
        new = ()
        for i in tl.static_range(len(values)):
            old = acc[i] * tl.expand_dims(alpha, -1)
            if V_OFFSET > 0:
                old -= tl.expand_dims(extra * raw_unit(i, len(values)), -1)
            new = new + (dot(p, values[i].to(V_TYPE), old, len(values)),)
        acc = new
    return m, l, acc, shift


@triton.jit
def to_ways(x, HEADS: tl.constexpr, WAYS: tl.constexpr):
    """What belongs to HEADS heads, one after the other in the first dimension, for each of WAYS warps: [HEADS * n, ...]
    to [WAYS, n, ...]."""
    N: tl.constexpr = x.shape[0] // HEADS
    if len(x.shape) == 1:
        x = tl.broadcast_to(tl.reshape(x, [HEADS, 1, N]), [HEADS, WAYS // HEADS, N])
        return tl.reshape(x, [WAYS, N])
    else:
        x = tl.reshape(x, [HEADS, 1, N, x.shape[1]])
        x = tl.broadcast_to(x, [HEADS, WAYS // HEADS, N, x.shape[3]])
        return tl.reshape(x, [WAYS, N, x.shape[3]])


@triton.jit
def join_ways(m, l, acc, shift, HEADS: tl.constexpr):
    """One state per head, [HEADS * BLOCK_M, ...], from those of the warps, [WAYS, BLOCK_M, ...]."""
    T: tl.constexpr = m.shape[0] // HEADS
    M: tl.constexpr = m.shape[1]
    m = tl.reshape(m, [HEADS, T, M])
    m_all = tl.max(m, 1)
    m_ref = tl.where(m_all == NEG_INF, 0.0, m_all)
    alpha = tl.exp2(m - m_ref[:, None, :])
    out = ()
    for i in tl.static_range(len(acc)):
        tiles = tl.reshape(acc[i], [HEADS, T, M, acc[i].shape[2]]) * alpha[:, :, :, None]
        out = out + (tl.reshape(tl.sum(tiles, 1), [HEADS * M, acc[i].shape[2]]),)
    l = tl.sum(tl.reshape(l, [HEADS, T, M]) * alpha, 1)
    shift = tl.sum(tl.reshape(shift, [HEADS, T, M]) * alpha, 1)
    return tl.reshape(m_all, [HEADS * M]), tl.reshape(l, [HEADS * M]), out, tl.reshape(shift, [HEADS * M])


@triton.jit
def load_query(
    q_ptr, rows, q_pos, valid, freqs, COS_SIN: tl.constexpr, PARTS_OF: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, TYPE: tl.constexpr, RESCALED: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """The query in parts, as codec.py cuts K: tiles [BLOCK_M, BLOCK] of dims i, i + PARTS_OF ...; of half a row, then
    of the other, rotated, if there is a COS_SIN. Also its sum over all dims, and the factor [BLOCK_M] that was taken
    out of it if RESCALED: bf16 values may exceed fp16. RAW: each part is multiplied by what makes up for the units of
    raw K; the sum is not."""
    loaded = load_parts(q_ptr, rows, valid, PARTS_OF, WIDTH, BLOCK)
    if COS_SIN is not None:
        far = load_parts(q_ptr + WIDTH * PARTS_OF, rows, valid, PARTS_OF, WIDTH, BLOCK)
        loaded = turn(loaded, far, q_pos, freqs, COS_SIN, 1.0)
    unit = tl.full([rows.shape[0]], 1.0, tl.float32)
    if RESCALED:
        top = tl.zeros([rows.shape[0]], tl.float32)
        for i in tl.static_range(len(loaded)):
            top = tl.maximum(top, tl.max(tl.abs(loaded[i].to(tl.float32)), 1))
        # the largest power of 2 <= top
        power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(power == 0.0, 1.0, power)
    total = tl.zeros([rows.shape[0]], tl.float32)
    q = ()
    for i in tl.static_range(len(loaded)):
        part = loaded[i]
        if RESCALED or part.dtype != TYPE:
            part = (part.to(tl.float32) / (unit / query_gain(i, PARTS_OF, RAW))[:, None]).to(TYPE)
        total += tl.sum(part.to(tl.float32), 1) / query_gain(i, PARTS_OF, RAW)
        q = q + (part,)
    return q, total, unit


@triton.jit
def load_parts(q_ptr, rows, valid, PARTS_OF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """PARTS_OF * WIDTH dims of the query's rows in parts, tiles [BLOCK_M, BLOCK]."""
    cols = tl.arange(0, BLOCK)
    mask = valid[:, None] & (cols < WIDTH)[None, :]
    out = ()
    for i in tl.static_range(PARTS_OF):
        ptrs = q_ptr + (rows[:, None] + (cols * PARTS_OF + i)[None, :])
        out = out + (tl.load(ptrs, mask=mask, other=0.0),)
    return out


LONE = ("lone_qo_len", "lone_kv_base", "lone_kv_len", "lone_begin", "lone_end", "lone_chunk")  # fields of LoneTile


@triton.jit(do_not_specialize=LONE)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, items_ptr, kv_indices_ptr, sinks_ptr,
    table_ptr, k_scale, v_scale, k_zero, v_zero,
    stride_qn, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh, stride_on, stride_oh,
    sm_scale, out_scale, soft_cap, window_left, window_right, num_qo_heads,
    lone_qo_len, lone_kv_base, lone_kv_len, lone_begin, lone_end, lone_chunk,
    KV_ROW: tl.constexpr, COS_SIN: tl.constexpr, LOGITS: tl.constexpr, SLOPES: tl.constexpr, SHIFTED: tl.constexpr,
    K_GAIN: tl.constexpr, CHAIN: tl.constexpr, K_DECODE: tl.constexpr, V_DECODE: tl.constexpr, K_FORM: tl.constexpr,
    V_FORM: tl.constexpr, K_BIAS: tl.constexpr, V_BIAS: tl.constexpr, K_OFFSET: tl.constexpr, V_OFFSET: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, K_TYPE: tl.constexpr, V_TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ALIKE: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SINKS: tl.constexpr, D_VO: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr,
    V_TILES: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WAYS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
    ONE_LOOP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One CTA per (item, HEADS head groups); without items_ptr the items are the chunks of a LoneTile.

    lse [nnz_qo, num_qo_heads]; partial states [slot, head group, BLOCK_M (, D_VO)]. With HEADS > 1, a head group is all
    heads of a KV head.

    A row of K (half a row, if there is a COS_SIN) is K_WIDTH elements of k_ptr, each with K_PARTS values. table_ptr:
    the frequencies for COS_SIN, or with SLOPES a slope per query head. SHIFTED: LOGITS leaves lse_shift to be added.
    k_scale ... v_zero: (pointer, strides of a page, a row and a head, for "group" also a group), or (pointer, stride of
    a head) for "head"; None if there is none.
    """
    if items_ptr is None:
        q_begin, row_begin = 0, 0
        qo_len, kv_base, kv_len = lone_qo_len, lone_kv_base, lone_kv_len
        begin = lone_begin + tl.program_id(1) * lone_chunk
        end = tl.minimum(begin + lone_chunk, lone_end)
        slot = tl.where(tl.num_programs(1) > 1, tl.program_id(1), -1)
        head_group = tl.program_id(0) * HEADS
    else:
        item = items_ptr + tl.program_id(1).to(tl.int64) * ITEM
        q_begin = tl.load(item + 1)
        qo_len = tl.load(item + 2)
        row_begin = tl.load(item + 3)
        kv_base = tl.load(item + 4)
        kv_len = tl.load(item + 5)
        begin = tl.load(item + 6)
        end = tl.load(item + 7)
        slot = tl.load(item + 8)
        head_group = (tl.load(item + 9) + tl.program_id(0)) * HEADS
    kv_head = (head_group * PACK // GROUP).to(tl.int64)

    r = tl.arange(0, HEADS * BLOCK_M)
    rows = row_begin + r % BLOCK_M  # packed rows: (token, head of the group)
    token = rows // PACK
    head = (head_group + r // BLOCK_M) * PACK + rows % PACK
    valid = token < qo_len
    q_row = (q_begin + token).to(tl.int64)
    q_pos = token + kv_len - qo_len
    freqs = ()
    if CHAIN > 1 and PAGE_SIZE > 0:  # while the query is waited for and turned: 1 x 16k tokens 34.0 -> 33.6 us
        prefetch_pages(kv_base, kv_indices_ptr, begin, tl.minimum(begin + BLOCK_N, end), PAGE_SIZE)
    if COS_SIN is not None:
        freqs = load_frequencies(table_ptr, K_PARTS, K_WIDTH, BLOCK_K)
    RESCALED: tl.constexpr = K_OFFSET > 0 or (q_ptr.dtype.element_ty == tl.bfloat16 and tl.float16 == K_TYPE)
    q, q_sum, q_unit = load_query(
        q_ptr, q_row * stride_qn + head.to(tl.int64) * stride_qh, q_pos, valid, freqs, COS_SIN, K_PARTS, K_WIDTH,
        BLOCK_K, K_TYPE, RESCALED, K_OFFSET > 0,
    )  # fmt: skip

    # [begin, left) and [right, end) hold keys that some rows must not see, [left, right) is visible to all
    left = begin
    if LEFT:
        last = tl.minimum((row_begin + BLOCK_M - 1) // PACK, qo_len - 1) + kv_len - qo_len
        left = begin + tl.cdiv(tl.maximum(last - window_left - begin, 0), BLOCK_N) * BLOCK_N
        left = tl.minimum(left, end)
    right = end
    if RIGHT:
        first = row_begin // PACK + kv_len - qo_len
        right = tl.minimum(end, first + window_right + 1)
    right = tl.maximum(begin + tl.maximum(right - begin, 0) // BLOCK_N * BLOCK_N, left)

    row_head = kv_head  # of a packed row
    way_head = kv_head  # of a warp, with WAYS > 1
    k_head = k_ptr + kv_head * stride_kh
    v_head = v_ptr + kv_head * stride_vh
    if HEADS > 1:
        row_head += r // BLOCK_M
        way_head += (tl.arange(0, WAYS) // (WAYS // HEADS))[:, None]
        k_head = k_ptr + way_head[:, :, None] * stride_kh
        v_head = v_ptr + way_head[:, :, None] * stride_vh
    if K_FORM == "head":
        sm_scale *= tl.load(k_scale[0] + row_head * k_scale[1]).to(tl.float32)
    elif K_FORM != "none":
        k_scale = of_head(k_scale, way_head)
    if V_FORM == "head":
        out_scale *= tl.load(v_scale[0] + row_head * v_scale[1]).to(tl.float32)
    elif V_FORM != "none":
        v_scale = of_head(v_scale, way_head)
    if k_zero is not None:
        k_zero = of_head(k_zero, way_head)
    if v_zero is not None:
        v_zero = of_head(v_zero, way_head)

    if RESCALED:
        if K_OFFSET > 0:
            q_unit /= raw_unit(K_PARTS - 1, K_PARTS)
        sm_scale *= q_unit
        if WAYS > 1:
            sm_scale = to_ways(sm_scale, HEADS, WAYS)
        sm_scale = tl.expand_dims(sm_scale, -1)
    elif K_FORM == "head" and HEADS > 1:
        sm_scale = tl.expand_dims(to_ways(sm_scale, HEADS, WAYS), -1)
    sm_scale /= K_GAIN
    slope, way_slope, ahead = 0.0, 0.0, kv_len - qo_len
    if SLOPES:
        slope = tl.load(table_ptr + head, mask=valid, other=0.0)
        way_slope = tl.expand_dims(to_ways(slope, HEADS, WAYS) if WAYS > 1 else slope, -1)
    logit_params = (sm_scale, soft_cap, way_slope, ahead)

    l = tl.zeros([BLOCK_M] if WAYS == 1 else [WAYS, BLOCK_M], tl.float32)
    m = l + NEG_INF
    shift = l
    acc = ()
    TILE: tl.constexpr = BLOCK_V * V_PARTS // V_TILES
    for _ in tl.static_range(V_TILES):
        acc = acc + (tl.zeros([BLOCK_M, TILE] if WAYS == 1 else [WAYS, BLOCK_M, TILE], tl.float32),)
    if WAYS > 1:
        each = ()
        for i in tl.static_range(len(q)):
            each = each + (to_ways(q[i], HEADS, WAYS),)
        q = each
        q_sum = to_ways(q_sum, HEADS, WAYS)
        q_pos = to_ways(q_pos, HEADS, WAYS)
    k = (k_head, stride_kp, stride_kn, k_scale, k_zero)
    v = (v_head, stride_vp, stride_vn, v_scale, v_zero)
    if ONE_LOOP:
        m, l, acc, shift = attend(
            q, q_sum, q_pos, k, v, kv_base, kv_indices_ptr, logit_params, freqs, window_left, window_right, begin, end,
            m, l, acc, shift, KV_ROW, COS_SIN, K_GAIN, CHAIN, LOGITS, K_DECODE, V_DECODE, K_FORM, V_FORM, K_BIAS,
            V_BIAS, K_OFFSET, V_OFFSET, K_GROUP, V_GROUP, K_TYPE, V_TYPE, PAGE_SIZE, ALIKE, True, LEFT, RIGHT,
            K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_M, BLOCK_N, WAYS, HEADS, STAGES)  # fmt: skip
    else:
        if LEFT:
            m, l, acc, shift = attend(
                q, q_sum, q_pos, k, v, kv_base, kv_indices_ptr, logit_params, freqs, window_left, window_right,
                begin, left, m, l, acc, shift, KV_ROW, COS_SIN, K_GAIN, CHAIN, LOGITS, K_DECODE, V_DECODE, K_FORM,
                V_FORM, K_BIAS, V_BIAS, K_OFFSET, V_OFFSET, K_GROUP, V_GROUP, K_TYPE, V_TYPE, PAGE_SIZE, ALIKE, True,
                LEFT, RIGHT, K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_M, BLOCK_N, WAYS, HEADS, 1)  # fmt: skip
        m, l, acc, shift = attend(
            q, q_sum, q_pos, k, v, kv_base, kv_indices_ptr, logit_params, freqs, window_left, window_right, left, right,
            m, l, acc, shift, KV_ROW, COS_SIN, K_GAIN, CHAIN, LOGITS, K_DECODE, V_DECODE, K_FORM, V_FORM, K_BIAS,
            V_BIAS, K_OFFSET, V_OFFSET, K_GROUP, V_GROUP, K_TYPE, V_TYPE, PAGE_SIZE, ALIKE, False, LEFT, RIGHT,
            K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_M, BLOCK_N, WAYS, HEADS, STAGES)  # fmt: skip
        m, l, acc, shift = attend(
            q, q_sum, q_pos, k, v, kv_base, kv_indices_ptr, logit_params, freqs, window_left, window_right, right, end,
            m, l, acc, shift, KV_ROW, COS_SIN, K_GAIN, CHAIN, LOGITS, K_DECODE, V_DECODE, K_FORM, V_FORM, K_BIAS,
            V_BIAS, K_OFFSET, V_OFFSET, K_GROUP, V_GROUP, K_TYPE, V_TYPE, PAGE_SIZE, ALIKE, True, LEFT, RIGHT,
            K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_M, BLOCK_N, WAYS, HEADS, 1)  # fmt: skip

    if WAYS > 1:
        m, l, acc, shift = join_ways(m, l, acc, shift, HEADS)
    if OVERLAP:
        gdc_launch_dependents()  # the merge may start; it waits for this grid's stores
    offs_dv = tl.arange(0, BLOCK_V * V_PARTS)
    gain = tl.full([HEADS * BLOCK_M], 1.0, tl.float32) * out_scale
    if SHIFTED:
        m += tl.where(slot < 0, lse_shift(slope, ahead), 0.0)
    if SINKS:  # once per row, as the shift of lse: of a split tile, the merge adds them
        m, l, alpha = add_sink(m, l, tl.load(sinks_ptr + head, mask=valid & (slot < 0), other=NEG_INF) * LOG2_E)
        gain *= alpha
    factor, lse = finish(m, l)
    if V_OFFSET > 0:
        parts = ()
        for i in tl.static_range(V_PARTS):
            parts = parts + (acc[i] * (1 / raw_unit(i, V_PARTS)),)
        acc = parts
    out = whole(acc)
    if V_FORM != "group" and v_zero is not None:
        out -= shift[:, None]
    out *= (factor * gain)[:, None]
    stored = valid[:, None] & (offs_dv < D_VO)[None, :]
    if slot >= 0:
        base = (slot.to(tl.int64) * tl.num_programs(0) * HEADS + head_group) * BLOCK_M + r
        tl.store(partial_ptr + base[:, None] * D_VO + offs_dv[None, :], out, mask=stored)
        tl.store(partial_lse_ptr + base, lse, mask=valid)
    else:
        out_ptrs = out_ptr + (q_row * stride_on + head.to(tl.int64) * stride_oh)[:, None] + offs_dv[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=stored)
        tl.store(lse_ptr + q_row * num_qo_heads + head, lse, mask=valid)


@triton.jit(do_not_specialize=["lone_qo_len", "lone_kv_len", "lone_slots"])
def merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, merges_ptr, sinks_ptr, slopes_ptr, stride_on, stride_oh,
    num_qo_heads, ROWS, lone_qo_len, lone_kv_len, lone_slots,
    PACK: tl.constexpr, SINKS: tl.constexpr, SHIFTED: tl.constexpr, D_VO: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One CTA per (BLOCK_R packed rows of a split tile, head group): joins the partial states of the rows' KV chunks.
    Without merges_ptr, the tile is a LoneTile.

    ROWS: packed rows of the tallest tile, at most BLOCK_M.
    """
    blocks = tl.cdiv(ROWS, BLOCK_R)
    r = tl.program_id(1) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    if merges_ptr is None:
        q_begin, row, qo_len, kv_len, num_slots = 0, r, lone_qo_len, lone_kv_len, lone_slots
        slot_begin = tl.full((), 0, tl.int64)
    else:
        merge = merges_ptr + (tl.program_id(1) // blocks).to(tl.int64) * MERGE
        q_begin = tl.load(merge)
        qo_len = tl.load(merge + 1)
        row = tl.load(merge + 2) + r
        slot_begin = tl.load(merge + 3).to(tl.int64)
        num_slots = tl.load(merge + 4)
        kv_len = tl.load(merge + 5)
    head_group = tl.program_id(0)
    token = row // PACK
    head = head_group * PACK + row % PACK
    valid = (r < ROWS) & (token < qo_len)
    offs_dv = tl.arange(0, BLOCK_DV)
    m = tl.full([BLOCK_R], NEG_INF, tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    if OVERLAP:
        gdc_wait()
    for s in range(0, num_slots, BLOCK_S):
        i = s + tl.arange(0, BLOCK_S)
        base = ((slot_begin + i) * tl.num_programs(0) + head_group)[None, :] * BLOCK_M + r[:, None]
        some = (i < num_slots)[None, :] & valid[:, None]
        lse = tl.load(partial_lse_ptr + base, mask=some, other=NEG_INF)
        out = tl.load(partial_ptr + base[:, :, None] * D_VO + offs_dv[None, None, :],
                      mask=some[:, :, None] & (offs_dv < D_VO)[None, None, :], other=0.0)  # fmt: skip
        out = tl.where((lse > NEG_INF)[:, :, None], out, 0.0)
        p, m, alpha = softmax_step(lse, m, True)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * out, 1)
    if SHIFTED:
        m += lse_shift(tl.load(slopes_ptr + head, mask=valid, other=0.0), kv_len - qo_len)
    if SINKS:
        m, l, alpha = add_sink(m, l, tl.load(sinks_ptr + head, mask=valid, other=0.0) * LOG2_E)
        acc *= alpha[:, None]
    factor, lse = finish(m, l)
    out = acc * factor[:, None]
    q_row = (q_begin + token).to(tl.int64)
    out_rows = out_ptr + q_row * stride_on + head.to(tl.int64) * stride_oh
    tl.store(out_rows[:, None] + offs_dv[None, :], out.to(out_ptr.dtype.element_ty),
             mask=valid[:, None] & (offs_dv < D_VO)[None, :])  # fmt: skip
    tl.store(lse_ptr + q_row * num_qo_heads + head, lse, mask=valid)


MERGE_ELEMENTS = 8192  # fp32 values of partial states that a CTA of the merge reads at once
MANY_CTAS = 1024  # from here on a CTA takes several rows


def launch_merge(
    plan: Plan, out: torch.Tensor, lse: torch.Tensor, workspace: torch.Tensor, sinks: torch.Tensor | None
) -> None:
    """Join the partial states that any family left in the workspace."""
    p, c, lone = plan.problem, plan.config, plan.lone
    partial, partial_lse = plan.partials(workspace)
    block_dv = triton.next_power_of_2(p.head_dim_vo)
    rows = min(c.block_m, plan.work.max_qo_len * c.pack)
    groups = p.num_qo_heads // c.pack
    block_s = min(triton.next_power_of_2(plan.max_slots), max(4, MERGE_ELEMENTS // block_dv))
    block_r = 1 if groups * plan.num_merges * rows < MANY_CTAS else max(MERGE_ELEMENTS // (block_dv * block_s), 1)
    block_r = min(block_r, triton.next_power_of_2(rows))
    merge_kernel[(groups, plan.num_merges * triton.cdiv(rows, block_r))](
        partial, partial_lse, out, lse, None if lone else plan.merges, sinks if sinks is not None else lse, plan.table,
        out.stride(0), out.stride(1), p.num_qo_heads, rows, *((lone.qo_len, lone.kv_len) if lone else (0, 0)),
        plan.num_slots, PACK=c.pack, SINKS=sinks is not None, SHIFTED=p.alibi_shift, D_VO=p.head_dim_vo,
        BLOCK_DV=block_dv, BLOCK_M=c.block_m, BLOCK_S=block_s, BLOCK_R=block_r, OVERLAP=c.overlap,
        num_warps=4, launch_pdl=c.overlap,
    )  # fmt: skip


def run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor,
    sm_scale: float,
    sinks: torch.Tensor | None,
    scales: Scales | None = None,
) -> None:
    """Launch the portable family: q [nnz_qo, num_qo_heads, head_dim_qk]; k, v as NHD, paged [pages, page_size, heads,
    dim] or ragged [nnz_kv, heads, dim]; out and lse are written. Partial states go to the workspace and are merged."""
    p = plan.problem
    c = suited(plan.config, scales or NO_SCALES)
    scales = fit_scales(scales, c) if scales else NO_SCALES
    partial, partial_lse = plan.partials(workspace)
    k, v = words(k, p.k_format), words(v, p.v_format)
    k_strides = k.stride()[:-1] if p.paged else (0, *k.stride()[:-1])
    v_strides = v.stride()[:-1] if p.paged else (0, *v.stride()[:-1])
    if plan.num_items:
        attention_kernel[(p.num_qo_heads // c.pack // c.heads, plan.num_items)](
            q, k, v, out, lse, partial, partial_lse, None if plan.lone else plan.items, plan.kv_indices,
            sinks if sinks is not None else lse, plan.table,
            *(factor_argument(f, p) for f in (scales.k, scales.v, scales.k_zero, scales.v_zero)),
            q.stride(0), q.stride(1), *k_strides, *v_strides, out.stride(0), out.stride(1),
            sm_scale, scales.out, p.logits_soft_cap, p.window_left, p.window_right, p.num_qo_heads,
            *(astuple(plan.lone) if plan.lone else (0,) * len(LONE)),
            **constexprs(p, c, sinks is not None, k_strides == v_strides, scales),
            num_warps=c.num_warps, num_stages=c.num_stages, maxnreg=c.max_registers,
        )  # fmt: skip
    if plan.num_merges:
        launch_merge(plan, out, lse, workspace, sinks)


def suited(c: Config, scales: Scales) -> Config:
    """The plan's configuration, or one with the same items and partial states that suits the scales better.

    Scales in groups take registers that one or two warps do not have. Scales of 2 bytes are not copied ahead
    (cp.async takes 4 at least), so that steps of one warp are best: int4, 64 x 4k tokens 120 us, 148 by two heads.
    Where many tokens' scales are not read, two warps are best: int8, 256 x 1k tokens 193 us, 195 by one.
    """
    factors = scales.factors()
    if c.chained and c.block_n == 128 and (scales.k_zero or any(factor.form == "group" for factor in factors)):
        # keys less a zero point, or times a scale, are fp32 and not turned in chains: four warps would spill
        c = replace(c, num_warps=8) if c.ctas_per_sm == 1 else replace(c, block_n=32, max_registers=168)
    each = [factor for factor in factors if factor.form != "head"]
    if scales.k_zero and c.max_registers == 192:
        c = replace(c, max_registers=200)  # for 10 CTAs an SM all the same; 8 bytes would be spilled
    if any(factor.form == "group" for factor in factors):
        if c.num_warps > 2 and c.heads == 1:
            return replace(c, num_stages=min(c.num_stages, 5), max_registers=255) if c.block_m == 16 else c
        return replace(c, heads=1, ways=1, raw=False, num_warps=4, block_n=64, num_stages=3, max_registers=None)
    if c.num_warps <= 2 and c.ctas_per_sm > 1 and any(factor.values.itemsize < 4 for factor in each):
        return replace(c, heads=1, ways=1, num_warps=1, block_n=32, num_stages=5, max_registers=None)
    if c.num_warps == 1 and c.num_stages == 6 and not each:  # config.py's row for int8 and many tiles
        return replace(c, num_warps=2, block_n=32, num_stages=3, max_registers=128)
    if c.num_warps == 2 and c.max_registers == 128 and each:
        return replace(c, block_n=64, max_registers=None)
    return c


def fit_scales(scales: Scales, c: Config) -> Scales:
    """Scales in the forms that suit a tile. Where many rows share K and V, these are multiplied by a scale per token;
    folded into logits and probabilities, of which a thread holds many columns, it would take too many registers."""
    if c.block_m <= 16:
        return scales

    def spread(scale: Factor | None, zero: Factor | None) -> tuple[Factor | None, Factor | None]:
        if scale is None or scale.form != "token":
            return scale, zero
        return Factor("group", scale.values[..., None]), zero and Factor("group", zero.values[..., None])

    (k, k_zero), (v, v_zero) = spread(scales.k, scales.k_zero), spread(scales.v, scales.v_zero)
    return Scales(k, v, k_zero, v_zero, scales.out)


def words(x: torch.Tensor, kv_format: str) -> torch.Tensor:
    """A cache as the kernel reads it: narrow formats as 16-bit words."""
    return x if PARTS[kv_format] == 1 else x.view(torch.int16)


def factor_argument(factor: Factor | None, p: Problem) -> tuple[Any, ...] | None:
    """A scale or zero point as the kernel takes it."""
    if factor is None:
        return None
    if factor.form == "head":
        return (factor.values, factor.values.stride(0))
    strides = factor.values.stride()
    return (factor.values, *(strides if p.paged else (0, *strides)))


def constexprs(
    p: Problem, c: Config, has_sinks: bool, alike: bool = True, scales: Scales = NO_SCALES
) -> dict[str, object]:
    """What the mainloop is specialised on; alike: K and V have the same strides."""
    k_parts, v_parts = PARTS[p.k_format], PARTS[p.v_format]
    exact = p.q_dtype == torch.float32
    logits = {
        (False, False): variants.plain,
        (False, True): variants.soft_capped,
        (True, False): variants.alibi,
        (True, True): variants.alibi_soft_capped,
    }
    block_k, block_v, v_tiles = tile_widths(p, c)
    k_type, v_type = product_type(p.q_dtype, p.k_format, scales.k), product_type(p.q_dtype, p.v_format, scales.v)
    k_raw = c.raw and p.k_format in codec.OFFSET and k_type == tl.float16 and reads_raw(scales.k, scales.k_zero)
    v_raw = c.raw and p.v_format in codec.OFFSET and v_type == tl.float16 and reads_raw(scales.v, scales.v_zero)
    k_raw = k_raw and p.rope is None  # pairs are turned as numbers
    v_raw = v_raw and v_tiles == v_parts
    return {
        "KV_ROW": kv.paged_row if p.paged else kv.contiguous_row,
        "COS_SIN": rotation.cos_sin_for(exact) if p.rope else None,
        "LOGITS": logits[p.alibi, p.logits_soft_cap > 0],
        "SLOPES": p.alibi,
        "SHIFTED": p.alibi_shift,
        "K_GAIN": rotation.key_gain(p.k_format, exact) if p.rope else 1.0,
        "CHAIN": chain_length(p, c, block_k),
        "K_DECODE": codec.decoder(p.k_format, c.has_e4m3, k_raw),
        "V_DECODE": codec.decoder(p.v_format, c.has_e4m3, v_raw),
        "K_FORM": scales.k.form if scales.k else "none",
        "V_FORM": scales.v.form if scales.v else "none",
        "K_BIAS": codec.BIAS[p.k_format],
        "V_BIAS": codec.BIAS[p.v_format],
        "K_OFFSET": codec.OFFSET[p.k_format] if k_raw else 0.0,
        "V_OFFSET": codec.OFFSET[p.v_format] if v_raw else 0.0,
        "K_GROUP": group_width(scales.k, p.head_dim_qk, k_parts, block_k),
        "V_GROUP": group_width(scales.v, p.head_dim_vo, v_parts, block_v),
        "K_TYPE": k_type,
        "V_TYPE": v_type,
        "PAGE_SIZE": p.page_size,
        "ALIKE": alike,
        "GROUP": p.group_size,
        "PACK": c.pack,
        "LEFT": p.window_left >= 0,
        "RIGHT": p.window_right >= 0,
        "SINKS": has_sinks,
        "D_VO": p.head_dim_vo,
        "K_PARTS": k_parts,
        "V_PARTS": v_parts,
        "V_TILES": v_tiles,
        "K_WIDTH": key_width(p) // k_parts,
        "V_WIDTH": p.head_dim_vo // v_parts,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "WAYS": c.ways,
        "HEADS": c.heads,
        "STAGES": c.num_stages,
        "ONE_LOOP": c.one_loop,
        "OVERLAP": c.overlap,
    }


def reads_raw(scale: Factor | None, zero: Factor | None) -> bool:
    """Whether numbers may be multiplied before anything is taken off them."""
    return zero is None and (scale is None or scale.form != "group")


def group_width(scale: Factor | None, head_dim: int, parts: int, block: int) -> int:
    """Words of a row that share a scale (if all do: the block, or both halves of a row that is turned); 0 unless scales
    come in groups."""
    if scale is None or scale.form != "group":
        return 0
    groups = scale.values.shape[-1]
    return max(block, triton.next_power_of_2(head_dim // parts)) if groups == 1 else head_dim // groups // parts


def chain_length(p: Problem, c: Config, block_k: int) -> int:
    """Rows of a tile of keys [block_n, block_k] that one thread holds, of which each has 8 neighbouring words, where
    their angles are chained (rotation.py); else 1."""
    if not c.chained or p.rope is None or c.ways > 1 or triton.knobs.runtime.interpret:
        return 1
    return min(max(c.block_n * block_k // (256 * c.num_warps), 1), rotation.LONGEST_CHAIN)


def key_width(p: Problem) -> int:
    """Dims of a tile of keys: a half of each row where pairs of dims are turned."""
    return p.head_dim_qk // 2 if p.rope else p.head_dim_qk


def tile_widths(p: Problem, c: Config) -> tuple[int, int, int]:
    """Words of a row of K and of V, filled up to what the tensor cores take, and in how many tiles V is multiplied: one
    for each part, or one of all.

    Where wgmma takes K and V from one place in shared memory and V's rows are the narrower ones, ptxas 12.8 (Triton
    3.6) makes it read V where a register points that nothing has written. So V's rows are as wide as K's there, or 128
    bytes, which are swizzled as wider ones are.
    """
    k_parts, v_parts = PARTS[p.k_format], PARTS[p.v_format]
    block_k, block_v = (
        max(triton.next_power_of_2(dim // parts), 16)
        for dim, parts in ((key_width(p), k_parts), (p.head_dim_vo, v_parts))
    )
    least = min(block_k, 64)
    if not c.has_wgmma or c.block_m < 64 or block_v >= least:
        return block_k, block_v, v_parts
    return block_k, max(block_v, least // v_parts), 1


def product_type(q_dtype: torch.dtype, kv_format: str, scale: Factor | None) -> tl.dtype:
    """What a product with K or V is computed in: fp16, in which narrow formats are exact, unless a scale was applied
    first."""
    if kv_format != "plain" and q_dtype != torch.float32 and not (scale is not None and scale.form == "group"):
        return tl.float16
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[q_dtype]


def compile_cases() -> list[CompileCase]:
    """Launches that stand for the family: decode, append and prefill; paged and ragged; with and without variants."""
    half, full = torch.bfloat16, torch.float32
    found = []
    for sm in ((8, 0), (9, 0)):
        found += [
            *[_case(f"decode.page{n}", sm, half, 1, page_size=n) for n in (1, 16, 64)],
            _case("decode.fp16.window", sm, torch.float16, 1, page_size=16, window_left=1024),
            _case("decode.fp32", sm, full, 1, page_size=16),
            *[_case(f"decode.dim{d}", sm, half, 1, page_size=16, head_dim_qk=d, head_dim_vo=d)
              for d in (64, 96, 256, 512)],
            _case("append", sm, half, 8, page_size=16, window_right=0),
            _case("append.few_keys", sm, half, 16, batch_size=1, kv_len=4096, page_size=16, window_right=0),
            _case("prefill.ragged", sm, half, 1024, window_right=0),
            _case("prefill.full", sm, half, 1024, page_size=16),
            _case("prefill.variants", sm, half, 1024, page_size=16, window_left=512, window_right=0,
                  logits_soft_cap=30.0),
            _case("prefill.fp32", sm, full, 1024, window_right=0),
            _case("prefill.dim64", sm, half, 1024, window_right=0, head_dim_qk=64, head_dim_vo=64),
            _case("prefill.dim192x128", sm, half, 1024, window_right=0, head_dim_qk=192),
            _case("prefill.dim256", sm, half, 1024, window_right=0, head_dim_qk=256, head_dim_vo=256),
            _case("prefill.dim512", sm, half, 1024, window_right=0, head_dim_qk=512, head_dim_vo=512),
            *[_case(f"{name}.{cache}.{form}", sm, half, qo_len, _scales(form), page_size=16, kv_dtype=cache_dtype)
              for name, qo_len in (("decode", 1), ("append", 8), ("prefill", 1024))
              for cache, cache_dtype, form in (
                  ("e4m3", torch.float8_e4m3fn, "head"), ("e5m2", torch.float8_e5m2, "head"),
                  ("int8", torch.int8, "token"), ("int4", torch.uint8, "token"),
                  ("int4", torch.uint8, "zero"), ("int4", torch.uint8, "group"),
              )],
            *[_case(f"decode.{cache}.{form}.page{page}.b64", sm, half, 1, _scales(form), 64, 4096, page_size=page,
                    kv_dtype=cache_dtype)
              for cache, cache_dtype in (("int8", torch.int8), ("int4", torch.uint8))
              for form, page in (("token", 16), ("token", 1), ("zero", 16), ("head", 16), ("group", 16),
                                 ("half", 16))],
            *[_case(f"decode.{cache}.{form}.page{page}.b256", sm, half, 1, _scales(form), 256, 1024, page_size=page,
                    kv_dtype=cache_dtype)
              for cache, cache_dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2),
                                         ("int8", torch.int8), ("int4", torch.uint8))
              for page in (1, 16) for form in ("head", "token", "zero", "group", "half")],
            *[_case(f"decode.page{n}.b64{name}", sm, half, 1, batch_size=64, kv_len=4096, page_size=n, **fields)
              for n in (1, 16)
              for name, fields in (("", {}), (".mha", {"num_kv_heads": 32}), (".group8", {"num_kv_heads": 4}),
                                   (".window", {"window_left": 512}), (".cap", {"logits_soft_cap": 30.0}),
                                   (".dim64", {"head_dim_qk": 64, "head_dim_vo": 64}), (".alibi", {"alibi": True}))],
            *[_case(f"decode.{cache}.{form}.window.b64", sm, half, 1, _scales(form), 64, 4096, page_size=16,
                    kv_dtype=cache_dtype, window_left=512)
              for cache, cache_dtype, form in (
                  ("e4m3", torch.float8_e4m3fn, "head"), ("e5m2", torch.float8_e5m2, "group"),
                  ("int8", torch.int8, "token"), ("int4", torch.uint8, "zero"),
              )],
            *[_case(f"decode.mha.{cache}.{form}", sm, half, 1, _scales(form), 1, 16384, page_size=16, num_kv_heads=32,
                    kv_dtype=cache_dtype)
              for cache, cache_dtype in (("e4m3", torch.float8_e4m3fn), ("int8", torch.int8), ("int4", torch.uint8))
              for form in ("head", "token", "zero", "group", "half")],
            *[_case(f"decode.{cache}.{form}.{layout}.b64", sm, half, 1, _scales(form), 64, 4096, page_size=page,
                    kv_dtype=cache_dtype, kv_heads_first=layout == "hnd")
              for cache, cache_dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2),
                                         ("int4", torch.uint8))
              for layout, page in (("hnd", 16), ("page1", 1))
              for form in ("head", "token", "zero", "group")],
            *[_case(f"decode.long.page{n}", sm, half, 1, kv_len=8192, page_size=n) for n in (1, 16)],
            *[_case(f"decode.long.ragged.{name}.b{b}", sm, half, 1, batch_size=b, kv_len=n, **fields)
              for b, n in ((1, 32768), (8, 8192))
              for name, fields in (("plain", {}), ("rope", {"rope": Rope()}), ("alibi", {"alibi": True}))],
            *[_case(f"decode.long.alibi.page{n}", sm, half, 1, kv_len=8192, page_size=n, alibi=True) for n in (1, 16)],
            *[_case(f"decode.long.ragged.{cache}", sm, half, 1, _scales("token"), 1, 65536, kv_dtype=cache_dtype)
              for cache, cache_dtype in (("e4m3", torch.float8_e4m3fn), ("int8", torch.int8), ("int4", torch.uint8))],
            *[_case(f"decode.fp32.{cache}", sm, full, 1, _scales("token"), page_size=16, kv_dtype=cache_dtype)
              for cache, cache_dtype in (("e4m3", torch.float8_e4m3fn), ("int4", torch.uint8))],
            _case("decode.fp32.int4.group", sm, full, 1, _scales("group"), page_size=16, kv_dtype=torch.uint8),
            _case("decode.fp32.int8.dim256", sm, full, 1, _scales("token"), page_size=16, kv_dtype=torch.int8,
                  head_dim_qk=256, head_dim_vo=256),
            _case("prefill.dim64x16", sm, half, 1024, window_right=0, head_dim_qk=64, head_dim_vo=16),
            _case("append.int8.dim96x64", sm, half, 8, _scales("token"), page_size=16, kv_dtype=torch.int8,
                  head_dim_qk=96, head_dim_vo=64),
            _case("prefill.int8.dim128x64", sm, half, 1024, _scales("token"), page_size=16, kv_dtype=torch.int8,
                  head_dim_vo=64),
            _case("prefill.int8.int4", sm, half, 1024, _scales("token"), page_size=16, kv_dtype=torch.int8,
                  v_dtype=torch.uint8),
            _case("decode.int4.dim512", sm, half, 1, _scales("token"), page_size=1, kv_dtype=torch.uint8,
                  head_dim_qk=512, head_dim_vo=512),
            _case("decode.int8.int4", sm, half, 1, _scales("token"), page_size=1, kv_dtype=torch.int8,
                  v_dtype=torch.uint8),
            *[_case(f"decode.rope.page{n}.b{b}", sm, half, 1, page_size=n, rope=Rope(), batch_size=b)
              for n in (1, 16) for b in (8, 64)],
            *[_case(f"decode.rope.long.page{n}", sm, half, 1, kv_len=8192, page_size=n, rope=Rope()) for n in (1, 16)],
            _case("decode.rope.long.e5m2.head", sm, half, 1, _scales("head"), kv_len=8192, page_size=16, rope=Rope(),
                  kv_dtype=torch.float8_e5m2),
            _case("decode.rope.long.int4.zero", sm, half, 1, _scales("zero"), kv_len=8192, page_size=16, rope=Rope(),
                  kv_dtype=torch.uint8),
            *[_case(f"decode.rope.dim{d}", sm, half, 1, page_size=16, rope=Rope(), head_dim_qk=d, head_dim_vo=d)
              for d in (80, 256, 512)],
            _case("decode.rope.fp32", sm, full, 1, page_size=16, rope=Rope()),
            *[_case(f"decode.rope.{cache}.{form}", sm, half, 1, _scales(form), page_size=16, kv_dtype=cache_dtype,
                    rope=Rope())
              for cache, cache_dtype, form in (("e5m2", torch.float8_e5m2, "head"), ("int8", torch.int8, "zero"),
                                               ("int4", torch.uint8, "group"))],
            *[_case(f"decode.rope.{cache}.{form}.b64", sm, half, 1, _scales(form), 64, 4096, page_size=16,
                    kv_dtype=cache_dtype, rope=Rope())
              for cache, cache_dtype, form in (
                  ("e4m3", torch.float8_e4m3fn, "head"), ("e5m2", torch.float8_e5m2, "group"),
                  ("int8", torch.int8, "zero"), ("int4", torch.uint8, "half"), ("int4", torch.uint8, "group"),
              )],
            *[_case(f"append.rope.dim{d}", sm, half, 8, page_size=16, rope=Rope(), window_right=0, head_dim_qk=d,
                    head_dim_vo=d) for d in (128, 256, 512)],
            *[_case(f"{name}.{mode}", sm, half, qo_len, page_size=16, **mode_fields, **fields)
              for mode, mode_fields in (("rope", {"rope": Rope()}), ("alibi", {"alibi": True}))
              for name, qo_len, fields in (
                  ("decode.window", 1, {"window_left": 512}), ("prefill", 1024, {"window_right": 0}),
                  ("prefill.variants", 1024, {"window_left": 512, "window_right": 0, "logits_soft_cap": 30.0}),
              )],
        ]  # fmt: skip
    merge = dict.fromkeys(("partial_ptr", "partial_lse_ptr", "lse_ptr", "sinks_ptr", "slopes_ptr"), "*fp32")
    merge |= {"out_ptr": "*bf16", "merges_ptr": "*i32"}
    integers = ("stride_on", "stride_oh", "num_qo_heads", "ROWS", "lone_qo_len", "lone_kv_len", "lone_slots")
    merge |= dict.fromkeys(integers, "i32")
    tile = {"PACK": 4, "D_VO": 128, "BLOCK_DV": 128, "BLOCK_M": 16}
    tile |= dict.fromkeys(("SINKS", "SHIFTED", "OVERLAP"), False)
    for block_s, block_r in ((64, 1), (4, 16)):
        constants = {**tile, "BLOCK_S": block_s, "BLOCK_R": block_r}
        name = f"merge.{block_r}x{block_s}"
        found.append(CompileCase(name, merge_kernel, merge, constants, aligned=("stride_on", "stride_oh")))
    return found


def _scales(form: str) -> Scales:
    """Scales of one form, "zero": per token with zero points, "half": per token in fp16."""
    dims = {"head": (8,), "group": (64, 16, 8, 4)}.get(form, (64, 16, 8))
    dtype = torch.float16 if form == "half" else torch.float32
    factor = Factor("token" if form in ("zero", "half") else form, torch.empty(dims, dtype=dtype, device="meta"))
    zero = factor if form in ("zero", "group") else None
    return Scales(factor, factor, zero, zero)


def _case(
    name: str,
    sm: tuple[int, int],
    dtype: torch.dtype,
    qo_len: int,
    scales: Scales = NO_SCALES,
    batch_size: int = 8,
    kv_len: int = 1024,
    **fields: Any,
) -> CompileCase:
    heads = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim_qk": 128, "head_dim_vo": 128, "kv_dtype": dtype}
    problem = Problem(**{**heads, **fields}, q_dtype=dtype, o_dtype=dtype)
    work = Workload(batch_size, batch_size * qo_len, qo_len, batch_size * kv_len, kv_len)
    config = suited(portable(problem, work, sm), scales)
    scales = fit_scales(scales, config)
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    strides = tuple(n for n in attention_kernel.arg_names if n.startswith("stride_"))
    signature: dict[str, Any] = dict.fromkeys(("q_ptr", "out_ptr"), element)
    signature["k_ptr"] = element if problem.k_format == "plain" else "*i16"
    signature["v_ptr"] = element if problem.v_format == "plain" else "*i16"
    signature |= dict.fromkeys(("lse_ptr", "partial_ptr", "partial_lse_ptr", "sinks_ptr", "table_ptr"), "*fp32")
    signature |= dict.fromkeys(("items_ptr", "kv_indices_ptr"), "*i32")
    signature |= dict.fromkeys((*strides, "window_left", "window_right", "num_qo_heads", *LONE), "i32")
    signature |= dict.fromkeys(("sm_scale", "out_scale", "soft_cap"), "fp32")
    alike = (problem.k_format, problem.head_dim_qk) == (problem.v_format, problem.head_dim_vo)
    constants = constexprs(problem, config, has_sinks="variants" in name, alike=alike, scales=scales)
    for argument, factor in zip(
        ("k", "v", "k_zero", "v_zero"), (scales.k, scales.v, scales.k_zero, scales.v_zero), strict=True
    ):
        argument += "_scale" if "_" not in argument else ""
        if factor is None:
            constants[argument] = None
        else:
            pointer = "*fp16" if factor.values.dtype == torch.float16 else "*fp32"
            signature[argument] = (pointer, *["i32"] * {"head": 1, "token": 3, "group": 4}[factor.form])
    if batch_size == 1:
        del signature["items_ptr"]
        constants["items_ptr"] = None
    arch = sm[0] * 10 + sm[1]
    return CompileCase(
        f"attention.{name}.sm{arch}", attention_kernel, signature, constants, config.num_warps, config.num_stages,
        aligned=strides, maxnreg=config.max_registers, min_capability=arch, max_capability=arch,
    )  # fmt: skip
