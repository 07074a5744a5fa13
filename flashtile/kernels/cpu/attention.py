"""The CPU attention family: a plan's work items, gathered into padded batches, over PyTorch matrix products in fp32."""

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from flashtile.plan.plan import Plan
from flashtile.plan.scales import NO_SCALES, Factor, Scales
from flashtile.plan.worklist import ITEM_FIELDS, MERGE_FIELDS

# Logits of one batch, in elements: 16 MB of fp32 stay within a few cores' last-level cache.
MAX_LOGITS = 4 << 20


@dataclass(frozen=True)
class Batch:
    """b items of T query tokens each, all final or all partial, padded to L KV tokens. None: nothing to mask."""

    tokens: Tensor  # [b, T] rows of q
    kv_rows: tuple[Tensor, ...]  # [b, L] each: (rows,) of ragged KV, or (page ids, slots in the page)
    kv_valid: Tensor | None  # [b, L]
    visible: Tensor | None  # [b, T, L]
    q_pos: Tensor  # [b, T] and
    kv_pos: Tensor  # [b, L]: positions in the KV sequence, fp32
    ahead: Tensor  # [b], kv_len - qo_len
    slots: Tensor | None  # [b], where partial states go; None: final results


_BATCHES: "WeakKeyDictionary[Plan, list[Batch]]" = WeakKeyDictionary()


def _make_batches(plan: Plan) -> list[Batch]:
    p, c = plan.problem, plan.config
    columns = dict(zip(ITEM_FIELDS, plan.items.numpy().astype(np.int64).T, strict=True))
    tokens = np.minimum(columns["qo_len"] - columns["row_begin"] // c.pack, c.block_m // c.pack)
    length = columns["kv_end"] - columns["kv_begin"]
    cut = columns["slot"] >= 0
    order = np.lexsort((length, tokens, cut))
    batches, start = [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order):
            widest = int(length[order[stop]])
            a, b = order[start], order[stop]  # requests without KV keep to themselves: padding changes matmul's bits
            same = tokens[a] == tokens[b] and cut[a] == cut[b] and (length[a] > 0) == (length[b] > 0)
            too_long = widest > 2 * length[a] + 64
            if not same or too_long or (stop + 1 - start) * int(tokens[a]) * p.num_qo_heads * widest > MAX_LOGITS:
                break
            stop += 1
        batches.append(
            _make_batch(plan, {k: v[order[start:stop]] for k, v in columns.items()}, int(tokens[order[start]]))
        )
        start = stop
    return batches


def _make_batch(plan: Plan, item: dict[str, np.ndarray], num_tokens: int) -> Batch:  # type: ignore[type-arg]
    p, c = plan.problem, plan.config
    column = {k: torch.from_numpy(v)[:, None] for k, v in item.items()}
    token = column["row_begin"] // c.pack + torch.arange(num_tokens)  # [b, T], inside the request
    longest = int((item["kv_end"] - item["kv_begin"]).max())
    pos = column["kv_begin"] + torch.arange(longest)  # [b, L]
    valid = pos < column["kv_end"]
    safe = torch.where(valid, pos, column["kv_begin"])
    # an item without KV has no row of its own to repeat: row 0 of everything, masked below
    at = torch.where(column["kv_end"] > column["kv_begin"], column["kv_base"], 0)
    if p.paged:
        pages = plan.kv_indices[at + safe // p.page_size].long() if longest else at + pos
        kv_rows: tuple[Tensor, ...] = (pages, safe % p.page_size)
    else:
        kv_rows = (at + safe,)
    visible = valid[:, None, :].expand(-1, num_tokens, -1)
    position = (token + column["kv_len"] - column["qo_len"])[:, :, None]
    if p.window_right >= 0:
        visible = visible & (pos[:, None, :] <= position + p.window_right)
    if p.window_left >= 0:
        visible = visible & (pos[:, None, :] >= position - p.window_left)
    return Batch(
        tokens=column["q_begin"] + token,
        q_pos=position[:, :, 0].float(),
        kv_pos=pos.float(),
        ahead=(column["kv_len"] - column["qo_len"])[:, 0],
        kv_rows=kv_rows,
        kv_valid=None if bool(valid.all()) else valid,
        visible=None if bool(visible.all()) else visible,
        slots=torch.from_numpy(item["slot"]) if item["slot"][0] >= 0 else None,
    )


def _gather(cache: Tensor, at: tuple[Tensor, ...], scale: Factor | None, zero: Factor | None) -> Tensor:
    """Rows of a cache as values, [b, L, H_kv, D] fp32."""
    if cache.dtype == torch.uint8:
        packed = _rows(cache, at)
        rows = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()
    elif cache.element_size() == 1:  # fp8 has no indexing
        rows = _rows(cache.view(torch.uint8), at).view(cache.dtype).float()
    else:
        rows = _rows(cache, at).float()
    if zero is not None:
        rows -= _spread(zero, at, rows)
    elif cache.dtype == torch.uint8:
        rows -= 8.0
    return rows if scale is None else rows.mul_(_spread(scale, at, rows))


def _rows(x: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """x[at], a copy: one index_select() where pages and slots can be counted as one row number, some 4 x as fast."""
    if len(at) == 2:
        page, slot = x.stride()[:2]
        if x.shape[0] == 0 or slot == 0 or page % slot:
            return x[at]
        step = page // slot  # rows from one page to the next, those of V between those of K counted
        x = x.as_strided(((x.shape[0] - 1) * step + x.shape[1], *x.shape[2:]), (slot, *x.stride()[2:]))
        at = (at[0] * step + at[1],)
    return x.index_select(0, at[0].view(-1)).view(*at[0].shape, *x.shape[1:])


def _spread(factor: Factor, at: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    values = (factor.values if factor.form == "head" else _rows(factor.values, at)).float()
    return (
        values.repeat_interleave(rows.shape[-1] // values.shape[-1], -1)
        if factor.form == "group"
        else values[..., None]
    )


def _turn(x: Tensor, pos: Tensor, frequencies: Tensor) -> Tensor:
    """Heads [b, n, H, D], fp32, turned in place by pos [b, n] * frequencies [D / 2]: dims d and d + D / 2 together."""
    angles = (pos[:, :, None] * frequencies)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    near, far = x.chunk(2, dim=-1)
    crossed = near * sin
    near.mul_(cos).addcmul_(far, sin, value=-1)
    far.mul_(cos).add_(crossed)
    return x


def _bias(plan: Plan, batch: Batch, logits: Tensor) -> Tensor:
    """ALiBi's term added to logits [b, H_kv, G, T, L], less slope * ahead where a soft cap does not need it whole: out
    does not depend on that, and what is large costs bits."""
    p = plan.problem
    origin = batch.q_pos if p.alibi_shift else batch.q_pos - batch.ahead[:, None]
    distance = batch.kv_pos[:, None, :] - origin[:, :, None]
    return logits.addcmul_(_slopes(plan), distance[:, None, None])


def _slopes(plan: Plan) -> Tensor:
    """ALiBi's slopes [H_kv, G, 1, 1]."""
    p = plan.problem
    return plan.table[: p.num_qo_heads].view(p.num_kv_heads, p.group_size, 1, 1)


def _state(
    plan: Plan, batch: Batch, q: Tensor, k: Tensor, v: Tensor, scale: float, scales: Scales
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, l, acc) of a batch: natural-log maximum and sum [b, H_kv, G, T, 1], and acc [b, H_kv, G, T, head_dim_vo]."""
    p = plan.problem
    b, t = batch.tokens.shape
    rows = q[batch.tokens].float()
    keys = _gather(k, batch.kv_rows, scales.k, scales.k_zero)
    if p.rope is not None:
        rows, keys = _turn(rows, batch.q_pos, plan.table), _turn(keys, batch.kv_pos, plan.table)
    rows = rows.view(b, t, p.num_kv_heads, p.group_size, p.head_dim_qk)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(b, p.num_kv_heads, p.group_size * t, p.head_dim_qk)
    keys = keys.permute(0, 2, 3, 1)  # [b, H_kv, D, L]
    values = _gather(v, batch.kv_rows, scales.v, scales.v_zero).permute(0, 2, 1, 3)  # [b, H_kv, L, D]
    if batch.kv_valid is not None:  # padding repeats rows that may not be the item's own: 0 * NaN must not arise
        values = values.masked_fill(~batch.kv_valid[:, None, :, None], 0.0)
    if p.q_dtype == torch.float32 and p.quantised:  # as on a GPU: what fp32 sums err by depends on who adds them up
        rows, keys = rows.double(), keys.double()
    logits = torch.matmul(rows, keys).mul_(scale).float().view(b, p.num_kv_heads, p.group_size, t, -1)
    if p.alibi:
        logits = _bias(plan, batch, logits)
    if p.logits_soft_cap > 0:
        logits = p.logits_soft_cap * torch.tanh(logits / p.logits_soft_cap)
    if batch.visible is not None:
        logits = logits.masked_fill(~batch.visible[:, None, None], -math.inf)
    m = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_full((*logits.shape[:-1], 1), -math.inf)
    probs = logits.sub_(m.clamp_min(torch.finfo(torch.float32).min)).exp_()
    l = probs.sum(-1, keepdim=True)
    acc = torch.matmul(probs.view(b, p.num_kv_heads, p.group_size * t, -1), values)
    return m, l, acc.view(b, p.num_kv_heads, p.group_size, t, -1)


def _finish(
    m: Tensor, l: Tensor, acc: Tensor, sink: Tensor | None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of a state; shift: what is missing in its logits."""
    if shift is not None:
        m = m + shift
    if sink is not None:
        top = torch.maximum(m, sink)
        ref = top.clamp_min(torch.finfo(torch.float32).min)
        alpha = (m - ref).exp()
        m, l, acc = top, l * alpha + (sink - ref).exp(), acc * alpha
    empty = l == 0
    out = torch.where(empty, 0.0, acc / l.masked_fill(empty, 1.0))
    return out, torch.where(empty, -math.inf, (m + l.log()) / math.log(2))


def run(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    workspace: Tensor,
    sm_scale: float,
    sinks: Tensor | None,
    scales: Scales | None = None,
) -> None:
    """Run a plan on CPU tensors: arguments as of the portable family's launcher, kernels/attention.py."""
    p, scales = plan.problem, scales or NO_SCALES
    partial, partial_lse = plan.partials(workspace)
    batches = _BATCHES.get(plan)
    if batches is None:
        batches = _BATCHES[plan] = _make_batches(plan)
    sink = None if sinks is None else sinks.float().view(1, p.num_kv_heads, p.group_size, 1, 1)
    for batch in batches:
        m, l, acc = _state(plan, batch, q, k, v, sm_scale, scales)
        b, t = batch.tokens.shape
        final = batch.slots is None
        shift = batch.ahead.view(b, 1, 1, 1, 1) * _slopes(plan) if final and p.alibi_shift else None
        result, result_lse = _finish(m, l, acc, sink if final else None, shift)
        if scales.out != 1.0:
            result *= scales.out
        result, result_lse = result.permute(0, 3, 1, 2, 4), result_lse.permute(0, 3, 1, 2, 4)  # [b, T, H_kv, G, D or 1]
        if batch.slots is None:
            out[batch.tokens.view(-1)] = result.reshape(b * t, p.num_qo_heads, p.head_dim_vo).to(out.dtype)
            lse[batch.tokens.view(-1)] = result_lse.reshape(b * t, p.num_qo_heads)
        else:  # packed rows are (token, head of the group)
            rows = t * p.group_size
            partial[batch.slots, :, :rows] = result.transpose(1, 2).reshape(b, p.num_kv_heads, rows, p.head_dim_vo)
            partial_lse[batch.slots, :, :rows] = result_lse.transpose(1, 2).reshape(b, p.num_kv_heads, rows)
    for merge in plan.merges.tolist():
        _merge(plan, dict(zip(MERGE_FIELDS, merge, strict=True)), partial, partial_lse, out, lse, sink)


def _merge(
    plan: Plan, at: dict[str, int], partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None
) -> None:
    p, c = plan.problem, plan.config
    first = at["row_begin"] // c.pack
    t = min(at["qo_len"] - first, c.block_m // c.pack)
    slots = slice(at["slot_begin"], at["slot_begin"] + at["num_slots"])
    rows = t * p.group_size
    shape = (at["num_slots"], p.num_kv_heads, t, p.group_size, -1)
    logits = partial_lse[slots, :, :rows].reshape(shape).mul(math.log(2))
    m = logits.amax(0)
    weight = (logits - m.clamp_min(torch.finfo(torch.float32).min)).exp()
    acc = (weight * partial[slots, :, :rows].reshape(shape)).sum(0)
    head_sink = None if sink is None else sink[0].permute(0, 2, 1, 3)
    shift = None
    if p.alibi_shift:
        shift = (at["kv_len"] - at["qo_len"]) * _slopes(plan).transpose(1, 2)
    result, result_lse = _finish(m, weight.sum(0), acc, head_sink, shift)
    begin = at["q_begin"] + first
    out[begin : begin + t] = result.permute(1, 0, 2, 3).reshape(t, p.num_qo_heads, -1).to(out.dtype)
    lse[begin : begin + t] = result_lse.permute(1, 0, 2, 3).reshape(t, p.num_qo_heads)
