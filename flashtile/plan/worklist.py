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
TAIL_PIECES = 8  # of a tile that is cut to fill the last wave: more cost workspace, and steps at their ends


@dataclass(frozen=True)
class Tiling:
    """The knobs of a work list; the scheduler's view of a Config.

    block_m: packed query rows of a tile; block_n: KV tokens of a step; pack: query heads packed into the rows.
    num_head_groups: num_qo_heads / pack; heads_per_item: how many of them one list entry covers.
    capacity: CTAs that run at once. item_cost, split_cost: fixed cost of an item, and of a partial state, in steps.
    kv_chunk: a fixed chunk length in tokens (0: chosen for the batch). max_chunks_per_cta bounds the workspace.
    persistent: one CTA takes many items, by turns that the plan lays down (take_turns).
    section_tiles: the list is made of sections of about so many tiles, of whole requests, each longest first (0: one
        section).
    pack_decode: of a request of one query token, an entry's first tile holds the rows of all its heads, and the others
        are left out; heads_per_item is the group's heads then.
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
    pack_decode: bool = False
    persistent: bool = False


@dataclass(frozen=True)
class WorkList:
    """items [num_items, ITEM_STRIDE] and merges [num_merges, MERGE_STRIDE], int32; partial states fill num_slots
    slots."""

    items: NDArray[np.int32]
    merges: NDArray[np.int32]
    num_slots: int


@dataclass(frozen=True)
class LoneTile:
    """What the items of a list say that holds no tile but the first request's: item i walks chunk i of KV tokens
    [begin, end), each `chunk` tokens but the last.

    qo_len, kv_len: tokens of the request; kv_base: its first KV token (ragged) or first entry of kv_indices (paged).
    """

    qo_len: int
    kv_base: int
    kv_len: int
    begin: int
    end: int
    chunk: int


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


def duration(steps: Ints, tiling: Tiling, cuts: int = 0) -> float:
    """How long a list of items of so many steps each, longest first, should take; `cuts`: pieces beyond the tiles.

    CTAs take items one after the other: that lasts as long as the mean CTA's share, or as one CTA that takes the last
    of some wave's items, and with it one at least as long from each wave before.
    """
    heads, capacity = tiling.num_head_groups, tiling.capacity
    waves = np.arange(-(-len(steps) * heads // capacity))
    share = heads * (float(steps.sum()) + len(steps) * tiling.item_cost) / capacity
    last = float(((waves + 1) * (steps[waves * capacity // heads] + tiling.item_cost)).max(initial=0.0))
    return max(share, last) + tiling.split_cost * (2 * cuts * heads / capacity + (1.0 if cuts else 0.0))


def pieces_of(steps: Ints, chunk: int) -> Ints:
    """The steps of all pieces, longest first, of tiles that are cut into chunks of so many steps."""
    whole, rest = np.divmod(steps, chunk)
    rest = np.sort(rest[(rest > 0) | (steps == 0)])[::-1]
    return np.concatenate([np.full(int(whole.sum()), chunk), rest])


def shortest_chunks(steps: Ints, targets: list[int], longest: int) -> list[int]:
    """For each target the smallest chunk, in steps, that cuts tiles of these steps into at most so many pieces, by
    bisection of all at once; no target is below the number of tiles, and no tile has more than `longest` steps."""
    low, high = np.ones(len(targets), dtype=np.int64), np.full(len(targets), longest)
    most = np.asarray(targets)
    while (low < high).any():
        middle = (low + high) // 2
        pieces = np.maximum(-(-steps // middle[:, None]), 1).sum(1)
        enough = pieces <= most
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return [int(chunk) for chunk in low]


def choose_chunk(lengths: Ints, tiling: Tiling) -> int:
    """The KV chunk length, in tokens, that should finish the tiles of these KV lengths soonest; 0: cut nothing.

    A list whose short items fill the gaps of its long ones (causal prefill) is left whole.
    """
    steps = -(-lengths // tiling.block_n)
    longest = int(steps.max(initial=0))
    heads, capacity = tiling.num_head_groups, tiling.capacity
    tiles = len(steps)
    if longest <= 1:
        return 0

    def cost(chunk: int) -> float:
        pieces = pieces_of(steps, chunk)
        return duration(pieces, tiling, len(pieces) - tiles)

    best, best_cost = longest, cost(longest)
    targets = [k * capacity // heads for k in (1, 2, 3, 4)] + [tiles + -(-capacity // heads)]
    for chunk in dict.fromkeys(shortest_chunks(steps, [n for n in targets if n > tiles], longest)):
        if (found := cost(chunk)) < best_cost:
            best, best_cost = chunk, found
    return 0 if best == longest else best * tiling.block_n


def choose_tail(lengths: Ints, tiling: Tiling) -> tuple[int, int]:
    """(n, chunk in tokens): cut the n shortest tiles, where a last wave of few tiles would leave most CTAs idle;
    (0, 0): cut nothing."""
    steps = np.sort(-(-lengths // tiling.block_n))[::-1]
    over = len(steps) * tiling.num_head_groups % tiling.capacity
    n = -(-over // tiling.num_head_groups)
    if n == 0 or n >= len(steps):
        return 0, 0
    chunk = -(-int(steps[-n]) // TAIL_PIECES)
    pieces = pieces_of(steps[-n:], max(chunk, 1))
    listed = np.sort(np.concatenate([steps[:-n], pieces]))[::-1]
    gain = duration(steps, tiling) - duration(listed, tiling, len(pieces) - n)
    worth = gain > 0.02 * duration(steps, tiling)  # 64 steps a tile: 1 % faster; 32: predicted 1.3 %, found 1 % slower
    return (n, chunk * tiling.block_n) if worth and len(pieces) > n else (0, 0)


def choose_cuts(lengths: Ints, tiling: Tiling) -> Ints:
    """The KV chunk length of each tile, in tokens; 0: the tile is left whole."""
    if not tiling.split:
        return np.zeros_like(lengths)
    chunk = tiling.kv_chunk or choose_chunk(lengths, tiling)
    cuts = np.full_like(lengths, chunk)
    if chunk == 0 and tiling.persistent:
        n, chunk = choose_tail(lengths, tiling)
        cuts[np.argsort(-lengths, kind="stable")[len(lengths) - n :]] = chunk
    return cuts


def take_turns(items: NDArray[np.int32], tiling: Tiling) -> NDArray[np.int32]:
    """Which tile each CTA of a persistent grid takes in each round: [rounds + 3, ctas] int32, -1 for none. The first of
    CTA i is the i-th that there is: i, where pack_decode leaves none out.

    A round hands out the next tiles of the list, back and forth over the CTAs. Where that leaves a CTA with more than
    its share, the longest tile of a round goes to the CTA that has had least to do so far: CTAs end within 1 % of one
    another then, without the atomic counter by which tiles could be drawn (2 % slower, benchmarks/NOTES.md). The last
    rounds are empty: the loader reads ahead.

    Args:
        items: the list [num_items, ITEM_STRIDE]; each entry stands for heads_per_item tiles.
    """
    qo_len, begin, end = (
        items[:, ITEM_FIELDS.index(name)].astype(np.int64) for name in ("qo_len", "kv_begin", "kv_end")
    )
    cost = -(-(end - begin) // tiling.block_n) + tiling.item_cost
    tile = np.arange(len(items) * tiling.heads_per_item)
    if tiling.pack_decode:
        tile = tile[(np.repeat(qo_len, tiling.heads_per_item) != 1) | (tile % tiling.heads_per_item == 0)]
    steps = cost[tile // tiling.heads_per_item]
    ctas = max(min(tiling.capacity, len(steps)), 1)
    rounds = -(-len(steps) // ctas)
    turns = np.full((rounds + 3, ctas), -1, dtype=np.int32)
    turns.reshape(-1)[: len(steps)] = np.arange(len(steps))
    turns[1:rounds:2] = turns[1:rounds:2, ::-1]
    share = np.append(steps, 0.0)[turns].sum(0)
    tolerance = 1.05 if cost.max(initial=0) < 10 else 1.01  # short tiles are bound by memory, not by their steps
    if share.max(initial=0) > tolerance * share.mean():
        turns[1:rounds:2] = turns[1:rounds:2, ::-1]
        done = np.zeros(ctas)
        for r in range(rounds):
            tiles = turns[r, : len(steps) - r * ctas].copy()
            longest = (-steps[tiles]).argsort(kind="stable")
            least = done.argsort(kind="stable")[: len(tiles)]
            tiles = tiles[longest]
            turns[r] = -1
            turns[r, least] = tiles
            done[least] += steps[tiles]
    turns = turns[:, np.argsort(turns[0])]  # now CTA i begins with the list's tile i, and need not read that
    return np.append(tile, -1)[turns].astype(np.int32)


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

    chunk = choose_cuts(hi - lo, tiling)
    chunk = np.where(chunk > 0, chunk, np.maximum(hi - lo, 1))
    chunks = np.maximum(-(-(hi - lo) // chunk), 1)
    tile = np.repeat(np.arange(len(request)), chunks)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    begin = lo[tile] + nth * chunk[tile]
    end = np.minimum(begin + chunk[tile], hi[tile])

    cut = chunks > 1
    slots_before = np.cumsum(np.where(cut, chunks, 0)) - np.where(cut, chunks, 0)
    slot = np.where(cut[tile], slots_before[tile] + nth, -1)

    r = request[tile]
    columns = [r, qo_indptr[r], qo_len[r], row_begin[tile], kv_base[r], kv_len[r], begin, end, slot, np.zeros_like(r)]
    items = np.stack(columns, axis=1)
    steps = -(-(end - begin) // tiling.block_n)  # tiles of as many steps stay together: they may share their KV
    items = items[np.argsort(-steps, kind="stable")]
    items = _spread_heads(items, tiling)

    m = np.flatnonzero(cut)
    r = request[m]
    columns = [qo_indptr[r], qo_len[r], row_begin[m], slots_before[m], chunks[m], kv_len[r]]
    merges = np.stack(columns, axis=1)
    return WorkList(items.astype(np.int32), merges.astype(np.int32), int(chunks[cut].sum()))


def lone_tile(items: NDArray[np.int32], tiling: Tiling) -> LoneTile | None:
    """The tile that all items [num_items, ITEM_STRIDE] are chunks of, if there is but one, of the first request, and a
    CTA takes one item: most often decode of one request. Its numbers can be arguments of the launch, where items are
    read from memory first."""
    others = [ITEM_FIELDS.index(name) for name in ("request", "row_begin", "head_begin")]
    if tiling.persistent or len(items) == 0 or items[:, others].any():
        return None
    first = dict(zip(ITEM_FIELDS, items[0].tolist(), strict=True))
    return LoneTile(
        qo_len=first["qo_len"],
        kv_base=first["kv_base"],
        kv_len=first["kv_len"],
        begin=first["kv_begin"],
        end=int(items[:, ITEM_FIELDS.index("kv_end")].max()),
        chunk=max(first["kv_end"] - first["kv_begin"], 1),
    )


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
    length = -((items[:, ITEM_FIELDS.index("kv_begin")] - items[:, ITEM_FIELDS.index("kv_end")]) // tiling.block_n)
    longest = np.zeros(int(request.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, request, length)
    order = np.lexsort((head, request, -longest[request]))
    first = np.append(True, np.diff(request[order]) | np.diff(head[order]) != 0)  # of its request and heads
    starts = np.flatnonzero(first)
    section = (starts * tiling.heads_per_item // tiling.section_tiles)[np.cumsum(first) - 1]
    ordered: Ints = items[order[np.lexsort((-length[order], section))]]
    return ordered
