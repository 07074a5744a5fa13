"""Benchmark cases: a name such as "decode/b64.kv4096.h32/8.bf16.page16" is the case, and is parsed into its parameters.

The names are the keys of every table of figures (benchmarks/peers_h100.csv, baselines, results). A case knows the bytes
that must move (each input read once, each output written once) and the floating-point operations that must be done.
Sizes that a name leaves out are those of Llama-3-8B: head_dim 128, hidden size 4096, bf16.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

HEAD_DIM = 128
HIDDEN_SIZE = 4096  # of rmsnorm, and the width of silu_and_mul's output
ROPE_HEADS = (32, 8)  # query and KV heads of elem/rope; elem/append_kv appends the 8 KV heads
MLA_DIMS = (512, 64)  # ckv and kpe
BF16_BYTES = 2
WINDOW = 1024  # keys, of the variant "window"
SOFT_CAP = 30.0
SCALE_BYTES = {"fp32": 4, "fp16": 2, "head": 0}  # of a token and head of an int8 or int4 cache


@dataclass(frozen=True)
class AttentionBench:
    """prefill (ragged KV), paged (the same over pages), append (a few tokens onto a cache), decode (one token each).

    All requests of a batch have the same lengths. page_size 0: ragged KV. kv_dtype: "bf16", "fp8" (e4m3), "int8" or
    "int4"; the latter two with a scale per token and head of type `scales`, "fp32" or "fp16", or one per head ("head").
    encoding: "none", or "rope" or "alibi" inside attention. head_dim_vo 0: head_dim. variant: "", "cap" (soft cap 30),
    "window" (the last 1024 keys) or "sinks". layout: "nhd" or "hnd", of the cache and of its scales.
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
    scales: str = "fp32"
    encoding: str = "none"
    head_dim: int = HEAD_DIM
    head_dim_vo: int = 0
    variant: str = ""
    layout: str = "nhd"

    @property
    def dim_vo(self) -> int:
        """Elements of a row of V."""
        return self.head_dim_vo or self.head_dim

    @property
    def causal(self) -> bool:
        """Whether a query token sees only the keys up to its own position."""
        return self.mask == "causal"

    @property
    def flops(self) -> int:
        """Two products per visible (query, key) pair; under a causal mask the last query token sees all keys."""
        hidden = self.qo_len * (self.qo_len - 1) // 2 if self.causal else 0
        pairs = self.qo_len * self.kv_len - hidden
        if self.variant == "window":  # the first WINDOW tokens see a triangle, the others all of their window
            before = self.kv_len - self.qo_len
            pairs = sum(min(before + i + 1, WINDOW) for i in range(self.qo_len))
        return 2 * self.batch_size * self.num_qo_heads * (self.head_dim + self.dim_vo) * pairs

    @property
    def bytes(self) -> int:
        """q, out, K and V, once each."""
        bits = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}[self.kv_dtype]
        row = bits * self.head_dim // 8 + (SCALE_BYTES[self.scales] if self.kv_dtype.startswith("int") else 0)
        kv = 2 * self.batch_size * self.kv_len * self.num_kv_heads * row
        if self.head_dim_vo:  # unequal dims: plain caches only
            kv = kv * (self.head_dim + self.dim_vo) // (2 * self.head_dim)
        return kv + self.batch_size * self.qo_len * self.num_qo_heads * (self.head_dim + self.dim_vo) * BF16_BYTES


@dataclass(frozen=True)
class RaggedBench:
    """Ragged batches. Lengths are log-normal, 1024 tokens on average and 16384 at most.

    kind: "prefill": each request attends to itself; "mixed": every other request has one query token only;
    "uniform": as many requests of one length, with the work of "prefill".
    """

    name: str
    area: str
    kind: str
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    mask: str
    head_dim: int = HEAD_DIM

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """KV tokens of each request; the same for everybody who asks."""
        draw = random.Random(0)
        lens = [min(int(draw.lognormvariate(6.43, 1.0)) + 1, 16384) for _ in range(self.batch_size)]
        if self.kind == "uniform":
            return (round((sum(n * n for n in lens) / self.batch_size) ** 0.5),) * self.batch_size
        return tuple(lens)

    @property
    def qo_lens(self) -> tuple[int, ...]:
        """Query tokens of each request: its last ones."""
        return tuple(1 if self.kind == "mixed" and i % 2 else n for i, n in enumerate(self.kv_lens))

    @property
    def flops(self) -> int:
        """Two products per visible pair."""
        pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(self.qo_lens, self.kv_lens, strict=True))
        return 4 * self.num_qo_heads * self.head_dim * pairs

    @property
    def bytes(self) -> int:
        """q, out, K and V, once each."""
        return BF16_BYTES * 2 * self.head_dim * (
            sum(self.kv_lens) * self.num_kv_heads + sum(self.qo_lens) * self.num_qo_heads
        )  # fmt: skip


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
            # read in bf16; written with a scale of each row in int8, and one and a zero point of 32 dims in int4
            "append_kv_fp8": 2 * ROPE_HEADS[1] * HEAD_DIM * (BF16_BYTES + 1),
            "append_kv_int8": 2 * ROPE_HEADS[1] * (HEAD_DIM * (BF16_BYTES + 1) + 4),
            "append_kv_int4": 2 * ROPE_HEADS[1] * (HEAD_DIM * BF16_BYTES + HEAD_DIM // 2 + 2 * 4 * HEAD_DIM // 32),
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


BenchCase = AttentionBench | RaggedBench | MlaBench | ElementwiseBench | SamplingBench | GemmBench

_BATCH, _HEADS, _PAGE = (
    r"b(?P<batch_size>\d+)",
    r"h(?P<num_qo_heads>\d+)/(?P<num_kv_heads>\d+)",
    r"page(?P<page_size>\d+)",
)
_SELF = rf"{_BATCH}\.s(?P<kv_len>\d+)\.{_HEADS}\.(?P<mask>causal|full)"
_ENCODING = r"(?:\.(?P<encoding>rope|alibi))?"
_DIMS = r"(?:\.d(?P<head_dim>\d+)(?:/(?P<head_dim_vo>\d+))?)?"
_VARIANT = r"(?:\.(?P<variant>cap|window|sinks))?"
_ELEMENTWISE = r"rmsnorm|fused_add_rmsnorm|silu_and_mul|rope|append_kv(?:_fp8|_int8|_int4)?"
_KV = r"(?P<kv_dtype>bf16|fp8|int8|int4)(?:\.(?P<scales>fp16|head))?"
_LAYOUT = r"(?:\.(?P<layout>hnd))?"
# area -> the class of its cases and the form of their names; a group is named for the field that it fills
_FORMS: dict[str, tuple[type[BenchCase], str]] = {
    "prefill": (AttentionBench, rf"{_SELF}{_DIMS}{_VARIANT}{_ENCODING}"),
    "ragged": (RaggedBench, rf"(?P<kind>prefill|mixed|uniform)\.{_BATCH}\.{_HEADS}\.(?P<mask>causal)"),
    "paged": (AttentionBench, rf"{_SELF}\.{_PAGE}{_ENCODING}"),
    "append": (AttentionBench, rf"{_BATCH}\.q(?P<qo_len>\d+)\.kv(?P<kv_len>\d+)\.{_HEADS}\.{_PAGE}{_ENCODING}"),
    "decode": (AttentionBench, rf"{_BATCH}\.kv(?P<kv_len>\d+)\.{_HEADS}\.{_KV}\.{_PAGE}{_LAYOUT}{_ENCODING}"),
    "mla": (MlaBench, rf"{_BATCH}\.kv(?P<kv_len>\d+)\.h(?P<num_heads>\d+)\.{_PAGE}"),
    "elem": (ElementwiseBench, rf"(?P<op>{_ELEMENTWISE})\.t(?P<num_tokens>\d+)"),
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
    fields: dict[str, Any] = {k: int(x) if x.isdecimal() else x for k, x in match.groupdict().items() if x is not None}
    if kind is AttentionBench:
        fields.setdefault("qo_len", 1 if area == "decode" else fields["kv_len"])
        fields.setdefault("mask", "causal" if area == "append" else "full")
    return kind(name=name, area=area, **fields)


# Shapes without a figure in peers_h100.csv. Decode over int8 and int4 caches, and page sizes:
DECODE_NAMES = (
    *(
        f"decode/b{batch_size}.kv{kv_len}.h{heads}.{kv_dtype}.page16"
        for batch_size, kv_len in ((1, 16384), (16, 4096), (64, 1024), (64, 4096), (64, 16384))
        for heads in ("32/8", "32/32")
        for kv_dtype in ("int8", "int4")
    ),
    *(
        f"decode/b{batch_size}.kv{kv_len}.h32/8.{kv_dtype}.page16{layout}"
        for batch_size, kv_len in ((16, 4096), (64, 4096), (64, 16384), (256, 1024))
        for layout in ("", ".hnd")
        for kv_dtype in ("bf16", "fp8", "int8", "int8.head", "int4", "int4.fp16")
    ),
    *(f"decode/b64.kv4096.h32/8.bf16.page{page_size}" for page_size in (3, 64, 256)),
    "decode/b1.kv131072.h32/8.bf16.page16",
)
# Prefill with other head dims and variants, ragged batches, and appends:
PREFILL_NAMES = (
    *(
        f"prefill/b{16384 // length}.s{length}.h{heads}.{mask}.d{dims}"
        for dims, heads in (("64", "32/8"), ("96", "32/8"), ("192/128", "32/32"), ("256", "16/8"))
        for length in (1024, 4096, 16384)
        for mask in ("causal", "full")
    ),
    *(f"prefill/b4.s4096.h32/8.causal.{variant}" for variant in ("cap", "window", "sinks")),
    *(f"ragged/{kind}.b64.h32/8.causal" for kind in ("uniform", "prefill", "mixed")),
)
APPEND_NAMES = tuple(
    f"append/b{batch_size}.q{qo_len}.kv{kv_len}.h32/8.page{page_size}"
    for page_size in (16, 1)
    for batch_size, kv_len in ((1, 4096), (1, 32768), (8, 4096), (8, 32768), (64, 4096), (64, 32768))
    for qo_len in (1, 4, 16, 64, 256)
)
# Shapes without a figure in peers_h100.csv: position encodings inside attention, each beside the case without one.
ENCODING_NAMES = (
    *(f"decode/b{b}.kv{n}.h32/8.bf16.page16.{mode}" for mode in ("rope", "alibi") for b, n in ((64, 4096), (1, 16384))),
    *(f"decode/b{b}.kv{n}.h32/8.bf16.page1.rope" for b, n in ((64, 4096), (16, 4096), (1, 16384))),
    *(f"decode/b{b}.kv{n}.h32/8.bf16.page16.rope" for b, n in ((16, 4096), (64, 1024), (1, 4096))),
    *(f"decode/b64.kv4096.h32/8.{cache}.page16.rope" for cache in ("fp8", "int8", "int4")),
    "append/b64.q4.kv4096.h32/8.page16.rope",
    *(f"prefill/b{b}.s{n}.h32/8.causal.{mode}" for mode in ("rope", "alibi") for b, n in ((16, 1024), (2, 8192))),
    "prefill/b4.s4096.h32/8.causal.rope",
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
# Appends that quantise.
QUANTISE_NAMES = tuple(f"elem/append_kv_{kv}.t{n}" for kv in ("fp8", "int8", "int4") for n in (1, 128, 4096, 16384))
EXTRA_NAMES = (*PREFILL_NAMES, *APPEND_NAMES, *DECODE_NAMES, *ENCODING_NAMES, *GEMM_NAMES, *QUANTISE_NAMES)
