"""What a kernel for narrow caches is specialised on, and what follows at compile time: tiles, layouts, barriers.

Tiles. A work tile is one query token with `heads` KV heads of its request; a step takes block_n KV tokens of all these
heads, which are cut into pieces of 16 tokens of one head. One persistent CTA per SM:
  consumers     8 warps, Gluon's default partition. Warp w attends to pieces of KV head w % heads: to all of them, or,
                with 4 heads, to every other one, and two warps join their states at the tile's end
  k_loader, v_loader    each 1 warp that issues TMA copies, or 4 warps that gather 16 bytes per thread
Each role walks the CTA's tiles (hopper/tiles.py) for itself.
Their copies fill nearly all of shared memory, and run on into the next tiles while consumers are busy elsewhere: bytes
on their way are what a cache of few bytes a token lacks.

Products are transposed, S' = K Q' and O' = V' P', by mma.sync: the 16 rows of its left operand are tokens, or dims, and
the 8 columns of its right operand the query heads of a group. The other way round most rows would be empty.

Words. Rows are read as 16-bit words (codec.py); part i of a row are dims i, i + parts, ...

Shared memory. A stage of K or V is [pieces / heads, heads, 16 tokens, words], rows swizzled as TMA does; its factors,
which are what each token has of its own, a scale and a zero point, are [pieces / heads, heads, 16] each, fp32.

Barriers (mbarriers unless said otherwise):
  full[stage]        bytes of both loaders landed, and the copies of factors, or of rows, by their threads -> consumers
  empty + stage      named barriers: all consumer threads arrive, the threads of both loaders wait
"""

from dataclasses import dataclass

from flashtile.kernels.codec import BIAS, e4m3, e5m2, int4, int8
from flashtile.kernels.hopper.compat import gl, gluon

WAYS = gl.constexpr(8)  # consumer warps
PIECE = gl.constexpr(16)  # tokens of a piece: the rows of one mma.sync
ROWS = gl.constexpr(8)  # query heads of a KV head, at most: its columns
GATHERERS = 4  # warps of a loader that gathers


@dataclass(frozen=True)
class NarrowSpec:
    """A kernel variant. Every field is a compile-time constant.

    kv_format: of plan/problem.py. words: of a row; parts: values in a word. block_n: tokens of a step; stages: steps
    in shared memory. heads: KV heads of a tile, 4 or 8.
    page_size: tokens, 0: ragged. boxes: pieces are copied by TMA, whole; else row by row.
    by_heads: neighbours in memory are tokens of one head (HND), not heads of one token.
    k_form, v_form: of a scale, "none", "head" or "token"; k_zero, v_zero: there is a zero point per token. half: what
    is per token is in fp16, else in fp32. left: the window is bounded on this side.
    """

    kv_format: str
    words: int
    parts: int
    block_n: int
    stages: int
    heads: int
    page_size: int
    boxes: bool
    by_heads: bool = False
    k_form: str = "none"
    v_form: str = "none"
    k_zero: bool = False
    v_zero: bool = False
    half: bool = False
    left: bool = False
    soft_cap: bool = False
    sinks: bool = False


@gluon.constexpr_function
def decoder(spec):
    """What turns words into a tuple of fp16 parts."""
    return {"e4m3": e4m3, "e5m2": e5m2, "int8": int8, "int4": int4}[spec.kv_format]


@gluon.constexpr_function
def bias(spec):
    """What it takes off the numbers; zero points count from there."""
    return BIAS[spec.kv_format]


@gluon.constexpr_function
def has_nan(spec):
    """Whether words that nobody has written may stand for NaN."""
    return spec.kv_format in ("e4m3", "e5m2")


@gluon.constexpr_function
def loader_warps(spec):
    """Warps of a loader."""
    return 1 if spec.boxes else GATHERERS


@gluon.constexpr_function
def threads(spec):
    """Threads that meet at an EMPTY barrier: those of the consumers and of both loaders."""
    return 32 * (8 + 2 * loader_warps(spec))


@gluon.constexpr_function
def empty(spec):
    """The named barrier of the first stage; those before belong to Triton: two, and one for each role but the
    first."""
    return 4


@gluon.constexpr_function
def full_arrivals(spec):
    """Arrivals that fill a stage: of each loader one thread for its boxes, or all for their copies of rows; and for
    factors all for their copies, or one for what all have stored."""
    sides = ((spec.k_form == "token") or spec.k_zero) + ((spec.v_form == "token") or spec.v_zero)
    rows = 2 if spec.boxes else 2 * 32 * GATHERERS
    if spec.half:
        return rows + sides
    return rows + (32 * sides if spec.boxes else 0)


@gluon.constexpr_function
def registers(spec):
    """Registers per thread: of the launch, of a loader. Warp groups share the launch's out anew."""
    return (168, 96) if spec.boxes else (128, 72)


def shared_bytes(spec: NarrowSpec) -> int:
    """Shared memory of the stages, in bytes."""
    factors = (spec.k_form == "token") + (spec.v_form == "token") + spec.k_zero + spec.v_zero
    return spec.stages * spec.block_n * spec.heads * (4 * spec.words + 4 * factors)


@gluon.constexpr_function
def blocks(spec):
    """Pieces of one head in a step."""
    return spec.block_n // 16


@gluon.constexpr_function
def pieces_of_way(spec):
    """Pieces of a step that a consumer warp attends to."""
    return spec.block_n * spec.heads // (16 * 8)


@gluon.constexpr_function
def room(spec):
    """Parts of O, one half of the dims of each, that a stage of K has room for."""
    return spec.block_n // 16


@gluon.constexpr_function
def mma_layout():
    """Registers of S' [ways, tokens, rows] and of O' [ways, words, rows]: a warp for each way."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[8, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def operand(i):
    """Registers of its left (0) or right (1) operand."""
    return gl.DotOperandLayout(operand_index=i, parent=mma_layout(), k_width=2)


@gluon.constexpr_function
def box_layout(words):
    """Shared-memory layout of boxes [1, heads, 16, words]: what TMA writes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * words, element_bitwidth=16, rank=4)


@gluon.constexpr_function
def words_layout(words, rank):
    """The same bytes as buffers of any rank, for other copies and for reads."""
    chunks = words // 8  # 16 bytes each; rows of 32, 64 or 128 bytes
    return gl.SwizzledSharedLayout(vec=8, per_phase=8 // chunks, max_phase=chunks, order=list(range(rank))[::-1])


@gluon.constexpr_function
def flat_layout(rank):
    """Shared memory in order."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def rows_layout(spec):
    """Registers of the copies of a step, [blocks, heads, 16, words], 16 bytes per thread; neighbours in memory
    together."""
    chunks = spec.words // 8
    rest = 32 // chunks
    outer = min(GATHERERS, blocks(spec))
    if spec.by_heads:
        lanes, order = [1, 1, rest, chunks], [3, 2, 1, 0]
    else:
        heads = min(spec.heads, rest)
        lanes, order = [1, heads, rest // heads, chunks], [3, 1, 2, 0]
    return gl.BlockedLayout([1, 1, 1, 8], lanes, [outer, 1, GATHERERS // outer, 1], order)


@gluon.constexpr_function
def factors_layout(spec):
    """Registers of the copies of a factor, [blocks, heads, 16], one per thread."""
    warps = loader_warps(spec)
    outer = min(warps, blocks(spec))
    if spec.by_heads:
        return gl.BlockedLayout([1, 1, 1], [1, 2, 16], [outer, warps // outer, 1], [2, 1, 0])
    return gl.BlockedLayout([1, 1, 1], [1, spec.heads, 32 // spec.heads], [outer, 1, warps // outer], [1, 2, 0])
