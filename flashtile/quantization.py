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
        x: [..., num_kv_heads, head_dim], fp16, bf16 or fp32.
        scale: one value, [num_kv_heads] or [..., num_kv_heads]; default: per row, so that its largest element is the
            format's largest.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        The numbers, shaped as x, and the scale as an fp32 tensor: what attention takes as k_scale or v_scale.

    Raises:
        ValueError: another dtype or shape.
    """
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    if dtype not in checks.FP8_DTYPES:
        raise ValueError(f"dtype: expected float8_e4m3fn or float8_e5m2, got {dtype}")
    top = torch.finfo(dtype).max
    values = x.float()
    used = _row_scale(values.abs().amax(-1), top) if scale is None else _given("scale", scale, values)
    return (values / _per_element(used, values)).clamp(-top, top).to(dtype), used


def quantize_kv_int8(
    x: Tensor, scale: float | Tensor | None = None, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys or values in int8: numbers round(x / scale + zero), saturated.

    Args:
        x: [..., num_kv_heads, head_dim], fp16, bf16 or fp32.
        scale: one value, [num_kv_heads] or [..., num_kv_heads], for symmetric numbers; default: per row, from its
            largest element.
        symmetric: without a zero point. Otherwise the row's smallest element becomes -128 and its largest 127.

    Returns:
        The numbers, shaped as x; the scale, fp32; and the zero point, [..., num_kv_heads] fp32, or None.

    Raises:
        ValueError: another dtype or shape, or a scale without symmetric.
    """
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    values = x.float()
    if not symmetric:
        if scale is not None:
            raise ValueError("scale: given numbers are symmetric; leave it out, or pass symmetric=True")
        used, zero = _affine(values, -128, 127)
        numbers = values / used[..., None] + zero[..., None]
        return numbers.round().clamp(-128, 127).to(torch.int8), used, zero
    used = _row_scale(values.abs().amax(-1), 127) if scale is None else _given("scale", scale, values)
    return (values / _per_element(used, values)).round().clamp(-127, 127).to(torch.int8), used, None


def quantize_kv_int4(
    x: Tensor, group_size: int | None = None, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys or values in int4, two to a byte along head_dim, the first in the lower bits.

    Args:
        x: [..., num_kv_heads, head_dim], fp16, bf16 or fp32.
        group_size: elements of a row that share a scale: 32, 64, 128; default: the whole row.
        symmetric: numbers around 8, without a zero point. Otherwise a group's smallest element becomes 0 and its
            largest 15.

    Returns:
        The bytes [..., num_kv_heads, head_dim / 2]; the scale, fp32, [..., num_kv_heads], with group_size [...,
        num_kv_heads, head_dim / group_size]; and the zero point, shaped as the scale, or None.

    Raises:
        ValueError: another dtype, or a head_dim that cannot be packed or cut into groups.
    """
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    head_dim = x.shape[-1]
    if head_dim % 8:
        raise ValueError(f"x: expected a head_dim that is a multiple of 8, got {head_dim}; pad the heads")
    if group_size is not None and (group_size not in KV_GROUP_SIZES or head_dim % group_size):
        raise ValueError(
            f"group_size: expected one of {KV_GROUP_SIZES} that divides head_dim {head_dim}, got {group_size}; "
            "leave it out for one scale per row"
        )
    values = x.float()
    if group_size is not None:
        values = values.unflatten(-1, (-1, group_size))
    if symmetric:
        scale, zero = _row_scale(values.abs().amax(-1), 7), None
        numbers = values / scale[..., None] + 8
    else:
        scale, zero = _affine(values, 0, 15)
        numbers = values / scale[..., None] + zero[..., None]
    numbers = numbers.round().clamp(0, 15).to(torch.uint8).view(*x.shape[:-1], head_dim // 2, 2)
    return numbers[..., 0] | numbers[..., 1] << 4, scale, zero


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


def _row_scale(largest: Tensor, top: float) -> Tensor:
    """largest / top; 1 for a row of zeros."""
    return torch.where(largest > 0, largest / top, 1.0)


def _affine(values: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [...] that map the range of values [..., n] to numbers low..high."""
    smallest, largest = values.aminmax(dim=-1)
    scale = _row_scale(largest - smallest, high - low)
    return scale, low - smallest / scale


def _given(name: str, scale: float | Tensor, values: Tensor) -> Tensor:
    """A scale that came from outside, as an fp32 tensor on the device of values [..., num_kv_heads, head_dim]."""
    used = torch.as_tensor(scale, dtype=torch.float32, device=values.device)
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
