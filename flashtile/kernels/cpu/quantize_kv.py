"""Keys and values in narrow formats, alone or on their way into the paged cache, in PyTorch."""

import torch
from torch import Tensor

from flashtile.kernels.cpu.page import slots
from flashtile.plan.problem import FORMATS
from flashtile.plan.scales import NUMBERS


def quantise(
    x: Tensor, dtype: torch.dtype, groups: int, affine: bool, given_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows [..., dim] as numbers of `dtype` (uint8: two int4 a byte), and the scale and zero point of each of their
    groups, [..., groups]. given_scale [...]: of each row, with one group and no zero point."""
    values = x.float().unflatten(-1, (groups, -1))
    n = NUMBERS[FORMATS[dtype], affine]
    zero = None
    if affine:
        smallest, largest = values.aminmax(dim=-1)
        scale = _or_one((largest - smallest) / (n.high - n.low))
        zero = n.low - smallest / scale
    elif given_scale is None:
        scale = _or_one(values.abs().amax(-1) / n.top)
    else:
        scale = given_scale.float()[..., None]
    numbers = values / scale[..., None]
    if not dtype.is_floating_point:
        numbers = numbers.add_(n.middle if zero is None else zero[..., None]).round_()
    numbers = numbers.clamp_(n.low, n.high).to(dtype).flatten(-2)
    if dtype == torch.uint8:
        numbers = numbers[..., 0::2] | numbers[..., 1::2] << 4
    return numbers, scale, zero


def _or_one(scale: Tensor) -> Tensor:
    """1 where a scale is 0: a group of zeros, or of one value beside a zero point."""
    return torch.where(scale > 0, scale, 1.0)


def quantize_kv(out: Tensor, scale: Tensor | None, zero: Tensor | None, x: Tensor, given_scale: Tensor | None) -> None:
    """out [tokens, num_kv_heads, dim] (packed: dim / 2) = the numbers of x; scale, zero: those of [..., groups]."""
    groups = 1 if scale is None else scale.shape[-1]
    numbers, used, zeros = quantise(x, out.dtype, groups, zero is not None, given_scale)
    out.copy_(numbers)
    if scale is not None:
        scale.copy_(used)
    if zero is not None:
        zero.copy_(zeros)


def quantize_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_zero: Tensor | None,
    v_zero: Tensor | None,
    append_key: Tensor,
    append_value: Tensor,
    k_given: Tensor | None,
    v_given: Tensor | None,
    k_divisor: float,
    v_divisor: float,
    batch_indices: Tensor,
    positions: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
) -> None:
    """Write rows [nnz, num_kv_heads, dim] as numbers, their scales and zero points into the caches' slots.

    A scale or zero point that is written: [num_pages, page_size, num_kv_heads, groups]. Where none is, the rows are
    divided by the given ones [num_kv_heads], or, if there are none either, the divisor; a cache of the rows' dtype
    takes them as they are.
    """
    where = slots(batch_indices, positions, kv_indices, kv_indptr, k_cache.shape[1])
    for cache, scale, zero, x, given, divisor in (
        (k_cache, k_scale, k_zero, append_key, k_given, k_divisor),
        (v_cache, v_scale, v_zero, append_value, v_given, v_divisor),
    ):
        if cache.dtype == x.dtype:
            cache.index_put_(where, x)
            continue
        if scale is None and given is None:
            given = torch.tensor(divisor)
        groups = 1 if scale is None else scale.shape[-1]
        numbers, used, zeros = quantise(x, cache.dtype, groups, zero is not None, given)
        cache.index_put_(where, numbers)
        if scale is not None:
            scale.index_put_(where, used)
        if zero is not None:
            zero.index_put_(where, zeros)
