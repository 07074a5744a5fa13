"""Attention over copies in the workspace, for families that do not rotate or gather as well in passing.

With a rope, each row of K is turned once, where a prefill's tiles would turn every key once per tile; and each row of
q, unless the family does (config.turn_q). Paged K and V become ragged on the way.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl

from flashtile.config import Config
from flashtile.kernels import kv
from flashtile.kernels.rotation import cos_sin_for, load_frequencies, turn
from flashtile.plan.encoding import Rope
from flashtile.plan.moves import MOVE_STRIDE, MOVE_TOKENS, moved
from flashtile.plan.plan import Lengths, Plan, make_plan
from flashtile.plan.problem import Problem
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

MOVE = tl.constexpr(MOVE_STRIDE)


@triton.jit
def move_kernel(
    out_ptr, x_ptr, moves_ptr, kv_indices_ptr, table_ptr, stride_page, stride_row, stride_head,
    ROW: tl.constexpr, COS_SIN: tl.constexpr, PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program per (head, block of tokens): rows of x to rows of out [n, HEADS, 2 * WIDTH], turned if there is a
    COS_SIN. Heads first: programs of a moment share the tokens' memory pages."""
    program = tl.program_id(0)
    head = program % HEADS
    move = moves_ptr + (program // HEADS).to(tl.int64) * MOVE
    to, base, first = tl.load(move), tl.load(move + 1), tl.load(move + 2)
    count, position = tl.load(move + 3), tl.load(move + 4)
    token = tl.arange(0, TOKENS)
    in_range = token < count
    page, row = ROW(first + token, in_range, base, kv_indices_ptr, PAGE_SIZE, True)
    cols = tl.arange(0, BLOCK)
    mask = in_range[:, None] & (cols < WIDTH)[None, :]
    ptrs = x_ptr + (page * stride_page + row * stride_row + head.to(tl.int64) * stride_head)[:, None] + cols[None, :]
    out_ptrs = out_ptr + ((to + token).to(tl.int64) * HEADS + head)[:, None] * (2 * WIDTH) + cols[None, :]
    near, far = tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + WIDTH, mask=mask, other=0.0)
    if COS_SIN is not None:
        freqs = load_frequencies(table_ptr, 1, WIDTH, BLOCK)
        near, far = turn((near,), (far,), position + token, freqs, COS_SIN, 1.0)
    tl.store(out_ptrs, near.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + WIDTH, far.to(out_ptr.dtype.element_ty), mask=mask)


def move(plan: Plan, out: torch.Tensor, x: torch.Tensor, moves: torch.Tensor, rotate: bool, paged: bool) -> None:
    """Bring rows of x (q; or K or V, paged or ragged) to out [n, heads, dim]."""
    p = plan.problem
    if not len(moves):
        return
    heads, dim = out.shape[1:]
    move_kernel[(len(moves) * heads,)](
        out, x, moves, plan.kv_indices, plan.table, x.stride(0) if paged else 0, x.stride(-3), x.stride(-2),
        ROW=kv.paged_row if paged else kv.contiguous_row,
        COS_SIN=cos_sin_for(p.q_dtype == torch.float32) if rotate else None,
        PAGE_SIZE=p.page_size, HEADS=heads, WIDTH=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), TOKENS=MOVE_TOKENS,
        num_warps=4,
    )  # fmt: skip


def copy(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, workspace: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, K and V as plan.inner reads them, and what is left of the workspace for it. Arguments as of the portable
    family's `run`."""
    p, moves = plan.problem, plan.moves
    assert moves is not None, "a plan with copy_first"
    turned_q, turned_k, gathered_v, rest = moved(p, plan.work, plan.config.turn_q, workspace)
    rotate = p.rope is not None
    if len(turned_q):
        move(plan, turned_q, q, moves.q, True, False)
        q = turned_q
    move(plan, turned_k, k, moves.kv, rotate, p.paged)
    if p.paged:
        move(plan, gathered_v, v, moves.kv, False, True)
        v = gathered_v
    return q, turned_k, v, rest


def compile_cases() -> Iterator[CompileCase]:
    """Keys from pages and ragged queries, turned; values from pages."""
    for name, dim, dtype, page_size, rotate in (
        ("k.paged", 128, torch.bfloat16, 16, True),
        ("q", 128, torch.bfloat16, 0, True),
        ("q.dim96.fp16", 96, torch.float16, 0, True),
        ("q.fp32", 64, torch.float32, 0, True),
        ("v.paged", 256, torch.bfloat16, 1, False),
    ):
        problem = Problem(32, 8, dim, dim, dtype, dtype, dtype, page_size=page_size, rope=Rope())
        lengths = Lengths(np.array([0, 40]), np.array([0]), np.array([40]))
        config = Config("portable", 64, 64, 4, copy_first=True)
        plan = make_plan(problem, config, lengths, torch.zeros(1, dtype=torch.int32), torch.device("cpu"))
        assert plan.moves is not None, "copy_first"
        x = torch.empty((4, page_size, 8, dim) if page_size else (40, 8, dim), dtype=dtype, device="meta")
        out = torch.empty(40, 8, dim, dtype=dtype, device="meta")
        launch = partial(move, plan, out, x, plan.moves.kv, rotate, page_size > 0)
        yield recorded(f"copied.{name}", move_kernel, launch)
