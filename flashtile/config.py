"""Problem -> Config: the only file that names an architecture, a tile size or a warp count."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from flashtile.plan.problem import PARTS, Problem, Workload
from flashtile.plan.scales import Scales
from flashtile.plan.worklist import Tiling

BACKENDS = ("auto", "fa2", "fa3")


def triton_version() -> tuple[int, ...]:
    """Major and minor number of the installed Triton, without importing it; (0, 0) if it goes by another name."""
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return 0, 0


# Whether ptxas leaves kernels registers for what takes a few more. That of Triton 3.9 keeps more of a kernel's
# arguments in them, and would spill: there kernels do without, and are some percent slower.
ROOMY_PTXAS = triton_version() < (3, 7)


@dataclass(frozen=True)
class Config:
    """How one plan runs: kernel family, tile sizes, and what the scheduler should assume.

    block_m: packed query rows of a tile (tokens x pack); block_n: KV tokens of a step; pack: query heads packed into
        rows.
    ctas_per_sm: CTAs that share an SM. item_cost, split_cost: see Tiling. heads_per_item: head groups of a list entry
        (0: all).
    kv_chunk: a fixed KV chunk in tokens (0: the scheduler's choice). one_loop: mask every step instead of walking the
        unmasked ones in a loop of their own. overlap: the merge is launched while the last tiles run (sm_90).
    ways: 1, or num_warps: each warp attends to its own keys of a step (needs a block_m of 16). heads: KV heads of a
        CTA, each in ways / heads warps of its own; more than 1 needs ways > 1, and all heads of a group packed.
    raw: int8 and int4 are multiplied as the bits they are (codec.py). max_registers: of a thread; None: the compiler's
        choice.
    section_tiles, pack_decode: see Tiling. chained: cos and sin of most angles follow from those of others, where a
        rope turns keys as they are read, or queries in warps of their own (kernels/rotation.py).
    copy_first: a kernel of its own rotates q and K, if there is a rope, and gathers K and V, if they are paged, into
        the workspace; attention runs over the result. turn_q: but q is left to the Hopper family's own kernel.
    """

    family: str
    block_m: int
    block_n: int
    pack: int
    num_warps: int = 4
    num_stages: int = 2
    ctas_per_sm: int = 1
    item_cost: float = 1.0
    split_cost: float = 1.0
    heads_per_item: int = 0
    kv_chunk: int = 0
    split: bool = True
    one_loop: bool = False
    overlap: bool = False
    ways: int = 1
    heads: int = 1
    raw: bool = False
    max_registers: int | None = None
    has_e4m3: bool = True  # the GPU converts e4m3 to fp16
    has_wgmma: bool = True  # tiles of 64 rows are multiplied by wgmma
    section_tiles: int = 0
    pack_decode: bool = False
    copy_first: bool = False
    turn_q: bool = False
    chained: bool = False

    def __post_init__(self) -> None:
        if self.ways not in (1, self.num_warps) or self.ways % self.heads or (self.heads > 1 and self.ways == 1):
            raise ValueError(
                f"ways, heads: expected 1 way or one per warp ({self.num_warps}), shared evenly by heads, "
                f"got ways={self.ways}, heads={self.heads}"
            )
        if self.family == "narrow" and (self.heads not in (4, 8) or (self.num_warps, self.block_m) != (8, 16)):
            raise ValueError(
                "heads, num_warps, block_m: expected 4 or 8 heads, 8 warps and 16 rows of the narrow family, "
                f"got {self.heads}, {self.num_warps}, {self.block_m}"
            )
        if self.family == "narrow" and self.num_stages > 12:
            raise ValueError(
                "num_stages: expected at most 12 of the narrow family, as there are 16 named barriers, "
                f"got {self.num_stages}"
            )
        if self.family == "hopper" and self.block_m not in (64, 128, 192):
            raise ValueError(
                "block_m: expected 64, 128 or 192, one to three consumers of 64 rows of the Hopper family, "
                f"got {self.block_m}"
            )
        if self.family == "hopper" and self.num_stages > (3 if self.block_m == 192 else 4):
            raise ValueError(
                "num_stages: expected at most 4 of the Hopper family, or 3 with three consumers (block_m=192): there "
                f"are 16 named barriers, got {self.num_stages} with block_m={self.block_m}"
            )

    def tiling(self, problem: Problem, num_sms: int) -> Tiling:
        """The scheduler's view of this configuration. ValueError if CTAs of several KV heads do not fit the problem."""
        if self.heads > 1 and (self.pack != problem.group_size or problem.num_kv_heads % self.heads):
            raise ValueError(
                f"heads: expected a divisor of num_kv_heads={problem.num_kv_heads}, and a pack of all "
                f"{problem.group_size} heads of a group, got heads={self.heads}, pack={self.pack}"
            )
        least = max(128 // self.heads, 16 * PARTS[problem.k_format] if self.heads == 4 else 0)
        if self.family == "narrow" and (self.block_n % least or self.block_n > 64):
            raise ValueError(
                f"block_n: expected a multiple of {least} up to 64 of the narrow family, by {self.heads} heads over "
                f"{problem.k_format}: each warp takes 16 tokens, and two warps exchange O in a step of K; "
                f"got {self.block_n}"
            )
        groups = problem.num_qo_heads // self.pack // self.heads
        return Tiling(
            block_m=self.block_m,
            block_n=self.block_n,
            pack=self.pack,
            num_head_groups=groups,
            heads_per_item=self.heads_per_item or groups,
            capacity=num_sms * self.ctas_per_sm,
            item_cost=self.item_cost,
            split_cost=self.split_cost,
            kv_chunk=self.kv_chunk,
            split=self.split,
            section_tiles=self.section_tiles,
            pack_decode=self.pack_decode,
            persistent=self.family in ("hopper", "narrow"),
        )


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability, (0, 0) on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def choose(
    problem: Problem, work: Workload, device: torch.device, backend: str = "auto", may_copy: bool = True
) -> Config:
    """The configuration for a problem on a device.

    Args:
        backend: "auto"; "fa2": the portable family; "fa3": the Hopper family, or the narrow one. On the CPU all three
            mean the CPU family.
        may_copy: whether the workspace may hold copies of q, K and V, which grow with the batch.

    Raises:
        ValueError: an unknown backend. NotImplementedError: "fa3", and that family cannot serve the problem.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if device.type == "cpu":
        # 256 rows and 4096 tokens of fp32 logits are 4 MB a head: they stay in a core's share of the last-level cache
        group = problem.group_size
        return Config("cpu", block_m=max(256 // group, 1) * group, block_n=64, pack=group, kv_chunk=4096)
    if problem.quantised:
        refusal = narrow_refusal(problem, work, capability(device))
        if backend == "fa3" and refusal:
            raise NotImplementedError(f"backend 'fa3': the narrow family cannot serve this: {refusal}; use 'auto'")
        if backend == "fa3" or (backend == "auto" and not refusal and _narrow_pays(problem, work, num_sms(device))):
            return narrow(problem, work, num_sms(device))
        return portable(problem, work, capability(device), num_sms(device))
    rows = work.max_qo_len * problem.group_size
    # Copying first moves each key and value four times. It pays where a rotation would else be repeated for every tile,
    # or KV be gathered by rows, which costs a tenth (H100, 32/8 heads: 16 x 1024 tokens 267 us by rows, 287 copied; 8 x
    # 2048 448 and 451; 4 x 4096 827 and 791)
    copy = problem.rope is not None or (box_rows(problem.page_size, 128) == 0 and rows > 8192 and may_copy)
    served = replace(problem, rope=None, page_size=0) if copy else problem  # what the Hopper family would see
    refusal = hopper_refusal(served, capability(device))
    if backend == "fa3" and refusal:
        raise NotImplementedError(f"backend 'fa3': the Hopper family cannot serve this: {refusal}; use backend='auto'")
    # Where one row of tensor-core tiles holds a group, the portable family reads K and V as fast as memory gives them.
    # 64 rows over 4k tokens of 64 requests: 370 us, portable 378; 16 rows by token, causal: 376, portable 416.
    # 64 rows over 1 x 4k tokens: 20.8 us, portable with deep stages 18.8; by token 20.4, 20.8.
    short = rows <= 64 and _deep_append(problem, work)
    enough = (rows > 16 and not short) or (problem.window_right >= 0 and problem.page_size < 8)
    if problem.rope is not None:
        enough = rows > 511 and may_copy
    if backend == "fa3" or (backend == "auto" and enough and refusal is None):
        turn_q = problem.rope is not None and problem.head_dim_qk in TURNED_DIMS
        chained = turn_q and work.max_kv_len <= CHAINED_TOKENS[problem.q_dtype]
        return replace(hopper(served, work), copy_first=copy, turn_q=turn_q, chained=chained)
    return portable(problem, work, capability(device), num_sms(device))


def box_rows(page_size: int, block_n: int) -> int:
    """Rows of the TMA boxes that make up a KV block; 0 if its rows must be gathered."""
    if page_size == 0 or page_size % block_n == 0:
        return block_n
    return page_size if page_size >= 8 and block_n % page_size == 0 else 0


def narrow_refusal(p: Problem, w: Workload, sm: tuple[int, int]) -> str | None:
    """Why the narrow family cannot serve a problem, or None if it can."""
    if sm != (9, 0):
        return f"it needs compute capability 9.0, this GPU has {sm[0]}.{sm[1]}"
    if w.max_qo_len > 1 or p.group_size > 8 or p.num_kv_heads % 4:
        return (
            "it takes one query token per request, at most 8 query heads for a KV head, and a multiple of 4 KV heads, "
            f"got {w.max_qo_len}, {p.group_size}, {p.num_kv_heads}"
        )
    if p.head_dim_qk != p.head_dim_vo or p.head_dim_qk not in (64, 128) or p.rope is not None or p.alibi:
        return f"it takes head_dim 64 or 128 and no position encoding, got {p.head_dim_qk}/{p.head_dim_vo}"
    if p.k_format != p.v_format or p.k_format == "plain" or p.q_dtype == torch.float32 or p.o_dtype != p.q_dtype:
        return f"it takes fp16 or bf16 over K and V of one narrow type, got {p.q_dtype}, {p.k_format}, {p.v_format}"
    return None


def narrow_takes(scales: Scales) -> bool:
    """Whether the narrow family takes scales and zero points: those of a KV head, and those of a token if all are in
    fp32 or all in fp16."""
    grouped = any(f.form == "group" for f in scales.factors())
    return not grouped and scales.token_dtypes() in (set(), {torch.float32}, {torch.float16})


def narrow(p: Problem, w: Workload, sms: int) -> Config:
    """The narrow family's rows (H100, 32/8 heads, us; benchmarks/results/h100_narrow_trials.md): as many steps of 32 to
    64 KB on their way as shared memory holds.

    CTAs of 8 heads read the most in one place; those of 4 need no cut along KV where 8 would leave SMs without a tile:
    64 x 4k tokens of int4 108, by 8 heads in two chunks each 112; 256 x 1k 111, 110.
    """
    eight = p.num_kv_heads % 8 == 0 and w.batch_size * p.num_kv_heads >= 8 * sms
    words = p.head_dim_qk // PARTS[p.k_format]  # a row of 32, 64 or 128 bytes
    block_n, stages = {
        (True, 64): (32, 3), (True, 32): (64, 3), (True, 16): (64, 5),
        (False, 64): (64, 3), (False, 32): (64, 6), (False, 16): (64, 11),
    }[eight, words]  # fmt: skip
    if p.page_size % 16 and eight and block_n == 64:
        block_n, stages = 32, min(2 * stages, 11)  # rows: 256 x 1k of int4 123, 129 by 64 tokens
    return Config(
        "narrow", 16, block_n, p.group_size, num_warps=8, num_stages=stages, ways=8, heads=8 if eight else 4,
        split_cost=2.0, overlap=True,
    )  # fmt: skip


def _narrow_pays(p: Problem, w: Workload, sms: int) -> bool:
    """Whether the narrow family is faster than the portable one. int4: 8 x 1k tokens 16.0 us, 17.0; 1 x 4k 14.8, 13.4.
    int8: 32 x 4k 104, 109, but 32 x 1k 35.8, 34.0, and 16 x 4k, which it must cut, 60, 56."""
    if p.k_format == "int4":
        return _keys_per_sm(p, w, sms) >= 480
    return w.batch_size * p.num_kv_heads >= 256 and _keys_per_sm(p, w, sms) >= 3072


HOPPER_DIMS = {(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)}  # (head_dim_qk, head_dim_vo)
TURNED_DIMS = (64, 128, 256) if ROOMY_PTXAS else ()  # of q that the Hopper family can turn


def hopper_refusal(p: Problem, sm: tuple[int, int]) -> str | None:
    """Why the Hopper family cannot serve a problem, or None if it can."""
    if sm != (9, 0):
        return f"it needs compute capability 9.0, this GPU has {sm[0]}.{sm[1]}"
    if p.q_dtype not in (torch.float16, torch.bfloat16) or p.o_dtype != p.q_dtype or p.quantised:
        return (
            f"it takes q, cache and out all in float16 or all in bfloat16, got {p.q_dtype}, {p.kv_dtype}, {p.o_dtype}"
        )
    if p.rope is not None or p.alibi:
        return f"pos_encoding_mode {'ALIBI' if p.alibi else 'ROPE_LLAMA'}: it takes q and k as they are"
    if (p.head_dim_qk, p.head_dim_vo) not in HOPPER_DIMS:
        dims = ", ".join(f"{qk}/{vo}" for qk, vo in sorted(HOPPER_DIMS))
        return f"head_dim_qk/head_dim_vo {p.head_dim_qk}/{p.head_dim_vo}: it has {dims}"
    return None


def hopper(p: Problem, w: Workload) -> Config:
    """The Hopper family's rows: the first that fits wins."""
    group, rows = p.group_size, w.max_qo_len * p.group_size
    block_m = 128
    block_n, stages = {(64, 64): (128, 4), (96, 96): (128, 3), (256, 256): (64, 2)}.get(
        (p.head_dim_qk, p.head_dim_vo), (128, 2)
    )
    pack = group if group > 1 and w.max_qo_len <= 64 else 1
    if pack > 1 and rows > 64 and (p.head_dim_qk, p.head_dim_vo) == (128, 128):
        stages = 3  # bound by memory as much as by products: 64 tokens over 64 x 4k 455 us, 486 with 2
        if _few_tiles(p, w) and rows * p.num_kv_heads * w.total_kv_len <= 2**24:
            block_m = 64  # more tiles, less to merge: 64 tokens over 1 x 4k 23.8 us, 29.1; over 1 x 32k 81, 69
    if (p.head_dim_qk, p.head_dim_vo) == (64, 64) and pack == 1 and _three_consumers_pay(p, w):
        block_m, stages = 192, 3
    if rows <= 64:  # one consumer: bound by memory
        return Config("hopper", 64, block_n, pack, num_stages=stages, split_cost=2.0, overlap=True)
    # The list: all tiles of one KV head one after the other, so that they find it in L2. Where tiles differ in length,
    # longest first in sections whose KV fits there: MHA at 2k tokens takes 442 us with 32 MB a section, 515 with 64 MB.
    uneven = p.window_right >= 0 or w.nnz_qo < w.batch_size * w.max_qo_len
    head_bytes = w.max_kv_len * (p.head_dim_qk + p.head_dim_vo) * p.q_dtype.itemsize
    section = max(min(512, 2**25 // max(head_bytes, 1) * max(rows // 128, 1)), 1)
    if w.max_kv_len <= 1024:  # by head; but 32 x 512 tokens of MHA, 4 heads together 201 us, one by one 217, 16: 237
        section = 16 if w.max_kv_len <= 512 else 1
    return Config(
        "hopper", block_m, block_n, pack, num_stages=stages, heads_per_item=group // pack,
        section_tiles=section if uneven else 1, split_cost=4.0, overlap=True,
        pack_decode=pack == 1 < group <= 64 and p.head_dim_qk <= 128,  # beyond, some variants would spill
    )  # fmt: skip


def _three_consumers_pay(p: Problem, w: Workload) -> bool:
    """Whether long tiles of head_dim 64 take 192 rows: exps take as long there as products, and a third consumer fills
    the gaps (H100, 16k tokens not causal 3868 us, by 128 rows 4121; causal 2025, 2172; 4 x 4096 1012, 1040, causal 581,
    576). With a soft cap, or where rows are gathered, the 160 registers of a consumer are too few."""
    enough = w.max_kv_len >= 4096 and w.nnz_qo * p.num_qo_heads >= 2**18  # 1365 tiles
    return enough and p.logits_soft_cap == 0 and (p.page_size == 0 or box_rows(p.page_size, 128) > 0)


# Tokens of a request up to which a chain of angles (kernels/rotation.py) is as good as fp32 ones: at most 2**-8 radians
# apart in bf16, whose keys are rounded by 2**-9 of themselves, and 2**-11 in fp16
CHAINED_TOKENS = {torch.bfloat16: 2**16, torch.float16: 2**13}


def portable(p: Problem, w: Workload, sm: tuple[int, int] = (9, 0), sms: int = 132) -> Config:
    """The portable family's choice. `sm`: compute capability."""
    row = _portable_row(p, w, sm, sms)
    row = _with_rope(p, w, row, sm, sms) if p.rope else _with_alibi(row, sm) if p.alibi else row
    return replace(row, has_e4m3=sm >= (8, 9), has_wgmma=sm[0] == 9)


def _with_rope(p: Problem, w: Workload, row: Config, sm: tuple[int, int], sms: int) -> Config:
    """A row for keys that are rotated as they are read: halves, angles and products take registers, so tiles that are
    full of them shrink."""
    wide = max(p.head_dim_qk, p.head_dim_vo)
    if p.q_dtype == torch.float32:
        return row
    chained = w.max_kv_len <= CHAINED_TOKENS[p.q_dtype]
    stages = 7 if p.k_format == "int4" else 5  # of 4 bits as many would fit; with 5, some variants spill
    if row.block_m == 16 and wide <= 128 and row.ctas_per_sm == 1:
        row = replace(row, chained=chained)
        if sm >= (9, 0) and p.paged and _keys_per_sm(p, w, sms) >= 384:
            # 16 x 4k tokens 97.6 us, without a rope 95.7, not chained 98.0, by 8 warps and 64 tokens 116; 1 x 16k 34.0,
            # 32.4, 34.7, 39. Chains take fewer registers: without them most variants would spill
            fits = chained or not (p.quantised or p.page_size == 1)
            return replace(row, block_n=128, num_warps=4 if fits else 8, num_stages=stages, max_registers=255)
        return replace(row, block_n=64, num_warps=8, max_registers=168)  # more warps to hide the rotation
    if row.block_m == 16 and wide <= 128:
        many = w.batch_size * p.num_kv_heads > 8 * sms
        long = w.total_kv_len >= 2048 * w.batch_size
        roomy = ROOMY_PTXAS or p.k_format != "int4"
        if chained and sm >= (9, 0) and roomy and (p.quantised or long or not (many and p.paged)):
            # 64 x 4k tokens: 365 us, by the rows below 369, without a rope 358; 64 x 1k 101.4, 106, 95.3. 64 x 4k of
            # fp8 205, 339, 187; of int8 233, 494, 195; of int4 219, 449, 121
            row = replace(row, block_n=128, num_warps=4, num_stages=stages if p.quantised else 3, ctas_per_sm=2)
            return replace(row, raw=False, heads=1, ways=1, max_registers=255, chained=True)
        fits = not p.quantised and p.window_left < 0 and not p.logits_soft_cap
        if fits and sm >= (9, 0):
            # 256 x 1k tokens: 369 us with 128 registers, of which more CTAs run at once, 385 with 168, chained as above
            # 373; without a rope 361
            row = replace(row, block_n=32, num_warps=2, num_stages=3)
            return replace(row, ctas_per_sm=8 if many else 6, max_registers=128 if many else 168)
        # two KV blocks of half the rows in flight are the bytes of one whole; ptxas left alone spills a few bytes
        row = replace(row, block_n=32, num_warps=4, num_stages=5, max_registers=128 if fits else 168)
        return replace(row, ctas_per_sm=min(row.ctas_per_sm, 4))
    if row.block_m > 16 and wide > 256:
        return replace(row, block_m=16, block_n=16)
    if row.block_m == 64 and sm < (9, 0):
        return replace(row, block_m=32) if wide > 128 else replace(row, num_warps=8)
    return replace(row, block_n=32) if row.block_m == 64 else row


def _with_alibi(row: Config, sm: tuple[int, int]) -> Config:
    """A row for logits with ALiBi's term, which takes some registers more where there is no wgmma. Likewise."""
    if row.block_m == 16 and sm >= (9, 0) and row.max_registers == 168:
        return replace(row, max_registers=255)  # one CTA an SM: it may have them
    if sm >= (9, 0) or row.num_warps != 4:
        return row
    return replace(row, max_registers=168) if row.block_m == 16 else replace(row, num_warps=8)


def _portable_row(p: Problem, w: Workload, sm: tuple[int, int], sms: int) -> Config:
    """The portable family's rows: the first that fits wins. (8, x) has no wgmma to keep accumulators of 128 x 64 logits
    within 255 registers, so its tiles are smaller."""
    group, rows = p.group_size, w.max_qo_len * p.group_size
    wide = max(p.head_dim_qk, p.head_dim_vo)
    if p.q_dtype == torch.float32:  # products in fp64: small tiles, or the operands spill
        return Config("portable", 16, 16 if wide > 256 else 32, group, num_warps=8, overlap=sm >= (9, 0))
    if rows <= 16:  # one tensor-core row of 16 holds the group: bound by memory
        overlap = sm >= (9, 0)
        if wide <= 128:
            whole = p.head_dim_qk in (16, 32, 64, 128) and p.head_dim_vo in (16, 32, 64, 128)
            block_n = 64 if whole else 32  # padded dims cost registers
            narrow = "plain" not in (p.k_format, p.v_format)
            variant = p.window_left >= 0 or p.window_right >= 0 or p.logits_soft_cap > 0  # its registers would spill
            if whole and narrow and not variant and sm >= (9, 0):
                return _narrow_row(p, w, sms)
            tiles = w.batch_size * p.num_kv_heads
            if tiles <= 2 * sms:
                # few tiles: two KV blocks in flight keep one CTA an SM at 84 % of the copy rate (H100, 16 x 4k tokens),
                # where twice the CTAs, each with one block in flight, lose 4 % to the merge
                row = Config("portable", 16, block_n, group, num_stages=5, split_cost=2.0, overlap=overlap)
                row = replace(row, max_registers=168) if sm >= (9, 0) else row  # else ptxas spills to keep to 128
                # more to read, longer steps: 16 x 4k tokens 96 us, 98 by 64; 8 x 1k 21.2, 21.7; but 1 x 1k of 32 heads
                # 15.5, 15.1, and 32 x 2k, of more tiles than SMs, 98.2, 96.7
                # Ragged KV has no page ids to wait for: its 5 stages are 4 blocks in flight, and of 128 keys do not fit
                longer = whole and not variant and p.paged and tiles <= sms and _keys_per_sm(p, w, sms) >= 384
                return replace(row, block_n=128) if longer and sm >= (9, 0) else row
            # many tiles: CTAs that wait for one another as little as can be; 64 x 4k tokens 358 us, by four warps 360,
            # 64 x 1k 95.8, 96.5
            row = Config("portable", 16, block_n, group, num_stages=3, ctas_per_sm=4, split_cost=2.0, overlap=overlap)
            return replace(row, num_warps=2, max_registers=255) if whole and sm >= (9, 0) else row
        if wide <= 256:
            return Config("portable", 16, 32, group, num_warps=8, num_stages=5, ctas_per_sm=2, overlap=overlap)
        return Config("portable", 16, 16, group, num_warps=8, num_stages=3, overlap=overlap)
    if wide > 256:
        return Config("portable", 32, 32, group, num_warps=8, num_stages=1)
    if wide > 128:
        return Config("portable", 64, 32, group, num_warps=8, split_cost=4.0)
    if sm < (9, 0):
        return Config("portable", 64, 32, group, split_cost=2.0, ctas_per_sm=2)
    if rows <= 64:
        row = Config("portable", 64, 64, group, ctas_per_sm=2)
        return replace(row, num_stages=5, ctas_per_sm=1, split_cost=2.0, overlap=True) if _deep_append(p, w) else row
    return Config("portable", 128, 64, group, num_warps=8, split_cost=4.0)  # enough rows to be bound by arithmetic


def _deep_append(p: Problem, w: Workload) -> bool:
    """Whether an append is over so few keys that only latency counts: each CTA then keeps many KV blocks in flight."""
    plain = "plain" == p.k_format == p.v_format and p.rope is None and not p.alibi and p.logits_soft_cap == 0
    dims = p.head_dim_qk == p.head_dim_vo == 128 and p.window_left < 0 and p.q_dtype != torch.float32
    few = _few_tiles(p, w) and w.total_kv_len * p.num_kv_heads <= 2**16
    return plain and dims and few and box_rows(p.page_size, 128) > 0


def _keys_per_sm(p: Problem, w: Workload, sms: int) -> float:
    """Keys of all KV heads that an SM reads."""
    return w.total_kv_len * p.num_kv_heads / sms


def _few_tiles(p: Problem, w: Workload) -> bool:
    """Whether packed rows fill so few tiles of 64 that most SMs would be idle, were these not cut along KV."""
    return w.batch_size * p.num_kv_heads * -(-w.max_qo_len * p.group_size // 64) <= 32


def _narrow_row(p: Problem, w: Workload, sms: int) -> Config:
    """Decode over caches of 8 and 4 bits (H100, 32/8 heads, us; benchmarks/results/h100_decode_sweeps.jsonl). A step is
    few bytes, so few tiles take long steps, and many tiles small CTAs: one or two warps wait for less."""
    row = Config("portable", 16, 128, p.group_size, num_stages=5, split_cost=2.0, overlap=True)
    int4 = {p.k_format, p.v_format} == {"int4"}
    fp8 = not {p.k_format, p.v_format} & {"int8", "int4"}
    tiles = w.batch_size * p.num_kv_heads
    raw = p.rope is None
    if tiles <= 2 * sms:
        if int4:  # 16 x 4k tokens 43, by one CTA an SM 54
            return replace(row, raw=True, ctas_per_sm=2) if raw else row
        scattered = p.page_size == 1 or (p.num_kv_heads > 8 and not p.kv_heads_first)
        if not fp8 and scattered:  # each scale is read from a place of its own: 1 x 16k tokens of 32 heads 61, 78
            return replace(row, block_n=64, num_warps=2, ctas_per_sm=4)
        # 16 x 4k tokens: fp8 53.9, int8 56.0; by 5 stages 55.5, 57.8; but 1 x 4k of 32 heads 21.8, 21.6
        return replace(row, num_stages=7 if raw and _keys_per_sm(p, w, sms) >= 2048 else 5, max_registers=168)
    many = tiles > 8 * sms  # more than run at once; by fewer stages more do
    if fp8:  # 64 x 4k tokens 187, by four warps 191; 256 x 1k 191, 198; 64 x 16k 718, 737
        row = replace(row, block_n=32, num_warps=2, max_registers=128)
        return replace(row, num_stages=3, ctas_per_sm=8) if many else replace(row, ctas_per_sm=4)
    if not raw:
        return replace(row, num_stages=3, ctas_per_sm=4, block_n=128 if int4 else 64)
    row = replace(row, max_registers=192 if ROOMY_PTXAS else 255)
    if not int4:  # 64 x 4k tokens 195, by four warps 205; 256 x 1k 200, 212. 6 stages, not 5: see attention.suited
        return replace(row, block_n=16, num_warps=1, num_stages=6 if many else 5, ctas_per_sm=8)
    together = p.kv_heads_first and p.page_size != 1  # rows of one head, of which a step reads whole pages
    row = replace(row, block_n=32, raw=True)
    if not together and p.num_kv_heads % 2 == 0 and _keys_per_sm(p, w, sms) >= 8192:
        # a row of one head is 64 bytes: CTAs of two heads read whole lines. 64 x 4k / 64 x 16k / 256 x 1k tokens 120 /
        # 431 / 124, by one warp and head 128 / 534 / 129
        return replace(row, num_warps=2, ctas_per_sm=4, ways=2, heads=2)
    # HND pages, 64 x 4k / 64 x 16k / 256 x 1k tokens: 111 / 404 / 114, by two warps and 128 tokens 110 / 404 / 122
    return replace(row, num_warps=1, ctas_per_sm=16 if many else 8)


@dataclass(frozen=True)
class GemmConfig:
    """How a grouped matrix product runs.

    family: "portable" or "hopper". block_m x block_n: a tile of the output; block_k: columns of x of a step.
    ctas_per_sm: CTAs that share an SM. group_m: row blocks that share a column block of the weight while it is in L2.
    """

    family: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    ctas_per_sm: int = 1
    group_m: int = 8

    def max_tiles(self, segments: int, rows: int, d_out: int) -> int:
        """Tiles of `rows` rows in all, however the segments (and the rows before and after them) cut these."""
        blocks = rows // self.block_m + segments + 2
        return min(blocks, rows) * -(-d_out // self.block_n)


@dataclass(frozen=True)
class Product:
    """A grouped matrix product as far as the host knows it: `segments` products of [rows, d_in] and [d_in, d_out], with
    rows of one on average; itemsize: bytes of an element of x."""

    segments: int
    rows: int
    d_in: int
    d_out: int
    itemsize: int

    @property
    def step(self) -> int:
        """Elements in 128 bytes: one swizzled row of shared memory."""
        return 128 // self.itemsize

    def tiles(self, block_m: int, block_n: int) -> int:
        """Tiles of the output."""
        return self.segments * -(-self.rows // block_m) * -(-self.d_out // block_n)


def choose_gemm(p: Product, sm: tuple[int, int], sms: int, hopper: bool = False) -> GemmConfig:
    """The configuration of a grouped product. Figures are of bf16 on an H100 (132 SMs); "enough" tiles fill 3/4 of it.

    Args:
        sm: compute capability; (0, 0) for the interpreter. sms: streaming multiprocessors to fill.
        hopper: whether the Hopper kernel can take the tensors.
    """
    if p.itemsize == 4:  # products in fp64: larger tiles spill
        return GemmConfig("portable", 32, 32, 32, num_stages=2, ctas_per_sm=2)
    if p.d_out <= 64:
        return _gemm_narrow(p, 3 * sms // 4, hopper)
    if p.rows <= 64:
        return _gemm_few_rows(p, sms, hopper)
    if hopper:
        return _gemm_hopper(p, 3 * sms // 4)
    return GemmConfig("portable", 128, 128, p.step if sm >= (9, 0) else p.step // 2, num_warps=8, num_stages=4)


def _gemm_narrow(p: Product, enough: int, hopper: bool) -> GemmConfig:
    """Few columns, as on LoRA's way down: x is all the traffic, and each row block of it should be read once."""
    wide = 1 << max(4, (p.d_out - 1).bit_length())
    if hopper and wide == 64 and p.tiles(64, 64) >= enough:  # 4 % faster than the portable kernel: 8 x 4096 rows
        return GemmConfig("hopper", 64, 64, p.step, num_stages=10)
    if p.tiles(64, wide) >= enough:
        return GemmConfig("portable", 64, wide, 2 * p.step, num_stages=4, ctas_per_sm=2)
    if p.tiles(32, wide) >= enough:
        return GemmConfig("portable", 32, wide, (4 if wide < 64 else 2) * p.step, num_stages=5)
    if wide == 64 and p.tiles(16, 64) >= enough:  # 16.0 us for 8 x 256 rows; half the columns, 23.6
        return GemmConfig("portable", 16, 64, 2 * p.step, num_stages=5)
    if wide >= 32 and p.tiles(16, 32) >= enough:  # 21.2 us for 64 x 16 rows; all columns, 22.3
        return GemmConfig("portable", 16, 32, 4 * p.step, num_stages=4)
    # few tiles: as many bytes in flight as fit; 13.0 us for 8 x 16 rows, 15.6 with a quarter of the depth
    return GemmConfig("portable", 16, 16, 8 * p.step, num_stages=4)


def _gemm_few_rows(p: Product, sms: int, hopper: bool) -> GemmConfig:
    """Few rows: the weights, or the stores, are all the traffic; each column block is read once."""
    block_m = next(m for m in (16, 32, 64) if p.rows <= m)
    if p.d_in <= p.step and (
        block_m < 64 or not hopper
    ):  # one step: 22.5 us for 64 x 16 rows, 25.9 by the Hopper kernel
        block_k = max(32, p.step // 2) if p.d_in <= 32 else p.step
        return GemmConfig("portable", block_m, 128, block_k, num_stages=1, ctas_per_sm=4)
    if hopper and p.d_in <= 4 * p.step:
        return GemmConfig("hopper", 64, 256, p.step, num_stages=4, group_m=1)
    for block_n in (128, 64):
        if p.tiles(block_m, block_n) >= sms:
            return GemmConfig("portable", block_m, block_n, 2 * p.step, num_stages=3, ctas_per_sm=2)
    if block_m == 16:  # few tiles: more bytes in flight in each; 17.3 us for 1 x 16 rows, 21.3 with half the depth
        return GemmConfig("portable", 16, 32, 4 * p.step, num_stages=5)
    return GemmConfig("portable", block_m, 32, 2 * p.step, num_stages=4)


def _gemm_hopper(p: Product, enough: int) -> GemmConfig:
    """Many rows and columns on Hopper."""
    if p.d_in <= p.step:  # LoRA's way up: bound by the stores, fastest where neighbours write neighbouring columns:
        # 750 us for 64 x 4096 rows of 16; 128 x 128 835, and 850 by columns first
        return GemmConfig("hopper", 64, 256, p.step, num_stages=4, group_m=1)
    if p.rows <= 128 and p.tiles(64, 256) >= enough:  # bound by the weights: 104 us for 8 x 128 rows; 128 x 256, 108
        return GemmConfig("hopper", 64, 256, p.step, num_stages=5, group_m=16)
    for block_m, block_n, stages in ((128, 256, 4), (128, 128, 6), (64, 128, 8)):
        if p.tiles(block_m, block_n) >= enough:
            return GemmConfig("hopper", block_m, block_n, p.step, num_stages=stages, group_m=16)
    return GemmConfig("hopper", 64, 64, p.step, num_stages=10, group_m=16)


# Candidates of top-p by rejection that are drawn from the whole row, whatever becomes of those before them. Tokens
# depend on it, so it is part of the definition (reference/sampling.py), and of no configuration.
WHOLE_ROW_DRAWS = 4


@dataclass(frozen=True)
class SamplingConfig:
    """How rows of one vocabulary are sampled. Nothing but the vocabulary may decide: tiles and warps give sums their
    order, and a row must draw the same token alone and in any batch.

    chunk: entries that a program reads in a pass over rows. chunk_warps: of a pass that only adds up; sweep_warps: of
        the pass that a search makes (kernels/sampling/threshold.py). draw_warps: of the program that draws.
    sample: entries of a row from which a search guesses its bracket, with guess_warps: more make the guess slower and
        the bracket narrower. guess_pivots: values that a pass over the sample tries for each end of the bracket.
        sigmas: half the width of a bracket, in standard errors.
    slots: entries of a chunk that a bracket has room for. slot_tile: those of a row that step 3 holds in registers,
        with select_warps of select_registers a thread; any others it reads again in each pass.
    accept_tile: entries of a row that top-p by rejection (kernels/sampling/rejection.py) reads together, with
        draw_warps, where none of the first candidates is accepted.
    row: entries, padded to a power of two of chunks, of the longest row that one program holds in registers, with up to
        row_warps of row_registers a thread: one launch, no guess and no sweep.
    """

    chunk: int = 2048  # 8 KB of fp32; a vocabulary of 128k makes 63 programs, enough for a batch of 1
    chunk_warps: int = 2  # 32 entries, eight 16-byte loads, per thread
    sweep_warps: int = 2
    draw_warps: int = 8  # there is one program for each row: latency counts
    sample: int = 1024
    guess_warps: int = 8
    guess_pivots: int = 4
    sigmas: float = 4.0  # a row in 10,000 is outside, and swept again by one program
    slots: int = 512  # brackets hold some 5 % of a flat distribution, 10 % at worst
    slot_tile: int = 8192  # 16 per thread: 32 are spilled on sm_80
    select_warps: int = 16
    select_registers: int = 128  # left to itself, ptxas aims at fewer, and spills
    accept_tile: int = 4096  # 8192 would take all registers
    row: int = 32768  # half of an SM's registers
    row_warps: int = 8  # with 16, what each warp does once a pass costs as much as the entries
    row_registers: int = 255  # 128 of them hold the row

    def __post_init__(self) -> None:
        for name in ("chunk", "sample", "slot_tile", "accept_tile"):
            if (value := getattr(self, name)) < 128 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two from 128, got {value}")
        if self.row_warps < 4 or self.row_warps & (self.row_warps - 1):
            raise ValueError(f"row_warps: expected a power of two from 4, got {self.row_warps}")
        if self.row < 0 or not 32 <= self.row_registers <= 255:
            raise ValueError(
                "row, row_registers: expected entries from 0 and registers from 32 to 255, "
                f"got {self.row} and {self.row_registers}"
            )
        if self.guess_pivots < 1 or self.guess_pivots & (self.guess_pivots - 1):
            raise ValueError(f"guess_pivots: expected a power of two, got {self.guess_pivots}")
        if self.slots % 4 or not 8 <= self.slots <= self.chunk:
            raise ValueError(f"slots: expected a multiple of 4 from 8 to chunk = {self.chunk}, got {self.slots}")


def choose_sampling(vocab_size: int, sm: tuple[int, int] = (9, 0)) -> SamplingConfig:
    """The configuration for rows of vocab_size entries. `sm`: compute capability."""
    if vocab_size <= 65536:
        return SamplingConfig() if sm >= (9, 0) else SamplingConfig(row=16384)  # 32768 would spill 200 bytes
    return SamplingConfig(chunk=4096, chunk_warps=4, sample=2048, sweep_warps=4, slots=1024)
