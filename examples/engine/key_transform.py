"""Keys that four bits hold well: centred, balanced and rotated, with queries to match, so that attention is the same.

Attention does not change if one vector is subtracted from all keys of a head, because the logits of a query all move by
the same amount, nor if keys are multiplied by a matrix and queries by its inverse, transposed. This is of use because a
few channels of the keys are large, and nearly the same in every token: a scale for 32 channels is as coarse as these
few need. What it brings is in benchmarks/results/perplexity_kv_dtype.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyTransform:
    """One layer's; fp32, on the device. For each head, key_matrix @ query_matrix.T is the identity."""

    offset: Tensor  # [num_kv_heads, head_dim]
    key_matrix: Tensor  # [num_kv_heads, head_dim, head_dim]
    query_matrix: Tensor  # likewise

    @staticmethod
    def fit(keys: Tensor, queries: Tensor) -> "KeyTransform":
        """From a sample of keys [n, num_kv_heads, head_dim] and queries [n, num_qo_heads, head_dim].

        Rotated keys are rounded with an error alike in all channels and proportional to the keys' size, and the logits
        multiply it by the queries: their error grows with (sum of k_d^2) (sum of q_d^2) over channels d. Dividing k_d,
        and multiplying q_d, by the square root of their ratio would make this product least (Cauchy-Schwarz); the
        fourth root serves better, as the sizes are those of a sample.
        """
        keys, queries = keys.float(), _by_kv_head(queries, keys.shape[1])
        size_k = keys.std(0)  # [num_kv_heads, head_dim]
        size_q = queries.square().mean((0, 2)).sqrt()
        size_k, size_q = (s + 1e-3 * s.mean() + 1e-20 for s in (size_k, size_q))  # no channel is blown up from zero
        factor = (size_q / size_k).pow(0.25)[..., None]
        rotation = _rotation(keys.shape[-1]).to(keys.device)
        return KeyTransform(keys.mean(0), factor * rotation, rotation / factor)

    def keys(self, k: Tensor) -> Tensor:
        """[n, num_kv_heads, head_dim], fp32."""
        return torch.einsum("nhd,hde->nhe", k.float() - self.offset, self.key_matrix)

    def queries(self, q: Tensor) -> Tensor:
        """[n, num_qo_heads, head_dim], in their dtype."""
        grouped = _by_kv_head(q, self.offset.shape[0])
        return torch.einsum("nhgd,hde->nhge", grouped, self.query_matrix).reshape(q.shape).to(q.dtype)


def _by_kv_head(queries: Tensor, num_kv_heads: int) -> Tensor:
    """[n, num_qo_heads, head_dim] -> [n, num_kv_heads, group_size, head_dim], fp32."""
    n, num_qo_heads, head_dim = queries.shape
    return queries.float().reshape(n, num_kv_heads, num_qo_heads // num_kv_heads, head_dim)


def _rotation(n: int) -> Tensor:
    """A fixed orthogonal matrix [n, n] that spreads every channel over all of them."""
    rotation: Tensor
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return rotation.float()
