"""The list of work tiles: which tile a CTA takes next, and how the loader tells the consumers.

`work` is (items_ptr, counter_ptr, num_tiles, heads_per_item, its inverse, inverse of groups_per_kv_head). Tile t is
head group t % heads_per_item of entry t // heads_per_item. The loader reads the entry, one field per lane, a tile
ahead,
and hands it over through a ring in shared memory; HEAD then holds the tile's own head group, or -1 after the last tile.
"""

from flashtile.kernels.hopper.compat import gl, gluon, mbarrier
from flashtile.kernels.hopper.spec import RING, WARP, loader_warps
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


@gluon.constexpr_function
def lane_layout(warps):
    """One value per lane, the same in all warps of a loader."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def fetch(work, t, C: gl.constexpr):
    """Start to read the entry of tile t: [32] int32, field i in lane i; all -1 past the last tile."""
    items_ptr, counter_ptr, num_tiles, heads_per_item, inverse_heads, inverse_groups = work
    entry = divide(t, inverse_heads).to(gl.int64)
    lane = gl.arange(0, WARP, layout=lane_layout(loader_warps(C)))
    return gl.load(items_ptr + entry * FIELDS + lane, mask=(lane < FIELDS) & (t < num_tiles), other=-1)


@gluon.jit
def field(item, i):
    """Lane i's value as a scalar: one field of an entry."""
    lane = gl.arange(0, WARP, layout=item.type.layout)
    return gl.sum(gl.where(lane == i, item, 0), 0)


@gluon.jit
def with_head(item, t, work):
    """The entry of tile t with the tile's own head group in it."""
    items_ptr, counter_ptr, num_tiles, heads_per_item, inverse_heads, inverse_groups = work
    lane = gl.arange(0, WARP, layout=item.type.layout)
    return item + gl.where((lane == HEAD) & (t < num_tiles), t - divide(t, inverse_heads) * heads_per_item, 0)


@gluon.jit
def publish(ring, tile_full, count, item):
    """Hand over tile number `count` of this CTA."""
    ring.index(count % RING).store(item)
    mbarrier.arrive(tile_full.index(count % RING), count=1)


@gluon.jit
def read(ring, count, F: gl.constexpr):
    """A field of tile number `count`, in a consumer."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(ring.index(count % RING).slice(F, 1).load(ONE), 0)


@gluon.jit
def block_range(kv_begin, kv_end, C: gl.constexpr):
    """First and last KV block of a tile. A tile without keys takes one block, all of it masked."""
    first = kv_begin // C.block_n
    last = gl.maximum((kv_end + C.block_n - 1) // C.block_n - 1, first)
    return first, last


@gluon.jit
def take_number(counter_ptr):
    """Draw the next number of the launch, in lane 0; nothing waits for it until `everyone` reads it."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 l; mov.u32 l, %laneid; setp.eq.u32 p, l, 0; mov.u32 $0, 0; "
        "@p atom.global.add.u32 $0, [$1], 1; }",
        "=r,l", [counter_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def everyone(x):
    """Lane 0's value in all lanes of a warp."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )
