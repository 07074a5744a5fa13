"""Areas prefill, ragged, paged, append and decode, through the batch wrappers; pages in random order."""

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.workload import Call, Overrides, Workload, plan_with, public
from flashtile.testing.cases_bench import SOFT_CAP, WINDOW, AttentionBench, RaggedBench

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
WORKSPACE_BYTES = 2**28
MODES = {"none": "NONE", "rope": "ROPE_LLAMA", "alibi": "ALIBI"}


def prefill(case: AttentionBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """Ragged prefill; a batch of one also through single_prefill_with_kv_cache."""
    q, k, v = (
        _values((case.batch_size, case.qo_len, heads, dim), torch.bfloat16, device)
        for heads, dim in (
            (case.num_qo_heads, case.head_dim), (case.num_kv_heads, case.head_dim), (case.num_kv_heads, case.dim_vo)
        )
    )  # fmt: skip
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    wrapper = public("BatchPrefillWithRaggedKVCacheWrapper")(_workspace(device), "NHD")
    indptr = _indptr(case.batch_size, case.qo_len)
    sizes = (case.num_qo_heads, case.num_kv_heads, case.head_dim)
    window = {"window_left": WINDOW - 1} if case.variant == "window" else {}
    cap = {"logits_soft_cap": SOFT_CAP} if case.variant == "cap" else {}
    variant = {"causal": case.causal, "pos_encoding_mode": MODES[case.encoding]}
    plan_with(wrapper, overrides, indptr, indptr, *sizes, case.dim_vo, **variant, q_data_type=q.dtype, **window, **cap)
    sinks = {"sinks": torch.zeros(case.num_qo_heads, device=device)} if case.variant == "sinks" else {}
    out = torch.empty(*flat_q.shape[:2], case.dim_vo, dtype=q.dtype, device=device)
    ours: dict[str, Call] = {"flashtile": lambda: wrapper.run(flat_q, flat_k, flat_v, out=out, **sinks)}
    if case.variant or case.encoding != "none":  # and the same without it
        plain = public("BatchPrefillWithRaggedKVCacheWrapper")(_workspace(device), "NHD")
        plan_with(plain, {}, indptr, indptr, *sizes, case.dim_vo, causal=case.causal, q_data_type=q.dtype)
        return Workload(ours | {"flashtile.plain": lambda: plain.run(flat_q, flat_k, flat_v, out=out)})
    if case.batch_size == 1 and not overrides:
        single = public("single_prefill_with_kv_cache")
        ours["flashtile.single"] = lambda: single(flat_q, flat_k, flat_v, **variant)
    return Workload(ours, rivals.dense_attention(q, k, v, case.causal) if with_rivals else {})


def ragged(case: RaggedBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """Ragged prefill of requests of different lengths; of the rivals, FlashAttention-3 takes them in one call."""
    qo_indptr, kv_indptr = (
        torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lens in (case.qo_lens, case.kv_lens)
    )
    q = _values((int(qo_indptr[-1]), case.num_qo_heads, case.head_dim), torch.bfloat16, device)
    k, v = (_values((int(kv_indptr[-1]), case.num_kv_heads, case.head_dim), torch.bfloat16, device) for _ in range(2))
    wrapper = public("BatchPrefillWithRaggedKVCacheWrapper")(_workspace(device), "NHD")
    sizes = (case.num_qo_heads, case.num_kv_heads, case.head_dim)
    plan_with(wrapper, overrides, qo_indptr, kv_indptr, *sizes, causal=True, q_data_type=q.dtype)
    out = torch.empty_like(q)
    others = rivals.ragged_attention(q, k, v, qo_indptr, kv_indptr) if with_rivals else {}
    return Workload({"flashtile": lambda: wrapper.run(q, k, v, out=out)}, others)


def paged(case: AttentionBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """Prefill or append over a page table: each request's last qo_len tokens attend to all of its kv_len. Prefill also
    over the same batch without pages, in turns with it."""
    q = _values((case.batch_size * case.qo_len, case.num_qo_heads, case.head_dim), torch.bfloat16, device)
    tables = _page_tables(case, device)
    cache = _paged_cache(case, tables[1].numel(), device)
    wrapper = public("BatchPrefillWithPagedKVCacheWrapper")(_workspace(device), "NHD")
    sizes = (case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    indptr = _indptr(case.batch_size, case.qo_len)
    variant = {"causal": case.causal, "pos_encoding_mode": MODES[case.encoding]}
    plan_with(wrapper, overrides, indptr, *tables, *sizes, q_data_type=q.dtype, **variant)
    out = torch.empty_like(q)
    with_rivals = with_rivals and case.area == "append" and case.encoding == "none"
    others = _dense_cache_rivals(case, q) if with_rivals else {}
    ours: dict[str, Call] = {"flashtile": lambda: wrapper.run(q, cache, out=out)}
    if case.area == "paged" and case.qo_len == case.kv_len:
        dense = public("BatchPrefillWithRaggedKVCacheWrapper")(_workspace(device), "NHD")
        plan_with(dense, overrides, indptr, indptr, *sizes[:3], q_data_type=q.dtype, **variant)
        shape = (case.batch_size * case.kv_len, case.num_kv_heads, case.head_dim)
        k, v = (_values(shape, torch.bfloat16, device) for _ in range(2))
        ours["flashtile.dense"] = lambda: dense.run(q, k, v, out=out)
    return Workload(ours, others)


def decode(case: AttentionBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """One token per request over a page table; cache and scales in the case's dtype and layout."""
    q = _values((case.batch_size, case.num_qo_heads, case.head_dim), torch.bfloat16, device)
    wrapper = public("BatchDecodeWithPagedKVCacheWrapper")(_workspace(device), case.layout.upper())
    tables = _page_tables(case, device)
    sizes = (case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    dtypes = {"q_data_type": q.dtype, "kv_data_type": DTYPES[case.kv_dtype]}
    variant = {"pos_encoding_mode": MODES[case.encoding], **dtypes}
    plan_with(wrapper, overrides, *tables, *sizes, **variant)  # before the cache: a refusal should cost no memory
    cache = _paged_cache(case, tables[1].numel(), device)
    out = torch.empty_like(q)
    with_rivals = with_rivals and case.kv_dtype == "bf16" and case.encoding == "none"
    others = _dense_cache_rivals(case, q) if with_rivals else {}
    scales = {}
    if case.kv_dtype in ("int8", "int4"):
        shape = (case.num_kv_heads,) if case.scales == "head" else cache[0].shape[:-1]
        dtype = torch.float16 if case.scales == "fp16" else torch.float32
        scales = {name: (torch.rand(shape, device=device) / 32).to(dtype) for name in ("k_scale", "v_scale")}
    ours: dict[str, Call] = {"flashtile": lambda: wrapper.run(q, cache, out=out, **scales)}
    if case.encoding != "none":  # and the same without it
        plain = public("BatchDecodeWithPagedKVCacheWrapper")(_workspace(device), case.layout.upper())
        plain.plan(*tables, *sizes, **dtypes)
        ours["flashtile.plain"] = lambda: plain.run(q, cache, out=out, **scales)
    return Workload(ours, others)


def _dense_cache_rivals(case: AttentionBench, q: Tensor) -> dict[str, Call]:
    if not q.is_cuda or rivals.fa3() is None:
        return {}
    shape = (case.batch_size, case.kv_len, case.num_kv_heads, case.head_dim)
    k, v = (_values(shape, torch.bfloat16, q.device) for _ in range(2))
    return rivals.dense_cache_attention(q.view(case.batch_size, case.qo_len, *q.shape[1:]), k, v, case.causal)


def _paged_cache(case: AttentionBench, num_pages: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """K and V in the case's layout, halves of one [num_pages, 2, ...] tensor."""
    width = case.head_dim // 2 if case.kv_dtype == "int4" else case.head_dim
    rows = (case.page_size, case.num_kv_heads)
    shape = (num_pages, 2, *(rows if case.layout == "nhd" else rows[::-1]), width)
    cache = _values(shape, DTYPES[case.kv_dtype], device)
    return cache[:, 0], cache[:, 1]


def _page_tables(case: AttentionBench, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """kv_indptr and last_page_len on the host, kv_indices (a random order of all pages) on the device."""
    pages = -(-case.kv_len // case.page_size)
    last_page_len = torch.full((case.batch_size,), case.kv_len - (pages - 1) * case.page_size, dtype=torch.int32)
    order = torch.randperm(case.batch_size * pages, dtype=torch.int32, device=device)
    return _indptr(case.batch_size, pages), order, last_page_len


def _indptr(batch_size: int, length: int) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32) * length


def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random data: normal, for fp8 random bytes without the exponent's top bit, which are finite and below 2,
    for integers all of their range."""
    if dtype == torch.float8_e4m3fn:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device).bitwise_and_(0xBF).view(dtype)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device)
