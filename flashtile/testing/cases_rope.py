"""Cases of the rotary embeddings, and what must hold for each: on the CPU, in Triton's interpreter and on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile import rope
from flashtile.reference import rope as reference
from flashtile.testing.tensors import name, randn, strided
from flashtile.testing.tolerance import assert_close


@dataclass(frozen=True)
class RopeCase:
    """heads: (num_qo_heads, num_kv_heads); rotary_dim None: the whole head."""

    nnz: int
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    rotary_dim: int | None = None
    interleave: bool = False
    dtype: torch.dtype = torch.float16
    strided: bool = False
    max_position: int = 4096
    rope_scale: float = 1.0
    rope_theta: float = 1e4

    def __str__(self) -> str:
        words = [f"nnz={self.nnz} heads={self.heads[0]}:{self.heads[1]} dim={self.head_dim}"]
        words += [f"rotary={self.rotary_dim}"] if self.rotary_dim else []
        words += [word for word, on in (("interleave", self.interleave), ("strided", self.strided)) if on]
        return " ".join([*words, f"below={self.max_position}", name(self.dtype)])

    def q_and_k(self, device: str) -> tuple[Tensor, Tensor]:
        """Random queries and keys."""
        q, k = (
            randn(self.nnz, heads, self.head_dim, dtype=self.dtype, device=device, seed=i)
            for i, heads in enumerate(self.heads)
        )
        return (strided(q), strided(k)) if self.strided else (q, k)

    def positions(self, device: str) -> Tensor:
        """Random positions, int32, the first and the last possible among them."""
        positions = torch.randint(self.max_position, (self.nnz,), generator=torch.Generator().manual_seed(2))
        positions[:1] = 0
        positions[1:2] = self.max_position - 1
        return positions.int().to(device)

    def freqs(self) -> Tensor:
        """By definition, fp64."""
        return reference.frequencies(self.rotary_dim or self.head_dim, self.rope_scale, self.rope_theta)

    def cos_sin_cache(self, device: str) -> Tensor:
        """[max_position, rotary_dim] fp32."""
        angles = torch.arange(self.max_position)[:, None] * self.freqs()
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(device)


SMALL_CASES = (
    RopeCase(3),
    RopeCase(1, (1, 1), 16, interleave=True),
    RopeCase(4, (9, 3), 64, strided=True),
    RopeCase(3, (2, 1), 80, rotary_dim=24, dtype=torch.float32),
    RopeCase(3, (3, 2), 96, rotary_dim=32, interleave=True, strided=True),
    RopeCase(2, (5, 5), 40, interleave=True, dtype=torch.float32),
    RopeCase(3, (4, 1), 128, rope_theta=5e5, rope_scale=8.0),
    RopeCase(0),
)
CASES = SMALL_CASES + tuple(
    RopeCase(nnz, heads, head_dim, rotary_dim, interleave, dtype, with_strides, max_position)
    for nnz, heads, head_dim, rotary_dim, with_strides, max_position in (
        (67, (32, 8), 128, None, True, 8192),
        (300, (9, 3), 64, None, False, 100),
        (5, (128, 1), 192, 64, True, 4096),
        (2, (2, 2), 256, None, False, 2),
    )
    for interleave in (False, True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
)
LONG = RopeCase(64, (2, 1), 128, dtype=torch.float32, max_position=1_000_000, rope_theta=5e5)


def check_pos_ids(case: RopeCase, device: str) -> None:
    """Against the oracle; angles are fp32 by contract, so the oracle's are fp32 too: position * frequency, rounded."""
    q, k = case.q_and_k(device)
    pos_ids = case.positions(device)
    kwargs = {"rotary_dim": case.rotary_dim, "interleave": case.interleave}
    freqs = case.freqs().float().to(device)
    angles = (pos_ids[:, None].float() * freqs).double()
    got = rope.apply_rope_pos_ids(q, k, pos_ids, rope_scale=case.rope_scale, rope_theta=case.rope_theta, **kwargs)
    for name_, out, x in (("q", got[0], q), ("k", got[1], k)):
        oracle = reference.rotate(x.double(), angles.cos(), angles.sin(), case.interleave)
        peer = reference.rotate(x, angles.float().cos().to(x.dtype), angles.float().sin().to(x.dtype), case.interleave)
        assert_close(out, oracle, peer, name_)
    for ids in (pos_ids.long(), torch.stack([pos_ids, pos_ids], 1)[:, 0]):
        again = rope.apply_rope_pos_ids(q, k, ids, rope_scale=case.rope_scale, rope_theta=case.rope_theta, **kwargs)
        assert torch.equal(again[0], got[0])
        assert torch.equal(again[1], got[1])
    rope.apply_rope_pos_ids_inplace(q, k, pos_ids, rope_scale=case.rope_scale, rope_theta=case.rope_theta, **kwargs)
    assert torch.equal(q, got[0])
    assert torch.equal(k, got[1])


def check_cos_sin_cache(case: RopeCase, device: str) -> None:
    """Against the oracle, by heads and flat, in place and not."""
    q, k = case.q_and_k(device)
    positions, cache = case.positions(device), case.cos_sin_cache(device)
    got = rope.apply_rope_with_cos_sin_cache(positions, q, k, case.head_dim, cache, is_neox=not case.interleave)
    oracle = reference.apply_rope_with_cos_sin_cache(q.double(), k.double(), positions, cache, case.interleave)
    peer = reference.apply_rope_with_cos_sin_cache(q, k, positions, cache, case.interleave)
    assert_close(got[0], oracle[0], peer[0], "q")
    assert_close(got[1], oracle[1], peer[1], "k")
    flat = [x.reshape(case.nnz, x.shape[1] * x.shape[2]).clone() for x in (q, k)]
    q_flat, k_flat = rope.apply_rope_with_cos_sin_cache(
        positions.long(), flat[0], flat[1], case.head_dim, cache, is_neox=not case.interleave
    )
    assert torch.equal(q_flat.view(got[0].shape), got[0])
    assert torch.equal(k_flat.view(got[1].shape), got[1])
    args = (case.head_dim, cache, not case.interleave)
    rope.apply_rope_with_cos_sin_cache_inplace(positions, flat[0], flat[1], *args)
    rope.apply_rope_with_cos_sin_cache_inplace(positions, q, k, *args)
    assert torch.equal(flat[0], q_flat)
    assert torch.equal(flat[1], k_flat)
    assert torch.equal(q, got[0])
    assert torch.equal(k, got[1])


def check_position_zero_changes_nothing(device: str) -> None:
    """At position 0 all angles are 0: cos 1, sin 0."""
    q, k = RopeCase(3).q_and_k(device)
    q_out, k_out = rope.apply_rope_pos_ids(q, k, torch.zeros(3, dtype=torch.int32, device=device))
    assert torch.equal(q_out, q)
    assert torch.equal(k_out, k)
