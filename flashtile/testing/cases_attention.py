"""Attention cases: small ones that every kernel family must pass, and the maker of their (hostile) inputs."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashtile.config import Config
from flashtile.decode import BatchDecodeWithPagedKVCacheWrapper
from flashtile.plan.encoding import Rope
from flashtile.plan.problem import Problem
from flashtile.prefill import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from flashtile.reference.attention import alibi_slopes, attention
from flashtile.reference.quantization import dequantise_kv
from flashtile.reference.rope import frequencies


@dataclass(frozen=True)
class AttentionCase:
    """A batch: lengths in tokens per request, heads, dims and the variant. page_size 0: ragged KV. qo_lens (): decode.

    k_cache, v_cache: "plain", "e4m3", "e5m2", "int8" or "int4".
    """

    name: str
    kv_lens: tuple[int, ...]
    qo_lens: tuple[int, ...] = ()
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    head_dim_vo: int = 0
    page_size: int = 16
    kv_layout: str = "NHD"
    causal: bool = True
    window_left: int = -1
    logits_soft_cap: float = 0.0
    sm_scale: float | None = None
    sinks: bool = False
    strided: bool = False
    one_tensor: bool = False
    q_gain: float = 1.0
    k_cache: str = "plain"
    v_cache: str = "plain"
    scale: str = "none"  # "float", "0d", "head", "token", "half" (per token, fp16), or "group32" ... "group128"
    zero: bool = False  # zero points, in the form of the scale
    v_gain: float = 1.0
    rope: Rope | None = None
    alibi: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def dim_vo(self) -> int:
        """head_dim_vo, which defaults to head_dim."""
        return self.head_dim_vo or self.head_dim

    def encoding(self) -> dict[str, Any]:
        """The position encoding as plan() takes it."""
        if self.rope is None:
            return {"pos_encoding_mode": "ALIBI" if self.alibi else "NONE"}
        names = ("low_freq_factor", "high_freq_factor", "old_context_len")
        return {
            "pos_encoding_mode": "ROPE_LLAMA",
            "rope_scale": self.rope.scale,
            "rope_theta": self.rope.theta,
            **dict(zip(names, self.rope.llama31 or (), strict=False)),
        }

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Query tokens per request: one each in decode."""
        return self.qo_lens or (1,) * len(self.kv_lens)


def _sweep(base: AttentionCase, field: str, values: tuple[object, ...]) -> list[AttentionCase]:
    def label(v: object) -> str:
        return "x".join(map(str, v)) if isinstance(v, tuple) else str(v)

    return [replace(base, name=f"{base.name}.{field}={label(v)}", **{field: v}) for v in values]  # type: ignore[arg-type]


_DECODE = AttentionCase("decode", kv_lens=(37, 1, 90))
_PREFILL = AttentionCase("prefill", kv_lens=(37, 70), qo_lens=(37, 70))
_APPEND = AttentionCase("append", kv_lens=(37, 95, 20), qo_lens=(5, 33, 1))
_RAGGED = replace(_PREFILL, name="ragged", page_size=0)
# logits of some 500, where fp32 rounds by 3e-5: what the worst row errs by is chance, unless there are many
_MANY = replace(_DECODE, kv_lens=_DECODE.kv_lens * 20)
_GROUPS = tuple((g, 1) for g in (1, 2, 3, 5, 7, 8, 9, 16, 24, 32, 64, 128))
_DIMS = (16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512)
_PAGES = (1, 2, 3, 5, 16, 17, 64, 100, 128, 256, 1024)

CASES: list[AttentionCase] = [
    _DECODE,
    _PREFILL,
    _APPEND,
    _RAGGED,
    *_sweep(_DECODE, "heads", _GROUPS),
    *_sweep(replace(_APPEND, kv_lens=(50,), qo_lens=(19,)), "heads", ((6, 2), (5, 1), (12, 12), (16, 1))),
    *_sweep(_DECODE, "head_dim", _DIMS),
    *_sweep(replace(_PREFILL, kv_lens=(45,), qo_lens=(45,)), "head_dim", (16, 40, 96, 128, 192, 256, 512)),
    *[
        replace(_APPEND, name=f"append.dims={a}x{b}", head_dim=a, head_dim_vo=b)
        for a, b in ((192, 128), (96, 64), (64, 96), (64, 16))
    ],
    *_sweep(_DECODE, "page_size", _PAGES),
    *_sweep(_APPEND, "page_size", (1, 3, 17, 64)),
    *[replace(_DECODE, name=f"decode.page_end={n}", kv_lens=(n, 64), page_size=16) for n in (15, 16, 17, 33)],
    replace(_DECODE, name="decode.empty_request", kv_lens=(0, 17, 0)),
    replace(_DECODE, name="decode.all_empty", kv_lens=(0, 0)),
    replace(_APPEND, name="append.empty_kv", kv_lens=(0, 40, 0), qo_lens=(3, 8, 0)),
    replace(_APPEND, name="append.no_queries", kv_lens=(16, 40), qo_lens=(0, 8)),
    replace(_APPEND, name="append.qo_longer_than_kv", kv_lens=(7, 30), qo_lens=(20, 30)),
    replace(_RAGGED, name="ragged.qo_longer_than_kv", kv_lens=(7, 0, 30), qo_lens=(20, 4, 30)),
    replace(_PREFILL, name="prefill.not_causal", causal=False),
    replace(_RAGGED, name="ragged.not_causal", causal=False),
    replace(_APPEND, name="append.hnd", kv_layout="HND"),
    replace(_RAGGED, name="ragged.hnd", kv_layout="HND"),
    replace(_DECODE, name="decode.hnd.one_tensor", kv_layout="HND", one_tensor=True),
    replace(_APPEND, name="append.one_tensor", one_tensor=True),
    replace(_APPEND, name="append.strided", strided=True),
    replace(_RAGGED, name="ragged.strided", strided=True),
    replace(_DECODE, name="decode.hnd.strided", strided=True, kv_layout="HND"),
    replace(_APPEND, name="append.sm_scale", sm_scale=0.3),
    replace(_MANY, name="decode.large_logits", q_gain=100.0),
    replace(_PREFILL, name="prefill.large_logits", q_gain=100.0),
    *_sweep(_APPEND, "window_left", (0, 1, 15, 16, 17, 31, 64, 95)),
    *_sweep(replace(_APPEND, causal=False), "window_left", (0, 16)),
    *_sweep(_DECODE, "window_left", (0, 16, 63, 90)),
    *_sweep(_APPEND, "logits_soft_cap", (0.5, 30.0)),
    *_sweep(_DECODE, "logits_soft_cap", (5.0,)),
    replace(_APPEND, name="append.sinks", sinks=True),
    replace(_DECODE, name="decode.sinks.window", sinks=True, window_left=20),
]


def _stored(base: AttentionCase, cache: str, scale: str, zero: bool = False, **changes: object) -> AttentionCase:
    """A case over quantised caches: both of one format, or "K/V"."""
    k_cache, _, v_cache = cache.partition("/")
    words = [base.name, cache, scale, *(["zero"] if zero else []), *(f"{k}={v}" for k, v in changes.items())]
    return replace(
        base,
        name=".".join(words),
        k_cache=k_cache,
        v_cache=v_cache or k_cache,
        scale=scale,
        zero=zero,
        **changes,  # type: ignore[arg-type]
    )


QUANTISED_CASES: list[AttentionCase] = [
    *[
        _stored(_DECODE, cache, scale)
        for cache in ("e4m3", "e5m2", "int8")
        for scale in ("float", "0d", "head", "token")
    ],
    _stored(_DECODE, "plain", "float"),
    _stored(_DECODE, "plain", "token"),
    *[_stored(_DECODE, "int8", scale, zero=True) for scale in ("float", "head", "token")],
    *[_stored(_DECODE, "int4", scale, zero) for scale in ("token", "group32") for zero in (False, True)],
    *[_stored(_DECODE, "int4", f"group{n}", True, head_dim=128) for n in (32, 64, 128)],
    _stored(_DECODE, "int4", "group32", True, head_dim=96),
    *[_stored(_DECODE, "int4", "token", head_dim=d) for d in (16, 40, 256, 512)],
    *[_stored(_DECODE, "e4m3", "head", head_dim=d) for d in (16, 72, 256)],
    *[_stored(_DECODE, cache, "token", True) for cache in ("int8/int4", "int4/int8")],
    *[_stored(_DECODE, cache, "token") for cache in ("e4m3/int4", "plain/int8", "int4/plain")],
    *[_stored(_DECODE, "int4", "token", page_size=n) for n in (1, 3, 64)],
    *[_stored(_DECODE, "int8", "token", heads=h) for h in ((8, 8), (16, 1), (5, 1))],
    *[_stored(_DECODE, "int8", "token", v_gain=g) for g in (1e-4, 1e4)],
    *[_stored(_DECODE, cache, "half", zero, head_dim=128)
      for cache, zero in (("e4m3", False), ("int8", False), ("int8", True), ("int4", False), ("int4", True))],
    _stored(_APPEND, "int4", "half", True),
    _stored(_MANY, "e4m3", "token", q_gain=100.0),
    _stored(_DECODE, "int4", "token", one_tensor=True, kv_layout="HND"),
    _stored(_DECODE, "int8", "token", True, strided=True, kv_layout="HND"),
    _stored(_DECODE, "e5m2", "head", window_left=20, sinks=True),
    _stored(_DECODE, "int8", "token", True, logits_soft_cap=5.0),
    _stored(replace(_DECODE, kv_lens=(0, 17, 0)), "int4", "token", True),
    *[_stored(base, cache, scale, zero) for base in (_PREFILL, _APPEND, _RAGGED)
      for cache, scale, zero in (("e4m3", "head", False), ("int8", "token", True), ("int4", "token", False),
                                 ("int4", "group32", True))],
    _stored(_APPEND, "int4", "token", True, strided=True),
    _stored(_APPEND, "int8", "token", window_left=16),
    _stored(_RAGGED, "int4", "group32", True, kv_layout="HND"),
    _stored(_APPEND, "int8", "token", head_dim=96, head_dim_vo=64),
    _stored(_APPEND, "int8", "token", head_dim=128),
    _stored(_APPEND, "int8/int4", "token", True, head_dim=128),
    _stored(_APPEND, "int4", "group32", True, head_dim=128, head_dim_vo=64),
    _stored(_RAGGED, "plain/int8", "token"),
]  # fmt: skip
CASES += QUANTISED_CASES


def _encoded(base: AttentionCase, name: str, **changes: object) -> list[AttentionCase]:
    """A case with the rope, and with ALiBi."""
    rope = replace(base, name=f"{base.name}.rope.{name}", rope=Rope(), **changes)  # type: ignore[arg-type]
    return [rope, replace(rope, name=f"{base.name}.alibi.{name}", rope=None, alibi=True)]


_LLAMA31 = Rope(8.0, 5e5, (1.0, 4.0, 64.0))  # an old context that short cases reach beyond

ENCODED_CASES: list[AttentionCase] = [
    *[case for base in (_DECODE, _PREFILL, _APPEND, _RAGGED) for case in _encoded(base, "plain")],
    *[case for base in (_DECODE, _APPEND) for n in (1, 3, 64) for case in _encoded(base, f"page{n}", page_size=n)],
    *[case for d in (16, 64, 80, 128, 256) for case in _encoded(_DECODE, f"dim{d}", head_dim=d)],
    *[case for d in (40, 128, 512)
      for case in _encoded(replace(_PREFILL, kv_lens=(45,), qo_lens=(45,)), f"dim{d}", head_dim=d)],
    *[case for h in ((6, 6), (5, 1), (12, 3), (40, 2)) for case in _encoded(_DECODE, f"heads{h[0]}x{h[1]}", heads=h)],
    *[case for h in ((6, 2), (12, 12), (40, 8))
      for case in _encoded(replace(_APPEND, kv_lens=(50,), qo_lens=(19,)), f"heads{h[0]}x{h[1]}", heads=h)],
    *_encoded(_APPEND, "dims192x128", head_dim=192, head_dim_vo=128),
    *_encoded(_PREFILL, "not_causal", causal=False),
    *_encoded(replace(_RAGGED, kv_lens=(7, 0, 30), qo_lens=(20, 4, 30)), "qo_longer", causal=False),
    *_encoded(replace(_DECODE, kv_lens=(0, 17, 0)), "empty_request"),
    *_encoded(_APPEND, "window", window_left=16),
    *_encoded(_DECODE, "window.sinks", window_left=20, sinks=True),
    *_encoded(_APPEND, "sinks", sinks=True),
    *_encoded(_DECODE, "soft_cap", logits_soft_cap=5.0),
    *_encoded(_APPEND, "soft_cap.window", logits_soft_cap=5.0, window_left=33),
    *_encoded(_PREFILL, "large_logits", q_gain=100.0),
    *_encoded(_APPEND, "strided", strided=True),
    *_encoded(_RAGGED, "hnd", kv_layout="HND"),
    *_encoded(_DECODE, "sm_scale", sm_scale=0.3),
    replace(_DECODE, name="decode.rope.million", rope=Rope(theta=5e5), kv_lens=(1_000_000,), heads=(2, 1), head_dim=16,
            page_size=1024, window_left=63),
    *[replace(base, name=f"{base.name}.rope.{name}", rope=rope)
      for base in (_DECODE, _APPEND, _RAGGED)
      for name, rope in (("scaled", Rope(4.0, 5e5)), ("llama31", _LLAMA31))],
    *[case for cache, scale in (("e4m3", "head"), ("e5m2", "float"), ("int8", "token"), ("int4", "group32"))
      for case in _encoded(_stored(_DECODE, cache, scale), "quantised")],
    *[replace(case, name=f"{case.name}.rope", rope=Rope()) for case in (
        _stored(_DECODE, "int8", "token", True), _stored(_DECODE, "int8", "head", True),
        _stored(_DECODE, "int4", "token", True), _stored(_DECODE, "int4", "group32", True, head_dim=96),
        _stored(_DECODE, "int4", "group128", head_dim=128), _stored(_DECODE, "e5m2", "token", head_dim=16),
        _stored(_APPEND, "int8", "token", True), _stored(_APPEND, "int4", "group32", True, head_dim=96),
        _stored(_RAGGED, "e4m3", "head", kv_layout="HND"), _stored(_APPEND, "plain/int8", "token"),
    )],
]  # fmt: skip
CASES += ENCODED_CASES

# One request, whose tile's numbers are arguments of the launch
_ALONE = replace(_DECODE, name="alone", kv_lens=(90,))
CASES += [
    _ALONE,
    *_sweep(_ALONE, "kv_lens", ((0,), (16,), (64,))),
    *_sweep(_ALONE, "page_size", (1, 3, 64)),
    replace(_ALONE, name="alone.window.sinks", window_left=20, sinks=True),
    replace(_ALONE, name="alone.append", qo_lens=(3,), window_left=33),
    replace(_ALONE, name="alone.ragged", qo_lens=(4,), page_size=0, sinks=True),
    _stored(_ALONE, "e4m3", "head", head_dim=128),
    _stored(_ALONE, "int8", "token", True),
    _stored(_ALONE, "int4", "group32", True),
    *_encoded(_ALONE, "plain"),
]


@dataclass
class Inputs:
    """Tensors of a case. q [nnz_qo, Hq, D]; cache: what run() takes (a tuple or one tensor, or ragged (k, v))."""

    case: AttentionCase
    q: Tensor
    ks: list[Tensor]  # per request [kv_len, Hkv, D]: the values, dequantised, in fp64 then
    vs: list[Tensor]
    cache: Tensor | tuple[Tensor, Tensor]
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor
    sinks: Tensor | None
    scales: dict[str, float | Tensor]  # k_scale, v_scale, k_zero, v_zero for run()


CACHE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8, "int4": torch.uint8}


def poison(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of NaN and infinities (integers: anything): what memory that nobody owns may hold."""
    gen = torch.Generator().manual_seed(seed)
    if dtype in (torch.int8, torch.uint8):
        return torch.randint(0, 256, shape, generator=gen, dtype=torch.uint8).view(dtype)
    specials = [float("nan"), float("inf"), float("-inf")]
    bad = torch.tensor(specials if dtype != torch.float8_e4m3fn else [float("nan"), 448.0, -448.0]).to(dtype)
    if bad.element_size() == 1:
        return bad.view(torch.uint8)[torch.randint(0, 3, shape, generator=gen)].view(dtype)
    return bad[torch.randint(0, 3, shape, generator=gen)]


def make_inputs(case: AttentionCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors; pages nobody owns, page tails, row gaps and index tails hold NaN, infinities or garbage."""
    gen = torch.Generator().manual_seed(seed)
    (hq, hk), d, dv = case.heads, case.head_dim, case.dim_vo
    nnz_qo = sum(case.query_lens)
    q = (torch.randn(nnz_qo, hq, d, generator=gen) * case.q_gain).to(dtype)
    k = _store(case, case.k_cache, [torch.randn(n, hk, d, generator=gen).to(dtype) for n in case.kv_lens], gen)
    v = _store(
        case, case.v_cache, [(torch.randn(n, hk, dv, generator=gen) * case.v_gain).to(dtype) for n in case.kv_lens], gen
    )
    qo_indptr = torch.tensor([0, *case.query_lens]).cumsum(0).int()
    per_row: dict[str, list[Tensor]] = {"k": k.rows, "v": v.rows, **_per_row_factors(k, v)}
    placed: dict[str, Tensor]
    cache: Tensor | tuple[Tensor, Tensor]
    if case.page_size:
        placed, kv_indptr, kv_indices, last = _paged(case, per_row, gen)
        cache = (placed["k"], placed["v"])
        if case.one_tensor:
            pages = placed["k"].shape[0]
            cache = torch.stack(cache, 1) if pages else torch.empty(0)
    else:
        placed = {}
        for i, (name, parts) in enumerate(per_row.items()):
            placed[name] = _place(torch.cat(parts), case.strided, case.kv_layout == "HND", seed + i)
        cache = (placed["k"], placed["v"])
        kv_indptr = torch.tensor([0, *case.kv_lens]).cumsum(0).int()
        kv_indices = last = torch.empty(0, dtype=torch.int32)
    if case.strided:
        wide = poison((nnz_qo, hq + 1, d + 8), dtype, seed)
        wide[:, 1:, :d] = q
        q = wide[:, 1:, :d]
    sinks = torch.randn(hq, generator=gen) * 2 if case.sinks else None
    if sinks is not None:
        sinks[0] = float("-inf")
    scales = {f"{side}_{what}": x for side, stored in (("k", k), ("v", v)) for what, x in stored.factors().items()}
    scales |= {name: placed[name] for name in placed if "_" in name}

    def move(x: Any) -> Any:
        return _to(x, device) if isinstance(x, Tensor) else x

    return Inputs(
        case, move(q), [x.to(device) for x in k.values], [x.to(device) for x in v.values],
        move(cache) if isinstance(cache, Tensor) else (move(cache[0]), move(cache[1])),
        qo_indptr, kv_indptr, kv_indices, last, None if sinks is None else sinks.to(device),
        {name: move(x) for name, x in scales.items()},
    )  # fmt: skip


@dataclass
class Stored:
    """K or V of a case: rows as the cache holds them and values as they are meant, per request; scale and zero
    point."""

    rows: list[Tensor]
    values: list[Tensor]
    scale: float | Tensor | list[Tensor] | None = None
    zero: float | Tensor | list[Tensor] | None = None

    def factors(self) -> dict[str, float | Tensor]:
        """Scale and zero point that do not vary by row."""
        found = {"scale": self.scale, "zero": self.zero}
        return {name: x for name, x in found.items() if x is not None and not isinstance(x, list)}


def _per_row_factors(k: Stored, v: Stored) -> dict[str, list[Tensor]]:
    named = {"k_scale": k.scale, "v_scale": v.scale, "k_zero": k.zero, "v_zero": v.zero}
    return {name: x for name, x in named.items() if isinstance(x, list)}


def _store(case: AttentionCase, cache: str, xs: list[Tensor], gen: torch.Generator) -> Stored:
    """Rows [kv_len, heads, dim] of each request in a cache format. Numbers are drawn so that the values are about as
    large."""
    if cache == "plain" and case.scale == "none":
        return Stored(xs, xs)
    heads, dim = xs[0].shape[1:]
    groups = dim // int(case.scale[5:]) if case.scale.startswith("group") else 0
    top = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "int4": 7.0, "plain": 4.0}[cache] / 4
    one = float(max((x.abs().max() for x in xs if x.numel()), default=torch.tensor(1.0))) / top / 4
    by_head = (torch.rand(heads, generator=gen) + 0.5) * one
    if case.scale in ("token", "half"):
        dtype = torch.float16 if case.scale == "half" else torch.float32
        scale: float | Tensor | list[Tensor] = [
            (torch.rand(x.shape[:2], generator=gen) * 2 * one + one / 50).to(dtype) for x in xs
        ]
    elif groups:
        scale = [torch.rand((*x.shape[:2], groups), generator=gen) * 2 * one + one / 50 for x in xs]
    else:
        forms: dict[str, float | Tensor] = {"float": one, "0d": torch.tensor(one), "head": by_head}
        scale = forms[case.scale]
    zero: float | Tensor | list[Tensor] | None = None
    middle, spread = (8.0, 3.0) if cache == "int4" else (0.0, 40.0)
    if case.zero and cache in ("int8", "int4"):
        if isinstance(scale, list):
            zero = [(middle + spread * (torch.rand(s.shape, generator=gen) - 0.5)).to(s.dtype) for s in scale]
        elif isinstance(scale, Tensor) and scale.dim():
            zero = middle + spread * (torch.rand(heads, generator=gen) - 0.5)
        else:
            zero = middle + 1.5
    rows, values = [], []
    for i, x in enumerate(xs):
        s = scale[i] if isinstance(scale, list) else torch.as_tensor(scale)
        z = zero[i] if isinstance(zero, list) else zero
        expanded = s.repeat_interleave(dim // groups, -1) if groups else s[..., None]
        numbers = x.float() / expanded
        if cache == "plain":
            row = numbers.to(x.dtype)
        elif cache in ("e4m3", "e5m2"):
            row = numbers.clamp(-4 * top, 4 * top).to(CACHE_DTYPES[cache])
        elif cache == "int8":
            row = numbers.round().clamp(-128, 127).to(torch.int8)
        else:
            n = (numbers + 8).round().clamp(0, 15).to(torch.uint8)
            row = n[..., ::2] | n[..., 1::2] << 4
        rows.append(row)
        values.append(dequantise_kv(row, s, z))
    return Stored(rows, values, scale, zero)


def _to(x: Tensor, device: str) -> Tensor:
    """x.to(device) with its strides and the garbage between its elements kept."""
    if device == "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _place(x: Tensor, strided: bool, heads_first: bool, seed: int) -> Tensor:
    """[n, heads (, dim)] in the layout asked for; strided: inside a larger poisoned tensor."""
    if heads_first:
        x = x.transpose(0, 1).contiguous()
    if not strided:
        return x
    wide = poison((x.shape[0] + 1, x.shape[1] + 2, *(n + 16 for n in x.shape[2:])), x.dtype, seed)
    inner = wide[(slice(1, None), slice(None, -2), *(slice(8, -8) for _ in x.shape[2:]))]
    return inner.copy_(x)


def _paged(
    case: AttentionCase, per_row: dict[str, list[Tensor]], gen: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Rows of requests, [kv_len, heads (, dim)] each, on scattered pages, in the layout asked for; and the page
    table."""
    page = case.page_size
    counts = [-(-n // page) for n in case.kv_lens]
    total = sum(counts) + 3  # pages nobody owns; page 0 is one of them
    ids = torch.randperm(total - 1, generator=gen)[: sum(counts)] + 1
    gap = 1 if case.strided else 0
    placed = {}
    for seed, (name, rows) in enumerate(per_row.items()):
        heads, *dims = rows[0].shape[1:]
        x = poison((total, page + gap, heads + gap, *(n + 8 * gap for n in dims)), rows[0].dtype, seed)
        x = x[(slice(None), slice(gap, None), slice(gap, None), *(slice(n) for n in dims))]
        start = 0
        for mine, count in zip(rows, counts, strict=True):
            for j, at in enumerate(ids[start : start + count].tolist()):
                part = mine[j * page : (j + 1) * page]
                x[at, : len(part)] = part
            start += count
        if case.kv_layout == "HND":  # same logical cache, heads before tokens in memory
            x = x.transpose(1, 2) if case.strided else x.transpose(1, 2).contiguous()
        placed[name] = x
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    last = torch.tensor([(n - 1) % page + 1 if n else 0 for n in case.kv_lens], dtype=torch.int32)
    indices = torch.cat([ids.int(), torch.tensor([2**30, -7], dtype=torch.int32)])  # garbage past the last page
    return placed, indptr, indices, last


def problem_of(case: AttentionCase, dtype: torch.dtype) -> Problem:
    """The problem of a case, as far as a Config depends on it."""
    k_dtype, v_dtype = (CACHE_DTYPES.get(c, dtype) for c in (case.k_cache, case.v_cache))
    return Problem(
        *case.heads, case.head_dim, case.dim_vo, dtype, k_dtype, dtype, page_size=case.page_size, v_dtype=v_dtype,
        rope=case.rope, alibi=case.alibi, kv_heads_first=case.kv_layout == "HND",
    )  # fmt: skip


def make_wrapper(x: Inputs, device: str, backend: str = "auto", config: Config | None = None) -> Any:
    """A planned wrapper for a case: decode, paged prefill or ragged prefill. The workspace starts as NaN."""
    case, dtype = x.case, x.q.dtype
    workspace = torch.full((32 << 20,), 255, dtype=torch.uint8, device=device)
    hq, hk = case.heads
    variant: dict[str, Any] = {"window_left": case.window_left, "logits_soft_cap": case.logits_soft_cap or None}
    variant |= case.encoding()
    variant["kv_data_type"] = (CACHE_DTYPES.get(case.k_cache, dtype), CACHE_DTYPES.get(case.v_cache, dtype))
    wrapper: Any
    if case.page_size and not case.qo_lens:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, case.kv_layout, backend=backend)
        wrapper._config = config
        wrapper.plan(x.kv_indptr, x.kv_indices, x.last_page_len, hq, hk, case.head_dim, case.page_size,
                     q_data_type=dtype, sm_scale=case.sm_scale, head_dim_vo=case.dim_vo, **variant)  # fmt: skip
    elif case.page_size:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, case.kv_layout, backend=backend)
        wrapper._config = config
        wrapper.plan(x.qo_indptr, x.kv_indptr, x.kv_indices, x.last_page_len, hq, hk, case.head_dim, case.page_size,
                     head_dim_vo=case.dim_vo, causal=case.causal, q_data_type=dtype, sm_scale=case.sm_scale,
                     **variant)  # fmt: skip
    else:
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, case.kv_layout, backend=backend)
        wrapper._config = config
        wrapper.plan(x.qo_indptr, x.kv_indptr, hq, hk, case.head_dim, case.dim_vo, causal=case.causal,
                     q_data_type=dtype, sm_scale=case.sm_scale, **variant)  # fmt: skip
    return wrapper


def run_case(x: Inputs, wrapper: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of a planned case; both are handed over full of NaN."""
    nnz_qo, hq = x.q.shape[:2]
    out = torch.full((nnz_qo, hq, x.case.dim_vo), float("nan"), dtype=x.q.dtype, device=x.q.device)
    lse = torch.full((nnz_qo, hq), float("nan"), device=x.q.device)
    kv = x.cache if x.case.page_size and isinstance(x.cache, Tensor) else (x.cache,) if x.case.page_size else x.cache
    args = (kv,) if isinstance(kv, Tensor) else kv
    wrapper.run(x.q, *args, out=out, lse=lse, return_lse=True, sinks=x.sinks, **x.scales)  # type: ignore[attr-defined]
    return out, lse


def expected(x: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) by the reference, computed in `dtype`, request by request."""
    case, outs, lses = x.case, [], []
    freqs = slopes = None
    if case.rope is not None:
        llama31 = case.rope.llama31 or (None, None, 8192)
        freqs = frequencies(case.head_dim, case.rope.scale, case.rope.theta, *llama31)  # type: ignore[arg-type]
    if case.alibi:
        slopes = alibi_slopes(case.heads[0]).to(x.q.device)
    begin = 0
    for n, k, v in zip(case.query_lens, x.ks, x.vs, strict=True):
        sinks = None if x.sinks is None else x.sinks.to(dtype)
        out, lse = attention(
            x.q[begin : begin + n].to(dtype), k.to(dtype), v.to(dtype), sm_scale=case.sm_scale,
            causal=case.causal and bool(case.qo_lens), window_left=case.window_left,
            logits_soft_cap=case.logits_soft_cap, sinks=sinks, rope_freqs=freqs, slopes=slopes,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
        begin += n
    return torch.cat(outs), torch.cat(lses)
