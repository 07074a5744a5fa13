"""Sampling: one token from each row of probabilities or logits, filtered by top-k, top-p and min-p.

Defined by reference/sampling.py. Draws are exact, and equal seeds give equal tokens on every backend (up to the
rounding of sums at a boundary). Thresholds are searched over all the vocabulary, and a token is found by inverting the
cumulative distribution at one uniform number: with equal seeds, a filtered draw is the draw from the filter's
renormalised probabilities. Top-p alone (`top_p_sampling_from_probs`; from logits, also under top-k first) has the same
distribution but needs no threshold: candidates are drawn from the row until one lies in the nucleus. With equal seeds,
its token may differ from the one drawn from the renormalised probabilities.

Where numbers come from: see flashtile/randomness.py. `deterministic=False` permits results that differ between runs; no
kernel here makes use of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from flashtile import checks, library
from flashtile.randomness import random_state

_RANDOM = "Tensor? seed, int seed_value, Tensor? offset, int offset_value"
_sample_from_probs = library.launcher(
    "sampling",
    "sample_from_probs(Tensor(a!) ids, Tensor(b!) valid, Tensor probs, Tensor? indices, "
    "Tensor? top_k, int top_k_value, Tensor? top_p, float top_p_value, Tensor? min_p, float min_p_value, "
    f"bool joint, {_RANDOM}) -> ()",
)
_sample_from_logits = library.launcher(
    "sampling",
    f"sample_from_logits(Tensor(a!) ids, Tensor(b!) valid, Tensor logits, Tensor? indices, {_RANDOM}) -> ()",
)
_softmax = library.launcher(
    "sampling",
    "softmax(Tensor(a!) out, Tensor logits, Tensor? temperature, float temperature_value, bool? enable_pdl) -> ()",
)
_renorm_probs = library.launcher(
    "sampling",
    "renorm_probs(Tensor(a!) out, Tensor probs, Tensor? top_k, int top_k_value, Tensor? top_p, float top_p_value) "
    "-> ()",
)
_mask_logits = library.launcher(
    "sampling", "mask_logits(Tensor(a!) out, Tensor logits, Tensor? top_k, int top_k_value) -> ()"
)
_chain_speculative = library.launcher(
    "sampling",
    "chain_speculative(Tensor(a!) ids, Tensor(b!) accepted, Tensor(c!) emitted, Tensor draft_probs, "
    f"Tensor draft_token_ids, Tensor target_probs, {_RANDOM}) -> ()",
)

_FILTER_ORDERS = ("top_k_first", "joint")
_LARGEST = torch.finfo(torch.float32).max
Samples = Any  # ids; with return_valid, (ids, valid)


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token from each row of probabilities.

    Args:
        probs: [batch_size, vocab_size], or [num_rows, vocab_size] with indices; fp16, bf16 or fp32, computed in fp32.
            Rows are taken relative to their sum.
        indices: [batch_size], int32 or int64: the row of probs that each output is drawn from.
        deterministic: equal inputs and seeds give equal results; always so here.
        generator: where seed and offset come from; default: the device's own. Its state advances.
        check_nan: raise if probs holds a NaN, at the price of a host sync.
        seed, offset: the random state itself, instead of a generator. Integers, or tensors of int64 (or uint64), [1] or
            [batch_size]. A row with a seed of its own draws the same token alone and in any batch.
        return_valid: also say which rows were distributions.

    Returns:
        ids [batch_size], of the dtype of indices, int32 without; with return_valid also valid [batch_size], bool. An
        id of probability zero is never drawn. A row with a NaN, an infinity or no positive entry gives id 0, valid
        False, and disturbs no other row.

    Raises:
        ValueError: a shape, dtype, device, stride or random state that does not fit, or a NaN under check_nan.
    """
    return _sample(probs, indices, generator, check_nan, seed, offset, return_valid)


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token from the softmax of each row of logits; -inf is never drawn.

    Args:
        logits: [batch_size, vocab_size], or [num_rows, vocab_size] with indices; fp16, bf16 or fp32.
        The others: as for `sampling_from_probs`.

    Returns:
        As `sampling_from_probs`; a row of -inf alone, or with a NaN or +inf, gives id 0 and valid False.
    """
    _check_rows("logits", logits)
    ids, valid, rows = _outputs(logits, indices)
    _check_nan("logits", logits, check_nan)
    _sample_from_logits(ids, valid, logits, rows, *random_state(generator, seed, offset, len(ids), logits.device))
    return (ids, valid) if return_valid else ids


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw from the most probable tokens whose mass reaches top_p of the row's (nucleus sampling, arXiv:1904.09751).

    Args:
        top_p: in 0..1; a number or [batch_size]. The token that crosses top_p is kept, with those of equal
            probability; 0 keeps the most probable one, 1 keeps all.
        The others: as for `sampling_from_probs`.

    Drawn by rejection (arXiv:2501.01005): the distribution is that of `top_p_renorm_probs`, but not the token that
    `sampling_from_probs` draws from it with the same seed, as it is under the other filters.
    """
    return _sample(probs, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p)


def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw from the top_k most probable tokens of each row, and those as probable as the last of them.

    Args:
        top_k: 1 or more (more than vocab_size keeps all); a number or [batch_size], int32 or int64.
        The others: as for `sampling_from_probs`.
    """
    return _sample(probs, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k)


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw from the tokens at least min_p times as probable as the most probable one (arXiv:2407.01082).

    Args:
        min_p: in 0..1; a number or [batch_size].
        The others: as for `sampling_from_probs`.
    """
    return _sample(probs, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p)


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw under top-k and top-p.

    Args:
        top_k, top_p: as for `top_k_sampling_from_probs` and `top_p_sampling_from_probs`.
        filter_apply_order: "top_k_first": top_p is a share of the mass that top_k left; "joint": of the whole row's.
        The others: as for `sampling_from_probs`.
    """
    joint = _is_joint(filter_apply_order)
    return _sample(
        probs, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k, top_p=top_p, joint=joint
    )


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw from the softmax of the logits under top-k and top-p.

    "top_k_first" judges top_k on the logits: softmax(top_k_mask_logits(logits, top_k)), then top-p. "joint" is
    `top_k_top_p_sampling_from_probs` of softmax(logits). The arguments are those of these functions.
    """
    joint = _is_joint(filter_apply_order)
    _check_rows("logits", logits)
    _check_nan("logits", logits, check_nan)
    per_row = isinstance(top_k, Tensor) and top_k.numel() > 1
    if indices is not None and per_row and not joint:  # top_k belongs to the outputs: give each its own row
        logits, indices = logits[_rows("indices", indices, logits)], None
    probs = softmax(logits if joint else top_k_mask_logits(logits, top_k))
    return _sample(
        probs,
        indices,
        generator,
        False,
        seed,
        offset,
        return_valid,
        top_k=top_k if joint else None,
        top_p=top_p,
        joint=joint,
    )


def softmax(logits: Tensor, temperature: Tensor | float | None = None, enable_pdl: bool | None = None) -> Tensor:
    """softmax(logits / temperature) over the vocabulary, in fp32.

    Args:
        logits: [batch_size, vocab_size], fp16, bf16 or fp32; may hold -inf.
        temperature: above 0; a number or [batch_size]. Default: 1.
        enable_pdl: let kernels of this call overlap (programmatic dependent launch, on sm_90 and later). None: yes.
            Results do not depend on it.

    Returns:
        [batch_size, vocab_size], fp32. A row of -inf alone gives zeros; a row with a NaN or +inf gives NaN.
    """
    _check_rows("logits", logits)
    tensor, value = _parameter("temperature", 1.0 if temperature is None else temperature, len(logits), logits.device)
    if not (0 < value <= _LARGEST if tensor is None else _all(tensor, lambda x: (x > 0) & x.isfinite())):
        raise ValueError(
            f"temperature: expected finite numbers above 0, got {temperature}; for greedy decoding take the argmax"
        )
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _softmax(out, logits, tensor, value, enable_pdl)
    return out


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    """The probabilities that `top_p_sampling_from_probs` draws from: zero where it removes a token, then normalised.

    Args:
        probs: [batch_size, vocab_size], fp16, bf16 or fp32.
        top_p: in 0..1; a number or [batch_size]. 1 keeps all tokens.
        is_deterministic: equal inputs give equal results; always so here.

    Returns:
        [batch_size, vocab_size], fp32. A row that is no distribution gives NaN.
    """
    return _renorm(probs, top_p=top_p)


def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int) -> Tensor:
    """The probabilities that `top_k_sampling_from_probs` draws from; ties of the k-th are kept.

    Args:
        probs: [batch_size, vocab_size], fp16, bf16 or fp32.
        top_k: 1 or more; a number or [batch_size]. vocab_size or more keeps all tokens.

    Returns:
        [batch_size, vocab_size], fp32. A row that is no distribution gives NaN.
    """
    return _renorm(probs, top_k=top_k)


def top_k_mask_logits(logits: Tensor, top_k: Tensor | int) -> Tensor:
    """The logits, with -inf for those below the top_k largest of their row; ties of the k-th are kept.

    Args:
        logits: [batch_size, vocab_size], fp16, bf16 or fp32; may hold -inf.
        top_k: 1 or more; a number or [batch_size]. vocab_size or more keeps all.

    Returns:
        [batch_size, vocab_size], fp32. NaN counts as the largest, and stays.
    """
    _check_rows("logits", logits)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _mask_logits(out, logits, *_top_k(top_k, len(logits), logits.device))
    return out


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check a chain of proposed tokens against the target model's probabilities (arXiv:2302.01318).

    A proposal is accepted if u * p_draft < p_target. At the first one that is not, a token is drawn from the positive
    part of target - draft and the chain ends; if all are accepted, a bonus token is drawn from the last target row.

    Args:
        draft_probs: [batch_size, num_speculative_tokens, vocab_size], fp16, bf16 or fp32.
        draft_token_ids: [batch_size, num_speculative_tokens], int32 or int64, each a token id.
        target_probs: [batch_size, num_speculative_tokens + 1, vocab_size]; dtype of draft_probs.
        maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: [batch_size], int32: counters that are
            added to in place. Default: new ones, from 0.
        deterministic, generator, seed, offset: as for `sampling_from_probs`.

    Returns:
        ids [batch_size, num_speculative_tokens + 1], int32, padded with -1; the number of proposals that pass their own
        test, also past the first that fails; the number of proposals emitted (without the token drawn at the end).

    Raises:
        ValueError: a shape, dtype, device, stride or random state that does not fit, or (host tensors) a token id
            outside the vocabulary.
    """
    checks.check_shape("draft_probs", draft_probs, ("batch_size", "num_speculative_tokens", "vocab_size"))
    batch_size, num_tokens, vocab_size = draft_probs.shape
    checks.check_shape("draft_token_ids", draft_token_ids, (batch_size, num_tokens))
    checks.check_shape("target_probs", target_probs, (batch_size, num_tokens + 1, vocab_size))
    device = draft_probs.device
    checks.check_dtype("draft_probs", draft_probs, checks.FLOAT_DTYPES)
    checks.check_same_dtype("target_probs", target_probs, "draft_probs", draft_probs)
    checks.check_dtype("draft_token_ids", draft_token_ids, checks.INDEX_DTYPES)
    checks.check_device("target_probs", target_probs, device)
    checks.check_inner_contiguous("draft_probs", draft_probs)
    checks.check_inner_contiguous("target_probs", target_probs)
    tokens = draft_token_ids.to(device).contiguous()
    checks.check_between("draft_token_ids", tokens.flatten(), 0, vocab_size)
    counters = [
        _counter("maybe_output_accepted_token_num", maybe_output_accepted_token_num, batch_size, device),
        _counter("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num, batch_size, device),
    ]
    ids = torch.empty((batch_size, num_tokens + 1), dtype=torch.int32, device=device)
    state = random_state(generator, seed, offset, batch_size, device)
    _chain_speculative(ids, *counters, draft_probs, tokens, target_probs, *state)
    return ids, counters[0], counters[1]


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


def _sample(
    probs: Tensor,
    indices: Tensor | None,
    generator: Generator | None,
    check_nan: bool,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    return_valid: bool,
    *,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    joint: bool = False,
) -> Samples:
    _check_rows("probs", probs)
    ids, valid, rows = _outputs(probs, indices)
    filters = (
        *_top_k(top_k, len(ids), probs.device),
        *_share("top_p", top_p, 1.0, len(ids), probs.device),
        *_share("min_p", min_p, 0.0, len(ids), probs.device),
    )
    _check_nan("probs", probs, check_nan)
    state = random_state(generator, seed, offset, len(ids), probs.device)
    _sample_from_probs(ids, valid, probs, rows, *filters, joint, *state)
    return (ids, valid) if return_valid else ids


def _renorm(probs: Tensor, *, top_k: Tensor | int | None = None, top_p: Tensor | float | None = None) -> Tensor:
    _check_rows("probs", probs)
    out = torch.empty(probs.shape, dtype=torch.float32, device=probs.device)
    _renorm_probs(
        out, probs, *_top_k(top_k, len(probs), probs.device), *_share("top_p", top_p, 1.0, len(probs), probs.device)
    )
    return out


def _check_rows(name: str, x: Tensor) -> None:
    checks.check_shape(name, x, ("batch_size", "vocab_size"))
    checks.check_dtype(name, x, checks.FLOAT_DTYPES)
    checks.check_inner_contiguous(name, x)
    if not 0 < x.shape[1] < 2**31:
        raise ValueError(f"{name}: expected a vocab_size from 1 to 2**31 - 1, got shape {list(x.shape)}")


def _check_nan(name: str, x: Tensor, check_nan: bool) -> None:
    if check_nan and bool(torch.isnan(x).any()):
        raise ValueError(f"Input {name} contains NaN.")


def _outputs(x: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """New ids and valid flags for the rows of x, or those that indices name; and the checked indices."""
    if indices is None:
        batch_size, dtype, rows = len(x), torch.int32, None
    else:
        rows = _rows("indices", indices, x)
        batch_size, dtype = len(rows), indices.dtype
    ids = torch.empty(batch_size, dtype=dtype, device=x.device)
    return ids, torch.empty(batch_size, dtype=torch.bool, device=x.device), rows


def _rows(name: str, indices: Tensor, x: Tensor) -> Tensor:
    rows = checks.index_tensor(name, indices, x.device)
    checks.check_between(name, rows, 0, len(x))
    return rows


def _top_k(top_k: Tensor | int | None, batch_size: int, device: torch.device) -> tuple[Tensor | None, int]:
    """(tensor, 0) or (None, value); value 0 is off."""
    if top_k is None:
        return None, 0
    if isinstance(top_k, Tensor):
        checks.check_dtype("top_k", top_k, checks.INDEX_DTYPES)
        tensor = _per_row("top_k", top_k, batch_size, device)
        checks.check_between("top_k", tensor, 1, 2**31)
        return tensor.int(), 0
    if not isinstance(top_k, int):
        raise TypeError(f"top_k: expected an int or a torch.Tensor, got {type(top_k).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k}; to keep all tokens give vocab_size")
    return None, min(top_k, 2**31 - 1)


def _share(
    name: str, x: Tensor | float | None, off: float, batch_size: int, device: torch.device
) -> tuple[Tensor | None, float]:
    """A share of probability in 0..1, as (tensor, off) or (None, value)."""
    tensor, value = _parameter(name, off if x is None else x, batch_size, device)
    if not (0 <= value <= 1 if tensor is None else _all(tensor, lambda x: (x >= 0) & (x <= 1))):
        raise ValueError(f"{name}: expected numbers from 0 to 1, got {x}")
    return tensor, value if tensor is None else off


def _parameter(name: str, x: Tensor | float, batch_size: int, device: torch.device) -> tuple[Tensor | None, float]:
    """(tensor of fp32, 0) or (None, value), which all kernels round to fp32: both forms give the same results."""
    if isinstance(x, Tensor):
        checks.check_dtype(name, x, (*checks.FLOAT_DTYPES, torch.float64))
        return _per_row(name, x, batch_size, device).float(), 0.0
    if not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(x).__name__}")
    return None, x


def _all(x: Tensor, condition: Callable[[Tensor], Tensor]) -> bool:
    """Whether a condition holds for all values; taken for granted where they are not read."""
    return not checks.reads_values(x) or bool(condition(x).all())


def _per_row(name: str, x: Tensor, batch_size: int, device: torch.device) -> Tensor:
    if x.dim() == 0:
        x = x.expand(batch_size)
    checks.check_shape(name, x, (batch_size,))
    return x.to(device).contiguous()


def _counter(name: str, x: Tensor | None, batch_size: int, device: torch.device) -> Tensor:
    if x is None:
        return torch.zeros(batch_size, dtype=torch.int32, device=device)
    checks.check_shape(name, x, (batch_size,))
    checks.check_dtype(name, x, (torch.int32,))
    checks.check_device(name, x, device)
    checks.check_inner_contiguous(name, x)
    return x


def _is_joint(filter_apply_order: str) -> bool:
    if filter_apply_order not in _FILTER_ORDERS:
        raise ValueError(f"filter_apply_order: expected 'top_k_first' or 'joint', got {filter_apply_order!r}")
    return filter_apply_order == "joint"
