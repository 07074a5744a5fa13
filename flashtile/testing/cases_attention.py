"""Attention cases: small ones that every kernel family must pass, and the maker of their (hostile) inputs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashtile.attention import PlannedOp
from flashtile.config import Config
from flashtile.decode import BatchDecodeWithPagedKVCacheWrapper
from flashtile.prefill import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from flashtile.reference.attention import attention


@dataclass(frozen=True)
class AttentionCase:
    """A batch: lengths in tokens per request, heads, dims and the variant. page_size 0: ragged KV. qo_lens (): decode."""

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

    def __str__(self) -> str:
        return self.name

    @property
    def dim_vo(self) -> int:
        """head_dim_vo, which defaults to head_dim."""
        return self.head_dim_vo or self.head_dim

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
        for a, b in ((192, 128), (96, 64), (64, 96))
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
    replace(_DECODE, name="decode.large_logits", q_gain=100.0),
    replace(_PREFILL, name="prefill.large_logits", q_gain=100.0),
    *_sweep(_APPEND, "window_left", (0, 1, 15, 16, 17, 31, 64, 95)),
    *_sweep(replace(_APPEND, causal=False), "window_left", (0, 16)),
    *_sweep(_DECODE, "window_left", (0, 16, 63, 90)),
    *_sweep(_APPEND, "logits_soft_cap", (0.5, 30.0)),
    *_sweep(_DECODE, "logits_soft_cap", (5.0,)),
    replace(_APPEND, name="append.sinks", sinks=True),
    replace(_DECODE, name="decode.sinks.window", sinks=True, window_left=20),
]


@dataclass
class Inputs:
    """Tensors of a case. q [nnz_qo, Hq, D]; cache: what run() takes (a tuple or one tensor, or ragged (k, v))."""

    case: AttentionCase
    q: Tensor
    ks: list[Tensor]  # per request [kv_len, Hkv, D]
    vs: list[Tensor]
    cache: Tensor | tuple[Tensor, Tensor]
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor
    sinks: Tensor | None


def poison(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of NaN and infinities: what memory that nobody owns may hold."""
    gen = torch.Generator().manual_seed(seed)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    return bad[torch.randint(0, 3, shape, generator=gen)]


def make_inputs(case: AttentionCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors; pages nobody owns, page tails, row gaps and index tails hold NaN, infinities or garbage."""
    gen = torch.Generator().manual_seed(seed)
    (hq, hk), d, dv = case.heads, case.head_dim, case.dim_vo
    nnz_qo = sum(case.query_lens)
    q = (torch.randn(nnz_qo, hq, d, generator=gen) * case.q_gain).to(dtype)
    ks = [torch.randn(n, hk, d, generator=gen).to(dtype) for n in case.kv_lens]
    vs = [torch.randn(n, hk, dv, generator=gen).to(dtype) for n in case.kv_lens]
    qo_indptr = torch.tensor([0, *case.query_lens]).cumsum(0).int()
    if case.page_size:
        cache, kv_indptr, kv_indices, last = _paged_cache(case, ks, vs, dtype, gen)
    else:
        members = []
        for i, (parts, dim) in enumerate(((ks, d), (vs, dv))):
            dense = torch.cat(parts) if parts else torch.empty(0, hk, dim, dtype=dtype)
            members.append(_place(dense, case.strided, case.kv_layout == "HND", seed + i))
        cache = (members[0], members[1])
        kv_indptr = torch.tensor([0, *case.kv_lens]).cumsum(0).int()
        kv_indices = last = torch.empty(0, dtype=torch.int32)
    if case.strided:
        wide = poison((nnz_qo, hq + 1, d + 8), dtype, seed)
        wide[:, 1:, :d] = q
        q = wide[:, 1:, :d]
    sinks = torch.randn(hq, generator=gen) * 2 if case.sinks else None
    if sinks is not None:
        sinks[0] = float("-inf")
    move = lambda x: _to(x, device)  # noqa: E731
    return Inputs(
        case, move(q), [k.to(device) for k in ks], [v.to(device) for v in vs],
        move(cache) if isinstance(cache, Tensor) else (move(cache[0]), move(cache[1])),
        qo_indptr, kv_indptr, kv_indices, last, None if sinks is None else sinks.to(device),
    )  # fmt: skip


def _to(x: Tensor, device: str) -> Tensor:
    """x.to(device) with its strides and the garbage between its elements kept."""
    if device == "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _place(x: Tensor, strided: bool, heads_first: bool, seed: int) -> Tensor:
    """[n, heads, dim] in the layout asked for; strided: inside a larger poisoned tensor."""
    n, h, d = x.shape
    if heads_first:
        x = x.transpose(0, 1).contiguous()
    if not strided:
        return x
    wide = poison((x.shape[0] + 1, x.shape[1] + 2, d + 16), x.dtype, seed)
    wide[1:, :-2, 8:-8] = x
    return wide[1:, :-2, 8:-8]


def _paged_cache(
    case: AttentionCase, ks: list[Tensor], vs: list[Tensor], dtype: torch.dtype, gen: torch.Generator
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    (_, hk), page = case.heads, case.page_size
    counts = [-(-n // page) for n in case.kv_lens]
    total = sum(counts) + 3  # pages nobody owns; page 0 is one of them
    ids = torch.randperm(total - 1, generator=gen)[: sum(counts)] + 1
    gap = 1 if case.strided else 0
    if case.one_tensor:
        both = poison((total, 2, page, hk, case.head_dim), dtype, 1)
        k, v = both.unbind(1)
    else:
        k = poison((total, page + gap, hk + gap, case.head_dim + 8 * gap), dtype, 1)[:, gap:, gap:, : case.head_dim]
        v = poison((total, page + gap, hk + gap, case.dim_vo + 8 * gap), dtype, 2)[:, gap:, gap:, : case.dim_vo]
    start = 0
    for rows_k, rows_v, count in zip(ks, vs, counts, strict=True):
        for j, at in enumerate(ids[start : start + count].tolist()):
            part = slice(j * page, (j + 1) * page)
            k[at, : len(rows_k[part])] = rows_k[part]
            v[at, : len(rows_v[part])] = rows_v[part]
        start += count
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    last = torch.tensor([(n - 1) % page + 1 if n else 0 for n in case.kv_lens], dtype=torch.int32)
    indices = torch.cat([ids.int(), torch.tensor([2**30, -7], dtype=torch.int32)])  # garbage past the last page
    if case.kv_layout == "HND":  # same logical cache, heads before tokens in memory
        if case.one_tensor:
            both = both.transpose(2, 3).contiguous()
        elif not case.strided:
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        else:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
    return (both if case.one_tensor else (k, v)), indptr, indices, last


def make_wrapper(x: Inputs, device: str, backend: str = "auto", config: Config | None = None) -> PlannedOp:
    """A planned wrapper for a case: decode, paged prefill or ragged prefill. The workspace starts as NaN."""
    case, dtype = x.case, x.q.dtype
    workspace = torch.full((32 << 20,), 255, dtype=torch.uint8, device=device)
    (hq, hk), variant = case.heads, {"window_left": case.window_left, "logits_soft_cap": case.logits_soft_cap or None}
    wrapper: PlannedOp
    if case.page_size and not case.qo_lens:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, case.kv_layout, backend=backend)
        wrapper._config = config
        wrapper.plan(x.kv_indptr, x.kv_indices, x.last_page_len, hq, hk, case.head_dim, case.page_size, q_data_type=dtype,
                     sm_scale=case.sm_scale, head_dim_vo=case.dim_vo, **variant)  # fmt: skip
    elif case.page_size:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, case.kv_layout, backend=backend)
        wrapper._config = config
        wrapper.plan(x.qo_indptr, x.kv_indptr, x.kv_indices, x.last_page_len, hq, hk, case.head_dim, case.page_size,
                     head_dim_vo=case.dim_vo, causal=case.causal, q_data_type=dtype, sm_scale=case.sm_scale, **variant)  # fmt: skip
    else:
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, case.kv_layout, backend=backend)
        wrapper._config = config
        wrapper.plan(x.qo_indptr, x.kv_indptr, hq, hk, case.head_dim, case.dim_vo, causal=case.causal, q_data_type=dtype,
                     sm_scale=case.sm_scale, **variant)  # fmt: skip
    return wrapper


def run_case(x: Inputs, wrapper: PlannedOp) -> tuple[Tensor, Tensor]:
    """(out, lse) of a planned case; both are handed over full of NaN."""
    nnz_qo, hq = x.q.shape[:2]
    out = torch.full((nnz_qo, hq, x.case.dim_vo), float("nan"), dtype=x.q.dtype, device=x.q.device)
    lse = torch.full((nnz_qo, hq), float("nan"), device=x.q.device)
    kv = x.cache if x.case.page_size and isinstance(x.cache, Tensor) else (x.cache,) if x.case.page_size else x.cache
    args = (kv,) if isinstance(kv, Tensor) else kv
    wrapper.run(x.q, *args, out=out, lse=lse, return_lse=True, sinks=x.sinks)  # type: ignore[attr-defined]
    return out, lse


def expected(x: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) by the reference, computed in `dtype`, request by request."""
    case, outs, lses = x.case, [], []
    begin = 0
    for n, k, v in zip(case.query_lens, x.ks, x.vs, strict=True):
        sinks = None if x.sinks is None else x.sinks.to(dtype)
        out, lse = attention(
            x.q[begin : begin + n].to(dtype), k.to(dtype), v.to(dtype), sm_scale=case.sm_scale,
            causal=case.causal and bool(case.qo_lens), window_left=case.window_left,
            logits_soft_cap=case.logits_soft_cap, sinks=sinks,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
        begin += n
    return torch.cat(outs), torch.cat(lses)
