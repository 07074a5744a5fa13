"""Benchmark cases: a name such as "decode/b64.kv4096.h32/8.bf16.page16" is the case, and is parsed into its parameters.

The names are the keys of every table of figures (benchmarks/peers_h100.csv, baselines, results). A case knows the bytes
that must move (each input read once, each output written once) and the floating-point operations that must be done.
Sizes that a name leaves out are those of Llama-3-8B: head_dim 128, hidden size 4096, bf16.
"""

import re
from dataclasses import dataclass
from typing import Any

HEAD_DIM = 128
HIDDEN_SIZE = 4096  # of rmsnorm, and the width of silu_and_mul's output
ROPE_HEADS = (32, 8)  # query and KV heads of elem/rope; elem/append_kv appends the 8 KV heads
MLA_DIMS = (512, 64)  # ckv and kpe
BF16_BYTES = 2


@dataclass(frozen=True)
class AttentionBench:
    """prefill (ragged KV), paged (the same over pages), append (a few tokens onto a cache), decode (one token each).

    All requests of a batch have the same lengths. page_size 0: ragged KV. kv_dtype: "bf16" or "fp8" (e4m3). encoding:
    "none", or "rope" or "alibi" inside attention.
    """

    name: str
    area: str
    batch_size: int
    qo_len: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    mask: str  # "causal" or "full"
    page_size: int = 0
    kv_dtype: str = "bf16"
    encoding: str = "none"
    head_dim: int = HEAD_DIM

    @property
    def causal(self) -> bool:
        """Whether a query token sees only the keys up to its own position."""
        return self.mask == "causal"

    @property
    def flops(self) -> int:
        """Two products per visible (query, key) pair; under a causal mask the last query token sees all keys."""
        hidden = self.qo_len * (self.qo_len - 1) // 2 if self.causal else 0
        pairs = self.qo_len * self.kv_len - hidden
        return 4 * self.batch_size * self.num_qo_heads * self.head_dim * pairs

    @property
    def bytes(self) -> int:
        """q, out, K and V, once each."""
        kv_bytes = 1 if self.kv_dtype == "fp8" else BF16_BYTES
        kv = 2 * self.batch_size * self.kv_len * self.num_kv_heads * self.head_dim * kv_bytes
        return kv + 2 * self.batch_size * self.qo_len * self.num_qo_heads * self.head_dim * BF16_BYTES


@dataclass(frozen=True)
class MlaBench:
    """Decode over a latent cache of 512 + 64 values per token, one KV head for all query heads."""

    name: str
    area: str
    batch_size: int
    kv_len: int
    num_heads: int
    page_size: int

    @property
    def flops(self) -> int:
        """Logits over 576 values, sums over 512."""
        return 2 * self.batch_size * self.kv_len * self.num_heads * (2 * MLA_DIMS[0] + MLA_DIMS[1])

    @property
    def bytes(self) -> int:
        """The cache, q (576 values a head) and out (512)."""
        cache = self.batch_size * self.kv_len * sum(MLA_DIMS)
        return BF16_BYTES * (cache + self.batch_size * self.num_heads * (2 * MLA_DIMS[0] + MLA_DIMS[1]))


@dataclass(frozen=True)
class ElementwiseBench:
    """Norm, activation, rope and cache append over `num_tokens` rows. Bound by memory: no operations are counted."""

    name: str
    area: str
    op: str
    num_tokens: int

    flops = 0

    @property
    def bytes(self) -> int:
        """What one token moves, times the tokens."""
        heads = sum(ROPE_HEADS) * HEAD_DIM
        per_token = {
            "rmsnorm": 2 * HIDDEN_SIZE * BF16_BYTES,
            "fused_add_rmsnorm": 4 * HIDDEN_SIZE * BF16_BYTES,  # input and residual, both read and written
            "silu_and_mul": 3 * HIDDEN_SIZE * BF16_BYTES,
            "rope": 2 * heads * BF16_BYTES + HEAD_DIM * 4,  # and one row of the fp32 cos/sin cache
            "append_kv": 2 * 2 * ROPE_HEADS[1] * HEAD_DIM * BF16_BYTES,
        }
        return per_token[self.op] * self.num_tokens


@dataclass(frozen=True)
class SamplingBench:
    """One token from each of `batch_size` fp32 distributions. Bound by memory: reading the probabilities once."""

    name: str
    area: str
    op: str
    batch_size: int
    vocab_size: int

    flops = 0

    @property
    def bytes(self) -> int:
        """The probabilities, fp32."""
        return self.batch_size * self.vocab_size * 4


@dataclass(frozen=True)
class GemmBench:
    """`groups` products of `rows` rows of x with a weight [d_in, d_out] of their own. op: "grouped" (bf16 segments of
    one matrix) or "bmm_fp8" (e4m3 batches, bf16 result)."""

    name: str
    area: str
    op: str
    groups: int
    rows: int
    d_in: int
    d_out: int

    @property
    def flops(self) -> int:
        """One product per group."""
        return 2 * self.groups * self.rows * self.d_in * self.d_out

    @property
    def bytes(self) -> int:
        """x, weights and out."""
        inputs = (self.rows + self.d_out) * self.d_in * (1 if self.op == "bmm_fp8" else BF16_BYTES)
        return self.groups * (inputs + self.rows * self.d_out * BF16_BYTES)


BenchCase = AttentionBench | MlaBench | ElementwiseBench | SamplingBench | GemmBench

_BATCH, _HEADS, _PAGE = (
    r"b(?P<batch_size>\d+)",
    r"h(?P<num_qo_heads>\d+)/(?P<num_kv_heads>\d+)",
    r"page(?P<page_size>\d+)",
)
_SELF = rf"{_BATCH}\.s(?P<kv_len>\d+)\.{_HEADS}\.(?P<mask>causal|full)"
_ENCODING = r"(\.(?P<encoding>rope|alibi))?"
# area -> the class of its cases and the form of their names; a group is named for the field that it fills
_FORMS: dict[str, tuple[type[BenchCase], str]] = {
    "prefill": (AttentionBench, rf"{_SELF}{_ENCODING}"),
    "paged": (AttentionBench, rf"{_SELF}\.{_PAGE}{_ENCODING}"),
    "append": (AttentionBench, rf"{_BATCH}\.q(?P<qo_len>\d+)\.kv(?P<kv_len>\d+)\.{_HEADS}\.{_PAGE}{_ENCODING}"),
    "decode": (AttentionBench, rf"{_BATCH}\.kv(?P<kv_len>\d+)\.{_HEADS}\.(?P<kv_dtype>bf16|fp8)\.{_PAGE}{_ENCODING}"),
    "mla": (MlaBench, rf"{_BATCH}\.kv(?P<kv_len>\d+)\.h(?P<num_heads>\d+)\.{_PAGE}"),
    "elem": (ElementwiseBench, r"(?P<op>rmsnorm|fused_add_rmsnorm|silu_and_mul|rope|append_kv)\.t(?P<num_tokens>\d+)"),
    "sample": (SamplingBench, rf"(?P<op>sample|top_p|top_k_top_p\.(joint|first))\.{_BATCH}\.v(?P<vocab_size>\d+)"),
    "gemm": (GemmBench, r"(?P<op>grouped|bmm_fp8)\.g(?P<groups>\d+)\.m(?P<rows>\d+)\.k(?P<d_in>\d+)\.n(?P<d_out>\d+)"),
}


def parse_case(name: str) -> BenchCase:
    """The case of a name. ValueError for a name of no known form."""
    area, _, rest = name.partition("/")
    kind, form = _FORMS.get(area, (AttentionBench, r"(?!)"))
    match = re.fullmatch(form, rest)
    if match is None:
        raise ValueError(f"name: expected a case such as decode/b64.kv4096.h32/8.bf16.page16, got {name!r}")
    fields: dict[str, Any] = {key: int(x) if x.isdecimal() else x for key, x in match.groupdict().items() if x}
    if kind is AttentionBench:
        fields.setdefault("qo_len", 1 if area == "decode" else fields["kv_len"])
        fields.setdefault("mask", "causal" if area == "append" else "full")
    return kind(name=name, area=area, **fields)


# Shapes without a figure in peers_h100.csv: position encodings inside attention, each beside the case without one.
ENCODING_NAMES = (
    *(f"decode/b{b}.kv{n}.h32/8.bf16.page16.{mode}" for mode in ("rope", "alibi") for b, n in ((64, 4096), (1, 16384))),
    "decode/b64.kv4096.h32/8.bf16.page1.rope",
    "decode/b16.kv4096.h32/8.bf16.page16.rope",
    "append/b64.q4.kv4096.h32/8.page16.rope",
    *(f"prefill/b{b}.s{n}.h32/8.causal.{mode}" for mode in ("rope", "alibi") for b, n in ((16, 1024), (2, 8192))),
    "paged/b2.s8192.h32/8.causal.page16.rope",
)

# Grouped products of experts (square) and of LoRA (down to rank 16 or 64,
# and up again), and fp8 products.
GEMM_NAMES = (
    *(
        f"gemm/grouped.g{groups}.m{rows}.k{d_in}.n{d_out}"
        for groups in (8, 64)
        for rows in (16, 256, 4096)
        for d_in, d_out in ((4096, 16), (4096, 64), (16, 4096), (64, 4096), (4096, 4096))
    ),
    *(f"gemm/bmm_fp8.g{g}.m{m}.k{k}.n{n}" for g, m, k, n in ((1, 2048, 4096, 4096), (1, 4096, 4096, 4096))),
    *(f"gemm/bmm_fp8.g{g}.m{m}.k{k}.n{n}" for g, m, k, n in ((1, 8192, 8192, 8192), (16, 512, 4096, 4096))),
    "gemm/bmm_fp8.g16.m48.k1024.n1024",
)
EXTRA_NAMES = (*ENCODING_NAMES, *GEMM_NAMES)
