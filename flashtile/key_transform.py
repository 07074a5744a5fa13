"""Keys that four bits hold well: balanced and rotated, with queries to match, so that attention stays the same.

Attention does not change if the keys of a head are multiplied by a matrix and its queries by the inverse, transposed.
This is of use because a few channels of the keys are large, in all tokens alike: a scale for 32 channels is as coarse
as these few need. Balancing is the idea of SmoothQuant (arXiv:2211.10438), rotation that of QuaRot (arXiv:2404.00456);
which rotation is our own. What it brings is in benchmarks/results/perplexity_kv_dtype.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile import checks

__all__ = ["KeyTransform"]


@dataclass(frozen=True)
class KeyTransform:
    """One layer's keys and queries, after their rotary embedding, made kinder to `quantize_kv_int4`.

    Fields:
        key_matrix, query_matrix: [num_kv_heads, head_dim, head_dim], fp32, on one device. For each head, key_matrix @
            query_matrix.T is the identity, so that logits stay as they are. Not for caches of keys that attention
            itself rotates.
    """

    key_matrix: Tensor
    query_matrix: Tensor

    def __post_init__(self) -> None:
        checks.check_shape("key_matrix", self.key_matrix, ("num_kv_heads", "head_dim", "head_dim"))
        if self.key_matrix.shape[1] != self.key_matrix.shape[2]:
            raise ValueError(f"key_matrix: expected square matrices, got shape {tuple(self.key_matrix.shape)}")
        checks.check_like("query_matrix", self.query_matrix, "key_matrix", self.key_matrix)
        checks.check_dtype("key_matrix", self.key_matrix, (torch.float32,))

    @staticmethod
    def fit(keys: Tensor, queries: Tensor, groups: int) -> "KeyTransform":
        """From a sample of a layer's keys and queries; of a thousand tokens, whose kind hardly matters.

        First, channels are balanced. Rotated keys are rounded with an error alike in all channels and proportional to
        the keys' size, and the logits multiply it by the queries: their error grows with (sum of k_d^2) (sum of q_d^2)
        over channels d. Dividing k_d, and multiplying q_d, by the square root of their ratio would make this product
        least (Cauchy-Schwarz); the fourth root serves better, as the sizes are those of a sample.

        Then, keys are rotated: their strongest directions, one for each of the `groups` of channels that share a scale
        and a zero point, become constant in a group, which is what a zero point holds without any rounding. What is
        left is spread over all channels.

        Args:
            keys: [n, num_kv_heads, head_dim]; queries: [n, num_qo_heads, head_dim]; fp16, bf16 or fp32, on one device.
            groups: of channels that share a scale and a zero point: head_dim / group_size of `quantize_kv_int4`.

        Raises:
            ValueError: a shape, dtype or device that does not fit; heads or head_dim that cannot be divided.
        """
        checks.check_shape("keys", keys, ("n", "num_kv_heads", "head_dim"))
        checks.check_shape("queries", queries, ("n", "num_qo_heads", keys.shape[2]))
        checks.check_device("queries", queries, keys.device)
        for name, x in (("keys", keys), ("queries", queries)):
            checks.check_dtype(name, x, checks.FLOAT_DTYPES)
            if x.shape[0] < 2:
                raise ValueError(f"{name}: expected a sample of at least 2 tokens, got {x.shape[0]}")
        if queries.shape[1] % keys.shape[1]:
            raise ValueError(
                f"queries: expected a multiple of num_kv_heads = {keys.shape[1]}, got {queries.shape[1]} heads"
            )
        if groups < 1 or keys.shape[2] % groups:
            raise ValueError(f"groups: expected a divisor of head_dim = {keys.shape[2]}, got {groups}")
        x, y = keys.double().cpu(), by_kv_head(queries, keys.shape[1]).double().cpu()
        size_k, size_q = x.std(0), y.square().mean((0, 2)).sqrt()  # [num_kv_heads, head_dim]
        size_k, size_q = (s + 1e-3 * s.mean() + 1e-20 for s in (size_k, size_q))  # no channel is blown up from zero
        factor = (size_q / size_k).pow(0.25)
        x = (x * factor).transpose(0, 1)  # [num_kv_heads, n, head_dim]
        _, directions = torch.linalg.eigh(x.mT @ x)  # the strongest last
        rotation = rotate_to_groups(directions[..., -groups:])
        matrices = factor[..., None] * rotation, rotation / factor[..., None]
        return KeyTransform(*(m.float().to(keys.device) for m in matrices))

    def keys(self, k: Tensor) -> Tensor:
        """Keys [n, num_kv_heads, head_dim], any float dtype, as the cache is to hold them; fp32.

        Raises:
            ValueError: another shape.
        """
        checks.check_shape("k", k, ("n", *self.key_matrix.shape[:2]))
        return torch.einsum("nhd,hde->nhe", k.float(), self.key_matrix)

    def queries(self, q: Tensor) -> Tensor:
        """Queries [n, num_qo_heads, head_dim] to such keys, in their own dtype.

        Raises:
            ValueError: another shape.
        """
        checks.check_shape("q", q, ("n", "num_qo_heads", self.query_matrix.shape[1]))
        grouped = by_kv_head(q, self.query_matrix.shape[0]).float()
        return torch.einsum("nhgd,hde->nhge", grouped, self.query_matrix).reshape(q.shape).to(q.dtype)


def by_kv_head(queries: Tensor, num_kv_heads: int) -> Tensor:
    """[n, num_qo_heads, head_dim] -> [n, num_kv_heads, group_size, head_dim]."""
    n, num_qo_heads, head_dim = queries.shape
    return queries.reshape(n, num_kv_heads, num_qo_heads // num_kv_heads, head_dim)


def rotate_to_groups(directions: Tensor) -> Tensor:
    """Orthogonal matrices [heads, dim, dim] for rows: orthonormal directions [heads, dim, groups] become vectors that
    are constant in a group of channels and 0 in others; what is orthogonal to them is mixed, at random but fixed."""
    heads, dim, groups = directions.shape
    constant = torch.eye(groups, dtype=directions.dtype).repeat_interleave(dim // groups, 0)
    rest = torch.randn(dim, dim - groups, generator=torch.Generator().manual_seed(0), dtype=directions.dtype)
    source, target = (
        torch.linalg.qr(torch.cat([first.expand(heads, -1, -1), rest.expand(heads, -1, -1)], -1))[0]
        for first in (directions, constant)
    )
    rotation: Tensor = source @ target.mT
    return rotation
