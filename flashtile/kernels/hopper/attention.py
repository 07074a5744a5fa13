"""The Hopper attention family: a persistent kernel with TMA, wgmma and specialised warps, behind the portable family's
launcher.

The kernel's roles are in loader.py and mainloop.py; what it is specialised on, and its barriers, in spec.py. Where the
strides of a layer's tensors can be expressed neither by TMA nor by 16-byte copies, the portable family takes over.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch

from flashtile import config as configs
from flashtile.config import TURNED_DIMS, box_rows, num_sms
from flashtile.kernels import attention as portable
from flashtile.kernels import softmax
from flashtile.kernels.attention import launch_merge
from flashtile.kernels.hopper.barriers import barriers
from flashtile.kernels.hopper.compat import TensorDescriptor, gl, gluon
from flashtile.kernels.hopper.lazy import GROWTH
from flashtile.kernels.hopper.loader import qk_loader, v_loader
from flashtile.kernels.hopper.mainloop import consumer
from flashtile.kernels.hopper.rotation import turner
from flashtile.kernels.hopper.spec import (
    RING,
    ROWS,
    WARP,
    Spec,
    has_turner,
    loader_warps,
    num_pieces,
    panel,
    piece,
    registers,
    rows_layout,
)
from flashtile.kernels.hopper.tiles import inverse
from flashtile.plan.plan import Plan, make_plan
from flashtile.testing.compile import CompileCase

LOG2_E: float = softmax.LOG2_E.value
I32, I64, F32 = gl.int32, gl.int64, gl.float32


@gluon.jit
def buffers(dtype: gl.constexpr, SLOTS: gl.constexpr, ROWS_EACH: gl.constexpr, DIM: gl.constexpr):
    """Shared memory for SLOTS x ROWS_EACH rows of a head dim: one buffer per piece of it."""
    out = ()
    for p in gl.static_range(num_pieces(DIM)):
        out = out + (gl.allocate_shared_memory(dtype, [SLOTS, ROWS_EACH, piece(DIM, p)], rows_layout(DIM)),)
    return out


# Arguments that vary from call to call: no variant of its own for 1 or for multiples of 16. What is only used in
# addresses is
# 64 bits wide: the compiler would widen it at the kernel's entry, where it has no register to keep it in.
WIDE = ("stride_on", "stride_oh", "num_heads", "num_groups")
RUNTIME = (
    *WIDE, "q_token", "q_cols", "q_rows", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head", "o_cols",
    "o_rows", "heads_per_item", "inverse_heads", "inverse_groups", "heads_packed", "inverse_packed",
    "page_size", "boxes", "window_left", "window_reach", "q_heads_token", "group",
)  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME)
def attention_kernel(
    q_desc, q_heads_desc, k_desc, v_desc, o_desc, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    sinks_ptr, freqs_ptr, items_ptr, kv_indices_ptr, turns_ptr,
    q_token: I32, q_cols: I32, q_rows: I32, q_heads_token: I32, group: I32,
    k_page: I32, k_token: I32, k_head: I32, v_page: I32, v_token: I32,
    v_head: I32, stride_on: I64, stride_oh: I64, o_cols: I32, o_rows: I32,
    num_heads: I64, num_groups: I64, heads_per_item: I32, inverse_heads: I32, inverse_groups: I32,
    heads_packed: I32, inverse_packed: I32, page_size: I32, boxes: I32, window_left: I32, window_reach: I32,
    scale: F32, cap_scale: F32, slack: F32, C: gl.constexpr,
):  # fmt: skip
    """One persistent CTA; see spec.py for its roles and barriers, and loader.py for what the strides mean."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_bufs = buffers(dtype, C.q_slots * C.consumers, ROWS, C.d_qk)
    k_bufs = buffers(dtype, C.stages, C.block_n, C.d_qk)
    v_bufs = buffers(dtype, C.stages, C.block_n, C.d_vo)
    o_bufs = ()
    if C.o_tma:
        o_bufs = buffers(dtype, C.consumers, ROWS, C.d_vo)
    scratch = gl.to_tensor(0)
    if C.gather:
        scratch = gl.allocate_shared_memory(gl.int32, [2, C.block_n], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ring = gl.allocate_shared_memory(gl.int32, [RING, WARP], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    KV_ARRIVALS: gl.constexpr = 32 * loader_warps(C) if C.gather else 1
    q_full = barriers(C.q_slots, 1)
    q_empty = barriers(C.q_slots, C.consumers)
    k_full = barriers(C.stages, KV_ARRIVALS)
    v_full = barriers(C.stages, KV_ARRIVALS)
    tile_full = barriers(RING, 1)
    tail_full = barriers(1, 1)
    q_ready = q_full
    if has_turner(C):
        q_ready = barriers(C.q_slots, 1)

    smem = (q_bufs, k_bufs, v_bufs, o_bufs, ring, scratch)
    bars = (q_full, q_empty, k_full, v_full, tile_full, tail_full)
    ready = (q_ready, q_empty, k_full, v_full, tile_full, tail_full)
    pack = (heads_packed, inverse_packed)
    heads = (q_heads_desc, q_heads_token, group) if C.pack_decode else ()
    q = (q_desc, q_ptr, q_token, q_cols, q_rows, pack, heads)
    k = (k_desc, k_ptr, k_page, k_token, k_head)
    v = (v_desc, v_ptr, v_page, v_token, v_head)
    outputs = (
        o_desc, out_ptr, stride_on, stride_oh, o_cols, o_rows, lse_ptr, partial_ptr, partial_lse_ptr, sinks_ptr,
        num_heads, num_groups, pack, group if C.pack_decode else 0,
    )  # fmt: skip
    table = (kv_indices_ptr, page_size, boxes)
    scales = (scale, cap_scale, slack)
    window = (window_left, window_reach, pack)
    work = (items_ptr, turns_ptr, heads_per_item, inverse_heads, inverse_groups)
    if C.consumers == 1:
        gl.warp_specialize(
            [
                (consumer, (0, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (qk_loader, (smem, bars, q, k, work, table, C)),
                (v_loader, (smem, bars, v, work, table, C)),
            ],
            [loader_warps(C), loader_warps(C)],
            [registers(C)[2], registers(C)[2]],
        )
    elif has_turner(C):
        gl.warp_specialize(
            [
                (consumer, (0, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (consumer, (1, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (turner, (smem, bars, q_ready, pack, freqs_ptr, C)),
                (qk_loader, (smem, bars, q, k, work, table, C)),
                (v_loader, (smem, bars, v, work, table, C)),
            ],
            [4, 4, loader_warps(C), loader_warps(C)],
            [registers(C)[1], registers(C)[2], registers(C)[2], registers(C)[2]],
        )
    elif C.consumers == 2:
        gl.warp_specialize(
            [
                (consumer, (0, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (consumer, (1, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (qk_loader, (smem, bars, q, k, work, table, C)),
                (v_loader, (smem, bars, v, work, table, C)),
            ],
            [4, loader_warps(C), loader_warps(C)],
            [registers(C)[1], registers(C)[2], registers(C)[2]],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (consumer, (1, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (consumer, (2, smem, ready, outputs, scales, window, freqs_ptr, C)),
                (qk_loader, (smem, bars, q, k, work, table, C)),
                (v_loader, (smem, bars, v, work, table, C)),
            ],
            [4, 4, loader_warps(C), loader_warps(C)],
            [registers(C)[1], registers(C)[1], registers(C)[2], registers(C)[2]],
        )


SHARED_BYTES = 232_448  # of an SM of compute capability 9.0, for one CTA
SMALL_BYTES = 1_024  # barriers, the hand-over ring, and what Triton adds


@dataclass(frozen=True)
class Matrix:
    """A tensor [.., tokens, heads, dim] as a matrix whose rows are one token apart, for TMA.

    Element (page, token, head, d) is at row page * pages + token + head * head_rows, column head * head_cols + d.
    """

    rows: int
    cols: int
    stride: int
    pages: int
    head_cols: int
    head_rows: int

    def descriptor(self, x: torch.Tensor, box: int) -> TensorDescriptor:
        """A TMA descriptor of x for boxes of `box` rows."""
        dim = x.shape[-1]
        return TensorDescriptor(x, [self.rows, self.cols], [self.stride, 1], [box, panel(dim)], rows_layout(dim))


def as_matrix(x: torch.Tensor) -> Matrix | None:
    """[tokens, heads, dim] or [pages, page_size, heads, dim] as a matrix, or None if TMA cannot express its strides."""
    tokens, heads, dim = x.shape[-3:]
    page_step, step, head_step = x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2)
    if heads == 1:
        head_cols = head_rows = 0
    elif head_step < step:
        head_cols, head_rows = head_step, 0
    else:
        head_cols, head_rows = 0, head_step // step if step else 0
    pages = page_step // step if step else 0
    cols = (heads - 1) * head_cols + dim
    rows = tokens + (heads - 1) * head_rows + ((x.shape[0] - 1) * pages if x.dim() == 4 else 0)
    exact = pages * step == page_step and (heads == 1 or head_cols + head_rows * step == head_step)
    if not exact or not copyable(x) or not 0 < cols <= step or not 0 < rows < 2**31:
        return None
    return Matrix(rows, cols, step, pages, head_cols, head_rows)


def by_heads(q: torch.Tensor) -> Matrix | None:
    """[tokens, heads, dim] as a matrix whose rows are one head apart, each token a "page" of them, if it can be."""
    tokens, heads, dim = q.shape
    step, head_step = q.stride(0), q.stride(1)
    if not dim <= head_step or step % head_step or not copyable(q):
        return None
    rows = (tokens - 1) * (step // head_step) + heads
    return Matrix(rows, dim, head_step, step // head_step, 0, 1) if rows < 2**31 else None


def copyable(x: torch.Tensor) -> bool:
    """Whether every row of x starts at a multiple of 16 bytes (8 elements)."""
    return x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1])


def near(x: torch.Tensor) -> bool:
    """Whether all of x lies within 2**32 times 8 elements (64 GB): what the offsets of a gathering loader reach."""
    return sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) // 8 < 2**32


def is_aligned(plan: Plan) -> bool:
    """Whether the diagonal of every tile starts at the first key of a KV block, and the tile's last block holds all of
    it."""
    p, c, lengths = plan.problem, plan.config, plan.lengths
    if p.window_right != 0 or c.pack != 1 or c.block_m != c.block_n or plan.num_merges:
        return False
    return not np.any((lengths.kv_len - np.diff(lengths.qo_indptr)) % c.block_n)


def has_tails(plan: Plan) -> bool:
    """Whether the last tile of some request leaves a consumer without rows."""
    c = plan.config
    rest = np.diff(plan.lengths.qo_indptr) * c.pack % c.block_m
    return bool(np.any((rest > 0) & (rest <= c.block_m - 64)))


class Setup:
    """What a plan's launches share, whatever the tensors: the kernel variants it may need, and the grid."""

    def __init__(self, plan: Plan) -> None:
        p, c = plan.problem, plan.config
        self.heads_per_item = c.heads_per_item or plan.num_head_groups
        self.inverses = inverse(self.heads_per_item), inverse(p.group_size // c.pack)
        self.grid = (plan.turns.shape[1],)
        self.box = box_rows(p.page_size, c.block_n)
        self.gathered_box = 1 if p.page_size == 1 else 0
        self.variants: dict[tuple[bool, ...], Spec] = {}
        self.plan = ref(plan)
        self.portable: Plan | None = None
        self.base = base_spec(plan, is_aligned(plan))

    def spec(self, gather: bool, q_tma: bool, o_tma: bool, sinks: bool) -> Spec:
        """The variant for tensors of these kinds."""
        key = (gather, q_tma, o_tma, sinks)
        if key not in self.variants:
            self.variants[key] = fit(
                replace(
                    self.base, gather=gather, q_tma=q_tma, o_tma=o_tma, sinks=sinks,
                    box=self.gathered_box if gather else self.box,
                )
            )  # fmt: skip
        return self.variants[key]

    def portable_plan(self) -> Plan:
        """The same batch for the portable family, not split: its tiles are others, and the workspace was sized for
        ours."""
        if self.portable is None:
            p = self.plan()
            assert p is not None, "a Setup is used while its plan exists"
            turned = p.config.turn_q and p.inner is None and p.work.total_kv_len > 0
            assert not turned, "keys that have been turned would be turned again; `takes` is asked before they are"
            config = configs.portable(p.problem, p.work, configs.capability(p.device), num_sms(p.device))
            self.portable = make_plan(p.problem, replace(config, split=False), p.lengths, p.kv_indices, p.device)
        return self.portable


def base_spec(plan: Plan, aligned: bool) -> Spec:
    """The part of a kernel variant that follows from the plan alone."""
    p, c = plan.problem, plan.config
    return Spec(
        d_qk=p.head_dim_qk, d_vo=p.head_dim_vo, block_n=c.block_n, consumers=c.block_m // 64, stages=c.num_stages,
        q_slots=2, packed=c.pack > 1, paged=p.paged, box=box_rows(p.page_size, c.block_n),
        left=p.window_left >= 0, right=p.window_right >= 0, aligned=aligned, tails=has_tails(plan),
        pack_decode=c.pack_decode and 1 in np.diff(plan.lengths.qo_indptr),
        soft_cap=p.logits_soft_cap > 0, split=plan.num_merges > 0, rope=c.turn_q and p.rope is not None,
        chained=c.chained and c.pack == 1,
    )  # fmt: skip


def shared_bytes(spec: Spec) -> int:
    """Shared memory of a variant, in bytes, without the small things."""
    q = spec.q_slots * spec.consumers * 64 * spec.d_qk
    kv = spec.stages * spec.block_n * (spec.d_qk + spec.d_vo)
    out = spec.consumers * 64 * spec.d_vo if spec.o_tma else 0
    return 2 * (q + kv + out) + (8 * spec.block_n if spec.gather else 0)


def fit(spec: Spec) -> Spec:
    """Give up what does not fit in shared memory: the second slot for Q, then the buffer for O."""
    for q_slots, o_tma in ((2, spec.o_tma), (1, spec.o_tma), (1, False)):
        spec = replace(spec, q_slots=q_slots, o_tma=o_tma)
        small = SMALL_BYTES + (64 if spec.sinks and spec.split else 0)  # the epilogue then exchanges a little more
        if shared_bytes(spec) <= SHARED_BYTES - small:
            return replace(spec, chained=spec.chained and has_turner(spec))  # consumers find each angle for itself
    raise ValueError(f"no room in shared memory for {spec}; take a smaller block_n or fewer stages")


_SETUPS: WeakKeyDictionary[Plan, Setup] = WeakKeyDictionary()


def setup_of(plan: Plan) -> Setup:
    """The plan's Setup, made at its first launch."""
    found = _SETUPS.get(plan)
    if found is None:
        found = _SETUPS[plan] = Setup(plan)
    return found


def portable_plan(plan: Plan) -> Plan:
    """The batch of a plan for the portable family; it needs no workspace."""
    return setup_of(plan).portable_plan()


def takes(plan: Plan, q: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sm_scale: float) -> bool:
    """Whether the kernels can read and write these tensors, K aside, and logits of this scale: the running maximum is
    of q.k itself, which needs a positive one; copies move 16 bytes; and values must be in reach of TMA or of a
    gathering loader, of which head_dim 256 has none, as it would spill registers."""
    if not sm_scale > 0 or not (copyable(q) and copyable(v) and copyable(out)):
        return False
    return (plan.problem.head_dim_qk < 256 and near(v)) or as_matrix(v) is not None


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
    """Launch the Hopper family, with the arguments of the portable family's `run`."""
    p, c = plan.problem, plan.config
    if not plan.num_items:
        return
    setup = setup_of(plan)
    if not takes(plan, q, v, out, sm_scale) or not copyable(k) or not k.shape[0]:
        portable.run(setup.portable_plan(), q, k, v, out, lse, workspace, sm_scale, sinks)
        return
    q_matrix, out_matrix = (as_matrix(q), as_matrix(out)) if c.pack == 1 else (None, None)
    k_matrix, v_matrix = (as_matrix(k), as_matrix(v)) if setup.box else (None, None)
    gather = k_matrix is None or v_matrix is None
    heads_matrix = by_heads(q) if setup.base.pack_decode and q_matrix else None
    if setup.base.pack_decode and heads_matrix is None:
        q_matrix = None
    if gather and not (p.head_dim_qk < 256 and near(k) and near(v)):  # head_dim 256 would spill registers
        portable.run(setup.portable_plan(), q, k, v, out, lse, workspace, sm_scale, sinks)
        return
    spec = setup.spec(gather, q_matrix is not None, out_matrix is not None, sinks is not None)

    q_desc = q_matrix.descriptor(q, 64) if q_matrix else None
    q_heads_desc = heads_matrix.descriptor(q, 64) if heads_matrix else None
    o_desc = out_matrix.descriptor(out, 64) if out_matrix and spec.o_tma else None
    if gather:
        k_desc = v_desc = None
        k_steps, v_steps = steps(k), steps(v)
    else:
        k_desc, v_desc = k_matrix.descriptor(k, spec.box), v_matrix.descriptor(v, spec.box)
        k_steps = k_matrix.pages, k_matrix.head_cols, k_matrix.head_rows
        v_steps = v_matrix.pages, v_matrix.head_cols, v_matrix.head_rows
    q_steps = (0, q_matrix.head_cols, q_matrix.head_rows) if q_matrix else (q.stride(0) // 8, q.stride(1) // 8, 0)
    o_steps = (out_matrix.head_cols, out_matrix.head_rows) if out_matrix else (0, 0)
    cap = p.logits_soft_cap
    scale, cap_scale = (cap * LOG2_E, sm_scale / cap) if cap > 0 else (sm_scale * LOG2_E, 0.0)
    partial, partial_lse = plan.partials(workspace)
    attention_kernel[setup.grid](
        q_desc, q_heads_desc, k_desc, v_desc, o_desc, q, k, v, out, lse, partial, partial_lse,
        sinks if sinks is not None else lse, plan.table, plan.items, plan.kv_indices, plan.turns,
        *q_steps, heads_matrix.pages if heads_matrix else 0, p.group_size, *k_steps, *v_steps,
        out.stride(0) // 8, out.stride(1) // 8, *o_steps,
        p.num_qo_heads, plan.num_head_groups, setup.heads_per_item, *setup.inverses, c.pack,
        inverse(c.pack), p.page_size, c.block_n // spec.box if spec.box else 0,
        p.window_left, p.window_right + 1, scale, cap_scale, GROWTH / scale, C=spec,
        num_warps=4, maxnreg=registers(spec)[0],
    )  # fmt: skip
    if plan.num_merges:
        launch_merge(plan, out, lse, workspace, sinks)


def steps(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of pages, tokens and heads, in units of 8 elements; 0 for the pages of ragged KV."""
    page = x.stride(0) // 8 if x.dim() == 4 else 0
    return page, x.stride(-3) // 8, x.stride(-2) // 8


def signature(spec: Spec, dtype: str) -> dict[str, str]:
    """Argument types of a launch, as Triton writes them."""

    def desc(rows: int, dim: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {panel(dim)}],{rows_layout(dim)!r}>"

    found = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    found |= dict.fromkeys(("lse_ptr", "partial_ptr", "partial_lse_ptr", "sinks_ptr", "freqs_ptr"), "*fp32")
    found |= dict.fromkeys(("items_ptr", "kv_indices_ptr", "turns_ptr"), "*i32")
    found |= dict.fromkeys(("scale", "cap_scale", "slack"), "fp32")
    found["q_desc"] = desc(64, spec.d_qk) if spec.q_tma else "constexpr"
    found["q_heads_desc"] = desc(64, spec.d_qk) if spec.q_tma and spec.pack_decode else "constexpr"
    found["k_desc"] = desc(spec.box, spec.d_qk) if not spec.gather else "constexpr"
    found["v_desc"] = desc(spec.box, spec.d_vo) if not spec.gather else "constexpr"
    found["o_desc"] = desc(64, spec.d_vo) if spec.o_tma else "constexpr"
    found["C"] = "constexpr"
    for name in attention_kernel.arg_names:
        found.setdefault(name, "i64" if name in WIDE else "i32")
    return found


def compile_cases() -> Iterator[CompileCase]:
    """Every head dim; ragged KV, paged by TMA and gathered; packed rows, split tiles, the variants."""
    causal = Spec(d_qk=128, d_vo=128, block_n=128, consumers=2, stages=2, q_slots=2, right=True, aligned=True)
    gathered = replace(causal, paged=True, gather=True, box=1, aligned=False, tails=True, pack_decode=True)
    rows = replace(gathered, box=0, left=True, soft_cap=True, sinks=True, split=True)
    specs = {
        "causal": causal,
        "causal.tails": replace(causal, tails=True),
        "causal.decode": replace(causal, tails=True, pack_decode=True),
        "full": replace(causal, right=False),
        "paged": replace(causal, paged=True, box=16, aligned=False, tails=True, pack_decode=True),
        "paged.rows": replace(causal, paged=True, box=16, aligned=False, tails=True, pack_decode=True, q_tma=False),
        "paged.all": replace(
            causal, paged=True, box=16, aligned=False, tails=True, pack_decode=True, left=True, sinks=True, split=True
        ),
        "page1": gathered,
        "page3.all": fit(rows),
        "page3.packed": replace(rows, soft_cap=False, packed=True, pack_decode=False, q_tma=False, o_tma=False),
        "page1.dim192x128": replace(gathered, d_qk=192, pack_decode=False),
        "window.cap.sinks": replace(
            causal, left=True, soft_cap=True, sinks=True, aligned=False, tails=True, pack_decode=True
        ),
        "packed.stages3": replace(
            causal, packed=True, paged=True, box=16, stages=3, q_tma=False, o_tma=False, aligned=False, tails=True
        ),
        "page1.packed.stages3": replace(
            gathered, packed=True, pack_decode=False, stages=3, q_tma=False, o_tma=False, aligned=False
        ),
        "packed.split": replace(causal, consumers=1, packed=True, split=True, q_tma=False, o_tma=False, aligned=False),
        "rope": replace(causal, rope=True, chained=True),
        "rope.decode": replace(causal, rope=True, chained=True, tails=True, pack_decode=True),
        "rope.rows": replace(causal, rope=True, chained=True, q_tma=False, tails=True),
        "rope.not_chained": replace(causal, rope=True, right=False),
        "rope.all": replace(
            causal, rope=True, aligned=False, tails=True, pack_decode=True, left=True, sinks=True, split=True
        ),
        "rope.cap": replace(causal, rope=True, aligned=False, tails=True, pack_decode=True, left=True, soft_cap=True),
        "rope.gathered": replace(rows, rope=True, paged=False, box=0),
        "rope.packed": replace(
            causal, rope=True, packed=True, stages=3, split=True, q_tma=False, o_tma=False, aligned=False, tails=True
        ),
        "rope.packed.split": replace(
            causal, rope=True, consumers=1, packed=True, split=True, q_tma=False, o_tma=False, aligned=False, left=True
        ),
        "rope.dim64": replace(causal, rope=True, d_qk=64, d_vo=64, stages=4),
        "rope.dim64.three": replace(
            causal, rope=True, d_qk=64, d_vo=64, consumers=3, stages=3, aligned=False, tails=True
        ),
        "rope.dim256": replace(causal, rope=True, d_qk=256, d_vo=256, block_n=64, aligned=False, tails=True),
        "dim64": replace(causal, d_qk=64, d_vo=64, stages=4),
        "dim64.three": replace(causal, d_qk=64, d_vo=64, consumers=3, stages=3, aligned=False),
        "dim64.three.full": replace(causal, d_qk=64, d_vo=64, consumers=3, stages=3, right=False, tails=True),
        "dim96": replace(causal, d_qk=96, d_vo=96, stages=3),
        "dim96.decode": replace(gathered, d_qk=96, d_vo=96, stages=3, left=True, sinks=True, split=True),
        "dim96.paged": replace(
            causal, d_qk=96, d_vo=96, stages=3, paged=True, box=16, aligned=False, tails=True, pack_decode=True
        ),
        "dim192x128": replace(causal, d_qk=192),
        "dim192x128.tails": replace(causal, d_qk=192, aligned=False, tails=True),
        "dim256": replace(causal, d_qk=256, d_vo=256, block_n=64),
        "dim256.tails": replace(causal, d_qk=256, d_vo=256, block_n=64, left=True, aligned=False, tails=True),
    }
    for name, spec in specs.items():
        if spec.rope and spec.d_qk not in TURNED_DIMS:
            continue
        spec = fit(spec)
        for dtype in ("bf16", "fp16") if name == "causal" else ("bf16",):
            types = signature(spec, dtype)
            constants = {n: spec if n == "C" else None for n, t in types.items() if t == "constexpr"}
            yield CompileCase(
                f"hopper.{name}.{dtype}",
                attention_kernel,
                types,
                constants,
                maxnreg=registers(spec)[0],
                min_capability=90,
            )
