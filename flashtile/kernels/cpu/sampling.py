"""Sampling in PyTorch. Thresholds are found by sorting, tokens by searching the cumulative distribution, in fp64."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import count

import torch
from torch import Tensor

from flashtile.config import WHOLE_ROW_DRAWS

_WORD = 0xFFFFFFFF
_BLOCK_ELEMENTS = 2**22  # probabilities handled at once: bounds the memory of fp64 copies
_FIRST_CANDIDATES = 1024  # the largest entries, tried before a whole row is sorted


def sample_from_probs(
    ids: Tensor,
    valid: Tensor,
    probs: Tensor,
    indices: Tensor | None,
    top_k: Tensor | None,
    top_k_value: int,
    top_p: Tensor | None,
    top_p_value: float,
    min_p: Tensor | None,
    min_p_value: float,
    joint: bool,
    seed: Tensor | None,
    seed_value: int,
    offset: Tensor | None,
    offset_value: int,
) -> None:
    """ids[i] from row indices[i] of probs [rows, vocab] under its filters; valid[i]: that row is a distribution."""
    draws = cache(lambda draw: uniforms(len(ids), seed, seed_value, offset, offset_value, draw))
    per_output = any(x is not None for x in (top_k, top_p, min_p))
    top_p_alone = top_k is None and top_k_value == 0 and min_p is None and min_p_value == 0
    for rows, outputs in _groups(ids, probs, indices, per_output):
        x = probs[rows].float()
        keep_from = _threshold(x, _part(top_k, outputs, top_k_value), _part(top_p, outputs, top_p_value), joint)
        if top_p_alone:  # or no filter: then the first candidate is accepted
            _reject(ids, valid, x, keep_from, outputs, draws)
            continue
        keep_from = keep_from.maximum(_part(min_p, outputs, min_p_value).reshape(-1, 1) * x.amax(-1, keepdim=True))
        _pick(ids, valid, torch.where(x >= keep_from, x, 0), outputs, draws(0))


def sample_from_logits(
    ids: Tensor,
    valid: Tensor,
    logits: Tensor,
    indices: Tensor | None,
    seed: Tensor | None,
    seed_value: int,
    offset: Tensor | None,
    offset_value: int,
) -> None:
    """ids[i] from the softmax of row indices[i] of logits [rows, vocab]; valid[i]: some logit of it is above -inf."""
    u = uniforms(len(ids), seed, seed_value, offset, offset_value)
    for rows, outputs in _groups(ids, logits, indices, per_output=False):
        _pick(ids, valid, torch.softmax(logits[rows].double(), -1), outputs, u)


def softmax(
    out: Tensor, logits: Tensor, temperature: Tensor | None, temperature_value: float, enable_pdl: bool | None
) -> None:
    """out = softmax(logits / temperature) [rows, vocab], fp32; zeros for a row of -inf alone."""
    scaled = logits.float() / (temperature_value if temperature is None else temperature[:, None])
    torch.softmax(scaled, -1, out=out)
    out.masked_fill_((scaled == -torch.inf).all(-1, keepdim=True), 0)


def renorm_probs(
    out: Tensor, probs: Tensor, top_k: Tensor | None, top_k_value: int, top_p: Tensor | None, top_p_value: float
) -> None:
    """out = the probabilities that are kept, relative to their sum [rows, vocab], fp32; NaN in a row that has none."""
    rows = slice(0, len(probs))
    x = probs.float().clamp_min(0)
    keep_from = _threshold(x, _part(top_k, rows, top_k_value), _part(top_p, rows, top_p_value), joint=False)
    kept = torch.where(x < keep_from, 0, x)  # a NaN is kept, and makes the sum NaN
    total = kept.sum(-1, keepdim=True, dtype=torch.float64)
    torch.div(kept, total.masked_fill((total == 0) | total.isinf(), torch.nan), out=out)


def mask_logits(out: Tensor, logits: Tensor, top_k: Tensor | None, top_k_value: int) -> None:
    """out = logits [rows, vocab], fp32, with -inf below the k-th largest of the row."""
    x = logits.float()
    keep_from = _threshold(x, _part(top_k, slice(0, len(x)), top_k_value), torch.ones(1, 1), joint=False)
    out.copy_(x.masked_fill(x < keep_from.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), -torch.inf))


def chain_speculative(
    ids: Tensor,
    accepted: Tensor,
    emitted: Tensor,
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    seed: Tensor | None,
    seed_value: int,
    offset: Tensor | None,
    offset_value: int,
) -> None:
    """ids [batch, n + 1] from proposals [batch, n]; the counters [batch] are added to."""
    batch_size, num_tokens = draft_token_ids.shape
    u = torch.stack(
        [uniforms(batch_size, seed, seed_value, offset, offset_value, draw) for draw in range(num_tokens + 1)], 1
    )
    tokens = draft_token_ids.long()
    p_draft, p_target = (p[:, :num_tokens].gather(2, tokens[:, :, None])[..., 0] for p in (draft_probs, target_probs))
    passed = u[:, :num_tokens] * p_draft < p_target
    end = passed.cumprod(1).sum(1)
    rows = torch.arange(batch_size)
    rest = target_probs[rows, end].float()
    if num_tokens:
        residual = (rest - draft_probs[rows, end.clamp(max=num_tokens - 1)].float()).clamp_min(0)
        use = (end < num_tokens) & (residual.sum(1) > 0)
        rest = torch.where(use[:, None], residual, rest)
    last = torch.empty(batch_size, dtype=torch.int32)
    _pick(last, torch.empty(batch_size, dtype=torch.bool), rest, slice(0, batch_size), u[:, num_tokens])
    place = torch.arange(num_tokens + 1)
    proposals = torch.nn.functional.pad(tokens, (0, 1), value=-1).masked_fill(place > end[:, None], -1)
    ids.copy_(torch.where(place == end[:, None], last[:, None], proposals))
    accepted += passed.sum(1)
    emitted += end


def uniforms(
    batch_size: int, seed: Tensor | None, seed_value: int, offset: Tensor | None, offset_value: int, draw: int = 0
) -> Tensor:
    """[batch_size] fp64 in [0, 1): `uniform` of reference/sampling.py for each output row."""
    key = torch.full((1,), seed_value) if seed is None else seed
    begin = torch.full((1,), offset_value) if offset is None else offset
    stream = torch.arange(batch_size) if len(key) == 1 else torch.zeros(1, dtype=torch.int64)
    c0, c1, c2, c3 = begin & _WORD, begin >> 32 & _WORD, stream, torch.full((1,), draw)
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(10):  # Philox4x32; products wrap around in int64 and lose nothing
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return ((c0 << 21) + (c1 >> 11)).double().mul_(2.0**-53).expand(batch_size)


def _part(x: Tensor | None, outputs: Tensor, value: float) -> Tensor:
    """The parameter of these outputs, as a column to compare rows with."""
    return torch.tensor([[value]]) if x is None else x[outputs, None]


def _groups(
    ids: Tensor, x: Tensor, indices: Tensor | None, per_output: bool
) -> Iterator[tuple[Tensor | slice, Tensor | slice]]:
    """Rows of x to be handled together, and the outputs drawn from them: one from each row, or all from one row."""
    num_outputs, step = len(ids), max(1, _BLOCK_ELEMENTS // x.shape[1])
    if indices is not None and not per_output and num_outputs > 4 * len(x):
        order = indices.argsort()
        for row, outputs in enumerate(order.split(indices.bincount(minlength=len(x)).tolist())):
            if len(outputs):
                yield slice(row, row + 1), outputs
        return
    for begin in range(0, num_outputs, step):
        outputs = slice(begin, min(begin + step, num_outputs))
        yield (outputs if indices is None else indices[outputs]), outputs


def _threshold(x: Tensor, top_k: Tensor, top_p: Tensor, joint: bool) -> Tensor:
    """[rows, 1]: the smallest entry that top_k and top_p keep in each row of x [rows, vocab]; -inf where they keep all.

    top_k [rows or 1, 1] (0: off) and top_p [rows or 1, 1] (1: off). Only the largest entries are sorted, if they do.
    """
    vocab_size = x.shape[1]
    k = top_k.clamp(max=vocab_size).masked_fill(top_k <= 0, vocab_size).long()
    use_k, use_p = bool((k < vocab_size).any()), bool((top_p < 1).any())
    keep_from = torch.full((len(x), 1), -torch.inf)
    if not use_k and not use_p:
        return keep_from
    size = int(k.max()) if use_k else min(_FIRST_CANDIDATES, vocab_size)
    largest = _largest(x, size)
    if use_k:
        kth = largest.gather(1, (k - 1).expand(len(x), 1))
        keep_from = torch.where(k < vocab_size, kth, keep_from)
    if not use_p:
        return keep_from
    total = (x if joint else torch.where(x >= keep_from, x, 0)).sum(-1, keepdim=True, dtype=torch.float64)
    enough = top_p.double() * total
    mass = largest.cumsum(-1, dtype=torch.float64)
    if not use_k and bool((mass[:, -1:] < enough).any()):
        largest = _largest(x, vocab_size)
        mass = largest.cumsum(-1, dtype=torch.float64)
    kept = (mass - largest < enough).sum(-1, keepdim=True).clamp(min=1)  # each is preceded by less than enough
    crossing = torch.where(top_p < 1, largest.gather(1, kept - 1), -torch.inf)
    return keep_from.maximum(crossing)


def _largest(x: Tensor, size: int) -> Tensor:
    """The `size` largest entries of each row, in falling order."""
    if 8 * size > x.shape[1]:
        return x.sort(-1, descending=True).values[:, :size]
    return x.topk(size, -1).values


def _pick(ids: Tensor, valid: Tensor, weights: Tensor, outputs: Tensor | slice, u: Tensor) -> None:
    """ids[outputs] = the first entry at which the cumulative weights of its row exceed u times their sum.

    weights [rows, vocab]: a row for each output, or one for all of them.
    """
    cumulative = weights.clamp_min(0).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    good = (total > 0) & total.isfinite()
    targets = u[outputs].reshape(len(weights), -1) * total
    found = torch.searchsorted(cumulative, targets, right=True)
    last = torch.searchsorted(cumulative, total)  # the last id with a weight, should rounding lift a target to the sum
    ids[outputs] = torch.where(good, found.minimum(last), 0).flatten().to(ids.dtype)
    valid[outputs] = good.expand_as(found).flatten()


def _reject(
    ids: Tensor, valid: Tensor, x: Tensor, keep_from: Tensor, outputs: Tensor | slice, draws: Callable[[int], Tensor]
) -> None:
    """ids[outputs] = `top_p_token` of reference/sampling.py for x [rows, vocab], which keeps what is at least keep_from
    [rows, 1]. draws: the numbers of all outputs [batch_size] for a draw. Rows as for `_pick`."""
    pending = torch.arange(len(ids))[outputs]
    low = torch.zeros(len(pending))  # the greatest entry refused
    for draw in count():
        if draw < WHOLE_ROW_DRAWS:
            _pick(ids, valid, x, pending, draws(draw))
        elif len(x) == 1:  # outputs of one row that have refused the same: together
            values, group = low.unique(return_inverse=True)
            parts = group.argsort().split(group.bincount().tolist())
            for value, part in zip(values, parts, strict=True):
                _pick(ids, valid, torch.where(x > value, x, 0), pending[part], draws(draw))
        else:
            _pick(ids, valid, torch.where(x > low[:, None], x, 0), pending, draws(draw))
        value = x.expand(len(pending), -1).gather(1, ids[pending, None].long())
        refused = (valid[pending, None] & (value < keep_from)).flatten()
        if not refused.any():
            return
        pending, low = pending[refused], low.maximum(value.flatten())[refused]
        if len(x) > 1:
            x, keep_from = x[refused], keep_from[refused]


def top_k(ids: Tensor, input: Tensor, starts: Tensor | None, lengths: Tensor | None, prefer_large_ids: bool) -> None:
    """ids [rows, k]: the k largest of input[r, start : start + length], as rising positions from start; then -1."""
    num_rows, k = ids.shape
    position = torch.arange(input.shape[1]) - (torch.zeros(num_rows, 1) if starts is None else starts[:, None])
    end = input.shape[1] if lengths is None else lengths[:, None]
    inside = (position >= 0) & (position < end)
    x = input.flip(1) if prefer_large_ids else input  # a stable sort takes the first of equal entries
    order = x.float().sort(dim=1, descending=True, stable=True).indices
    if prefer_large_ids:
        order = input.shape[1] - 1 - order
    chosen = inside.gather(1, order)
    chosen &= chosen.cumsum(1) <= k
    keep = torch.zeros_like(inside).scatter_(1, order, chosen)
    found = torch.where(keep, position, torch.inf).sort(1).values[:, :k]
    found = torch.nn.functional.pad(found, (0, k - found.shape[1]), value=torch.inf)
    ids.copy_(found.masked_fill(found.isinf(), -1))
