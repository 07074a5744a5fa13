"""What a Hopper kernel is specialised on, and everything that follows from it at compile time: tiles, layouts,
barriers.

Tiles. A work tile is 64 packed query rows per consumer; a step takes block_n KV tokens. One persistent CTA per SM:
  consumer w (4 warps)   rows 64 w .. 64 w + 63 of the tile; consumer 0 is Gluon's default partition
  qk_loader, v_loader    each 1 warp that issues TMA copies, or 2 warps that gather 16 bytes per thread
  turner                 4 warps that turn Q for a rope, one tile ahead; else the consumers do (see has_turner)
Head dims that are no power of two are kept in two pieces that are (192 = 128 + 64, 96 = 64 + 32).

Barriers (mbarriers unless said otherwise):
  q_full[slot]             qk_loader (bytes landed)          -> consumers
  q_asked + slot           named barrier: qk_loader has asked for Q, or the list has ended -> turner
  q_turned[slot]           turner                             -> consumers, which then do not wait for q_full
  q_empty[slot]            one arrival per consumer           -> qk_loader, after the last S of the tile
  k_full, v_full[stage]    loaders (bytes landed)            -> consumers
  tail_full                TMA bytes of a V block that ends beyond its request, landed -> v_loader, which clears it
  tile_full[4]             qk_loader published the next tile  -> consumers
  k_empty, v_empty + stage named barriers: all consumer threads arrive, the threads of the one loader wait
  turn + w                 named barriers (ping-pong): consumer w waits before it issues its products, consumer w - 1
                           arrives after issuing its own. So the tensor cores see S0 PV0 S1 PV1 ..., and the softmax of
                           one consumer runs under the products of the other.
"""

from dataclasses import dataclass

from flashtile.kernels.hopper.compat import ROOMY, gl, gluon

ROWS = gl.constexpr(64)  # query rows of a consumer: one wgmma
RING = gl.constexpr(4)  # tiles in the hand-over ring
WARP = gl.constexpr(32)


@dataclass(frozen=True)
class Spec:
    """A kernel variant. Every field is a compile-time constant; see the functions below for what follows from them.

    packed: a tile's rows are (token, head of a group), not tokens of one head. paged: KV rows are found by page ids.
    gather: rows of K and V are copied one by one, from pages of one token if box is 1;
        else by TMA, in boxes of `box` rows.
    q_tma, o_tma: whether whole row blocks of q and out can be copied by TMA.
    left, right: the window is bounded on this side. aligned: each first block of a tile starts at its first row's
        position.
    tails: the last rows of some request are those of consumer 0 alone. pack_decode: a tile of a request of one token
        holds all query heads of its group, one a row, though other tiles hold the tokens of one head.
    rope: query rows are turned in shared memory as they arrive; keys have been. chained: by angles that follow from one
        another (kernels/rotation.py).
    """

    d_qk: int
    d_vo: int
    block_n: int
    consumers: int
    stages: int
    q_slots: int
    packed: bool = False
    paged: bool = False
    gather: bool = False
    box: int = 128
    q_tma: bool = True
    o_tma: bool = True
    left: bool = False
    right: bool = False
    aligned: bool = False
    tails: bool = False
    pack_decode: bool = False
    soft_cap: bool = False
    sinks: bool = False
    split: bool = False
    rope: bool = False
    chained: bool = False


# What follows from a Spec. Functions, not properties: Triton's compilation cache sees their source.
@gluon.constexpr_function
def loader_warps(spec):
    """Warps of a loader."""
    return 2 if spec.gather else 1


@gluon.constexpr_function
def has_turner(spec):
    """Whether warps of their own turn Q: where it arrives a tile ahead, and there are registers for four warps more."""
    fits = spec.d_qk == 128 and spec.consumers == 2 and not spec.gather and spec.q_tma
    return spec.rope and fits and spec.q_slots == 2


@gluon.constexpr_function
def turns_query(spec):
    """Whether a consumer turns its own rows of Q."""
    return spec.rope and not has_turner(spec)


@gluon.constexpr_function
def threads(spec):
    """Threads that meet at an EMPTY barrier: those of all consumers and of one loader."""
    return 128 * spec.consumers + 32 * loader_warps(spec)


@gluon.constexpr_function
def turn(spec):
    """The first of the named barriers, of consumer 0; those before belong to Triton: two, and one for each role but
    the first."""
    return 3 + spec.consumers + has_turner(spec)


@gluon.constexpr_function
def k_empty(spec):
    """The named barrier of K's first stage."""
    return turn(spec) + spec.consumers


@gluon.constexpr_function
def v_empty(spec):
    """The named barrier of V's first stage; the last one is below 16 with 3 consumers and 3 stages."""
    return k_empty(spec) + spec.stages


@gluon.constexpr_function
def q_asked(spec):
    """The named barrier of Q's first slot, where a turner waits for it: mbarriers are polled, and its four warps would
    take turns of issue from the consumers, 2 % of long prefill."""
    return v_empty(spec) + spec.stages


@gluon.constexpr_function
def masked_loop(spec):
    """Whether blocks after the first one of a tile may hold keys that some row must not see."""
    return spec.left or (spec.right and not spec.aligned)


@gluon.constexpr_function
def half_first(spec):
    """Whether consumer 0 sees only the left half of a tile's first block: the diagonal ends there."""
    return spec.aligned and spec.consumers == 2 and spec.block_n == 128


@gluon.constexpr_function
def bordered(spec):
    """Whether a branch tells ptxas which of the exps ahead come first (lazy.border): 2 to 4 % of long prefill, 7 % at
    head_dim 64. It takes some registers, which three consumers, head_dim 192, and the addresses of an output that TMA
    does not store leave too few of (and Triton 3.9, see config.ROOMY_PTXAS)."""
    fits = ROOMY and spec.o_tma and spec.d_qk == spec.d_vo and spec.d_qk <= 128 and spec.consumers < 3
    return fits and not spec.soft_cap


@gluon.constexpr_function
def lazy(spec):
    """Whether O is rescaled only where a maximum has grown by much (lazy.py). It costs some percent with a soft cap, or
    at head_dim 64 without a border."""
    return bordered(spec) or (spec.d_vo > 64 and not spec.soft_cap)


@gluon.constexpr_function
def ahead(spec):
    """Whether P's left half is computed while the block's maxima are still searched, and again where they have grown:
    5 % of long prefill. It takes 32 registers, and gains nothing at head dims 96, without a border, and 256."""
    return bordered(spec) or (lazy(spec) and spec.d_vo == 128)


@gluon.constexpr_function
def late_turn(spec):
    """Whether a consumer passes its turn when its S is done, not as soon as its products are issued: 4 % at head_dim
    96; 128 would be 3 % slower."""
    return lazy(spec) and spec.d_qk in (96, 256)


@gluon.constexpr_function
def registers(spec):
    """Registers per thread: of the launch, of a consumer, of a loader. Warp groups share the launch's out anew."""
    if has_turner(spec):  # 14 warps count as 16
        return 128, 224, 32
    if spec.consumers == 1:
        return 168, 232, 104
    if spec.consumers == 3:
        return 128, 160, 32
    if spec.gather or spec.packed:  # the loaders' copies of single rows need registers
        return 168, 224, 56
    return 168, 232, 40  # 240 and 24 spill in the loaders of causal tiles that are not aligned


@gluon.constexpr_function
def pieces(dim):
    """Powers of two that add up to a head dim, largest first."""
    low = dim & -dim
    return (dim,) if low == dim else (dim - low, low)


@gluon.constexpr_function
def panel(dim):
    """Columns of a TMA box: one swizzled row of shared memory, 128 bytes where the head dim allows."""
    return 64 if dim % 64 == 0 else 32


@gluon.constexpr_function
def num_pieces(dim):
    """Of how many pieces a head dim is made."""
    return len(pieces(dim))


@gluon.constexpr_function
def piece(dim, i):
    """Columns of piece i of a head dim."""
    return pieces(dim)[i]


@gluon.constexpr_function
def rows_layout(dim):
    """Shared-memory layout of rows of 16-bit elements: what TMA writes and wgmma reads."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * panel(dim), element_bitwidth=16, rank=2)


@gluon.constexpr_function
def mma_layout(columns):
    """Registers of a [64, columns] fp32 accumulator of one consumer."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def row_layout(columns=64):
    """Registers of one value per row of such an accumulator; the same for all widths."""
    return gl.SliceLayout(1, mma_layout(columns))


@gluon.constexpr_function
def p_layout():
    """Registers of P as the left operand of P V."""
    return gl.DotOperandLayout(operand_index=0, parent=mma_layout(64), k_width=2)


@gluon.constexpr_function
def store_layout(columns):
    """Registers of such an accumulator as it is stored: the same rows, but 8 neighbouring columns to a thread."""
    wide = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *wide],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, columns],
    )
