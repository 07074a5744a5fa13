"""The paged KV cache: pages of `page_size` tokens that requests take from one pool and give back when they finish."""

import torch
from torch import Tensor


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


class KVCache:
    """K and V of all layers, [num_layers, num_pages, 2, page_size, num_kv_heads, head_dim], and the pool of its pages.

    A page id means the same page in every layer. Memory starts uninitialised: attention reads only what was appended.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size: expected at least 1 token, got {page_size}")
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        shape = (num_layers, num_pages, 2, page_size, num_kv_heads, head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> Tensor:
        """The cache of one layer, [num_pages, 2, page_size, num_kv_heads, head_dim], a view."""
        return self.data[index]
