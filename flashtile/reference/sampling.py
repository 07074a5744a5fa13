"""Sampling by definition: random numbers, filters, draws. Loops over rows and tokens, Python integers and fp64.

One law holds for every sampler but that of top-p alone: its filter gives a distribution, one uniform number u in [0, 1)
is drawn for the row, and the token is the first one, in order of ids, at which the cumulative distribution exceeds u. A
filtered sampler therefore draws the token that `sampling_from_probs` draws from the filter's renormalised
probabilities. Top-p alone draws from the same distribution by rejection, with more numbers: `top_p_token`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WHOLE_ROW_DRAWS = 4  # of `top_p_token`
_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words from a 128-bit counter and a 64-bit key: Philox4x32 with 10 rounds (Random123, SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, offset: int, stream: int, draw: int = 0) -> float:
    """The number in [0, 1), a multiple of 2**-53, of a seed and offset (64 bits), a stream and a draw (32 bits).

    The stream is the output row under a seed shared by the batch, and 0 under a seed of the row's own. The draw counts
    the numbers that one row needs: always 0, but for speculative sampling and top-p alone.
    """
    words = philox((offset & _WORD, offset >> 32 & _WORD, stream, draw), (seed & _WORD, seed >> 32 & _WORD))
    return ((words[0] << 21) + (words[1] >> 11)) * 2.0**-53


def softmax(logits: Tensor, temperature: Tensor | float | None = None) -> Tensor:
    """exp(logits / temperature), normalised over the last dimension; a row of -inf alone gives zeros. [rows, vocab]."""
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1).to(logits.dtype)
    scaled = logits if temperature is None else logits / temperature
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def top_k_keep(x: Tensor, k: int) -> Tensor:
    """Which entries of the row x [vocab] have fewer than k greater ones: the k largest, and all ties of the k-th."""
    ordered = x.sort(descending=True).values
    return x >= ordered[min(k, len(x)) - 1]


def top_p_keep(probs: Tensor, top_p: float) -> Tensor:
    """Which entries of the row probs [vocab] are preceded by less than top_p of the row's mass in greater entries.

    So the entry that crosses top_p is kept, with its ties, and the largest one always is.
    """
    if top_p >= 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ordered = probs.double().sort(descending=True).values
    before = ordered.cumsum(0) - ordered
    kept = max(int((before < top_p * ordered.sum()).sum()), 1)
    return probs.double() >= ordered[kept - 1]


def min_p_keep(probs: Tensor, min_p: float) -> Tensor:
    """Which entries of the row probs [vocab] are at least min_p times the largest."""
    return probs >= min_p * probs.max()


def normalise(weights: Tensor) -> Tensor:
    """The row, divided by its sum, in fp64."""
    return weights.double() / weights.double().sum()


def filtered(
    probs: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    joint: bool = False,
) -> Tensor:
    """The distribution, [vocab] in fp64, that a row is drawn from under filters.

    top_k and top_p together: top_p is judged on the renormalised top-k (joint=False), or on the row itself.
    """
    keep = torch.ones_like(probs, dtype=torch.bool)
    if top_k is not None:
        keep &= top_k_keep(probs, top_k)
    if top_p is not None:
        keep &= top_p_keep(probs if joint else probs * keep, top_p)
    if min_p is not None:
        keep &= min_p_keep(probs, min_p)
    return normalise(probs * keep)


def pick(probs: Tensor, u: float) -> int:
    """The first id at which the cumulative distribution of the row probs [vocab] exceeds u; 0 for a row that is no
    distribution (NaN, infinity, or nothing above zero)."""
    total = float(probs.double().sum())
    if not 0 < total < float("inf"):
        return 0
    cumulative = probs.double().cumsum(0)
    above = (cumulative > u * total).nonzero()
    return int(above[0] if len(above) else probs.nonzero()[-1])  # rounding: the last id that can be drawn


def top_p_token(probs: Tensor, top_p: float, uniform: Callable[[int], float]) -> int:
    """The token of the row probs [vocab] under top-p alone, by rejection; uniform: the number of a draw.

    Candidates are drawn until one is kept by top_p. The first `WHOLE_ROW_DRAWS` are drawn from the whole row, whatever
    becomes of those before them, so that all can be judged at once; later ones from the entries greater than all those
    refused. Each of these holds the nucleus whole, so that what is kept is distributed as the renormalised nucleus. The
    largest entry is always kept, so there is an end.
    """
    if not 0 < float(probs.double().sum()) < float("inf"):
        return 0
    keep, refused, draw = top_p_keep(probs, top_p), 0.0, 0
    while True:
        token = pick(probs if draw < WHOLE_ROW_DRAWS else probs * (probs > refused), uniform(draw))
        if keep[token]:
            return token
        refused = max(refused, float(probs[token]))
        draw += 1


def top_k(x: Tensor, k: int, prefer_large_ids: bool = False) -> list[int]:
    """Ids of the k largest entries of the row x, largest first; of equal ones the smaller (or larger) id is first."""
    sign = -1 if prefer_large_ids else 1
    return sorted(range(len(x)), key=lambda i: (-float(x[i]), sign * i))[:k]


def chain_speculative_sampling(
    draft_probs: Tensor, draft_token_ids: Sequence[int], target_probs: Tensor, uniforms: Sequence[float]
) -> tuple[list[int], int, int]:
    """One request of speculative sampling (arXiv:2302.01318).

    Args:
        draft_probs: [n, vocab]; target_probs: [n + 1, vocab]; draft_token_ids: n proposals.
        uniforms: n for the tests, then one for the last token.

    Returns:
        The tokens, padded with -1 to n + 1; how many proposals pass their own test; how many are emitted.
    """
    n = len(draft_token_ids)
    passed = [
        uniforms[i] * float(draft_probs[i, token]) < float(target_probs[i, token])
        for i, token in enumerate(draft_token_ids)
    ]
    emitted = passed.index(False) if False in passed else n
    rest = target_probs[emitted].double()
    if emitted < n:
        residual = (rest - draft_probs[emitted].double()).clamp_min(0)
        rest = residual if residual.sum() > 0 else rest
    tokens = [*draft_token_ids[:emitted], pick(rest, uniforms[n])]
    return tokens + [-1] * (n + 1 - len(tokens)), sum(passed), emitted
