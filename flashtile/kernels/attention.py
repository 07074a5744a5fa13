"""The portable attention family: one mainloop, launched over a plan's work list, and the merge of split tiles.

FlashAttention-2 (arXiv:2307.08691) with a work list: prefill, append and decode over ragged or paged KV differ only in
the items of the list and in the small functions of kv.py and variants.py that are passed in.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashtile.config import Config, portable
from flashtile.kernels import kv, variants
from flashtile.kernels.softmax import LOG2_E, NEG_INF, add_sink, finish, softmax_step
from flashtile.plan.plan import Plan
from flashtile.plan.problem import Problem, Workload
from flashtile.plan.worklist import ITEM_STRIDE, MERGE_STRIDE
from flashtile.testing.compile import CompileCase

ITEM = tl.constexpr(ITEM_STRIDE)
MERGE = tl.constexpr(MERGE_STRIDE)


@triton.jit
def dot(a, b):
    """a @ b in fp32. fp32 operands are multiplied in fp64: sums of TF32 products, or of 512 fp32 ones in a row, err more
    than twice as much as PyTorch's, and fp64 is as fast as fp32 outside of TF32 on the GPUs that serve models."""
    if a.dtype == tl.float32:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b)


@triton.jit
def attend(
    q, q_pos, k_ptr, v_ptr, kv_base, kv_indices_ptr, stride_kp, stride_kn, stride_vp, stride_vn, sm_scale, soft_cap,
    window_left, window_right, begin, end, m, l, acc,
    KV_OFFSET: tl.constexpr, LOGITS: tl.constexpr, PAGE_SIZE: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, D_QK: tl.constexpr, D_VO: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold KV tokens [begin, end) into m, l [BLOCK_M] and acc [BLOCK_M, BLOCK_DV], all fp32.

    q [BLOCK_M, BLOCK_D], unscaled; q_pos [BLOCK_M], position in the KV sequence. Without MASKED, all rows see all of
    [begin, end) and its length is a multiple of BLOCK_N.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        kv_pos = start + tl.arange(0, BLOCK_N)
        in_range = kv_pos < end if MASKED else tl.full([BLOCK_N], True, tl.int1)
        k_rows = KV_OFFSET(kv_pos, in_range, kv_base, kv_indices_ptr, stride_kp, stride_kn, PAGE_SIZE)
        v_rows = k_rows  # K and V are most often of one shape: half the address arithmetic
        if not ALIKE:
            v_rows = KV_OFFSET(kv_pos, in_range, kv_base, kv_indices_ptr, stride_vp, stride_vn, PAGE_SIZE)
        k_ptrs = k_ptr + (k_rows[:, None] + offs_d[None, :])
        v_ptrs = v_ptr + (v_rows[:, None] + offs_dv[None, :])
        if MASKED or D_QK != BLOCK_D:
            k = tl.load(k_ptrs, mask=in_range[:, None] & (offs_d < D_QK)[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
        s = LOGITS(dot(q, k.T), sm_scale, soft_cap)  # [BLOCK_M, BLOCK_N], log2 units
        if MASKED:
            keep = in_range[None, :]
            if LEFT:
                keep &= kv_pos[None, :] >= q_pos[:, None] - window_left
            if RIGHT:
                keep &= kv_pos[None, :] <= q_pos[:, None] + window_right
            s = tl.where(keep, s, NEG_INF)
        p, m, l, acc = softmax_step(s, m, l, acc, MASKED)
        if MASKED or D_VO != BLOCK_DV:
            v = tl.load(v_ptrs, mask=in_range[:, None] & (offs_dv < D_VO)[None, :], other=0.0)
        else:
            v = tl.load(v_ptrs)
        if v.dtype == tl.float32:
            acc += dot(p, v)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc)
    return m, l, acc


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, items_ptr, kv_indices_ptr, sinks_ptr,
    stride_qn, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh, stride_on, stride_oh,
    sm_scale, soft_cap, window_left, window_right, num_qo_heads,
    KV_OFFSET: tl.constexpr, LOGITS: tl.constexpr, PAGE_SIZE: tl.constexpr, ALIKE: tl.constexpr, GROUP: tl.constexpr,
    PACK: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SINKS: tl.constexpr, D_QK: tl.constexpr, D_VO: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, ONE_LOOP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One CTA per (item, head group). lse [nnz_qo, num_qo_heads]; partial states [slot, head group, BLOCK_M (, D_VO)]."""
    item = items_ptr + tl.program_id(1).to(tl.int64) * ITEM
    q_begin = tl.load(item + 1)
    qo_len = tl.load(item + 2)
    row_begin = tl.load(item + 3)
    kv_base = tl.load(item + 4)
    kv_len = tl.load(item + 5)
    begin = tl.load(item + 6)
    end = tl.load(item + 7)
    slot = tl.load(item + 8)
    head_group = tl.load(item + 9) + tl.program_id(0)
    kv_head = (head_group * PACK // GROUP).to(tl.int64)

    rows = row_begin + tl.arange(0, BLOCK_M)  # packed rows: (token, head of the group)
    token = rows // PACK
    head = head_group * PACK + rows % PACK
    valid = token < qo_len
    q_row = (q_begin + token).to(tl.int64)
    q_pos = token + kv_len - qo_len
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_mask = valid[:, None] & (offs_d < D_QK)[None, :]
    q = tl.load(
        q_ptr + (q_row * stride_qn + head.to(tl.int64) * stride_qh)[:, None] + offs_d[None, :], mask=q_mask, other=0.0
    )

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

    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    if ONE_LOOP:
        m, l, acc = attend(q, q_pos, k_ptr, v_ptr, kv_base, kv_indices_ptr, stride_kp, stride_kn, stride_vp, stride_vn,
                           sm_scale, soft_cap, window_left, window_right, begin, end, m, l, acc,
                           KV_OFFSET, LOGITS, PAGE_SIZE, ALIKE, True, LEFT, RIGHT, D_QK, D_VO, BLOCK_D, BLOCK_DV, BLOCK_N,
                           STAGES)  # fmt: skip
    else:
        if LEFT:
            m, l, acc = attend(q, q_pos, k_ptr, v_ptr, kv_base, kv_indices_ptr, stride_kp, stride_kn, stride_vp, stride_vn,
                               sm_scale, soft_cap, window_left, window_right, begin, left, m, l, acc,
                               KV_OFFSET, LOGITS, PAGE_SIZE, ALIKE, True, LEFT, RIGHT, D_QK, D_VO, BLOCK_D, BLOCK_DV,
                               BLOCK_N, 1)  # fmt: skip
        m, l, acc = attend(q, q_pos, k_ptr, v_ptr, kv_base, kv_indices_ptr, stride_kp, stride_kn, stride_vp, stride_vn,
                           sm_scale, soft_cap, window_left, window_right, left, right, m, l, acc,
                           KV_OFFSET, LOGITS, PAGE_SIZE, ALIKE, False, LEFT, RIGHT, D_QK, D_VO, BLOCK_D, BLOCK_DV,
                           BLOCK_N, STAGES)  # fmt: skip
        m, l, acc = attend(q, q_pos, k_ptr, v_ptr, kv_base, kv_indices_ptr, stride_kp, stride_kn, stride_vp, stride_vn,
                           sm_scale, soft_cap, window_left, window_right, right, end, m, l, acc,
                           KV_OFFSET, LOGITS, PAGE_SIZE, ALIKE, True, LEFT, RIGHT, D_QK, D_VO, BLOCK_D, BLOCK_DV,
                           BLOCK_N, 1)  # fmt: skip

    if OVERLAP:
        gdc_launch_dependents()  # the merge may start; it waits for this grid's stores
    if slot >= 0:
        out, lse = finish(m, l, acc)
        base = (slot.to(tl.int64) * tl.num_programs(0) + head_group) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial_ptr + base[:, None] * D_VO + offs_dv[None, :], out,
                 mask=valid[:, None] & (offs_dv < D_VO)[None, :])  # fmt: skip
        tl.store(partial_lse_ptr + base, lse, mask=valid)
    else:
        if SINKS:
            m, l, acc = add_sink(m, l, acc, tl.load(sinks_ptr + head) * LOG2_E)
        out, lse = finish(m, l, acc)
        out_ptrs = out_ptr + (q_row * stride_on + head.to(tl.int64) * stride_oh)[:, None] + offs_dv[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (offs_dv < D_VO)[None, :])
        tl.store(lse_ptr + q_row * num_qo_heads + head, lse, mask=valid)


@triton.jit
def merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, merges_ptr, sinks_ptr, stride_on, stride_oh, num_qo_heads,
    ROWS, PACK: tl.constexpr, SINKS: tl.constexpr, D_VO: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One CTA per (packed row of a split tile, head group): joins the partial states of the row's KV chunks.

    ROWS: packed rows of the tallest tile, at most BLOCK_M.
    """
    merge = merges_ptr + (tl.program_id(1) // ROWS).to(tl.int64) * MERGE
    r = tl.program_id(1) % ROWS
    q_begin = tl.load(merge)
    qo_len = tl.load(merge + 1)
    row = tl.load(merge + 2) + r
    slot_begin = tl.load(merge + 3).to(tl.int64)
    num_slots = tl.load(merge + 4)
    head_group = tl.program_id(0)
    token = row // PACK
    if OVERLAP:
        gdc_wait()
    if token < qo_len:
        head = head_group * PACK + row % PACK
        offs_dv = tl.arange(0, BLOCK_DV)
        m = tl.full([1], NEG_INF, tl.float32)
        l = tl.zeros([1], tl.float32)
        acc = tl.zeros([1, BLOCK_DV], tl.float32)
        for s in range(0, num_slots, BLOCK_S):
            i = s + tl.arange(0, BLOCK_S)
            base = ((slot_begin + i) * tl.num_programs(0) + head_group) * BLOCK_M + r
            lse = tl.load(partial_lse_ptr + base, mask=i < num_slots, other=NEG_INF)
            out = tl.load(partial_ptr + base[:, None] * D_VO + offs_dv[None, :],
                          mask=(lse > NEG_INF)[:, None] & (offs_dv < D_VO)[None, :], other=0.0)  # fmt: skip
            p, m, l, acc = softmax_step(lse[None, :], m, l, acc, True)
            acc += tl.sum(tl.reshape(p, [BLOCK_S])[:, None] * out, 0)[None, :]
        if SINKS:
            m, l, acc = add_sink(m, l, acc, tl.full([1], 0.0, tl.float32) + tl.load(sinks_ptr + head) * LOG2_E)
        out, lse = finish(m, l, acc)
        q_row = (q_begin + token).to(tl.int64)
        out_row = out_ptr + q_row * stride_on + head.to(tl.int64) * stride_oh
        tl.store(out_row + offs_dv[None, :], out.to(out_ptr.dtype.element_ty), mask=(offs_dv < D_VO)[None, :])
        tl.store(lse_ptr + q_row * num_qo_heads + head + tl.arange(0, 1), lse)


def launch_merge(
    plan: Plan, out: torch.Tensor, lse: torch.Tensor, workspace: torch.Tensor, sinks: torch.Tensor | None
) -> None:
    """Join the partial states that any family left in the workspace."""
    p, c = plan.problem, plan.config
    partial, partial_lse = plan.partials(workspace)
    block_dv = triton.next_power_of_2(p.head_dim_vo)
    rows = min(c.block_m, plan.work.max_qo_len * c.pack)
    merge_kernel[(p.num_qo_heads // c.pack, plan.num_merges * rows)](
        partial, partial_lse, out, lse, plan.merges, sinks if sinks is not None else lse, out.stride(0), out.stride(1),
        p.num_qo_heads, rows, PACK=c.pack, SINKS=sinks is not None, D_VO=p.head_dim_vo, BLOCK_DV=block_dv,
        BLOCK_M=c.block_m, BLOCK_S=max(4, 8192 // block_dv), OVERLAP=c.overlap, num_warps=4, launch_pdl=c.overlap,
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
) -> None:
    """Launch the portable family: q [nnz_qo, num_qo_heads, head_dim_qk]; k, v as NHD, paged [pages, page_size, heads, dim]
    or ragged [nnz_kv, heads, dim]; out and lse are written. Partial states go to the workspace and are merged."""
    p, c = plan.problem, plan.config
    partial, partial_lse = plan.partials(workspace)
    k_strides = k.stride()[:-1] if p.paged else (0, *k.stride()[:-1])
    v_strides = v.stride()[:-1] if p.paged else (0, *v.stride()[:-1])
    if plan.num_items:
        attention_kernel[(p.num_qo_heads // c.pack, plan.num_items)](
            q, k, v, out, lse, partial, partial_lse, plan.items, plan.kv_indices, sinks if sinks is not None else lse,
            q.stride(0), q.stride(1), *k_strides, *v_strides, out.stride(0), out.stride(1),
            sm_scale, p.logits_soft_cap, p.window_left, p.window_right, p.num_qo_heads,
            **constexprs(p, c, sinks is not None, k_strides[:2] == v_strides[:2]), num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    if plan.num_merges:
        launch_merge(plan, out, lse, workspace, sinks)


def constexprs(p: Problem, c: Config, has_sinks: bool, alike: bool = True) -> dict[str, object]:
    """What the mainloop is specialised on; alike: K and V have the same page and token strides."""
    return {
        "KV_OFFSET": kv.paged_offset if p.paged else kv.contiguous_offset,
        "LOGITS": variants.soft_capped if p.logits_soft_cap > 0 else variants.plain,
        "PAGE_SIZE": p.page_size,
        "ALIKE": alike,
        "GROUP": p.group_size,
        "PACK": c.pack,
        "LEFT": p.window_left >= 0,
        "RIGHT": p.window_right >= 0,
        "SINKS": has_sinks,
        "D_QK": p.head_dim_qk,
        "D_VO": p.head_dim_vo,
        "BLOCK_D": triton.next_power_of_2(p.head_dim_qk),
        "BLOCK_DV": triton.next_power_of_2(p.head_dim_vo),
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "STAGES": c.num_stages,
        "ONE_LOOP": c.one_loop,
        "OVERLAP": c.overlap,
    }


def compile_cases() -> list[CompileCase]:
    """Launches that stand for the family: decode, append and prefill; paged and ragged; with and without variants."""
    half, full = torch.bfloat16, torch.float32
    found = []
    for sm in ((8, 0), (9, 0)):
        found += [
            *[_case(f"decode.page{n}", sm, half, 1, page_size=n) for n in (1, 16, 64)],
            _case("decode.fp16.window", sm, torch.float16, 1, page_size=16, window_left=1024),
            _case("decode.fp32", sm, full, 1, page_size=16),
            *[_case(f"decode.dim{d}", sm, half, 1, page_size=16, head_dim_qk=d, head_dim_vo=d) for d in (64, 96, 256, 512)],
            _case("append", sm, half, 8, page_size=16, window_right=0),
            _case("prefill.ragged", sm, half, 1024, window_right=0),
            _case("prefill.full", sm, half, 1024, page_size=16),
            _case("prefill.variants", sm, half, 1024, page_size=16, window_left=512, window_right=0, logits_soft_cap=30.0),
            _case("prefill.fp32", sm, full, 1024, window_right=0),
            _case("prefill.dim64", sm, half, 1024, window_right=0, head_dim_qk=64, head_dim_vo=64),
            _case("prefill.dim192x128", sm, half, 1024, window_right=0, head_dim_qk=192),
            _case("prefill.dim256", sm, half, 1024, window_right=0, head_dim_qk=256, head_dim_vo=256),
            _case("prefill.dim512", sm, half, 1024, window_right=0, head_dim_qk=512, head_dim_vo=512),
        ]  # fmt: skip
    merge = dict.fromkeys(("partial_ptr", "partial_lse_ptr", "lse_ptr", "sinks_ptr"), "*fp32")
    merge |= {"out_ptr": "*bf16", "merges_ptr": "*i32"}
    merge |= dict.fromkeys(("stride_on", "stride_oh", "num_qo_heads", "ROWS"), "i32")
    tile = {"PACK": 4, "SINKS": False, "D_VO": 128, "BLOCK_DV": 128, "BLOCK_M": 16, "BLOCK_S": 64, "OVERLAP": False}
    return [*found, CompileCase("merge", merge_kernel, merge, tile, aligned=("stride_on", "stride_oh"))]


def _case(name: str, sm: tuple[int, int], dtype: torch.dtype, qo_len: int, **fields: Any) -> CompileCase:
    heads = {"num_qo_heads": 32, "num_kv_heads": 8, "head_dim_qk": 128, "head_dim_vo": 128}
    problem = Problem(**{**heads, **fields}, q_dtype=dtype, kv_dtype=dtype, o_dtype=dtype)
    config = portable(problem, Workload(8, 8 * qo_len, qo_len, 8 * 1024, 1024), sm)
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    strides = tuple(n for n in attention_kernel.arg_names if n.startswith("stride_"))
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), element)
    signature |= dict.fromkeys(("lse_ptr", "partial_ptr", "partial_lse_ptr", "sinks_ptr"), "*fp32")
    signature |= dict.fromkeys(("items_ptr", "kv_indices_ptr"), "*i32")
    signature |= dict.fromkeys((*strides, "window_left", "window_right", "num_qo_heads"), "i32")
    signature |= dict.fromkeys(("sm_scale", "soft_cap"), "fp32")
    constants = constexprs(problem, config, has_sinks="variants" in name)
    arch = sm[0] * 10 + sm[1]
    return CompileCase(
        f"attention.{name}.sm{arch}", attention_kernel, signature, constants, config.num_warps, config.num_stages,
        aligned=strides, min_capability=arch, max_capability=arch,
    )  # fmt: skip
