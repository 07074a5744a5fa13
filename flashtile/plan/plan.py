"""A plan: the work list of one batch on one device, ready to launch for every layer of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flashtile.config import Config, num_sms
from flashtile.plan.encoding import alibi_slopes, frequencies
from flashtile.plan.moves import MOVE_STRIDE, Moves, make_moves, moved_bytes
from flashtile.plan.problem import Problem, Workload
from flashtile.plan.worklist import (
    ITEM_STRIDE,
    MERGE_FIELDS,
    MERGE_STRIDE,
    Ints,
    LoneTile,
    lone_tile,
    make_worklist,
    take_turns,
)


@dataclass(frozen=True)
class Lengths:
    """Where the requests of a batch lie, on the host.

    qo_indptr [batch_size + 1] in query tokens; kv_base [batch_size]: first KV token (ragged) or first entry of
    kv_indices (paged); kv_len [batch_size] in tokens.
    """

    qo_indptr: Ints
    kv_base: Ints
    kv_len: Ints

    def workload(self) -> Workload:
        """The batch in a few numbers."""
        qo_len = np.diff(self.qo_indptr)
        return Workload(
            batch_size=len(self.kv_len),
            nnz_qo=int(self.qo_indptr[-1]),
            max_qo_len=int(qo_len.max(initial=0)),
            total_kv_len=int(self.kv_len.sum()),
            max_kv_len=int(self.kv_len.max(initial=0)),
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a launch needs but the tensors of a layer. Immutable; the arrays live on the device."""

    problem: Problem
    config: Config
    work: Workload
    device: torch.device
    items: Tensor  # [num_items, ITEM_STRIDE] int32
    merges: Tensor  # [num_merges, MERGE_STRIDE] int32
    turns: Tensor  # [rounds, ctas] int32, of a persistent grid; else empty
    kv_indices: Tensor  # page ids, int32; any int32 tensor if the KV is ragged
    table: Tensor  # fp32: the rope's radians per token [head_dim_qk / 2], or ALiBi's slopes [num_qo_heads]; or empty
    num_slots: int
    max_slots: int  # of one split tile
    lengths: Lengths
    kv_rows: int = 0  # pages, or ragged tokens, that K and V must have, as far as the host knows
    kv_rows_request: int = 0  # a request that reads the last of them
    lone: LoneTile | None = None  # the items once more, as arguments of a launch, if they are one tile's
    moves: Moves | None = None  # with config.copy_first: what brings q and K to where `inner` reads them
    inner: "Plan | None" = None  # of the same batch over the result; this plan has no items of its own then

    @property
    def num_items(self) -> int:
        """Work items: CTAs per head group of the portable family."""
        return self.items.shape[0]

    @property
    def num_merges(self) -> int:
        """Tiles that were cut along KV."""
        return self.merges.shape[0]

    @property
    def num_head_groups(self) -> int:
        """Head groups of config.pack query heads each."""
        return self.problem.num_qo_heads // self.config.pack

    def workspace_size(self) -> int:
        """Bytes of workspace that run() needs: the partial states of split tiles, fp32; and of rotated q and K."""
        if self.inner is not None:
            return sum(moved_bytes(self.problem, self.work, self.config.turn_q)) + self.inner.workspace_size()
        return self.num_slots * self.num_head_groups * self.config.block_m * (self.problem.head_dim_vo + 1) * 4

    def partials(self, workspace: Tensor) -> tuple[Tensor, Tensor]:
        """The workspace as partial outputs [slots, head groups, block_m, head_dim_vo] and lse [.., block_m], fp32."""
        rows = self.num_slots * self.num_head_groups * self.config.block_m
        flat = workspace.view(torch.float32)
        dims = (self.num_slots, self.num_head_groups, self.config.block_m)
        out = flat[: rows * self.problem.head_dim_vo].view(*dims, self.problem.head_dim_vo)
        lse = flat[rows * self.problem.head_dim_vo : rows * (self.problem.head_dim_vo + 1)].view(*dims)
        return out, lse


def make_plan(
    problem: Problem,
    config: Config,
    lengths: Lengths,
    kv_indices: Tensor,
    device: torch.device,
    kv_rows: int = 0,
    kv_rows_request: int = 0,
) -> Plan:
    """Schedule a batch and bring the work list to the device in one copy."""
    if config.copy_first:
        return _make_copied_plan(problem, config, lengths, kv_indices, device, kv_rows, kv_rows_request)
    tiling = config.tiling(problem, num_sms(device))
    work = make_worklist(
        lengths.qo_indptr, lengths.kv_base, lengths.kv_len, tiling, problem.window_left, problem.window_right
    )
    turns = np.empty((0, 0), dtype=np.int32)
    if tiling.persistent:
        turns = take_turns(work.items, tiling)
    # the table first, filled up to 16 bytes: then items start at such a multiple in every plan
    host = [position_table(problem).view(np.int32), work.items, work.merges, turns]
    table, items, merges, turns_there = upload(host, device)
    return Plan(
        problem=problem,
        config=config,
        work=lengths.workload(),
        device=device,
        items=items.view(-1, ITEM_STRIDE),
        merges=merges.view(-1, MERGE_STRIDE),
        turns=turns_there.view(turns.shape),
        kv_indices=kv_indices,
        table=table.view(torch.float32),
        num_slots=work.num_slots,
        max_slots=int(work.merges[:, MERGE_FIELDS.index("num_slots")].max(initial=0)),
        lengths=lengths,
        kv_rows=kv_rows,
        kv_rows_request=kv_rows_request,
        lone=lone_tile(work.items, tiling),
    )


def _make_copied_plan(
    problem: Problem,
    config: Config,
    lengths: Lengths,
    kv_indices: Tensor,
    device: torch.device,
    kv_rows: int,
    kv_rows_request: int,
) -> Plan:
    """The plan of a batch whose K and V, and q if it is rotated, are copied first."""
    qo_begin, qo_len = lengths.qo_indptr[:-1], np.diff(lengths.qo_indptr)
    kv_begin = np.cumsum(lengths.kv_len) - lengths.kv_len
    rope_left = problem.rope if config.turn_q else None  # of q
    rotated = qo_len if problem.rope and not rope_left else np.zeros_like(qo_len)
    q_moves = make_moves(qo_begin, qo_begin, rotated, lengths.kv_len - qo_len)
    kv_moves = make_moves(kv_begin, lengths.kv_base, lengths.kv_len, np.zeros_like(kv_begin))
    table, q_part, kv_part = upload([position_table(problem).view(np.int32), q_moves, kv_moves], device)
    inner = make_plan(
        replace(problem, rope=rope_left, page_size=0),
        replace(config, copy_first=False),
        Lengths(lengths.qo_indptr, kv_begin, lengths.kv_len),
        kv_indices,
        device,
    )
    return Plan(
        problem=problem,
        config=config,
        work=lengths.workload(),
        device=device,
        items=table[:0].view(-1, ITEM_STRIDE),
        merges=table[:0].view(-1, MERGE_STRIDE),
        turns=table[:0].view(0, 1),
        kv_indices=kv_indices,
        table=table.view(torch.float32),
        num_slots=0,
        max_slots=0,
        lengths=lengths,
        kv_rows=kv_rows,
        kv_rows_request=kv_rows_request,
        moves=Moves(q_part.view(-1, MOVE_STRIDE), kv_part.view(-1, MOVE_STRIDE)),
        inner=inner,
    )


def position_table(p: Problem) -> npt.NDArray[np.float32]:
    """What the kernels need for a position encoding (see Plan.table), filled up to a multiple of 4 numbers."""
    if p.rope is not None:
        numbers = frequencies(p.head_dim_qk, p.rope)
    elif p.alibi:
        numbers = alibi_slopes(p.num_qo_heads)
    else:
        return np.empty(0, dtype=np.float32)
    return np.pad(numbers.float().numpy(), (0, -len(numbers) % 4))


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:  # type: ignore[type-arg]
    """Flat int32 tensors on the device from host arrays: one pinned buffer, one asynchronous copy."""
    sizes = [a.size for a in arrays]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    for part, array in zip(host.split(sizes), arrays, strict=True):
        part.copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(-1)))
    return list(host.to(device, non_blocking=True).split(sizes))
