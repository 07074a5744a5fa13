"""Decode over narrow caches on Hopper, behind the portable family's launcher.

The kernel's roles are in loader.py and consumer.py; what it is specialised on, and its barriers, in spec.py. Partial
states are as the portable family's, whose merge joins them. Where a layer's tensors or scales do not suit the kernel,
that family takes over, with a plan of its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from flashtile import config as configs
from flashtile.config import num_sms
from flashtile.kernels import attention as portable
from flashtile.kernels import softmax
from flashtile.kernels.attention import launch_merge, words
from flashtile.kernels.hopper.attention import copyable
from flashtile.kernels.hopper.barriers import barriers
from flashtile.kernels.hopper.compat import TensorDescriptor, gl, gluon, reinterpret
from flashtile.kernels.hopper.narrow.consumer import consumer
from flashtile.kernels.hopper.narrow.loader import loader
from flashtile.kernels.hopper.narrow.spec import (
    PIECE,
    ROWS,
    WAYS,
    NarrowSpec,
    blocks,
    box_layout,
    flat_layout,
    full_arrivals,
    loader_warps,
    pieces_of_way,
    registers,
    room,
    words_layout,
)
from flashtile.kernels.hopper.tiles import inverse
from flashtile.plan.plan import Plan, make_plan
from flashtile.plan.problem import PARTS
from flashtile.plan.scales import NO_SCALES, Factor, Scales
from flashtile.testing.compile import CompileCase

LOG2_E: float = softmax.LOG2_E.value
# Arguments that vary from call to call: no variant of its own for 1 or for multiples of 16
RUNTIME = (
    "q_token", "q_head", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head", "ks_page", "ks_token", "ks_head",
    "vs_page", "vs_token", "vs_head", "kz_page", "kz_token", "kz_head", "vz_page", "vz_token", "vz_head", "stride_on",
    "stride_oh", "num_heads", "num_groups", "heads_per_item", "inverse_heads", "group", "window_left",
)  # fmt: skip


@gluon.jit
def rows_buffer(C: gl.constexpr):
    """Shared memory for the stages of K or V: as the loader writes it, as consumers read it, and as boxes."""
    STAGES: gl.constexpr = C.stages
    HEADS: gl.constexpr = C.heads
    WORDS: gl.constexpr = C.words
    BLOCKS: gl.constexpr = blocks(C)
    OWN: gl.constexpr = STAGES * pieces_of_way(C)
    boxes = gl.allocate_shared_memory(gl.int16, [STAGES * BLOCKS, 1, HEADS, PIECE, WORDS], box_layout(WORDS))
    written = boxes
    if not C.boxes:
        written = reinterpret(boxes, gl.int16, [STAGES, BLOCKS, HEADS, PIECE, WORDS], words_layout(WORDS, 4))
    return written, reinterpret(boxes, gl.int16, [OWN, WAYS, PIECE, WORDS], words_layout(WORDS, 3)), boxes


@gluon.jit
def factor_buffer(SOME: gl.constexpr, C: gl.constexpr):
    """The same for a factor per token: as the loader writes it and as consumers read it; nothing if there is none."""
    written = gl.to_tensor(0)
    read = written
    if SOME:
        STAGES: gl.constexpr = C.stages
        HEADS: gl.constexpr = C.heads
        BLOCKS: gl.constexpr = blocks(C)
        OWN: gl.constexpr = STAGES * pieces_of_way(C)
        written = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCKS, HEADS, PIECE], flat_layout(3))
        read = reinterpret(written, gl.float32, [OWN, WAYS, PIECE], flat_layout(2))
    return written, read


@gluon.jit
def factors_of(scale, zero, SCALED: gl.constexpr, SHIFTED: gl.constexpr):
    """Those factors that there are."""
    out = ()
    if SCALED:
        out = out + (scale,)
    if SHIFTED:
        out = out + (zero,)
    return out


@gluon.jit(do_not_specialize=RUNTIME)
def narrow_kernel(
    k_desc, v_desc, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_zero_ptr, v_zero_ptr, out_ptr, lse_ptr,
    partial_ptr, partial_lse_ptr, sinks_ptr, items_ptr, kv_indices_ptr, turns_ptr, q_token, q_head, k_page, k_token,
    k_head, v_page, v_token, v_head, ks_page, ks_token, ks_head, vs_page, vs_token, vs_head, kz_page, kz_token, kz_head,
    vz_page, vz_token, vz_head, stride_on, stride_oh, num_heads, num_groups, heads_per_item, inverse_heads, group,
    window_left, scale, cap, out_scale, C: gl.constexpr,
):  # fmt: skip
    """One persistent CTA; see spec.py for its roles and barriers.

    Strides: of q and of factors in elements, of K and V in 16 bytes, of out in 8 elements.
    """
    k_written, k_read, k_boxes = rows_buffer(C)
    v_written, v_read, v_boxes = rows_buffer(C)
    ks_written, ks_read = factor_buffer(C.k_form == "token", C)
    vs_written, vs_read = factor_buffer(C.v_form == "token", C)
    kz_written, kz_read = factor_buffer(C.k_zero, C)
    vz_written, vz_read = factor_buffer(C.v_zero, C)
    scratch = gl.to_tensor(0)
    pair = scratch
    if C.heads < WAYS:
        PARTS_OF: gl.constexpr = C.stages * room(C)
        HALF: gl.constexpr = C.words // 2
        HEADS: gl.constexpr = C.heads
        scratch = reinterpret(k_boxes, gl.float32, [PARTS_OF, 2, HEADS, HALF, ROWS], flat_layout(4))
        pair = gl.allocate_shared_memory(gl.float32, [2, 2, HEADS, ROWS], flat_layout(3))
    STAGES: gl.constexpr = C.stages
    ARRIVALS: gl.constexpr = full_arrivals(C)
    full = barriers(STAGES, ARRIVALS)

    outputs = (
        out_ptr, stride_on, stride_oh, lse_ptr, partial_ptr, partial_lse_ptr, sinks_ptr, num_heads, num_groups
    )  # fmt: skip
    q = (q_ptr, q_token, q_head)
    k = (k_desc, k_ptr, (k_page, k_token, k_head))
    v = (v_desc, v_ptr, (v_page, v_token, v_head))
    k_scale = (k_scale_ptr, (ks_page, ks_token, ks_head), ks_written)
    v_scale = (v_scale_ptr, (vs_page, vs_token, vs_head), vs_written)
    k_zero = (k_zero_ptr, (kz_page, kz_token, kz_head), kz_written)
    v_zero = (v_zero_ptr, (vz_page, vz_token, vz_head), vz_written)
    k_factors = factors_of(k_scale, k_zero, C.k_form == "token", C.k_zero)
    v_factors = factors_of(v_scale, v_zero, C.v_form == "token", C.v_zero)
    scales = ((k_scale_ptr, ks_head), (v_scale_ptr, vs_head), out_scale)
    work = (items_ptr, turns_ptr, heads_per_item, inverse_heads, 0)
    smem = ((k_read, v_read, ks_read, vs_read, kz_read, vz_read), scratch, pair)
    WARPS: gl.constexpr = loader_warps(C)
    REGISTERS: gl.constexpr = registers(C)[1]
    gl.warp_specialize(
        [
            (consumer, (smem, full, q, outputs, scales, (scale, cap, window_left, group), work, C)),
            (loader, (k_written, full, k, k_factors, work, kv_indices_ptr, C)),
            (loader, (v_written, full, v, v_factors, work, kv_indices_ptr, C)),
        ],
        [WARPS, WARPS],
        [REGISTERS, REGISTERS],
    )


def descriptor(x: torch.Tensor, heads: int) -> TensorDescriptor:
    """A TMA descriptor of words [pages, page_size, heads, words], or ragged [tokens, heads, words] as one page."""
    x = x if x.dim() == 4 else x[None]
    pages, tokens, all_heads, width = x.shape
    page, token, head, one = x.stride()
    box = [1, heads, PIECE.value, width]
    return TensorDescriptor(x, [pages, all_heads, tokens, width], [page, head, token, one], box, box_layout(width))


def boxable(x: torch.Tensor, page_size: int) -> bool:
    """Whether TMA can bring pieces of x whole: none lies in two pages, and no stride is 0."""
    return page_size % PIECE.value == 0 and all(s > 0 for s in x.stride())


def suits(k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scales: Scales) -> bool:
    """Whether the kernel can read and write these tensors; k, v as words."""
    return configs.narrow_takes(scales) and copyable(k) and copyable(v) and copyable(out) and k.shape[0] > 0


_PORTABLE: WeakKeyDictionary[Plan, Plan] = WeakKeyDictionary()


def portable_plan(plan: Plan, room: int) -> Plan:
    """The same batch for the portable family, made when it is first needed; not split, if its partial states take more
    than `room` bytes."""
    found = _PORTABLE.get(plan)
    if found is None:
        p = plan.problem
        c = configs.portable(p, plan.work, configs.capability(plan.device), num_sms(plan.device))
        c = replace(c, kv_chunk=plan.config.kv_chunk)
        found = make_plan(p, c, plan.lengths, plan.kv_indices, plan.device)
        if found.workspace_size() > room:
            found = make_plan(p, replace(c, split=False), plan.lengths, plan.kv_indices, plan.device)
        _PORTABLE[plan] = found
    return found


def spec_of(plan: Plan, k: torch.Tensor, v: torch.Tensor, scales: Scales, has_sinks: bool) -> NarrowSpec:
    """The variant for a plan and the tensors of a layer."""
    p, c = plan.problem, plan.config
    parts = PARTS[p.k_format]
    return NarrowSpec(
        kv_format=p.k_format, words=p.head_dim_qk // parts, parts=parts, block_n=c.block_n, stages=c.num_stages,
        heads=c.heads, page_size=p.page_size, boxes=boxable(k, p.page_size) and boxable(v, p.page_size),
        by_heads=p.kv_heads_first, k_form=scales.k.form if scales.k else "none",
        v_form=scales.v.form if scales.v else "none", k_zero=scales.k_zero is not None,
        v_zero=scales.v_zero is not None, half=torch.float16 in scales.token_dtypes(), left=p.window_left >= 0,
        soft_cap=p.logits_soft_cap > 0, sinks=has_sinks,
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
    scales: Scales = NO_SCALES,
) -> None:
    """Launch the kernel, with the arguments of the portable family's `run`."""
    p, c = plan.problem, plan.config
    if not plan.num_items:
        return
    k_words, v_words = words(k, p.k_format), words(v, p.v_format)
    if not suits(k_words, v_words, out, scales):
        other = portable_plan(plan, workspace.numel())
        portable.run(other, q, k, v, out, lse, workspace, sm_scale, sinks, scales)
        return
    spec = spec_of(plan, k_words, v_words, scales, sinks is not None)
    k_desc, v_desc = (descriptor(k_words, c.heads), descriptor(v_words, c.heads)) if spec.boxes else (None, None)
    cap = p.logits_soft_cap
    scale, cap_scale = (sm_scale / cap, cap * LOG2_E) if cap > 0 else (sm_scale * LOG2_E, 0.0)
    heads_per_item = c.heads_per_item or p.num_kv_heads // c.heads
    partial, partial_lse = plan.partials(workspace)
    factors = (scales.k, scales.v, scales.k_zero, scales.v_zero)
    narrow_kernel[(plan.turns.shape[1],)](
        k_desc, v_desc, q, k_words, v_words, *(f.values if f else lse for f in factors), out, lse, partial, partial_lse,
        sinks if sinks is not None else lse, plan.items, plan.kv_indices, plan.turns, q.stride(0), q.stride(1),
        *row_steps(k_words), *row_steps(v_words), *(step for f in factors for step in factor_steps(f)),
        out.stride(0) // 8, out.stride(1) // 8, p.num_qo_heads, p.num_kv_heads, heads_per_item, inverse(heads_per_item),
        p.group_size, p.window_left, scale, cap_scale, scales.out, C=spec, num_warps=WAYS.value,
        maxnreg=registers(spec)[0],
    )  # fmt: skip
    if plan.num_merges:
        launch_merge(plan, out, lse, workspace, sinks)


def row_steps(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of pages, tokens and heads of words, in 16 bytes; 0 for the pages of ragged KV."""
    steps = tuple(s // 8 for s in x.stride()[:-1])
    return steps if x.dim() == 4 else (0, *steps)


def factor_steps(factor: Factor | None) -> tuple[int, ...]:
    """Strides of pages, tokens and heads of a factor, in elements; 0 where it has no such dimension."""
    steps = factor.values.stride() if factor else ()
    return (0,) * (3 - len(steps)) + tuple(steps)


def signature(spec: NarrowSpec, dtype: str) -> dict[str, str]:
    """Argument types of a launch, as Triton writes them."""
    box = f"tensordesc<i16[1, {spec.heads}, {PIECE.value}, {spec.words}],{box_layout(spec.words)!r}>"
    found = dict.fromkeys(("k_desc", "v_desc"), box if spec.boxes else "constexpr")
    found |= dict.fromkeys(("q_ptr", "out_ptr"), f"*{dtype}")
    found |= dict.fromkeys(("k_ptr", "v_ptr"), "*i16")
    found |= dict.fromkeys(("items_ptr", "kv_indices_ptr", "turns_ptr"), "*i32")
    found |= dict.fromkeys(("scale", "cap", "out_scale"), "fp32")
    if spec.half:
        found |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "k_zero_ptr", "v_zero_ptr"), "*fp16")
    found["C"] = "constexpr"
    for name in narrow_kernel.arg_names:
        found.setdefault(name, "*fp32" if name.endswith("_ptr") else "i32")
    return found


def compile_cases() -> Iterator[CompileCase]:
    """Every format and form of scale; pieces by TMA and rows; a head for each warp and for two; the variants."""
    int4 = NarrowSpec("int4", 32, 4, 64, 6, 4, 16, True, k_form="token", v_form="token")
    int8 = NarrowSpec("int8", 64, 2, 64, 3, 4, 16, True, k_form="token", v_form="token")
    fp8 = NarrowSpec("e4m3", 64, 2, 64, 3, 4, 16, True)
    rows = {"page_size": 1, "boxes": False}
    every = {"left": True, "soft_cap": True, "sinks": True}
    zeros = {"k_zero": True, "v_zero": True}
    eight8, eight4 = {"heads": 8, "block_n": 32}, {"heads": 8, "stages": 3}
    specs = {
        "int4": int4, "int4.eight": replace(int4, **eight4), "int4.all": replace(int4, **every, by_heads=True),
        "int4.rows": replace(int4, heads=8, block_n=32, **rows),
        "int4.rows.all": replace(int4, page_size=3, boxes=False, **every),
        "int4.dim64": replace(int4, words=16), "int4.dim64.zeros": replace(int4, words=16, stages=11, **zeros),
        "int4.head": replace(int4, k_form="head", v_form="head", page_size=0),
        "int4.zeros": replace(int4, **zeros), "int4.half": replace(int4, half=True),
        "int4.eight.zeros.half": replace(int4, **eight4, **zeros, half=True, **every),
        "int4.rows.zeros.half": replace(int4, **zeros, half=True, **rows), "int8.zeros": replace(int8, **zeros),
        "int8.rows.zeros": replace(int8, **eight8, **rows, **zeros),
        "int8.head.zeros": replace(int8, **zeros, k_form="head", v_form="head"),
        "int8": int8, "int8.eight": replace(int8, **eight8), "int8.rows": replace(int8, **eight8, **rows),
        "int8.all": replace(int8, **every), "int8.mixed": replace(int8, k_form="head"),
        "int8.rows.hnd": replace(int8, **every, by_heads=True, page_size=8, boxes=False),
        "fp8": fp8, "fp8.eight": replace(fp8, **eight8), "fp8.rows": replace(fp8, **eight8, **rows),
        "fp8.all": replace(fp8, **every), "fp8.ragged": replace(fp8, page_size=0),
        "fp8.dim64": replace(fp8, words=32), "e5m2": replace(fp8, kv_format="e5m2", k_form="head", v_form="head"),
        "e5m2.token": replace(fp8, kv_format="e5m2", k_form="token", v_form="token", **every),
    }  # fmt: skip
    for name, spec in specs.items():
        for dtype in ("bf16", "fp16") if name == "int4" else ("bf16",):
            types = signature(spec, dtype)
            constants = {n: spec if n == "C" else None for n, t in types.items() if t == "constexpr"}
            yield CompileCase(
                f"hopper.narrow.{name}.{dtype}", narrow_kernel, types, constants, num_warps=WAYS.value,
                maxnreg=registers(spec)[0], min_capability=90,
            )  # fmt: skip
