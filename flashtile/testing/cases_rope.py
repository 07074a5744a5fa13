"""Cases of the rotary embeddings, and what must hold for each: on the CPU, in Triton's interpreter and on a GPU."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flashtile import rope
from flashtile.reference import rope as reference
from flashtile.testing.cases_page import SMALL_CASES as PAGE_CASES
from flashtile.testing.cases_page import bits, by_token, make_cache, page_table
from flashtile.testing.fp8 import FP8_DTYPES, assert_fp8_close
from flashtile.testing.tensors import name, poisoned, randn, strided
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
    RopeCase(2, (3, 0)),  # queries alone
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
    kwargs: dict[str, Any] = {"rotary_dim": case.rotary_dim, "interleave": case.interleave}
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


def check_ragged(case: RopeCase, device: str) -> None:
    """By indptr and offsets the same bits as by position ids, with Llama's frequencies and Llama 3.1's."""
    lens = torch.tensor([case.nnz // 2, 0, case.nnz - case.nnz // 2])
    offsets = torch.tensor([5, 7, 0])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])
    pos_ids = (
        torch.cat([first + torch.arange(n) for first, n in zip(offsets, lens.tolist(), strict=True)]).int().to(device)
    )
    how: dict[str, Any] = {"rotary_dim": case.rotary_dim, "interleave": case.interleave}
    pairs = (
        (rope.apply_rope, rope.apply_rope_inplace, rope.apply_rope_pos_ids),
        (rope.apply_llama31_rope, rope.apply_llama31_rope_inplace, rope.apply_llama31_rope_pos_ids),
    )
    for ragged, ragged_inplace, by_ids in pairs:
        q, k = case.q_and_k(device)
        expected = by_ids(q, k, pos_ids, **how)
        for dtype in (torch.int32, torch.int64):
            got = ragged(q, k, indptr.to(dtype).to(device), offsets.to(dtype).to(device), **how)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
        ragged_inplace(q, k, indptr.to(device), offsets.to(device), **how)
        assert torch.equal(q, expected[0])
        assert torch.equal(k, expected[1])


def check_llama31(case: RopeCase, device: str) -> None:
    """Against the definition of the smoothed frequencies."""
    q, k = case.q_and_k(device)
    pos_ids = case.positions(device)
    factors: dict[str, Any] = {"low_freq_factor": 1.5, "high_freq_factor": 6.0, "old_context_len": 4096}
    freqs = reference.frequencies(case.rotary_dim or case.head_dim, 8.0, 5e5, **factors).float().to(device)
    angles = (pos_ids[:, None].float() * freqs).double()
    how = {
        "rotary_dim": case.rotary_dim,
        "interleave": case.interleave,
        "rope_scale": 8.0,
        "rope_theta": 5e5,
        **factors,
    }
    got = rope.apply_llama31_rope_pos_ids(q, k, pos_ids, **how)
    for part, out, x in (("q", got[0], q), ("k", got[1], k)):
        oracle = reference.rotate(x.double(), angles.cos(), angles.sin(), case.interleave)
        peer = reference.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), case.interleave)
        assert_close(out, oracle, peer, part)
    rope.apply_llama31_rope_pos_ids_inplace(q, k, pos_ids, **how)
    assert torch.equal(q, got[0])
    assert torch.equal(k, got[1])


@dataclass(frozen=True)
class QuantizeCase:
    """heads (q, k); rope_dim and nope_dim of a head, dim_v of a value; mla: keys [nnz, dim] of one head, no values."""

    nnz: int
    heads: tuple[int, int]
    rope_dim: int
    nope_dim: int
    dim_v: int = 64
    interleave: bool = False
    mla: bool = False
    strided: bool = False

    def __str__(self) -> str:
        words = [
            f"nnz={self.nnz} heads={self.heads[0]}:{self.heads[1]} dims={self.rope_dim},{self.nope_dim},{self.dim_v}"
        ]
        flags = (("interleave", self.interleave), ("mla", self.mla), ("strided", self.strided))
        return " ".join(words + [word for word, on in flags if on])

    def parts(self, nnz: int, device: str) -> dict[str, Tensor]:
        """q_rope, k_rope, q_nope, k_nope and v."""
        q_heads, k_heads = (self.heads[0],), (() if self.mla else (self.heads[1],))
        shapes = {
            "q_rope": (*q_heads, self.rope_dim),
            "k_rope": (*k_heads, self.rope_dim),
            "q_nope": (*q_heads, self.nope_dim),
            "k_nope": (*k_heads, self.nope_dim),
            "v": (*k_heads, self.dim_v),
        }
        made = {
            k: randn(nnz, *v, dtype=torch.float16, device=device, seed=i) for i, (k, v) in enumerate(shapes.items())
        }
        return {k: strided(x) for k, x in made.items()} if self.strided else made

    def turned(self, x: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
        """A rope part, rotated, fp64."""
        cos, sin = cache[positions.long()].double().chunk(2, dim=-1)
        by_head = x.double() if x.dim() == 3 else x.double()[:, None]
        return reference.rotate(by_head, cos, sin, self.interleave).view(x.shape)


SMALL_QUANTIZE_CASES = (
    QuantizeCase(3, (4, 2), 32, 32, 64),
    QuantizeCase(2, (16, 1), 64, 96, interleave=True, mla=True),
    QuantizeCase(3, (3, 3), 40, 0, 24, strided=True),
)
QUANTIZE_CASES = (
    *SMALL_QUANTIZE_CASES,
    QuantizeCase(65, (128, 1), 64, 512, mla=True, strided=True),
    QuantizeCase(300, (32, 8), 128, 0, 128, interleave=True),
    QuantizeCase(33, (9, 3), 24, 72, 64, strided=True),
    QuantizeCase(0, (4, 2), 32, 32),
)


def check_quantize(case: QuantizeCase, device: str) -> None:
    """Rotated and plain parts in fp8, into new tensors and into strided ones."""
    parts = case.parts(case.nnz, device)
    parts.pop("v")
    positions = RopeCase(case.nnz, max_position=50).positions(device)
    cache = RopeCase(1, head_dim=case.rope_dim, max_position=50).cos_sin_cache(device)
    run: Any = rope.mla_rope_quantize_fp8 if case.mla else rope.rope_quantize_fp8
    how: dict[str, Any] = {"is_neox": not case.interleave, "quant_scale_q": 3.0, "quant_scale_kv": 200.0}
    for dtype in FP8_DTYPES:
        outs = {f"{part}_out": strided(poisoned(x.shape, dtype, device)) for part, x in parts.items()}
        fresh = run(*parts.values(), cache, positions, quantize_dtype=dtype, **how)
        given = run(*parts.values(), cache, positions, **how, **outs)
        for (part, x), got, other, out in zip(parts.items(), fresh, given, outs.values(), strict=True):
            exact = case.turned(x, positions, cache) if "rope" in part else x.double()
            assert_fp8_close(got, exact, 1 / (3.0 if part[0] == "q" else 200.0), part)
            assert other is out
            assert torch.equal(other.view(torch.uint8), got.view(torch.uint8))
    if case.nope_dim == 0:
        without = run(parts["q_rope"], parts["k_rope"], None, None, cache, positions, **how)
        assert torch.equal(
            without[0].view(torch.uint8), run(*parts.values(), cache, positions, **how)[0].view(torch.uint8)
        )
        assert without[2].numel() == 0


def check_quantize_append(case: QuantizeCase, kv_layout: str, device: str) -> None:
    """Queries as `check_quantize` has them; keys and values in their slots, and no other bit of the cache changed."""
    layout = "NHD" if case.mla else kv_layout
    heads = 1 if case.mla else case.heads[1]
    cos_sin = RopeCase(1, head_dim=case.rope_dim, max_position=50).cos_sin_cache(device)
    for pages in PAGE_CASES:
        shape = replace(pages, num_kv_heads=heads, dtype=torch.float8_e4m3fn, kv_layout=layout)
        table = page_table(shape, device)
        parts = case.parts(len(table.positions), device)
        q_rope, k_rope = (case.turned(parts[part], table.positions, cos_sin) for part in ("q_rope", "k_rope"))
        k_nope, v = parts["k_nope"].double(), parts.pop("v")
        exact = (k_nope[:, None], k_rope[:, None]) if case.mla else (torch.cat([k_rope, k_nope], dim=-1), v.double())
        caches = [make_cache(replace(shape, head_dim=x.shape[-1]), table.num_pages, device)[0] for x in exact]
        before = [by_token(x, layout).clone() for x in caches]
        ckv_and_kpe, k_and_v = (caches[0][:, :, 0], caches[1][:, :, 0]), (caches[0], caches[1])
        got = rope.rope_quantize_fp8_append_paged_kv_cache(
            **cast("dict[str, Any]", parts), v=None if case.mla else v, cos_sin_cache=cos_sin, pos_ids=table.positions,
            paged_kv_cache=ckv_and_kpe if case.mla else k_and_v, kv_indices=table.kv_indices, kv_indptr=table.kv_indptr,
            batch_indices=table.batch_indices, positions=table.positions, is_neox=not case.interleave,
            quant_scale_q=3.0, quant_scale_kv=0.5, page_size=shape.page_size, kv_layout=kv_layout,
        )  # fmt: skip
        assert_fp8_close(got[0], q_rope, 1 / 3.0, "q_rope")
        assert_fp8_close(got[1], parts["q_nope"].double(), 1 / 3.0, "q_nope")
        where = table.slots(shape.page_size)
        for cache, old, rows in zip(caches, before, exact, strict=True):
            after = by_token(cache, layout)
            assert_fp8_close(after[where], rows.cpu(), 2.0, "cache")
            old[where] = after[where]
            assert torch.equal(bits(after), bits(old))


def check_position_zero_changes_nothing(device: str) -> None:
    """At position 0 all angles are 0: cos 1, sin 0."""
    q, k = RopeCase(3).q_and_k(device)
    q_out, k_out = rope.apply_rope_pos_ids(q, k, torch.zeros(3, dtype=torch.int32, device=device))
    assert torch.equal(q_out, q)
    assert torch.equal(k_out, k)
