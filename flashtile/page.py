"""The paged KV cache: where a token lives, and writing new ones. Defined by reference/page.py.

Token i of request b is in slot i % page_size of page kv_indices[kv_indptr[b] + i // page_size]."""

import functools

import numpy as np
import torch
from torch import Tensor

from flashtile import checks, library
from flashtile.attention import split_paged_cache, without_page_dim
from flashtile.page_scales import read_append_scales, row_width
from flashtile.plan.problem import FORMATS
from flashtile.plan.worklist import Ints
from flashtile.scales import Scale

FrozenInts = tuple[str, bytes]  # dtype and bytes of an index tensor: a key to remember it by

_append = library.launcher(
    "page",
    "append_paged_kv_cache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor append_key, Tensor append_value,"
    " Tensor batch_indices, Tensor positions, Tensor kv_indices, Tensor kv_indptr) -> ()",
)
_quantize_append = library.launcher(
    "quantize_kv",
    "quantize_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale,"
    " Tensor(e!)? k_zero, Tensor(f!)? v_zero, Tensor append_key, Tensor append_value, Tensor? k_given, Tensor? v_given,"
    " float k_divisor, float v_divisor, Tensor batch_indices, Tensor positions, Tensor kv_indices, Tensor kv_indptr)"
    " -> ()",
)
_batch_indices_positions = library.launcher(
    "page",
    "get_batch_indices_positions(Tensor(a!) batch_indices, Tensor(b!) positions, Tensor append_indptr, Tensor seq_lens)"
    " -> ()",
)


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
    *,
    k_scale: Scale = None,
    v_scale: Scale = None,
    k_zero: Scale = None,
    v_zero: Scale = None,
) -> None:
    """Write the keys and values of new tokens to their slots of a paged cache, in place; nothing else changes.

    A cache in fp8, int8 or int4 (uint8, two to a byte) takes fp16, bf16 and fp32 rows too, quantised on their way in
    one launch: what is stored is, bit by bit, what `quantize_kv_fp8`, `quantize_kv_int8` and `quantize_kv_int4` return.
    Scales and zero points have the names and shapes that attention's run() takes.

    Index tensors are int32 or int64. On CUDA their values are not read by the host: a token out of range is skipped.

    Args:
        append_key: [nnz, num_kv_heads, head_dim], of the cache's dtype, or fp16, bf16 or fp32 if that is narrow; any
            strides, the last dimension contiguous.
        append_value: [nnz, num_kv_heads, head_dim_vo], of the same dtype.
        batch_indices: [nnz], the request of each token, in any order.
        positions: [nnz], its position in that request's KV; gaps are allowed.
        paged_kv_cache: (k, v), each [num_pages, page_size, num_kv_heads, head_dim] (NHD) or
            [num_pages, num_kv_heads, page_size, head_dim] (HND), or one tensor [num_pages, 2, ...]; any strides, the
            last dimension contiguous. With page_size 1 the page dimension may be left out. int4: head_dim / 2 bytes.
            k and v of a tuple may differ in format.
        kv_indices: page ids of all requests.
        kv_indptr: [batch_size + 1], offsets of each request in kv_indices; the pages of new tokens are counted.
        kv_last_page_len: [batch_size], tokens in each last page, new ones counted.
        kv_layout: "NHD" or "HND".
        k_scale: a number, or a tensor of one value or [num_kv_heads]: keys are divided by it (fp8, int8). A tensor
            shaped as the cache without head_dim, fp32, any strides: each row's own scale is written to it; for int8 and
            int4 its last dimension may be the groups of 32, 64 or 128 elements of head_dim that have one each. fp8 may
            go without: 1. Only for rows that are quantised.
        v_scale: likewise, of values.
        k_zero: a tensor shaped as a k_scale that is written: zero points are written to it (int8, int4). Without it
            numbers are symmetric.
        v_zero: likewise, of values.

    Raises:
        KeyError: unknown kv_layout, or paged_kv_cache is neither a tensor nor a tuple.
        TypeError: a scale that is neither a number nor a tensor.
        ValueError: a shape, dtype, device or stride that does not fit, or a scale that is missing or of no use; on host
            tensors also a request, position or page out of range.
    """
    checks.check_layout(kv_layout)
    k_cache, v_cache = split_paged_cache(paged_kv_cache, kv_layout)
    checks.check_tensor("append_key", append_key)
    checks.check_tensor("append_value", append_value)
    size, heads = k_cache.shape[:2], k_cache.shape[2]
    checks.check_shape("paged_kv_cache (v)", v_cache, (*size, heads, "head_dim_vo"))
    checks.check_shape("append_key", append_key, ("nnz", heads, row_width(append_key, k_cache)))
    checks.check_shape("append_value", append_value, (append_key.shape[0], heads, row_width(append_value, v_cache)))
    _check_rows({"append_key": append_key, "append_value": append_value})
    dtypes = (append_key.dtype, *(FORMATS if append_key.dtype in checks.FLOAT_DTYPES else ()))
    for name, cache in (("paged_kv_cache (k)", k_cache), ("paged_kv_cache (v)", v_cache)):
        checks.check_dtype(name, cache, dtypes)
        checks.check_device(name, cache, append_key.device)
        checks.check_inner_contiguous(name, cache)
    short = without_page_dim(paged_kv_cache)
    k = read_append_scales("k", append_key, k_cache, kv_layout, short, k_scale, k_zero)
    v = read_append_scales("v", append_value, v_cache, kv_layout, short, v_scale, v_zero)
    nnz, device = append_key.shape[0], append_key.device
    indices = check_append(nnz, device, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len, size)
    if k_cache.dtype == v_cache.dtype == append_key.dtype:
        _append(k_cache, v_cache, append_key, append_value, *indices)
    else:
        _quantize_append(
            k_cache, v_cache, k.scale, v.scale, k.zero, v.zero, append_key, append_value,
            k.given, v.given, k.divisor, v.divisor, *indices,
        )  # fmt: skip


def append_paged_mla_kv_cache(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """Write the latent rows of new tokens to their slots of a paged MLA cache, in place; nothing else changes.

    Args:
        append_ckv: [nnz, head_dim_ckv], of the cache's dtype; rows may be strided.
        append_kpe: [nnz, head_dim_kpe].
        ckv_cache: [num_pages, page_size, head_dim_ckv]; any strides, the last dimension contiguous.
        kpe_cache: [num_pages, page_size, head_dim_kpe]; both may be slices of one tensor.
        batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len: as for `append_paged_kv_cache`.

    Raises:
        ValueError: as for `append_paged_kv_cache`.
    """
    checks.check_shape("ckv_cache", ckv_cache, ("num_pages", "page_size", "head_dim_ckv"))
    checks.check_shape("kpe_cache", kpe_cache, (*ckv_cache.shape[:2], "head_dim_kpe"))
    checks.check_shape("append_ckv", append_ckv, ("nnz", ckv_cache.shape[2]))
    checks.check_shape("append_kpe", append_kpe, (append_ckv.shape[0], kpe_cache.shape[2]))
    caches = {"ckv_cache": ckv_cache, "kpe_cache": kpe_cache}
    _check_rows({"append_ckv": append_ckv, "append_kpe": append_kpe} | caches)
    nnz, device, size = append_ckv.shape[0], append_ckv.device, ckv_cache.shape[:2]
    indices = check_append(nnz, device, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len, size)
    _append(ckv_cache.unsqueeze(2), kpe_cache.unsqueeze(2), append_ckv[:, None], append_kpe[:, None], *indices)


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each appended token, the request it belongs to and its position in that request's KV.

    Args:
        append_indptr: [batch_size + 1] int32 or int64, offsets of each request in the appended tokens.
        seq_lens: [batch_size], tokens of each request, new ones counted: the last of them is at seq_lens - 1.
        nnz: number of appended tokens, append_indptr[-1]. On CUDA, where that is not read, tokens past it get -1 and
            -1, which `append_paged_kv_cache` skips.
        batch_indices, positions: [nnz] int32, where to write. Default: new tensors.

    Returns:
        batch_indices and positions.

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the host also an nnz that is not append_indptr[-1].
    """
    device = checks.check_tensor("seq_lens", seq_lens).device
    append_indptr = checks.index_tensor("append_indptr", append_indptr, device, "batch_size + 1")
    seq_lens = checks.index_tensor("seq_lens", seq_lens, device, append_indptr.shape[0] - 1)
    if checks.reads_values(append_indptr) and int(append_indptr[-1]) != nnz:
        message = f"nnz: expected append_indptr[-1] = {int(append_indptr[-1])}, got {nnz}"
        raise checks.value_error(append_indptr, message)
    out = []
    for name, x in (("batch_indices", batch_indices), ("positions", positions)):
        if x is None:
            x = torch.empty(nnz, dtype=torch.int32, device=device)
        checks.check_shape(name, x, (nnz,))
        checks.check_dtype(name, x, (torch.int32,))
        checks.check_device(name, x, device)
        checks.check_inner_contiguous(name, x)
        out.append(x)
    _batch_indices_positions(*out, append_indptr, seq_lens)
    return out[0], out[1]


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Tokens of each request, [batch_size] int32: its pages are full but for the last.

    Args:
        kv_indptr: [batch_size + 1] int32 or int64, offsets of each request's pages.
        kv_last_page_len: [batch_size], tokens in each last page; 0 for a request without pages.
        page_size: tokens of a page.

    Raises:
        ValueError: a shape, dtype or page_size that does not fit.
    """
    checks.check_shape("kv_indptr", kv_indptr, ("batch_size + 1",))
    checks.check_dtype("kv_indptr", kv_indptr, checks.INDEX_DTYPES)
    checks.check_shape("kv_last_page_len", kv_last_page_len, (kv_indptr.shape[0] - 1,))
    checks.check_dtype("kv_last_page_len", kv_last_page_len, checks.INDEX_DTYPES)
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1 token, got {page_size}")
    return ((kv_indptr.diff() - 1).clamp_min(0) * page_size + kv_last_page_len.to(kv_indptr.device)).int()


def check_append(
    nnz: int,
    device: torch.device,
    batch_indices: Tensor,
    positions: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor | None,
    cache_size: torch.Size,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """batch_indices, positions, kv_indices and kv_indptr fit for a kernel on `device`.

    kv_last_page_len: None if it is not known; cache_size: (num_pages, page_size).

    Raises:
        ValueError: another shape or dtype; on host tensors also a request, position or page out of range.
    """
    batch_indices = checks.index_tensor("batch_indices", batch_indices, device, nnz)
    positions = checks.index_tensor("positions", positions, device, nnz)
    kv_indices = checks.index_tensor("kv_indices", kv_indices, device, "num_indices")
    kv_indptr = checks.index_tensor("kv_indptr", kv_indptr, device, "batch_size + 1")
    if kv_last_page_len is not None:
        checks.check_shape("kv_last_page_len", kv_last_page_len, (kv_indptr.shape[0] - 1,))
        checks.check_dtype("kv_last_page_len", kv_last_page_len, checks.INDEX_DTYPES)
    if checks.reads_values(positions):
        tables = (_frozen(x) for x in (batch_indices, positions, kv_indices, kv_indptr))
        last_page_len = None if kv_last_page_len is None else _frozen(kv_last_page_len)
        _check_append_values(tuple(cache_size), positions.is_cuda, *tables, last_page_len)
    return batch_indices, positions, kv_indices, kv_indptr


def _frozen(x: Tensor) -> FrozenInts:
    host = x.cpu().numpy()
    return host.dtype.char, host.tobytes()


def _thawed(x: FrozenInts) -> Ints:
    return np.frombuffer(x[1], x[0]).astype(np.int64)


@functools.lru_cache(maxsize=4)  # every layer of a step asks with the same tables
def _check_append_values(
    cache_size: tuple[int, int],
    on_cuda: bool,
    batch_indices: FrozenInts,
    positions: FrozenInts,
    kv_indices: FrozenInts,
    kv_indptr: FrozenInts,
    kv_last_page_len: FrozenInts | None,
) -> None:
    """Every new token must lie in the KV of its request, and that on a page of the cache. ValueError; on CUDA, where
    only debugging reads the tables, IndexError."""
    error = IndexError if on_cuda else ValueError
    num_pages, page_size = cache_size
    b, pos, page_ids, indptr = (_thawed(x) for x in (batch_indices, positions, kv_indices, kv_indptr))
    if indptr[-1] > len(page_ids):
        raise error(f"kv_indices: expected at least kv_indptr[-1] = {indptr[-1]} page ids, got {len(page_ids)}")
    batch_size = len(indptr) - 1
    if (wrong := (b < 0) | (b >= batch_size)).any():
        t = int(wrong.argmax())
        raise error(f"batch_indices: expected values from 0 to {batch_size - 1}, got {b[t]} at token {t}")
    first_page = indptr[b]
    num_pages_of = indptr[b + 1] - first_page
    kv_len = num_pages_of * page_size
    if kv_last_page_len is not None:
        last = _thawed(kv_last_page_len)[b]
        if (wrong := (num_pages_of > 0) & ((last < 1) | (last > page_size))).any():
            raise error(
                f"kv_last_page_len: expected 1 to {page_size} (page_size), new tokens counted, in request "
                f"{b[wrong][0]}, got {last[wrong][0]}"
            )
        kv_len = kv_len - (num_pages_of > 0) * (page_size - last)
    if (wrong := (pos < 0) | (pos >= kv_len)).any():
        t = int(wrong.argmax())
        raise error(
            f"positions: expected 0 to {kv_len[t] - 1} in request {b[t]}, whose pages hold {kv_len[t]} tokens by "
            f"kv_indptr and kv_last_page_len, got {pos[t]} at token {t}"
        )
    pages = page_ids[first_page + pos // page_size]
    if (wrong := (pages < 0) | (pages >= num_pages)).any():
        raise error(
            f"kv_indices: expected page ids from 0 to {num_pages - 1}, got {pages[wrong][0]} in request {b[wrong][0]}"
        )


def _check_rows(tensors: dict[str, Tensor]) -> None:
    """Rows and caches [..., dim] share the dtype and device of the first."""
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        checks.check_inner_contiguous(name, x)
        checks.check_same_dtype(name, x, first_name, first)
        checks.check_device(name, x, first.device)
