"""The paged KV cache in PyTorch; index arithmetic in numpy, several times as fast on the few tokens of a step."""

import numpy as np
import torch
from torch import Tensor


def append_paged_kv_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
) -> None:
    """Write rows [nnz, num_kv_heads, dim] into caches [num_pages, page_size, num_kv_heads, dim] of any strides."""
    where = slots(batch_indices, positions, kv_indices, kv_indptr, k_cache.shape[1])
    k_cache.index_put_(where, append_key)
    v_cache.index_put_(where, append_value)


def slots(
    batch_indices: Tensor, positions: Tensor, kv_indices: Tensor, kv_indptr: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """Page and slot of tokens, [nnz] int64."""
    b, pos, page_ids, indptr = (x.numpy() for x in (batch_indices, positions, kv_indices, kv_indptr))
    entry, slot = np.divmod(pos, page_size)
    return torch.from_numpy(page_ids[indptr[b] + entry].astype(np.int64)), torch.from_numpy(slot.astype(np.int64))


def get_batch_indices_positions(
    batch_indices: Tensor, positions: Tensor, append_indptr: Tensor, seq_lens: Tensor
) -> None:
    """Request and position of each appended token, [nnz]."""
    token = torch.arange(batch_indices.shape[0], dtype=torch.int32)
    torch.searchsorted(append_indptr[1:], token, right=True, out_int32=True, out=batch_indices)
    shift = seq_lens - append_indptr[1:]
    torch.add(shift.index_select(0, batch_indices), token, out=positions)
