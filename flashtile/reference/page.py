"""The paged KV cache, by definition: token i of request b lives in slot i % page_size of page
kv_indices[kv_indptr[b] + i // page_size]."""

import torch
from torch import Tensor


def slots(
    batch_indices: Tensor, positions: Tensor, kv_indices: Tensor, kv_indptr: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """Page and slot of tokens, [nnz] each."""
    where = [
        (int(kv_indices[kv_indptr[b] + pos // page_size]), pos % page_size)
        for b, pos in zip(batch_indices.tolist(), positions.tolist(), strict=True)
    ]
    return torch.tensor([page for page, _ in where], dtype=torch.long), torch.tensor(
        [slot for _, slot in where], dtype=torch.long
    )


def append_paged_cache(
    append: Tensor, batch_indices: Tensor, positions: Tensor, cache: Tensor, kv_indices: Tensor, kv_indptr: Tensor
) -> Tensor:
    """A copy of cache [num_pages, page_size, ...] with rows of append [nnz, ...] at tokens positions of requests."""
    out = cache.clone()
    out[slots(batch_indices, positions, kv_indices, kv_indptr, cache.shape[1])] = append
    return out


def get_batch_indices_positions(append_indptr: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """For each appended token its request and its position there; the last of request b is at seq_lens[b] - 1."""
    counts = append_indptr.diff().tolist()
    batch_indices = [b for b, count in enumerate(counts) for _ in range(count)]
    positions = [
        length - count + i for length, count in zip(seq_lens.tolist(), counts, strict=True) for i in range(count)
    ]
    return torch.tensor(batch_indices, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Tokens of each request: all pages but the last are full."""
    lens = [
        max(pages - 1, 0) * page_size + last
        for pages, last in zip(kv_indptr.diff().tolist(), kv_last_page_len.tolist(), strict=True)
    ]
    return torch.tensor(lens, dtype=torch.int32)
