"""Cases of the paged cache, and what must hold for each: on the CPU, in Triton's interpreter and on a GPU."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashtile import page
from flashtile.reference import page as reference
from flashtile.testing.tensors import name, poison, randn


@dataclass(frozen=True)
class PageCase:
    """kv_lens: tokens of each request, new ones counted; new_lens: how many of them are new.

    sparse: only every other new token is written, in random order.
    """

    kv_lens: tuple[int, ...]
    new_lens: tuple[int, ...]
    page_size: int = 16
    num_kv_heads: int = 2
    head_dim: int = 64
    kv_layout: str = "NHD"
    one_tensor: bool = False
    sparse: bool = False
    dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        lens = ",".join(f"{new}of{length}" for new, length in zip(self.new_lens, self.kv_lens, strict=True))
        words = [f"new={lens} page={self.page_size} heads={self.num_kv_heads} dim={self.head_dim} {self.kv_layout}"]
        words += [word for word, on in (("one-tensor", self.one_tensor), ("sparse", self.sparse)) if on]
        return " ".join([*words, name(self.dtype)])


@dataclass(frozen=True)
class PageTable:
    """Index tensors of a batch, whose pages are scattered over a cache with pages to spare, and of its new tokens."""

    kv_indptr: Tensor
    kv_indices: Tensor
    kv_last_page_len: Tensor
    batch_indices: Tensor
    positions: Tensor
    num_pages: int

    def wide(self) -> "PageTable":
        """The same as int64 tensors of stride 2."""
        names = ("kv_indptr", "kv_indices", "kv_last_page_len", "batch_indices", "positions")
        tensors = {name: getattr(self, name).long() for name in names}
        wide: dict[str, Any] = {name: torch.stack([x, x], 1)[:, 0] for name, x in tensors.items()}
        return replace(self, **wide)

    def slots(self, page_size: int) -> tuple[Tensor, Tensor]:
        """Page and slot of each new token, by definition, on the CPU."""
        tensors = (self.batch_indices, self.positions, self.kv_indices, self.kv_indptr)
        batch_indices, positions, kv_indices, kv_indptr = (x.cpu() for x in tensors)
        return reference.slots(batch_indices, positions, kv_indices, kv_indptr, page_size)


SMALL_CASES = (
    PageCase((5, 0, 17), (5, 0, 2)),
    PageCase((3, 4), (1, 1), page_size=1, num_kv_heads=3, head_dim=40, kv_layout="HND"),
    PageCase((40, 33), (23, 9), page_size=5, sparse=True, one_tensor=True),
    PageCase((9,), (0,)),
)
CASES = SMALL_CASES + tuple(
    PageCase((1, 64, 0, 200, 17), (1, 3, 0, 111, 17), page_size, heads, dim, layout, one_tensor, sparse, dtype)
    for page_size, heads, dim, one_tensor, sparse, dtype in (
        (1, 8, 128, False, True, torch.bfloat16),
        (16, 3, 64, True, False, torch.float16),
        (17, 1, 96, True, True, torch.float32),
        (256, 2, 72, False, False, torch.bfloat16),
        (16, 2, 64, False, True, torch.float8_e4m3fn),
    )
    for layout in ("NHD", "HND")
)


def page_table(case: PageCase, device: str) -> PageTable:
    """Pages in random order, some owned by nobody."""
    counts = [-(-length // case.page_size) for length in case.kv_lens]
    used = sum(counts)
    lens = zip(case.kv_lens, counts, strict=True)
    last_page_len = torch.tensor([length - (pages - 1) * case.page_size if pages else 0 for length, pages in lens])
    kv_indices = torch.randperm(used + 3, generator=torch.Generator().manual_seed(3))[:used]
    new_indptr = torch.tensor([0, *case.new_lens]).cumsum(0)
    batch_indices, positions = reference.get_batch_indices_positions(new_indptr, torch.tensor(case.kv_lens))
    if case.sparse:
        some = torch.randperm(len(positions), generator=torch.Generator().manual_seed(4))[: len(positions) // 2]
        batch_indices, positions = batch_indices[some], positions[some]
    return PageTable(
        kv_indptr=torch.tensor([0, *counts]).cumsum(0).int().to(device),
        kv_indices=kv_indices.int().to(device),
        kv_last_page_len=last_page_len.int().to(device),
        batch_indices=batch_indices.to(device),
        positions=positions.to(device),
        num_pages=used + 3,
    )


def make_cache(case: PageCase, num_pages: int, device: str) -> tuple[Tensor, Tensor]:
    """Poisoned k and v caches in the case's layout, with gaps between pages."""
    slot = (case.page_size, case.num_kv_heads) if case.kv_layout == "NHD" else (case.num_kv_heads, case.page_size)
    layers = torch.empty(num_pages, 3, 2, *slot, case.head_dim, dtype=torch.float32)
    both = poison(layers).to(case.dtype).to(device)[:, 1]  # one layer of several: pages are far apart
    return both[:, 0], both[:, 1]


def bits(x: Tensor) -> Tensor:
    """As integers, so that NaN compares equal to itself."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def by_token(cache: Tensor, kv_layout: str) -> Tensor:
    """A cache as [num_pages, page_size, num_kv_heads, head_dim], on the CPU."""
    return (cache if kv_layout == "NHD" else cache.transpose(1, 2)).cpu()


def check_append(case: PageCase, device: str) -> None:
    """Addressed slots hold the new rows, every other bit of the cache is as before; int64 and strided indices too."""
    table = page_table(case, device)
    shape = (len(table.positions), case.num_kv_heads, 3 * case.head_dim)
    new = (randn(*shape, seed=5) * 10).to(case.dtype).to(device)
    rows = new[..., : case.head_dim], new[..., -case.head_dim :]
    for t in (table, table.wide()):
        caches = make_cache(case, t.num_pages, device)
        expected = [by_token(x, case.kv_layout).clone() for x in caches]
        for cache, part in zip(expected, rows, strict=True):
            cache[table.slots(case.page_size)] = part.cpu()
        paged = torch.stack(caches, 1) if case.one_tensor else caches
        indices = (t.kv_indices, t.kv_indptr, t.kv_last_page_len)
        page.append_paged_kv_cache(*rows, t.batch_indices, t.positions, paged, *indices, kv_layout=case.kv_layout)
        got = paged.unbind(1) if isinstance(paged, Tensor) else paged
        for cache, want in zip(got, expected, strict=True):
            assert torch.equal(bits(by_token(cache, case.kv_layout)), bits(want))


def check_append_mla(case: PageCase, device: str) -> None:
    """Rows of two latent caches that are slices of one tensor; addressed slots only."""
    table = page_table(case, device)
    dim = 4 * case.head_dim
    flat = replace(case, num_kv_heads=1, head_dim=dim + case.head_dim, kv_layout="NHD")
    both = make_cache(flat, table.num_pages, device)[0][:, :, 0]
    rows = (randn(len(table.positions), flat.head_dim, seed=5) * 10).to(case.dtype).to(device)
    expected = both.cpu().clone()
    expected[table.slots(case.page_size)] = rows.cpu()
    page.append_paged_mla_kv_cache(
        rows[:, :dim], rows[:, dim:], table.batch_indices, table.positions, both[..., :dim], both[..., dim:],
        table.kv_indices, table.kv_indptr, table.kv_last_page_len,
    )  # fmt: skip
    assert torch.equal(bits(both.cpu()), bits(expected))


def check_batch_indices_positions(case: PageCase, device: str) -> None:
    """Equal to the definition; int64 lengths, and buffers of the caller."""
    indptr = torch.tensor([0, *case.new_lens]).cumsum(0)
    seq_lens = torch.tensor(case.kv_lens)
    nnz = int(indptr[-1])
    expected = reference.get_batch_indices_positions(indptr, seq_lens)
    buffers = [torch.full((nnz,), -7, dtype=torch.int32, device=device) for _ in range(2)]
    for dtype in (torch.int32, torch.int64):
        args = (indptr.to(dtype).to(device), seq_lens.to(dtype).to(device), nnz)
        for got in (page.get_batch_indices_positions(*args), page.get_batch_indices_positions(*args, *buffers)):
            assert [x.dtype for x in got] == [torch.int32, torch.int32]
            assert torch.equal(got[0].cpu(), expected[0])
            assert torch.equal(got[1].cpu(), expected[1])


def check_seq_lens(case: PageCase, device: str) -> None:
    """The lengths that the page table was made from."""
    table = page_table(case, device)
    got = page.get_seq_lens(table.kv_indptr, table.kv_last_page_len, case.page_size)
    assert got.dtype == torch.int32
    assert tuple(got.tolist()) == case.kv_lens
