"""Merging attention states: outputs over disjoint parts of the KV, with their log-sum-exp, into the output over all of
it (arXiv:2501.01005). Defined by reference/cascade.py.

A state without keys is v = 0, s = -inf: merging two of them gives such a state, merging one with another state gives
the other's very bits. What v holds where s = -inf is never read into a result. s is base 2, fp32; sums are fp32."""

import torch
from torch import Tensor

from flashtile import checks, library

_merge_state = library.launcher(
    "merge",
    "merge_state(Tensor(a!) v_out, Tensor(b!) s_out, Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> ()",
)
_merge_state_in_place = library.launcher(
    "merge",
    "merge_state_in_place(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, Tensor? mask) -> ()",
)
_merge_states = library.launcher("merge", "merge_states(Tensor(a!) v_out, Tensor(b!) s_out, Tensor v, Tensor s) -> ()")
_merge_ragged_states = library.launcher(
    "merge", "merge_ragged_states(Tensor(a!) v_out, Tensor(b!) s_out, Tensor v, Tensor s, Tensor indptr) -> ()"
)


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """The state over the keys of two states.

    Args:
        v_a: [n, num_heads, head_dim]; fp16, bf16 or fp32; any strides, the last dimension contiguous.
        s_a: [n, num_heads], base 2; converted to fp32.
        v_b, s_b: the other state, shaped and of dtypes as the first.

    Returns:
        v [n, num_heads, head_dim] of v_a's dtype, and s [n, num_heads] fp32.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    s_a, s_b = _check_state("v_a", v_a, "s_a", s_a), _check_state("v_b", v_b, "s_b", s_b)
    checks.check_like("v_b", v_b, "v_a", v_a)
    v, s = torch.empty(v_a.shape, dtype=v_a.dtype, device=v_a.device), torch.empty_like(s_a)
    _merge_state(v, s, v_a, s_a, v_b, s_b)
    return v, s


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """Merge another state into (v, s).

    Args:
        v: [n, num_heads, head_dim]; fp16, bf16 or fp32; any strides, the last dimension contiguous.
        s: [n, num_heads] fp32, base 2: written, so no other dtype can be converted.
        v_other, s_other: the other state, shaped as the first; v_other of v's dtype.
        mask: [n] bool; rows where it is False keep their bits. Default: all rows are merged.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    checks.check_dtype("s", checks.check_tensor("s", s), (torch.float32,))
    _check_state("v", v, "s", s)
    s_other = _check_state("v_other", v_other, "s_other", s_other)
    checks.check_like("v_other", v_other, "v", v)
    if mask is not None:
        checks.check_shape("mask", mask, (v.shape[0],))
        checks.check_dtype("mask", mask, (torch.bool,))
        checks.check_device("mask", mask, v.device)
        mask = mask.contiguous()
    _merge_state_in_place(v, s, v_other, s_other, mask)


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The state over the keys of several states; none (num_states = 0) give v = 0, s = -inf.

    Args:
        v: [n, num_states, num_heads, head_dim]; fp16, bf16 or fp32; any strides, the last dimension contiguous.
        s: [n, num_states, num_heads], base 2; converted to fp32.

    Returns:
        v [n, num_heads, head_dim] of v's dtype, and s [n, num_heads] fp32.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    checks.check_shape("v", v, ("n", "num_states", "num_heads", "head_dim"))
    s = _check_state("v", v, "s", s)
    v_out, s_out = _new_state(v.shape[0], v)
    _merge_states(v_out, s_out, v, s)
    return v_out, s_out


def variable_length_merge_states(v: Tensor, s: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Merge states whose number differs by row: those of row i lie from indptr[i] to indptr[i + 1].

    Args:
        v: [nnz, num_heads, head_dim]; fp16, bf16 or fp32; any strides, the last dimension contiguous.
        s: [nnz, num_heads], base 2; converted to fp32.
        indptr: [n + 1] int32 or int64. On CUDA, where values are not read, states past nnz are left out.

    Returns:
        v [n, num_heads, head_dim] of v's dtype, and s [n, num_heads] fp32.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; on the host offsets that decrease or leave v.
    """
    checks.check_shape("v", v, ("nnz", "num_heads", "head_dim"))
    s = _check_state("v", v, "s", s)
    indptr = checks.index_tensor("indptr", indptr, v.device, "n + 1")
    checks.check_offsets("indptr", indptr, v.shape[0])
    v_out, s_out = _new_state(indptr.shape[0] - 1, v)
    _merge_ragged_states(v_out, s_out, v, s, indptr)
    return v_out, s_out


def _check_state(v_name: str, v: Tensor, s_name: str, s: Tensor) -> Tensor:
    """s as fp32."""
    checks.check_tensor(v_name, v)
    if v.dim() < 3:
        raise ValueError(f"{v_name}: expected shape [n, num_heads, head_dim], got {list(v.shape)}")
    checks.check_dtype(v_name, v, checks.FLOAT_DTYPES)
    checks.check_inner_contiguous(v_name, v)
    checks.check_shape(s_name, s, v.shape[:-1])
    checks.check_device(s_name, s, v.device)
    return s.float()


def _new_state(n: int, v: Tensor) -> tuple[Tensor, Tensor]:
    num_heads, head_dim = v.shape[-2:]
    v_out = torch.empty(n, num_heads, head_dim, dtype=v.dtype, device=v.device)
    return v_out, torch.empty(n, num_heads, dtype=torch.float32, device=v.device)
