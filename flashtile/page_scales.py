"""Reading what append is told about the scales of a quantised cache: those that it writes beside the numbers, and those
that are given."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import checks
from flashtile.plan.problem import FORMATS
from flashtile.quantization import KV_GROUP_SIZES, check_packed_dim
from flashtile.scales import Scale

FP8_FORMATS = ("e4m3", "e5m2")


class AppendScales(NamedTuple):
    """Of keys or of values: scale and zero point are written if they are tensors [num_pages, page_size, num_kv_heads,
    groups]; otherwise rows are divided by given [num_kv_heads], or, if that is None too, by divisor."""

    scale: Tensor | None = None
    zero: Tensor | None = None
    given: Tensor | None = None
    divisor: float = 1.0


def row_width(x: Tensor, cache: Tensor) -> int:
    """head_dim of the rows that `cache` [..., width] holds: for rows x of another dtype, uint8 is two int4 a byte."""
    packed = cache.dtype == torch.uint8 and x.dtype != torch.uint8
    return cache.shape[-1] * (2 if packed else 1)


def read_append_scales(
    side: str, x: Tensor, cache: Tensor, kv_layout: str, without_page_dim: bool, scale: Scale, zero: Scale
) -> AppendScales:
    """What `{side}_scale` and `{side}_zero` say about rows x [nnz, num_kv_heads, head_dim] on their way into `cache`,
    an NHD view.

    Args:
        kv_layout: of tensors that are written, which are shaped as the cache without head_dim.
        without_page_dim: the cache came in the short form of page_size 1, and so do they.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: a dtype, shape or device that does not fit, or a scale that is missing, 0, or of no use.
    """
    scale_name, zero_name = f"{side}_scale", f"{side}_zero"
    if cache.dtype == x.dtype:
        for name, factor in ((scale_name, scale), (zero_name, zero)):
            if factor is not None:
                raise ValueError(
                    f"{name}: expected None for rows that have the cache's dtype, {x.dtype}, and are copied; got "
                    f"{_kind(factor)}"
                )
        return AppendScales()
    kv_format, head_dim = FORMATS[cache.dtype], x.shape[-1]
    fp8 = kv_format in FP8_FORMATS
    if kv_format == "int4":
        check_packed_dim("append_key" if side == "k" else "append_value", head_dim)
    written = isinstance(scale, Tensor) and scale.dim() > 1
    if not written and (kv_format == "int4" or (kv_format == "int8" and scale is None)):
        or_given = "" if kv_format == "int4" else ", or a given scale: a number, or a tensor of one value or per head"
        raise ValueError(
            f"{scale_name}: an {kv_format} cache needs a tensor to write scales to, fp32, of the cache's shape without "
            f"head_dim or with groups of it in its place{or_given}; got {_kind(scale)}"
        )
    if zero is not None and (fp8 or not written):
        why = "fp8 has no zero point" if fp8 else "a given scale has no zero point"
        raise ValueError(f"{zero_name}: expected None, since {why}; got {_kind(zero)}")
    if not written:
        return _given(scale_name, scale, x)
    rows = _written(scale_name, scale, cache, kv_layout, without_page_dim)
    groups = rows.shape[-1]
    if groups != 1 and (fp8 or head_dim / groups not in KV_GROUP_SIZES):
        raise ValueError(
            f"{scale_name}: expected the cache's shape without head_dim"
            + ("" if fp8 else f", or that and groups of {KV_GROUP_SIZES} elements of head_dim {head_dim}")
            + f", got {_kind(scale)}"
        )
    if zero is None:
        return AppendScales(rows)
    zeros = _written(zero_name, zero, cache, kv_layout, without_page_dim)
    if zeros.shape != rows.shape:
        raise ValueError(f"{zero_name}: expected the shape of {scale_name}, {_kind(scale)}, got {_kind(zero)}")
    return AppendScales(rows, zeros)


def _given(name: str, scale: Scale, x: Tensor) -> AppendScales:
    """A number, or a tensor of one value or one per head."""
    if scale is None:
        return AppendScales()
    if not isinstance(scale, Tensor):
        if not isinstance(scale, (int, float)):
            raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(scale).__name__}")
        if scale == 0:
            raise ValueError(f"{name}: expected a number other than 0, which rows are divided by")
        return AppendScales(divisor=float(scale))
    heads = x.shape[1]
    if scale.numel() not in (1, heads):
        raise ValueError(f"{name}: expected one value or [{heads}] (per KV head), got {_kind(scale)}")
    checks.check_dtype(name, scale, checks.FLOAT_DTYPES)
    if scale.numel() == 1 and scale.device.type == "cpu" and x.device.type != "cpu":
        return AppendScales(divisor=float(scale))
    checks.check_device(name, scale, x.device)
    return AppendScales(given=scale.reshape(-1).expand(heads))


def _written(name: str, factor: Scale, cache: Tensor, kv_layout: str, without_page_dim: bool) -> Tensor:
    """A tensor to write to as [num_pages, page_size, num_kv_heads, groups]."""
    factor = checks.check_tensor(name, factor)
    checks.check_dtype(name, factor, (torch.float32,))
    checks.check_device(name, factor, cache.device)
    rows = factor
    if without_page_dim and rows.dim() in (2, 3):
        rows = rows.unsqueeze(1 if kv_layout == "NHD" else 2)
    if kv_layout == "HND" and rows.dim() > 2:
        rows = rows.transpose(1, 2)
    shape = cache.shape[:-1]
    if rows.shape == shape:
        rows = rows.unsqueeze(-1)
    if rows.dim() != 4 or rows.shape[:-1] != shape or rows.shape[-1] == 0:
        pages, page_size, heads = shape
        size = [pages, page_size, heads] if kv_layout == "NHD" else [pages, heads, page_size]
        if without_page_dim:
            size = [pages, heads]
        raise ValueError(
            f"{name}: expected {size}, the cache's shape without head_dim, or that and groups of head_dim; got "
            f"{_kind(factor)}"
        )
    return rows


def _kind(x: object) -> str:
    """What an argument is, in a word for a message."""
    return f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
