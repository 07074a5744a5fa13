"""The paged KV cache: pages of `page_size` tokens that requests take from one pool and give back when they finish.

Keys and values lie there as floats, or quantised: each token and head on its own, so that what a page holds depends
neither on the chunks of a prompt nor on what else is served.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import flashtile

# The names that --kv-dtype takes, beside "auto": that of the model.
KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "int4": torch.uint8,  # two to a byte
}
INT4_GROUP = 32  # elements of head_dim that share a scale and a zero point, where head_dim can be cut so


class PagePool:
    """Hands out page ids; a page belongs to at most one request at a time."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: expected at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: pages released last are reused first
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` free page ids, now the caller's; None, and nothing taken, if fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back. ValueError, and nothing released, for a page that is not taken or named twice."""
        if len(set(pages)) != len(pages) or not self._taken.issuperset(pages):
            wrong = next(p for i, p in enumerate(pages) if p in pages[:i] or p not in self._taken)
            raise ValueError(f"pages: page {wrong} is not taken, or released twice; release a page once")
        self._taken.difference_update(pages)
        self._free.extend(pages)


class Slots(NamedTuple):
    """Where the K and V of a step's tokens go, and whose they are. Index tensors on the device."""

    batch_indices: Tensor  # [nnz_qo], which request
    positions: Tensor  # [nnz_qo], in the token's request
    kv_indptr: Tensor  # [batch_size + 1], in pages
    kv_indices: Tensor  # page ids
    last_page_len: Tensor  # [batch_size]


class KVCache:
    """K and V of all layers, and the pool of their pages. A page id means the same page in every layer.

    data: [num_layers, num_pages, 2, page_size, num_kv_heads, head_dim], in int4 half as many bytes. factors, in int8
    and int4: the scales of each token and head, then the zero points, fp32; None for other formats. fp8 has a scale of
    1: keys and values of a language model lie well inside its range.
    Memory starts uninitialised: attention reads only what was appended.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        model_dtype: torch.dtype,
        kv_dtype: str,
        device: torch.device,
    ) -> None:
        """kv_dtype: "auto", for model_dtype, or a name in KV_DTYPES."""
        if page_size < 1:
            raise ValueError(f"page_size: expected at least 1 token, got {page_size}")
        if kv_dtype != "auto" and kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: expected auto or one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.dtype = model_dtype if kv_dtype == "auto" else KV_DTYPES[kv_dtype]
        # attention over a cache that is not quantised wants queries of the same dtype
        self.query_dtype = self.dtype if self.dtype.itemsize > 1 else model_dtype
        self.name = str(model_dtype).removeprefix("torch.") if kv_dtype == "auto" else kv_dtype
        self._num_groups = head_dim // INT4_GROUP if head_dim % INT4_GROUP == 0 else 1
        num_factors = {torch.int8: 1, torch.uint8: 2 * self._num_groups}.get(self.dtype, 0)
        rows = (num_layers, num_pages, 2, page_size, num_kv_heads)
        width = head_dim // 2 if self.dtype == torch.uint8 else head_dim
        self.data = torch.empty(*rows, width, dtype=self.dtype, device=device)
        self.factors = torch.empty(*rows, num_factors, device=device) if num_factors else None
        self.key_transforms: list[flashtile.KeyTransform] | None = None  # of each layer; one that is missing is fitted

    def __str__(self) -> str:
        size = f"{self.num_bytes / 2**20:.1f} MiB in {self.pool.num_pages} pages of {self.page_size}"
        return f"KV cache in {self.name}: {self.bytes_per_token} bytes per token, {size}"

    @property
    def num_bytes(self) -> int:
        """Of the whole pool, in all layers."""
        return self.data.nbytes + (0 if self.factors is None else self.factors.nbytes)

    @property
    def bytes_per_token(self) -> int:
        """K, V and their factors, in all layers."""
        return self.num_bytes // (self.pool.num_pages * self.page_size)

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Slots) -> Tensor:
        """Write new tokens' K and V, [nnz_qo, num_kv_heads, head_dim], to their slots of one layer.

        Returns their queries q, [nnz_qo, num_qo_heads, head_dim], as attention over this cache takes them.
        """
        if self.key_transforms is not None:
            if layer == len(self.key_transforms):
                self.key_transforms.append(flashtile.KeyTransform.fit(k, q, self._num_groups))
            transform = self.key_transforms[layer]
            q, k = transform.queries(q), transform.keys(k)
        cache, factors = self.layer(layer)
        rows = k.dtype if self.dtype.itemsize == 1 else self.dtype  # rows of another dtype are quantised on their way
        flashtile.append_paged_kv_cache(
            k.to(rows), v.to(rows), slots.batch_indices, slots.positions, cache, slots.kv_indices, slots.kv_indptr,
            slots.last_page_len, "NHD", **factors,
        )  # fmt: skip
        return q.to(self.query_dtype)

    def layer(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What attention over one layer reads and append writes: the cache [num_pages, 2, page_size, num_kv_heads,
        ...], and the scales and zero points by the names of their arguments. Views."""
        if self.factors is None:
            return self.data[index], {}
        k, v = self.factors[index].unbind(1)
        if self.dtype == torch.int8:
            return self.data[index], {"k_scale": k, "v_scale": v}
        (k_scale, k_zero), (v_scale, v_zero) = k.chunk(2, -1), v.chunk(2, -1)
        return self.data[index], {"k_scale": k_scale, "v_scale": v_scale, "k_zero": k_zero, "v_zero": v_zero}
