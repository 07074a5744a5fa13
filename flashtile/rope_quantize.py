"""Rotary position embeddings (arXiv:2104.09864) fused with fp8 quantisation and with the append to a paged cache.
Defined by reference/rope.py and reference/quantization.py. fp32 inside, rounded once, to fp8."""

import torch
from torch import Tensor

from flashtile import checks, library
from flashtile.attention import split_paged_cache
from flashtile.page import check_append

_OUTPUTS = "Tensor(a!) q_rope_out, Tensor(b!) q_nope_out, Tensor(c!) k_rope_out, Tensor(d!) k_nope_out"
_INPUTS = "Tensor q_rope, Tensor q_nope, Tensor k_rope, Tensor k_nope"
_HOW = (
    "Tensor pos_ids, Tensor cos_sin_cache, bool interleave, float quant_scale_q, float quant_scale_kv, bool enable_pdl"
)

# FlashInfer's names of implementations: here both mean the same kernel, without the second one's limits.
BACKENDS = ("cuda", "cutile")

_rope_quantize = library.launcher("rope_quantize", f"rope_quantize({_OUTPUTS}, {_INPUTS}, {_HOW}) -> ()")
_rope_quantize_append = library.launcher(
    "rope_quantize",
    f"rope_quantize_append({_OUTPUTS}, Tensor(e!) v_cache, {_INPUTS}, Tensor v, {_HOW},"
    " Tensor batch_indices, Tensor positions, Tensor kv_indices, Tensor kv_indptr) -> ()",
)


def rope_quantize_fp8(
    q_rope: Tensor,
    k_rope: Tensor,
    q_nope: Tensor | None,
    k_nope: Tensor | None,
    cos_sin_cache: Tensor,
    pos_ids: Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Tensor | None = None,
    k_rope_out: Tensor | None = None,
    q_nope_out: Tensor | None = None,
    k_nope_out: Tensor | None = None,
    enable_pdl: bool = False,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate the rotary part of queries and keys, and quantise both parts to fp8; values too large become the largest.

    Args:
        q_rope: [nnz, num_qo_heads, rope_dim]; fp16, bf16 or fp32; any strides, the last dimension contiguous.
        k_rope: [nnz, num_kv_heads, rope_dim], or [nnz, rope_dim] (MLA: one head).
        q_nope: [nnz, num_qo_heads, nope_dim], the dimensions that are not rotated. None: there are none.
        k_nope: [nnz, num_kv_heads, nope_dim_k], or [nnz, nope_dim_k].
        cos_sin_cache: [max_position, rope_dim] fp32, cosines then sines; pos_ids [nnz] are its rows.
        is_neox: pairs are (i, i + rope_dim / 2); False: neighbours (2 i, 2 i + 1).
        quantize_dtype: float8_e4m3fn or float8_e5m2. Default: that of the outputs given, or float8_e4m3fn.
        quant_scale_q: queries are multiplied by it before they are cast.
        quant_scale_kv: keys are multiplied by it before they are cast.
        q_rope_out, k_rope_out, q_nope_out, k_nope_out: where to write, shaped as the inputs; any strides, the last
            dimension contiguous. Default: new tensors.
        enable_pdl: as for `rmsnorm`.
        backend: "cuda" or "cutile", FlashInfer's names; both mean the same kernel here.

    Returns:
        q_rope_out, k_rope_out, q_nope_out, k_nope_out; of size 0 for a part that is None.

    Raises:
        ValueError: a shape, dtype, device, stride or backend that does not fit; a host position outside the cache.
        NotImplementedError: a GPU older than compute capability 8.9.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    outs = {"q_rope_out": q_rope_out, "k_rope_out": k_rope_out, "q_nope_out": q_nope_out, "k_nope_out": k_nope_out}
    dtype = _quantize_dtype(quantize_dtype, outs)
    q_nope, k_nope = _part(q_nope, q_rope), _part(k_nope, k_rope)
    parts = {"q_rope": q_rope, "k_rope": k_rope, "q_nope": q_nope, "k_nope": k_nope}
    written = [_part_out(outs[f"{name}_out"], f"{name}_out", x, dtype) for name, x in parts.items()]
    q_rope, k_rope, q_nope, k_nope = (_three_dims(x) for x in parts.values())
    pos_ids = _check_parts(q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids)
    q_rope_to, k_rope_to, q_nope_to, k_nope_to = (_three_dims(x) for x in written)
    _rope_quantize(
        q_rope_to, q_nope_to, k_rope_to, k_nope_to, q_rope, q_nope, k_rope, k_nope,
        pos_ids, cos_sin_cache, not is_neox, quant_scale_q, quant_scale_kv, checks.pdl(enable_pdl, q_rope),
    )  # fmt: skip
    return written[0], written[1], written[2], written[3]


def mla_rope_quantize_fp8(
    q_rope: Tensor,
    k_rope: Tensor,
    q_nope: Tensor | None,
    k_nope: Tensor | None,
    cos_sin_cache: Tensor,
    pos_ids: Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Tensor | None = None,
    k_rope_out: Tensor | None = None,
    q_nope_out: Tensor | None = None,
    k_nope_out: Tensor | None = None,
    enable_pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rope_quantize_fp8` for MLA, where k_rope [nnz, rope_dim] and k_nope [nnz, nope_dim] have no heads."""
    return rope_quantize_fp8(
        q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox, quantize_dtype, quant_scale_q, quant_scale_kv,
        q_rope_out, k_rope_out, q_nope_out, k_nope_out, enable_pdl,
    )  # fmt: skip


def rope_quantize_fp8_append_paged_kv_cache(
    q_rope: Tensor,
    k_rope: Tensor,
    q_nope: Tensor | None,
    k_nope: Tensor | None,
    v: Tensor | None,
    cos_sin_cache: Tensor,
    pos_ids: Tensor,
    paged_kv_cache: tuple[Tensor, Tensor],
    kv_indices: Tensor,
    kv_indptr: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    page_size: int = 16,
    kv_layout: str = "NHD",
    q_rope_out: Tensor | None = None,
    q_nope_out: Tensor | None = None,
    enable_pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope_quantize_fp8`, but keys and values are written to their slots of a paged fp8 cache, and nothing else there.

    Args:
        v: [nnz, num_kv_heads, head_dim_vo], multiplied by quant_scale_kv as the keys. None for MLA.
        paged_kv_cache: fp8. With v: (k, v), each [num_pages, page_size, num_kv_heads, head_dim] (NHD) or
            [num_pages, num_kv_heads, page_size, head_dim] (HND), where a key is its rotated part, then the rest.
            Without (MLA): (ckv [num_pages, page_size, nope_dim], kpe [num_pages, page_size, rope_dim]). Any strides,
            the last dimension contiguous.
        kv_indices, kv_indptr, batch_indices, positions: where each token lives, see `append_paged_kv_cache`.
        page_size: tokens of a page of paged_kv_cache.
        q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox, quantize_dtype, quant_scale_q, quant_scale_kv,
            q_rope_out, q_nope_out, enable_pdl: as for `rope_quantize_fp8`.

    Returns:
        q_rope_out, q_nope_out.

    Raises:
        KeyError: unknown kv_layout, or a paged_kv_cache of another kind.
        ValueError: a shape, dtype, device, stride or page_size that does not fit; on host tensors also a position,
            request or page out of range.
        NotImplementedError: a GPU older than compute capability 8.9.
    """
    checks.check_layout(kv_layout)
    dtype = _quantize_dtype(quantize_dtype, {"q_rope_out": q_rope_out, "q_nope_out": q_nope_out})
    q_nope, k_nope = _part(q_nope, q_rope), _part(k_nope, k_rope)
    q_rope_out = _part_out(q_rope_out, "q_rope_out", q_rope, dtype)
    q_nope_out = _part_out(q_nope_out, "q_nope_out", q_nope, dtype)
    k_rope, k_nope = _three_dims(k_rope), _three_dims(k_nope)
    pos_ids = _check_parts(q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids)
    rope_dim = k_rope.shape[2]
    if v is None:
        if not isinstance(paged_kv_cache, tuple) or len(paged_kv_cache) != 2:
            kind = type(paged_kv_cache).__name__
            raise KeyError(f"Unrecognized paged_kv_cache type {kind}: expected a tuple (ckv, kpe), since v is None")
        ckv_cache, kpe_cache = paged_kv_cache
        checks.check_shape("paged_kv_cache (ckv)", ckv_cache, ("num_pages", page_size, k_nope.shape[2]))
        checks.check_shape("paged_kv_cache (kpe)", kpe_cache, (ckv_cache.shape[0], page_size, rope_dim))
        caches = {"paged_kv_cache (ckv)": ckv_cache, "paged_kv_cache (kpe)": kpe_cache}
        k_nope_cache, k_rope_cache = ckv_cache.unsqueeze(2), kpe_cache.unsqueeze(2)
        v, v_cache = k_rope[..., :0], k_rope_cache[..., :0]
    else:
        k_cache, v_cache = split_paged_cache(paged_kv_cache, kv_layout)
        num_kv_heads = k_rope.shape[1]
        checks.check_shape("v", v, (k_rope.shape[0], num_kv_heads, "head_dim_vo"))
        checks.check_same_dtype("v", v, "q_rope", q_rope)
        checks.check_device("v", v, q_rope.device)
        checks.check_inner_contiguous("v", v)
        head_dim = rope_dim + k_nope.shape[2]
        checks.check_shape("paged_kv_cache (k)", k_cache, ("num_pages", page_size, num_kv_heads, head_dim))
        checks.check_shape("paged_kv_cache (v)", v_cache, (k_cache.shape[0], page_size, num_kv_heads, v.shape[2]))
        caches = {"paged_kv_cache (k)": k_cache, "paged_kv_cache (v)": v_cache}
        k_rope_cache, k_nope_cache = k_cache[..., :rope_dim], k_cache[..., rope_dim:]
    for name, cache in caches.items():
        checks.check_dtype(name, cache, (dtype,))
        checks.check_device(name, cache, q_rope.device)
        checks.check_inner_contiguous(name, cache)
    nnz, cache_size = q_rope.shape[0], k_rope_cache.shape[:2]
    indices = check_append(nnz, q_rope.device, batch_indices, positions, kv_indices, kv_indptr, None, cache_size)
    _rope_quantize_append(
        q_rope_out, q_nope_out, k_rope_cache, k_nope_cache, v_cache, q_rope, q_nope, k_rope, k_nope, v,
        pos_ids, cos_sin_cache, not is_neox, quant_scale_q, quant_scale_kv, checks.pdl(enable_pdl, q_rope), *indices,
    )  # fmt: skip
    return q_rope_out, q_nope_out


def _three_dims(x: Tensor) -> Tensor:
    """[nnz, num_heads, dim], where a key of MLA has one head."""
    return x.unsqueeze(1) if x.dim() == 2 else x


def _part(nope: Tensor | None, rope: Tensor) -> Tensor:
    """The part that is not rotated; of no dimensions if it is None."""
    checks.check_tensor("q_rope or k_rope", rope)
    return rope[..., :0] if nope is None else checks.check_tensor("q_nope or k_nope", nope)


def _quantize_dtype(quantize_dtype: torch.dtype | None, outs: dict[str, Tensor | None]) -> torch.dtype:
    given = [out.dtype for out in outs.values() if out is not None]
    dtype = quantize_dtype or (given[0] if given else torch.float8_e4m3fn)
    if dtype not in checks.FP8_DTYPES:
        raise ValueError(f"quantize_dtype: expected torch.float8_e4m3fn or torch.float8_e5m2, got {dtype}")
    return dtype


def _part_out(out: Tensor | None, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`out`, checked, or a new tensor if it is None."""
    if out is None:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    checks.check_shape(name, out, x.shape)
    checks.check_dtype(name, out, (dtype,))
    checks.check_device(name, out, x.device)
    checks.check_inner_contiguous(name, out)
    return out


def _check_parts(
    q_rope: Tensor, k_rope: Tensor, q_nope: Tensor, k_nope: Tensor, cos_sin_cache: Tensor, pos_ids: Tensor
) -> Tensor:
    """pos_ids fit for a kernel."""
    checks.check_shape("q_rope", q_rope, ("nnz", "num_qo_heads", "rope_dim"))
    checks.check_dtype("q_rope", q_rope, checks.FLOAT_DTYPES)
    nnz, num_qo_heads, rope_dim = q_rope.shape
    checks.check_shape("k_rope", k_rope, (nnz, "num_kv_heads", rope_dim))
    checks.check_shape("q_nope", q_nope, (nnz, num_qo_heads, "nope_dim"))
    checks.check_shape("k_nope", k_nope, (nnz, k_rope.shape[1], "nope_dim"))
    for name, x in (("q_rope", q_rope), ("k_rope", k_rope), ("q_nope", q_nope), ("k_nope", k_nope)):
        checks.check_same_dtype(name, x, "q_rope", q_rope)
        checks.check_device(name, x, q_rope.device)
        checks.check_inner_contiguous(name, x)
    checks.check_cos_sin_cache(cos_sin_cache, q_rope.device)
    checks.check_shape("cos_sin_cache", cos_sin_cache, ("max_position", rope_dim))
    if rope_dim % 2:
        raise ValueError(f"q_rope: expected an even rope_dim, got {rope_dim}")
    pos_ids = checks.index_tensor("pos_ids", pos_ids, q_rope.device, nnz)
    checks.check_between("pos_ids", pos_ids, 0, len(cos_sin_cache), "token")
    return pos_ids
