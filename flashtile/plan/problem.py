"""What is to be computed: the frozen description that a plan and a kernel configuration are chosen from."""

from dataclasses import dataclass

import torch

from flashtile.plan.encoding import Rope

# Cache formats by the dtype of the cache; other dtypes are "plain" and must be the query's. uint8 holds two int4 a
# byte.
FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8", torch.uint8: "int4"}
# Values of a format in the 16-bit words that kernels read.
PARTS = {"plain": 1, "e4m3": 2, "e5m2": 2, "int8": 2, "int4": 4}


@dataclass(frozen=True)
class Problem:
    """One attention problem, without its lengths. Every field is known at plan time.

    A query row of request r at token i sits at position i + kv_len - qo_len of the KV sequence and sees the keys from
    its position - window_left to its position + window_right (both inclusive; -1: no bound). Causal is window_right 0.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    o_dtype: torch.dtype
    page_size: int = 0  # tokens; 0: KV is ragged, one row per token without a page table
    window_left: int = -1
    window_right: int = -1
    logits_soft_cap: float = 0.0
    v_dtype: torch.dtype | None = None  # of V's cache, where kv_dtype is only K's
    rope: Rope | None = None  # q and k are to be rotated: q at its position, key j at j
    kv_heads_first: bool = False  # HND: the rows of one head lie together in a page, or in all of ragged KV
    alibi: bool = False  # slope[head] * (j - i) is added to the scaled logit of key j and the request's row i

    @property
    def k_format(self) -> str:
        """How K is stored: "plain", "e4m3", "e5m2", "int8" or "int4"."""
        return FORMATS.get(self.kv_dtype, "plain")

    @property
    def v_format(self) -> str:
        """How V is stored, likewise."""
        return FORMATS.get(self.v_dtype or self.kv_dtype, "plain")

    @property
    def quantised(self) -> bool:
        """Whether K or V is stored in 8 or 4 bits."""
        return self.k_format != "plain" or self.v_format != "plain"

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def alibi_shift(self) -> bool:
        """Whether logits are less than ALiBi's by slope * (kv_len - qo_len), a constant of the row, until the end: out
        does not depend on it, lse does. A soft cap needs them whole."""
        return self.alibi and not self.logits_soft_cap

    @property
    def paged(self) -> bool:
        """Whether KV rows are found through a page table."""
        return self.page_size > 0

    def check(self) -> None:
        """Raise ValueError for sizes that no kernel family takes."""
        for name, heads in (("num_qo_heads", self.num_qo_heads), ("num_kv_heads", self.num_kv_heads)):
            if heads < 1:
                raise ValueError(f"{name}: expected at least 1, got {heads}")
        if self.num_qo_heads % self.num_kv_heads:
            raise ValueError(
                f"num_qo_heads {self.num_qo_heads} should be divisible by num_kv_heads {self.num_kv_heads}: "
                "each KV head serves the same number of query heads"
            )
        for name, dim in (("head_dim_qk", self.head_dim_qk), ("head_dim_vo", self.head_dim_vo)):
            if dim % 8 or not 16 <= dim <= 512:
                raise ValueError(
                    f"{name}: expected a multiple of 8 from 16 to 512, got {dim}; pad the heads to the next one"
                )
        if self.window_left < -1:
            raise ValueError(f"window_left: expected -1 (off) or a number of tokens, got {self.window_left}")
        if not self.logits_soft_cap >= 0:
            raise ValueError(f"logits_soft_cap: expected 0 (off) or a positive cap, got {self.logits_soft_cap}")
        if self.rope is not None:
            self.rope.check()


@dataclass(frozen=True)
class Workload:
    """The lengths of a batch in a few numbers, for choosing a configuration."""

    batch_size: int
    nnz_qo: int
    max_qo_len: int
    total_kv_len: int
    max_kv_len: int
