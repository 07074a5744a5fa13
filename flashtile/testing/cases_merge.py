"""Cases of merging attention states, and what must hold for each: on the CPU, in Triton's interpreter and on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile import cascade
from flashtile.reference import cascade as reference
from flashtile.testing.tensors import name, randn, strided
from flashtile.testing.tolerance import assert_close


@dataclass(frozen=True)
class MergeCase:
    """n rows of num_heads states each, `num_states` of them to merge; about a third is empty, with garbage in v."""

    n: int
    num_states: int
    num_heads: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    strided: bool = False

    def __str__(self) -> str:
        words = f"n={self.n} states={self.num_states} heads={self.num_heads} dim={self.head_dim} {name(self.dtype)}"
        return words + (" strided" if self.strided else "")

    def states(self, device: str) -> tuple[Tensor, Tensor]:
        """v [n, num_states, num_heads, head_dim], NaN where s [n, num_states, num_heads] is -inf."""
        v = randn(self.n, self.num_states, self.num_heads, self.head_dim, dtype=self.dtype)
        s = randn(self.n, self.num_states, self.num_heads, dtype=torch.float32, seed=1) * 20
        s[randn(*s.shape, dtype=torch.float32, seed=2) < -0.5] = -torch.inf
        s[:1] = -torch.inf
        v[s == -torch.inf] = torch.nan
        v, s = v.to(device), s.to(device)
        return (strided(v), strided(s[..., None])[..., 0]) if self.strided else (v, s)


SMALL_CASES = (
    MergeCase(3, 2),
    MergeCase(5, 2, 3, 40, strided=True),
    MergeCase(4, 1, dtype=torch.float32),
    MergeCase(3, 17, 2, 64, strided=True),
    MergeCase(2, 5, 1, 576, dtype=torch.float32),
    MergeCase(0, 2),
)
CASES = SMALL_CASES + tuple(
    MergeCase(n, num_states, heads, dim, dtype, with_strides)
    for n, num_states, heads, dim, with_strides in ((129, 2, 9, 64, True), (33, 17, 8, 128, False), (7, 3, 5, 72, True))
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
)


def _oracle_and_peer(v: Tensor, s: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """By definition, which multiplies empty states by 0: they must be finite there."""
    v = torch.where(s[..., None] == -torch.inf, 0.0, v)
    return reference.merge_states(v.double(), s.double()), reference.merge_states(v, s)


def check_merge_states(case: MergeCase, device: str) -> None:
    """Against the oracle; the ragged form gives the same."""
    v, s = case.states(device)
    oracle, peer = _oracle_and_peer(v, s)
    got = cascade.merge_states(v, s)
    assert_close(got[0], oracle[0], peer[0], "v")
    assert_close(got[1], oracle[1], peer[1], "s")
    indptr = torch.arange(case.n + 1, device=device) * case.num_states
    ragged = cascade.variable_length_merge_states(v.flatten(0, 1), s.flatten(0, 1), indptr)
    assert_close(ragged[0], oracle[0], peer[0], "ragged v")
    assert_close(ragged[1], oracle[1], peer[1], "ragged s")


def check_merge_state(case: MergeCase, device: str) -> None:
    """Two states against the oracle; in place with the same bits, and only where the mask says."""
    v, s = case.states(device)
    oracle, peer = _oracle_and_peer(v[:, :2], s[:, :2])
    pair = (v[:, 0], s[:, 0], v[:, -1], s[:, -1])
    if case.num_states == 2:
        got = cascade.merge_state(*pair)
        assert_close(got[0], oracle[0], peer[0], "v")
        assert_close(got[1], oracle[1], peer[1], "s")
    expected = cascade.merge_state(*pair)
    mask = torch.arange(case.n, device=device) % 3 != 1
    for rows in (None, mask):
        v_new, s_new = v[:, 0].clone(), s[:, 0].clone()
        cascade.merge_state_in_place(v_new, s_new, pair[2], pair[3], rows)
        keep = torch.zeros_like(mask) if rows is None else ~rows
        assert torch.equal(v_new[~keep], expected[0][~keep])
        assert torch.equal(s_new[~keep], expected[1][~keep])
        assert torch.equal(v_new[keep].nan_to_num(7.0), v[:, 0][keep].nan_to_num(7.0))
        assert torch.equal(s_new[keep], s[:, 0][keep])


def check_empty_states(device: str) -> None:
    """Empty with empty is empty; empty with another state is that state, bit for bit; none at all is empty."""
    v = randn(3, 2, 64, dtype=torch.float16, device=device)
    v[0, 0, :2] = torch.tensor([-0.0, 65504.0])
    s = torch.tensor([[0.0, -1e4], [1e4, 3.5], [-torch.inf, -torch.inf]], device=device)
    v[2] = 0.0
    nothing = torch.full_like(v, torch.nan), torch.full_like(s, -torch.inf)
    for got in (
        cascade.merge_state(v, s, *nothing),
        cascade.merge_state(*nothing, v, s),
        cascade.merge_states(v[:, None], s[:, None]),
        cascade.merge_states(*(torch.stack(x, 1) for x in zip(nothing, (v, s), nothing, strict=True))),
    ):
        assert torch.equal(got[0], v)
        assert torch.equal(got[1], s)
    assert torch.equal(cascade.merge_state(v, s, *nothing)[0].view(torch.int16), v.view(torch.int16))
    none = cascade.merge_states(v[:, None][:, :0], s[:, None][:, :0])
    assert torch.equal(none[0], torch.zeros_like(v))
    assert torch.equal(none[1], nothing[1])


def check_any_split_gives_the_whole(device: str) -> None:
    """Logits cut into 2 to 8 parts, each attended alone, merge into attention over all of them."""
    logits, values = (
        (randn(5, 64, dtype=torch.float32, seed=1) * 8).double(),
        randn(64, 32, dtype=torch.float32, seed=2).double(),
    )
    log2e = torch.tensor(2.0).log().reciprocal()
    whole = torch.softmax(logits, -1) @ values, logits.logsumexp(-1) * log2e
    for parts in range(2, 9):
        states = [
            (torch.softmax(part, -1) @ values[where], part.logsumexp(-1) * log2e)
            for part, where in zip(logits.tensor_split(parts, -1), torch.arange(64).tensor_split(parts), strict=True)
        ]
        v, s = (torch.stack(x, 1)[:, :, None].float().to(device) for x in zip(*states, strict=True))
        got = cascade.merge_states(v, s)
        torch.testing.assert_close(got[0][:, 0].cpu().double(), whole[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1][:, 0].cpu().double(), whole[1], rtol=1e-6, atol=1e-5)
