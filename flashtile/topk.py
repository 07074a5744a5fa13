"""The k largest entries of each row, exactly k of them, and the forms that sparse attention builds on it.

Defined by reference/sampling.py. The threshold is searched over all entries. Results are always deterministic, so
`deterministic=False` changes nothing, and all launches are fixed, so `dsa_graph_safe=False` does not either."""

from enum import IntEnum

import torch
from torch import Tensor

from flashtile import checks, library

_top_k = library.launcher(
    "sampling",
    "top_k(Tensor(a!) ids, Tensor input, Tensor? starts, Tensor? lengths, bool prefer_large_ids) -> ()",
)


class TopKTieBreak(IntEnum):
    """Which of several equal entries at the threshold are taken. NONE: any, here as SMALL."""

    NONE = 0
    SMALL = 1
    LARGE = 2


def top_k(
    input: Tensor,
    k: int,
    sorted: bool = False,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and their ids. NaN counts as the largest.

    Args:
        input: [num_rows, row_len], fp16, bf16 or fp32.
        k: 1..row_len.
        sorted: by falling value (equal ones as tie_break says); otherwise by rising id.
        tie_break: a TopKTieBreak: which of equal entries to take, small ids or large ones.
        deterministic, dsa_graph_safe: results are deterministic and launches fixed either way.

    Returns:
        values [num_rows, k], of input's dtype; ids [num_rows, k], int64.

    Raises:
        ValueError: a shape, dtype, stride, k or tie_break that does not fit.
    """
    _check_scores("input", input)
    if not 1 <= k <= input.shape[1]:
        raise ValueError(f"k: expected 1 to the row length {input.shape[1]}, got {k}")
    ids = torch.empty((len(input), k), dtype=torch.int32, device=input.device)
    large = _prefers_large_ids(tie_break)
    _top_k(ids, input, None, None, large)
    index = ids.long()
    values = input.gather(1, index)
    if not sorted:
        return values, index
    if large:  # a stable sort keeps equal values in the order they have
        values, index = values.flip(1), index.flip(1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def top_k_page_table_transform(
    input: Tensor,
    src_page_table: Tensor,
    lengths: Tensor,
    k: int,
    row_to_batch: Tensor | None = None,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: Tensor | None = None,
    page_table_row_starts: Tensor | None = None,
    *,
    page_size: int = 1,
    out: Tensor | None = None,
    out_raw_indices: Tensor | None = None,
) -> Tensor:
    """The cache slots of the k best-scored tokens of each row, by rising token position.

    Args:
        input: scores [num_rows, max_len], fp16, bf16 or fp32.
        src_page_table: [batch_size, max_pages], int32: the page of each group of page_size tokens.
        lengths: [num_rows]: how many scores of each row count.
        k: entries to select; a row with fewer gives them all.
        row_to_batch: [num_rows]: the row of the page table of each row of scores. Default: its own index.
        row_starts: [num_rows]: the column of a row's first score; positions count from there. Default: 0.
        page_table_row_starts: [num_rows]: the token, in the row of the page table, of position 0. Default: row_starts.
        page_size: tokens per page.
        out: where to write, [num_rows, k] int32. Default: a new tensor.
        out_raw_indices: [num_rows, k] int32, written with the positions themselves, which count from row_starts.
        deterministic, tie_break, dsa_graph_safe: as for `top_k`.

    Returns:
        [num_rows, k], int32: page * page_size + token in page; -1 past a row's last entry.
    """
    _check_scores("input", input)
    device, num_rows = input.device, len(input)
    checks.check_shape("src_page_table", src_page_table, ("batch_size", "max_pages"))
    checks.check_dtype("src_page_table", src_page_table, checks.INDEX_DTYPES)
    checks.check_device("src_page_table", src_page_table, device)
    if page_size < 1:
        raise ValueError(f"page_size: expected 1 or more, got {page_size}")
    starts = _row_tensor("row_starts", row_starts, num_rows, device)
    first = _row_tensor("page_table_row_starts", page_table_row_starts, num_rows, device)
    tables = _row_tensor("row_to_batch", row_to_batch, num_rows, device)
    selected = _check_ids("out_raw_indices", out_raw_indices, num_rows, k, device)
    _select(input, selected, _index_rows("lengths", lengths, num_rows, device), starts, tie_break)
    ids = selected.long()
    first = starts if first is None else first
    tokens = ids if first is None else ids + first[:, None]
    rows = torch.arange(num_rows, device=device) if tables is None else tables.long()
    pages = src_page_table[rows[:, None], (tokens // page_size).masked_fill(ids < 0, 0)]
    slots = (pages * page_size + tokens % page_size).masked_fill(ids < 0, -1)
    return _check_ids("out", out, num_rows, k, device).copy_(slots)


def top_k_ragged_transform(
    input: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    k: int,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: Tensor | None = None,
) -> Tensor:
    """The positions, in a ragged cache, of the k best-scored tokens of each row, by rising position.

    Args:
        input: scores [num_rows, max_len], fp16, bf16 or fp32.
        offsets: [num_rows]: added to the positions of each row.
        lengths, k, row_starts: as for `top_k_page_table_transform`.
        deterministic, tie_break, dsa_graph_safe: as for `top_k`.

    Returns:
        [num_rows, k], int32; -1 past a row's last entry.
    """
    _check_scores("input", input)
    device, num_rows = input.device, len(input)
    shift = _index_rows("offsets", offsets, num_rows, device)
    starts = _row_tensor("row_starts", row_starts, num_rows, device)
    ids = _check_ids("out", None, num_rows, k, device)
    _select(input, ids, _index_rows("lengths", lengths, num_rows, device), starts, tie_break)
    return torch.where(ids < 0, -1, ids + shift[:, None]).int()


def top_k_varlen(
    logits: Tensor,
    seq_lens: Tensor,
    top_k: int,
    pre_idx: Tensor | None = None,
    compress_ratio: int = 1,
    next_n: int = 1,
    return_values: bool = False,
    out_indices: Tensor | None = None,
    out_values: Tensor | None = None,
    backend: str = "auto",
    load_balance: bool = True,
    workspace: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The top_k best-scored positions of each row, where next_n rows belong to a request (speculative decoding).

    Row r of a request counts (seq_len - next_n + r + 1) // compress_ratio scores: each token sees one more than
    the one before it.

    Args:
        logits: scores [batch_size * next_n, max_len], fp16, bf16 or fp32.
        seq_lens: [batch_size], tokens in each request's cache, with those of this step.
        top_k: entries to select; a row with fewer gives them all.
        pre_idx: a guess of the result. Results do not depend on it, and no kernel here needs one.
        compress_ratio: tokens per score.
        next_n: rows per request.
        return_values: also give the scores selected.
        out_indices, out_values: where to write: [batch_size * next_n, top_k], int32; and of the dtype of logits.
        backend: "auto" (others are not implemented).
        load_balance, workspace: how upstream kernels share their work; nothing here depends on them.

    Returns:
        positions int32, by rising position, -1 past a row's last entry; the scores, -inf there, or None.
    """
    _check_scores("logits", logits)
    if backend != "auto":
        raise checks.not_implemented(f"backend={backend!r}", "use 'auto'")
    if min(next_n, compress_ratio) < 1 or len(logits) % max(next_n, 1):
        raise ValueError(
            f"next_n: expected a divisor of {len(logits)} rows, and compress_ratio 1 or more, "
            f"got {next_n} and {compress_ratio}"
        )
    lens = _index_rows("seq_lens", seq_lens, len(logits) // next_n, logits.device)
    place = torch.arange(next_n, device=logits.device)
    lengths = ((lens[:, None] - next_n + place + 1) // compress_ratio).clamp(0, logits.shape[1]).flatten().int()
    ids = _check_ids("out_indices", out_indices, len(logits), top_k, logits.device)
    _select(logits, ids, lengths, None, TopKTieBreak.NONE)
    if not return_values and out_values is None:
        return ids, None
    values = logits.gather(1, ids.long().clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    if out_values is not None:
        checks.check_like("out_values", out_values, "the selected logits", values)
        values = out_values.copy_(values)
    return ids, values


def _select(scores: Tensor, ids: Tensor, lengths: Tensor | None, starts: Tensor | None, tie_break: int) -> None:
    """ids [num_rows, k] int32 = positions from `starts`, rising, -1 where a row has no more."""
    _top_k(ids, scores, starts, lengths, _prefers_large_ids(tie_break))


def _check_ids(name: str, ids: Tensor | None, num_rows: int, k: int, device: torch.device) -> Tensor:
    """`ids`, checked, or a new tensor if it is None: [num_rows, k] int32."""
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}")
    if ids is None:
        return torch.empty((num_rows, k), dtype=torch.int32, device=device)
    checks.check_shape(name, ids, (num_rows, k))
    checks.check_dtype(name, ids, (torch.int32,))
    checks.check_device(name, ids, device)
    checks.check_inner_contiguous(name, ids)
    return ids


def _check_scores(name: str, x: Tensor) -> None:
    checks.check_shape(name, x, ("num_rows", "row_len"))
    checks.check_dtype(name, x, checks.FLOAT_DTYPES)
    checks.check_inner_contiguous(name, x)
    if not 0 < x.shape[1] < 2**31:
        raise ValueError(f"{name}: expected a row_len from 1 to 2**31 - 1, got shape {list(x.shape)}")


def _prefers_large_ids(tie_break: int) -> bool:
    try:
        return TopKTieBreak(tie_break) == TopKTieBreak.LARGE
    except ValueError:
        raise ValueError(f"tie_break: expected a TopKTieBreak (0, 1 or 2), got {tie_break!r}") from None


def _row_tensor(name: str, x: Tensor | None, num_rows: int, device: torch.device) -> Tensor | None:
    return None if x is None else _index_rows(name, x, num_rows, device)


def _index_rows(name: str, x: Tensor, num_rows: int, device: torch.device) -> Tensor:
    x = checks.index_tensor(name, x, device)
    checks.check_shape(name, x, (num_rows,))
    return x.int()
