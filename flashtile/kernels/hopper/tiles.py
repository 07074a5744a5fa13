"""The list of work tiles: which tile a CTA takes next, and how the loader tells the consumers.

`work` is (items_ptr, turns_ptr, heads_per_item, its inverse, inverse of groups_per_kv_head). The plan's turns say which
tile each CTA takes in each round: tile t is head group t % heads_per_item of entry t // heads_per_item; -1: no more. A
loader reads a tile's number two tiles ahead and its entry one tile ahead, one field per lane; qk_loader hands it over
through a ring in shared memory. HEAD then holds the tile's own head group, or -1 after the last tile.
"""

from flashtile.kernels.hopper.compat import gl, gluon, mbarrier
from flashtile.kernels.hopper.spec import RING, WARP
from flashtile.plan.worklist import ITEM_FIELDS, ITEM_STRIDE

FIELDS = gl.constexpr(ITEM_STRIDE)
Q_BEGIN = gl.constexpr(ITEM_FIELDS.index("q_begin"))
QO_LEN = gl.constexpr(ITEM_FIELDS.index("qo_len"))
ROW_BEGIN = gl.constexpr(ITEM_FIELDS.index("row_begin"))
KV_BASE = gl.constexpr(ITEM_FIELDS.index("kv_base"))
KV_LEN = gl.constexpr(ITEM_FIELDS.index("kv_len"))
KV_BEGIN = gl.constexpr(ITEM_FIELDS.index("kv_begin"))
KV_END = gl.constexpr(ITEM_FIELDS.index("kv_end"))
SLOT = gl.constexpr(ITEM_FIELDS.index("slot"))
HEAD = gl.constexpr(ITEM_FIELDS.index("head_begin"))


INVERSE_BITS = gl.constexpr(30)


def inverse(n: int) -> int:
    """m with x * m >> 30 == x // n for 0 <= x < 2**30 / n.

    Kernels divide by such arguments this way. The first part of an ordinary division depends on the divisor alone: of
    an argument, the compiler moves it to the kernel's entry, and has no registers there to keep its result in.
    """
    return -(-(2**30) // n)


@gluon.jit
def divide(x, inverse_of_n):
    """x // n, for inverse_of_n = inverse(n)."""
    return ((x.to(gl.int64) * inverse_of_n) >> INVERSE_BITS).to(gl.int32)


@gluon.jit
def token_of(row, pack, C: gl.constexpr):
    """The token, inside its request, of a packed row. pack: heads packed into the rows, and the inverse."""
    if C.packed:
        row = divide(row, pack[1])
    return row


@gluon.jit
def owner_of(row, head, qo_len, pack, group, C: gl.constexpr):
    """Of packed rows of a tile of a head group: token, inside the request, query head, and whether there is such a
    row."""
    token = token_of(row, pack, C)
    heads = head + gl.zeros_like(row)
    if C.packed:
        heads = head * pack[0] + (row - token * pack[0])
    valid = token < qo_len
    if C.pack_decode:  # rows may be the heads of a single token
        lone = qo_len == 1
        valid = gl.where(lone, row < group, valid)
        token = gl.where(lone, 0, token)
        heads = gl.where(lone, head + gl.minimum(row, group - 1), heads)
    return token, heads, valid


@gluon.constexpr_function
def lane_layout(warps):
    """One value per lane, the same in all warps of a loader."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def turn(work, r):
    """Start to read which tile this CTA takes in round r."""
    items_ptr, turns_ptr, heads_per_item, inverse_heads, inverse_groups = work
    return gl.load(turns_ptr + r * gl.num_programs(0) + gl.program_id(0))


@gluon.jit
def first_turn(work, C: gl.constexpr):
    """The tile that this CTA begins with: known without a read of memory, unless the plan leaves tiles out."""
    if C.pack_decode:
        return turn(work, 0)
    else:
        return gl.program_id(0)


@gluon.jit
def fetch(work, t, WARPS: gl.constexpr):
    """Start to read the entry of tile t: [32] int32, field i in lane i; all -1 for no tile. WARPS: of the role."""
    items_ptr, turns_ptr, heads_per_item, inverse_heads, inverse_groups = work
    entry = divide(t, inverse_heads).to(gl.int64)
    lane = gl.arange(0, WARP, layout=lane_layout(WARPS))
    return gl.load(items_ptr + entry * FIELDS + lane, mask=(lane < FIELDS) & (t >= 0), other=-1)


@gluon.jit
def field(item, i):
    """Lane i's value as a scalar: one field of an entry."""
    lane = gl.arange(0, WARP, layout=item.type.layout)
    return gl.sum(gl.where(lane == i, item, 0), 0)


@gluon.jit
def with_head(item, t, work):
    """The entry of tile t with the tile's own head group in it."""
    items_ptr, turns_ptr, heads_per_item, inverse_heads, inverse_groups = work
    lane = gl.arange(0, WARP, layout=item.type.layout)
    return item + gl.where((lane == HEAD) & (t >= 0), t - divide(t, inverse_heads) * heads_per_item, 0)


@gluon.jit
def publish(ring, tile_full, count, item):
    """Hand over tile number `count` of this CTA."""
    ring.index(count % RING).store(item)
    mbarrier.arrive(tile_full.index(count % RING), count=1)


@gluon.jit
def read(ring, count, F: gl.constexpr):
    """A field of tile number `count`, for a role that is not the loader."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(ring.index(count % RING).slice(F, 1).load(ONE), 0)


@gluon.jit
def block_range(kv_begin, kv_end, BLOCK_N: gl.constexpr):
    """First and last KV block of a tile. A tile without keys takes one block, all of it masked."""
    first = kv_begin // BLOCK_N
    last = gl.maximum((kv_end + BLOCK_N - 1) // BLOCK_N - 1, first)
    return first, last
