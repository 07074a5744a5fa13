"""The paged cache on the CPU: against the definition, laws, graphs, errors."""

import pytest
import torch

from flashtile import page
from flashtile.testing import cases_page as cases


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_append(case: cases.PageCase) -> None:
    cases.check_append(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_append_mla(case: cases.PageCase) -> None:
    cases.check_append_mla(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_batch_indices_positions(case: cases.PageCase) -> None:
    cases.check_batch_indices_positions(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_seq_lens(case: cases.PageCase) -> None:
    cases.check_seq_lens(case, "cpu")


def test_page_size_one_without_the_page_dimension() -> None:
    short, full = torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 1, 8)
    key, value, index = torch.randn(2, 1, 8), torch.randn(2, 1, 8), torch.tensor([0, 0])
    for cache in (short, full):
        table = torch.tensor([3, 1]), torch.tensor([0, 2]), torch.tensor([1])
        page.append_paged_kv_cache(key, value, index, torch.tensor([0, 1]), cache, *table)
    assert torch.equal(short, full[:, :, 0])
    assert torch.equal(short[[3, 1], 0], key)


def test_compiles_as_one_graph() -> None:
    def step(indptr: torch.Tensor, pages: torch.Tensor, key: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        last_page_len = torch.tensor([2, 1])
        lens = page.get_seq_lens(indptr, last_page_len, 2)
        batch_indices, positions = page.get_batch_indices_positions(torch.tensor([0, 3, 4]), lens, 4)
        page.append_paged_kv_cache(key, key, batch_indices, positions, cache, pages, indptr, last_page_len)
        return cache + 1

    args = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 3]), torch.randn(4, 1, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args, torch.zeros(4, 2, 2, 1, 8)), step(*args, torch.zeros(4, 2, 2, 1, 8)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_layout": "DHN"}, KeyError, "Invalid kv_layout 'DHN'"),
        ({"paged_kv_cache": [1, 2]}, KeyError, "Unrecognized paged_kv_cache type list"),
        ({"paged_kv_cache": torch.zeros(4, 3)}, ValueError, "must be 4D or 5D"),
        ({"append_key": torch.ones(3, 8)}, ValueError, r"append_key: expected shape \[nnz, 1, 8\], got \[3, 8\]"),
        (
            {"append_value": torch.ones(2, 1, 8)},
            ValueError,
            r"append_value: expected shape \[3, 1, 8\], got \[2, 1, 8\]",
        ),
        ({"append_value": torch.ones(3, 1, 8).half()}, ValueError, "append_value: expected the dtype of append_key"),
        (
            {"append_key": torch.ones(3, 8, 2).mT[:, :1]},
            ValueError,
            "append_key: the last dimension must be contiguous",
        ),
        ({"positions": torch.tensor([0, 1])}, ValueError, r"positions: expected shape \[3\], got \[2\]"),
        (
            {"positions": torch.tensor([0, -1, 0])},
            ValueError,
            r"positions: expected 0 to 2 in request 0, .*-1 at token 1",
        ),
        (
            {"positions": torch.tensor([0, 1, 1])},
            ValueError,
            r"positions: expected 0 to 0 in request 1, .*1 at token 2",
        ),
        (
            {"batch_indices": torch.tensor([0, 0, 2])},
            ValueError,
            "batch_indices: expected values from 0 to 1, got 2 at token 2",
        ),
        (
            {"kv_indices": torch.tensor([0, 4, 2])},
            ValueError,
            r"kv_indices: expected page ids from 0 to 3, got 4 in request 0",
        ),
        (
            {"kv_indices": torch.tensor([0, 1])},
            ValueError,
            r"kv_indices: expected at least kv_indptr\[-1\] = 3 page ids, got 2",
        ),
        ({"kv_indptr": torch.tensor([0, 3])}, ValueError, r"kv_last_page_len: expected shape \[1\], got \[2\]"),
        (
            {"kv_last_page_len": torch.tensor([3, 1])},
            ValueError,
            r"kv_last_page_len: expected 1 to 2 .* request 0, got 3",
        ),
        (
            {"kv_last_page_len": torch.tensor([1, 0])},
            ValueError,
            r"kv_last_page_len: expected 1 to 2 .* request 1, got 0",
        ),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    args: dict[str, object] = {
        "append_key": torch.ones(3, 1, 8),
        "append_value": torch.ones(3, 1, 8),
        "batch_indices": torch.tensor([0, 0, 1]),
        "positions": torch.tensor([1, 2, 0]),
        "paged_kv_cache": torch.zeros(4, 2, 2, 1, 8),
        "kv_indices": torch.tensor([0, 1, 2]),
        "kv_indptr": torch.tensor([0, 2, 3]),
        "kv_last_page_len": torch.tensor([1, 1]),
    }
    with pytest.raises(error, match=message):
        page.append_paged_kv_cache(**(args | change))  # type: ignore[arg-type]


def test_batch_indices_errors() -> None:
    with pytest.raises(ValueError, match=r"nnz: expected append_indptr\[-1\] = 3, got 4"):
        page.get_batch_indices_positions(torch.tensor([0, 3]), torch.tensor([5]), 4)
    with pytest.raises(ValueError, match=r"seq_lens: expected shape \[1\], got \[2\]"):
        page.get_batch_indices_positions(torch.tensor([0, 3]), torch.tensor([5, 5]), 3)
    with pytest.raises(ValueError, match="page_size: expected at least 1 token, got 0"):
        page.get_seq_lens(torch.tensor([0, 3]), torch.tensor([1]), 0)
