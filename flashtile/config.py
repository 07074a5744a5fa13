"""Problem -> Config: the only file that names an architecture, a tile size or a warp count."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from flashtile.plan.problem import Problem, Workload
from flashtile.plan.worklist import Tiling

BACKENDS = ("auto", "fa2", "fa3")


@dataclass(frozen=True)
class Config:
    """How one plan runs: kernel family, tile sizes, and what the scheduler should assume.

    block_m: packed query rows of a tile (tokens x pack); block_n: KV tokens of a step; pack: query heads packed into rows.
    ctas_per_sm: CTAs that share an SM. item_cost, split_cost: see Tiling. heads_per_item: head groups of a list entry (0: all).
    kv_chunk: a fixed KV chunk in tokens (0: the scheduler's choice). one_loop: mask every step instead of walking the
    unmasked ones in a loop of their own. overlap: the merge is launched while the last tiles run (sm_90).
    section_tiles: see Tiling. dynamic: CTAs of a persistent grid draw tiles one by one, instead of by turns.
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
    has_e4m3: bool = True  # the GPU converts e4m3 to fp16
    section_tiles: int = 0
    dynamic: bool = False

    def tiling(self, problem: Problem, num_sms: int) -> Tiling:
        """The scheduler's view of this configuration."""
        groups = problem.num_qo_heads // self.pack
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
        )


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability, (0, 0) on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def choose(problem: Problem, work: Workload, device: torch.device, backend: str = "auto") -> Config:
    """The configuration for a problem on a device.

    Args:
        backend: "auto"; "fa2": the portable family; "fa3": the Hopper family. On the CPU all three mean the CPU family.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if device.type == "cpu":
        # 256 rows and 4096 tokens of fp32 logits are 4 MB a head: they stay in a core's share of the last-level cache
        group = problem.group_size
        return Config("cpu", block_m=max(256 // group, 1) * group, block_n=64, pack=group, kv_chunk=4096)
    return portable(problem, work, capability(device), num_sms(device))


def portable(p: Problem, w: Workload, sm: tuple[int, int] = (9, 0), sms: int = 132) -> Config:
    """The portable family's choice. `sm`: compute capability."""
    return replace(_portable_row(p, w, sm, sms), has_e4m3=sm >= (8, 9))


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
            if w.batch_size * p.num_kv_heads <= 2 * sms:
                # few tiles: two KV blocks in flight keep one CTA an SM at 84 % of the copy rate (H100, 16 x 4k tokens),
                # where twice the CTAs, each with one block in flight, lose 4 % to the merge
                return Config("portable", 16, block_n, group, num_stages=5, split_cost=2.0, overlap=overlap)
            # many tiles: four CTAs an SM hold 64 x 8 tiles at once; 370 us for 64 x 4k tokens where two take 386
            return Config("portable", 16, block_n, group, num_stages=3, ctas_per_sm=4, split_cost=2.0, overlap=overlap)
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
        return Config("portable", 64, 64, group, ctas_per_sm=2)
    return Config("portable", 128, 64, group, num_warps=8, split_cost=4.0)  # enough rows to be bound by arithmetic


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


def choose_gemm(
    segments: int, rows: int, d_in: int, d_out: int, itemsize: int, sm: tuple[int, int], sms: int, hopper: bool = False
) -> GemmConfig:
    """The configuration of a grouped product: the first row that fits wins.

    Args:
        segments, rows: products, and rows of one on average; what the device alone knows does not count.
        itemsize: bytes of an element of x.
        sm: compute capability; (0, 0) for the interpreter. sms: streaming multiprocessors to fill.
        hopper: whether the Hopper kernel can take the tensors.
    """
    if itemsize == 4:  # products in fp64: larger tiles spill
        return GemmConfig("portable", 32, 32, 32, num_stages=2, ctas_per_sm=2)

    def tiles(block_m: int, block_n: int) -> int:
        return segments * -(-rows // block_m) * -(-d_out // block_n)

    step = 128 // itemsize  # columns of x in 128 bytes, one swizzled row of shared memory
    if d_out <= 64:  # LoRA's way down: x is all the traffic, each row block is read once
        block_n = max(16, 1 << (d_out - 1).bit_length())
        block_m = next((m for m in (64, 32) if tiles(m, block_n) >= sms), 16)
        return GemmConfig("portable", block_m, block_n, 2 * step, num_stages=4, ctas_per_sm=2)
    if rows <= 64:  # few rows: the weights are all the traffic, each column block is read once
        block_m = next(m for m in (16, 32, 64) if rows <= m)
        block_n = next((n for n in (128, 64) if tiles(block_m, n) >= sms), 32)
        return GemmConfig("portable", block_m, block_n, 2 * step, num_stages=3, ctas_per_sm=2)
    if hopper:
        return GemmConfig("hopper", 128, 256, step, num_stages=4, group_m=16)
    if sm >= (9, 0):
        return GemmConfig("portable", 128, 128, step, num_warps=8, num_stages=4)
    return GemmConfig("portable", 128, 128, step // 2, num_warps=8, num_stages=4)
