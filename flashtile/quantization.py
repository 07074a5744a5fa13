"""Narrow formats: bits packed into bytes. Defined by reference/quantization.py, with numpy's semantics."""

import torch
from torch import Tensor

from flashtile import checks, library

BIT_ORDERS = ("big", "little")

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
