"""Copying first: K, V if it is paged, and q if it is rotated and the family does not turn it itself, are brought into
the workspace before attention, one request after the other. Which rows go where, and how the workspace is shared out.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flashtile.plan.problem import Problem, Workload
from flashtile.plan.worklist import Ints

# Columns of a block of rows, int32 each: `count` tokens, from token `first` of a request whose rows start at `base`
# (kernels/kv.py), go to rows from `to` on; the first of them is at `position`.
MOVE_FIELDS = ("to", "base", "first", "count", "position")
MOVE_STRIDE = len(MOVE_FIELDS)
MOVE_TOKENS = 32  # of a block, at most


@dataclass(frozen=True, eq=False)
class Moves:
    """The blocks of q and those of K and V, each [n, MOVE_STRIDE] int32 on the device."""

    q: Tensor
    kv: Tensor


def make_moves(to: Ints, base: Ints, length: Ints, position: Ints) -> NDArray[np.int32]:
    """The blocks [n, MOVE_STRIDE] of requests: where their rows go, start, how many there are, and where the first of
    them is in the KV sequence; arguments [batch_size]."""
    blocks = -(-length // MOVE_TOKENS)
    r = np.repeat(np.arange(len(length)), blocks)
    first = (np.arange(len(r)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * MOVE_TOKENS
    count = np.minimum(length[r] - first, MOVE_TOKENS)
    return np.stack([to[r] + first, base[r], first, count, position[r] + first], axis=1).astype(np.int32)


def moved_shapes(p: Problem, work: Workload, turn_q: bool) -> tuple[tuple[int, int, int], ...]:
    """[rows, heads, dim] of q, K and V in the workspace; q and V have no rows there if they are read where they are.

    turn_q: see Config.
    """
    return (
        (work.nnz_qo if p.rope and not turn_q else 0, p.num_qo_heads, p.head_dim_qk),
        (work.total_kv_len, p.num_kv_heads, p.head_dim_qk),
        (work.total_kv_len if p.paged else 0, p.num_kv_heads, p.head_dim_vo),
    )


def moved_bytes(p: Problem, work: Workload, turn_q: bool) -> list[int]:
    """Bytes of q, K and V in the workspace, each a multiple of 128. They grow with the batch: the one part of the
    workspace that the number of CTAs does not bound."""
    return [-(-math.prod(shape) * p.q_dtype.itemsize // 128) * 128 for shape in moved_shapes(p, work, turn_q)]


def moved(p: Problem, work: Workload, turn_q: bool, workspace: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, K and V in the workspace (uint8), and the rest of it."""
    sizes = moved_bytes(p, work, turn_q)
    *parts, rest = workspace.split([*sizes, workspace.numel() - sum(sizes)])
    q, k, v = (
        part.view(p.q_dtype)[: math.prod(shape)].view(shape)
        for part, shape in zip(parts, moved_shapes(p, work, turn_q), strict=True)
    )
    return q, k, v, rest
