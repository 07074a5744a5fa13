"""Narrow formats: bits packed into bytes (numpy's semantics), KV caches of 8 and 4 bits. Defined by
reference/quantization.py."""

import torch
from torch import Tensor

from flashtile import checks, library

BIT_ORDERS = ("big", "little")
KV_GROUP_SIZES = (32, 64, 128)  # elements of head_dim that may share a scale, besides all of them

_packbits = library.launcher("quantization", "packbits(Tensor(a!) out, Tensor x, bool little) -> ()")
_segment_packbits = library.launcher(
    "quantization",
    "segment_packbits(Tensor(a!) out, Tensor x, Tensor indptr, Tensor out_indptr, bool little) -> ()",
)
_quantize_kv = library.launcher(
    "quantize_kv",
    "quantize_kv(Tensor(a!) out, Tensor(b!)? scale, Tensor(c!)? zero, Tensor x, Tensor? given_scale) -> ()",
)


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """Eight flags to a byte, the last byte filled up with zeros.

    Args:
        x: [n] bool or uint8; what is not 0 is a 1.
        bitorder: "big": the first flag is the highest bit; "little": the lowest.

    Returns:
        [ceil(n / 8)] uint8.

    Raises:
        ValueError: another rank, dtype or bitorder.
    """
    x, little = _check_flags(x), _is_little(bitorder)
    out = torch.empty((x.shape[0] + 7) // 8, dtype=torch.uint8, device=x.device)
    _packbits(out, x, little)
    return out


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """`packbits` of each segment of x: every segment starts a byte. How many bytes there are is read from the device.

    Args:
        x: [n] bool or uint8; what is not 0 is a 1.
        indptr: [num_segments + 1] int32 or int64, offsets of the segments in x.
        bitorder: as for `packbits`.

    Returns:
        The bytes of all segments, uint8, and the offsets of the segments in them, [num_segments + 1] int32.

    Raises:
        ValueError: another rank, dtype or bitorder; on the host also offsets that decrease or leave x.
    """
    x, little = _check_flags(x), _is_little(bitorder)
    indptr = checks.index_tensor("indptr", indptr, x.device, "num_segments + 1")
    checks.check_offsets("indptr", indptr, x.shape[0])
    out_indptr = torch.zeros(indptr.shape[0], dtype=torch.int32, device=x.device)
    torch.cumsum((indptr.diff() + 7) // 8, 0, dtype=torch.int32, out=out_indptr[1:])
    out = torch.empty(int(out_indptr[-1]), dtype=torch.uint8, device=x.device)
    _segment_packbits(out, x, indptr, out_indptr, little)
    return out, out_indptr


def output_scale(name: str, scale: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """What a kernel multiplies its fp8 output with: (divisor on the device or None, factor). Reading a CUDA tensor here
    would stall the GPU.

    Raises:
        ValueError: 0, or a tensor of several elements or on another device.
    """
    if not isinstance(scale, Tensor):
        if scale == 0:
            raise ValueError(f"{name}: expected a number other than 0, which the output is divided by")
        return None, 1.0 / scale
    if scale.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {list(scale.shape)}")
    checks.check_device(name, scale, device)
    checks.check_dtype(name, scale, checks.FLOAT_DTYPES)
    return scale, 1.0


def _check_flags(x: Tensor) -> Tensor:
    checks.check_shape("x", x, ("n",))
    checks.check_dtype("x", x, (torch.bool, torch.uint8))
    return x.contiguous()


def _is_little(bitorder: str) -> bool:
    if bitorder not in BIT_ORDERS:
        raise ValueError(f"bitorder: expected 'big' or 'little', got {bitorder!r}")
    return bitorder == "little"


def quantize_kv_fp8(
    x: Tensor, scale: float | Tensor | None = None, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Keys or values in fp8: numbers x / scale, saturated.

    Args:
        x: [..., num_kv_heads, head_dim], fp16, bf16 or fp32; finite, unless the scale is given.
        scale: one value, [num_kv_heads] or [..., num_kv_heads]; default: per row, so that its largest element is the
            format's largest.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        The numbers, shaped as x, and the scale as an fp32 tensor: what attention takes as k_scale or v_scale.

    Raises:
        ValueError: another dtype or shape.
    """
    if dtype not in checks.FP8_DTYPES:
        raise ValueError(f"dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")
    numbers, used, _ = _quantise(x, dtype, scale, None, symmetric=True)
    return numbers, used


def quantize_kv_int8(
    x: Tensor, scale: float | Tensor | None = None, symmetric: bool = True, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys or values in int8: numbers round(x / scale + zero), saturated.

    Args:
        x: [..., num_kv_heads, head_dim], fp16, bf16 or fp32, finite.
        scale: one value, [num_kv_heads] or [..., num_kv_heads], for symmetric numbers; default: per row or group, from
            its largest element.
        symmetric: without a zero point. Otherwise a group's smallest element becomes -128 and its largest 127.
        group_size: elements of a row that share a scale: 32, 64, 128; default: the whole row.

    Returns:
        The numbers, shaped as x; the scale, fp32; and the zero point, shaped as the scale, or None. Unless the scale is
        given, its shape is [..., num_kv_heads], with group_size [..., num_kv_heads, head_dim / group_size].

    Raises:
        ValueError: another dtype or shape, a head_dim that cannot be cut into groups, or a scale with group_size or
            without symmetric.
    """
    if scale is not None and not symmetric:
        raise ValueError("scale: given numbers are symmetric; leave it out, or pass symmetric=True")
    if scale is not None and group_size is not None:
        raise ValueError(f"scale: expected None with group_size {group_size}, whose groups have scales of their own")
    return _quantise(x, torch.int8, scale, group_size, symmetric)


def quantize_kv_int4(
    x: Tensor, group_size: int | None = None, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys or values in int4, two to a byte along head_dim, the first in the lower bits.

    Args:
        x: [..., num_kv_heads, head_dim], fp16, bf16 or fp32, finite.
        group_size: elements of a row that share a scale: 32, 64, 128; default: the whole row.
        symmetric: numbers around 8, without a zero point. Otherwise a group's smallest element becomes 0 and its
            largest 15.

    Returns:
        The bytes [..., num_kv_heads, head_dim / 2]; the scale, fp32, [..., num_kv_heads], with group_size [...,
        num_kv_heads, head_dim / group_size]; and the zero point, shaped as the scale, or None.

    Raises:
        ValueError: another dtype, or a head_dim that cannot be packed or cut into groups.
    """
    return _quantise(x, torch.uint8, None, group_size, symmetric)


def check_packed_dim(name: str, head_dim: int) -> None:
    """ValueError for a head_dim that attention does not read from packed int4."""
    if head_dim % 8:
        raise ValueError(f"{name}: expected a head_dim that is a multiple of 8, got {head_dim}; pad the heads")


def _quantise(
    x: Tensor, dtype: torch.dtype, scale: float | Tensor | None, group_size: int | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers of `dtype` (uint8: two int4 a byte), scale and zero point of x [..., num_kv_heads, head_dim]."""
    checks.check_tensor("x", x)
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [..., num_kv_heads, head_dim], got {list(x.shape)}")
    head_dim = x.shape[-1]
    if dtype == torch.uint8:
        check_packed_dim("x", head_dim)
    if group_size is not None and (group_size not in KV_GROUP_SIZES or head_dim % group_size):
        raise ValueError(
            f"group_size: expected one of {KV_GROUP_SIZES} that divides head_dim {head_dim}, got {group_size}; "
            "leave it out for one scale per row"
        )
    rows = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0)  # [tokens, num_kv_heads, head_dim]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    numbers = torch.empty(*rows.shape[:2], head_dim // 2 if dtype == torch.uint8 else head_dim, dtype=dtype,
                          device=x.device)  # fmt: skip
    if scale is not None:
        used = _given("scale", scale, x)
        of_rows = (used.reshape(()) if used.numel() == 1 else used).expand(x.shape[:-1])
        _quantize_kv(numbers, None, None, rows, of_rows.reshape(rows.shape[:2]))
        return numbers.view(x.shape), used, None
    groups = (1,) if group_size is None else (head_dim // group_size,)
    factors = [torch.empty(*rows.shape[:2], *groups, device=x.device) for _ in range(1 if symmetric else 2)]
    _quantize_kv(numbers, factors[0], None if symmetric else factors[1], rows, None)
    shape = x.shape[:-1] if group_size is None else (*x.shape[:-1], *groups)
    used, *zero = (f.view(shape) for f in factors)
    return numbers.view(*x.shape[:-1], numbers.shape[-1]), used, zero[0] if zero else None


def dequantize_kv_fp8(x: Tensor, scale: float | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that `quantize_kv_fp8` stored: x * scale, [..., num_kv_heads, head_dim], in `dtype`."""
    checks.check_dtype("x", x, checks.FP8_DTYPES)
    return dequantize_kv(x, scale).to(dtype)


def dequantize_kv_int8(
    x: Tensor, scale: float | Tensor, zero: float | Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that `quantize_kv_int8` stored: (x - zero) * scale, [..., num_kv_heads, head_dim], in `dtype`."""
    checks.check_dtype("x", x, (torch.int8,))
    return dequantize_kv(x, scale, zero).to(dtype)


def dequantize_kv_int4(
    x: Tensor, scale: float | Tensor, zero: float | Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that `quantize_kv_int4` stored: (number - zero) * scale, [..., num_kv_heads, head_dim], in `dtype`.
    Without zero, numbers are around 8."""
    checks.check_dtype("x", x, (torch.uint8,))
    return dequantize_kv(x, scale, zero).to(dtype)


def dequantize_kv(x: Tensor, scale: float | Tensor | None, zero: float | Tensor | None = None) -> Tensor:
    """Rows of any cache as fp32: fp8, int8, bytes of two int4 each, or values already. scale, zero: one value,
    [num_kv_heads], [..., num_kv_heads] or [..., num_kv_heads, groups]; None: 1, and 0 (8 for int4)."""
    if x.dtype == torch.uint8:
        values = torch.stack([x & 15, x >> 4], dim=-1).flatten(-2).float()
        zero = 8.0 if zero is None else zero
    else:
        values = x.float()
    if zero is not None:
        values = values - _per_element(zero, values)
    return values if scale is None else values * _per_element(scale, values)


def _given(name: str, scale: float | Tensor, values: Tensor) -> Tensor:
    """A scale that came from outside, as an fp32 tensor on the device of values [..., num_kv_heads, head_dim]."""
    if isinstance(scale, Tensor):
        used = scale.to(values.device, torch.float32)
    else:
        used = torch.full((), scale, dtype=torch.float32, device=values.device)
    if used.numel() != 1 and tuple(used.shape) not in (tuple(values.shape[-2:-1]), tuple(values.shape[:-1])):
        raise ValueError(
            f"{name}: expected one value, {list(values.shape[-2:-1])} or {list(values.shape[:-1])}, "
            f"got {list(used.shape)}"
        )
    return used


def _per_element(factor: float | Tensor, values: Tensor) -> float | Tensor:
    """A factor in a shape that broadcasts with values [..., num_kv_heads, head_dim]."""
    if not isinstance(factor, Tensor):
        return factor
    factor = factor.float()
    if factor.numel() == 1:
        return factor.reshape(())
    if factor.dim() == values.dim():
        return factor.repeat_interleave(values.shape[-1] // factor.shape[-1], dim=-1)
    return factor[..., None]
