"""The scheduler: cut a ragged batch into tiles and KV chunks for a grid of CTAs. Pure functions over NumPy arrays.

A *tile* is up to `block_m` packed query rows of one request; packed row p is token p // pack, head p % pack of a head
group. Each tile walks the KV tokens that any of its rows may see. Where tiles alone cannot fill the GPU, or one is much
longer than the rest, tiles are cut along KV; the partial states go to numbered slots and a merge entry joins them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Columns of WorkList.items, int32 each. Every kernel family reads an item with these offsets.
ITEM_FIELDS = (
    "request",  # index in the batch
    "q_begin",  # first query token of the request in q
    "qo_len",  # query tokens of the request
    "row_begin",  # first packed row of the tile, inside the request
    "kv_base",  # first KV token (ragged) or first entry of kv_indices (paged) of the request
    "kv_len",  # KV tokens of the request
    "kv_begin",  # the item walks KV tokens [kv_begin, kv_end) of the request
    "kv_end",
    "slot",  # where the partial state goes; -1: the item writes the final result
    "head_begin",  # first head group of the item; it covers Config.heads_per_item of them
)
ITEM_STRIDE = len(ITEM_FIELDS)
# Columns of WorkList.merges, int32 each.
MERGE_FIELDS = ("q_begin", "qo_len", "row_begin", "slot_begin", "num_slots", "kv_len")
MERGE_STRIDE = len(MERGE_FIELDS)


@dataclass(frozen=True)
class Tiling:
    """The knobs of a work list; the scheduler's view of a Config.

    block_m: packed query rows of a tile; block_n: KV tokens of a step; pack: query heads packed into the rows.
    num_head_groups: num_qo_heads / pack; heads_per_item: how many of them one list entry covers.
    capacity: CTAs that run at once. item_cost, split_cost: fixed cost of an item, and of a partial state, in steps.
    kv_chunk: a fixed chunk length in tokens (0: chosen for the batch). max_chunks_per_cta bounds the workspace.
    section_tiles: the list is made of sections of about so many tiles, of whole requests, each longest first (0: one
        section).
    """

    block_m: int
    block_n: int
    pack: int
    num_head_groups: int
    heads_per_item: int
    capacity: int
    item_cost: float = 1.0
    split_cost: float = 1.0
    kv_chunk: int = 0
    split: bool = True
    section_tiles: int = 0


@dataclass(frozen=True)
class WorkList:
    """items [num_items, ITEM_STRIDE] and merges [num_merges, MERGE_STRIDE], int32; partial states fill num_slots
    slots."""

    items: NDArray[np.int32]
    merges: NDArray[np.int32]
    num_slots: int
    kv_chunk: int  # tokens; 0: no tile was cut


def visible_range(
    row_begin: Ints, qo_len: Ints, kv_len: Ints, tiling: Tiling, window_left: int, window_right: int
) -> tuple[Ints, Ints]:
    """The KV tokens [lo, hi) that at least one row of each tile sees; lo is a multiple of block_n, hi >= lo."""
    first = row_begin // tiling.pack
    last = np.minimum((row_begin + tiling.block_m - 1) // tiling.pack, qo_len - 1)
    offset = kv_len - qo_len
    hi = kv_len if window_right < 0 else np.clip(last + offset + window_right + 1, 0, kv_len)
    lo = np.zeros_like(kv_len) if window_left < 0 else np.clip(first + offset - window_left, 0, hi)
    return lo // tiling.block_n * tiling.block_n, hi


def choose_chunk(lengths: Ints, tiling: Tiling) -> int:
    """The KV chunk length, in tokens, that should finish the tiles of these KV lengths soonest; 0: cut nothing.

    The model counts steps of block_n tokens: CTAs take items longest first, so a list of n items lasts about
    ceil(n / capacity) mean items, and never less than the longest one.
    """
    steps = -(-lengths // tiling.block_n)
    total, longest = int(steps.sum()), int(steps.max(initial=0))
    heads, capacity = tiling.num_head_groups, tiling.capacity
    tiles = len(steps)
    if total == 0 or longest <= 1:
        return 0

    def count(chunk: int) -> int:
        return int(np.maximum(-(-steps // chunk), 1).sum())

    def cost(chunk: int) -> float:
        items = count(chunk)
        waves = -(-items * heads // capacity)
        partials = 2 * (items - tiles) * heads / capacity
        fixed = tiling.split_cost if items > tiles else 0.0
        return (
            max(waves * (total / items + tiling.item_cost), chunk + tiling.item_cost)
            + tiling.split_cost * partials
            + fixed
        )

    best, best_cost = longest, cost(longest)
    targets = [k * capacity // heads for k in (1, 2, 3, 4)] + [tiles + -(-capacity // heads)]
    for target in targets:
        if target <= tiles:
            continue
        low, high = 1, longest  # the shortest chunk with at most `target` items
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if count(middle) <= target else (middle + 1, high)
        if cost(low) < best_cost:
            best, best_cost = low, cost(low)
    return 0 if best == longest else best * tiling.block_n


def make_worklist(
    qo_indptr: Ints, kv_base: Ints, kv_len: Ints, tiling: Tiling, window_left: int = -1, window_right: int = -1
) -> WorkList:
    """Cut a batch into work items, longest first, and list the merges of the tiles that were cut along KV.

    Args:
        qo_indptr: [batch_size + 1], offsets of the requests in query tokens.
        kv_base: [batch_size], first KV token (ragged) or first entry of kv_indices (paged) of each request.
        kv_len: [batch_size], KV tokens.
        tiling: tile sizes and the capacity to fill.
        window_left, window_right: visible keys around a row's position; -1: no bound.
    """
    qo_len = np.diff(qo_indptr)
    tiles_of = -(-qo_len * tiling.pack // tiling.block_m)
    request = np.repeat(np.arange(len(qo_len)), tiles_of)
    row_begin = (np.arange(len(request)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)) * tiling.block_m
    lo, hi = visible_range(row_begin, qo_len[request], kv_len[request], tiling, window_left, window_right)

    chunk = (tiling.kv_chunk or choose_chunk(hi - lo, tiling)) if tiling.split else 0
    chunks = np.ones_like(lo) if chunk == 0 else np.maximum(-(-(hi - lo) // chunk), 1)
    tile = np.repeat(np.arange(len(request)), chunks)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    begin = lo[tile] + nth * chunk
    end = np.minimum(begin + chunk, hi[tile]) if chunk else hi[tile]

    cut = chunks > 1
    slots_before = np.cumsum(np.where(cut, chunks, 0)) - np.where(cut, chunks, 0)
    slot = np.where(cut[tile], slots_before[tile] + nth, -1)

    r = request[tile]
    columns = [r, qo_indptr[r], qo_len[r], row_begin[tile], kv_base[r], kv_len[r], begin, end, slot, np.zeros_like(r)]
    items = np.stack(columns, axis=1)
    items = items[np.argsort(begin - end, kind="stable")]
    items = _spread_heads(items, tiling)

    m = np.flatnonzero(cut)
    r = request[m]
    columns = [qo_indptr[r], qo_len[r], row_begin[m], slots_before[m], chunks[m], kv_len[r]]
    merges = np.stack(columns, axis=1)
    return WorkList(items.astype(np.int32), merges.astype(np.int32), int(chunks[cut].sum()), chunk)


def _spread_heads(items: Ints, tiling: Tiling) -> Ints:
    """One entry per section of heads_per_item head groups, sections outermost: their K and V stay in L2."""
    sections = tiling.num_head_groups // tiling.heads_per_item
    if sections > 1:
        spread = np.tile(items, (sections, 1))
        spread[:, ITEM_FIELDS.index("head_begin")] = np.repeat(np.arange(sections) * tiling.heads_per_item, len(items))
        items = spread
    return _order_by_section(items, tiling) if tiling.section_tiles and len(items) else items


def _order_by_section(items: Ints, tiling: Tiling) -> Ints:
    """Entries in sections of about section_tiles tiles, each longest first. All tiles of a request's heads_per_item
    heads are in one section, so that they find their K and V in L2; requests with long tiles come first."""
    request, head = items[:, ITEM_FIELDS.index("request")], items[:, ITEM_FIELDS.index("head_begin")]
    length = items[:, ITEM_FIELDS.index("kv_end")] - items[:, ITEM_FIELDS.index("kv_begin")]
    longest = np.zeros(int(request.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, request, length)
    order = np.lexsort((head, request, -longest[request]))
    first = np.append(True, np.diff(request[order]) | np.diff(head[order]) != 0)  # of its request and heads
    starts = np.flatnonzero(first)
    section = (starts * tiling.heads_per_item // tiling.section_tiles)[np.cumsum(first) - 1]
    ordered: Ints = items[order[np.lexsort((-length[order], section))]]
    return ordered
