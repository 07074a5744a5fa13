"""Keys and values in narrow formats, alone or on their way into the paged cache, in Triton: each row (token, head) is
cut into groups of head_dim that share a scale, and a tile holds a group in each of its rows.

Divisions are IEEE's and ties round to even, so that numbers, scales and zero points are those of kernels/cpu, bit by
bit."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.page import find_slot
from flashtile.kernels.quantization import convert
from flashtile.kernels.tiles import RowTile, alignment, row_offsets, row_tile, strides
from flashtile.plan.problem import FORMATS
from flashtile.plan.scales import NUMBERS
from flashtile.testing.compile import CompileCase
from flashtile.testing.launches import recorded

TABLE = tl.constexpr(NUMBERS)
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # a sum with it has no room for fractions: they are rounded, ties to even


@triton.constexpr_function
def bound(name, kv_format, affine):
    """A field of plan/scales.py's Numbers."""
    return getattr(TABLE.value[kv_format, affine], name)


@triton.jit
def fp8_byte(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """fp32 x, within the format's range, as the byte of an fp8 with these many bits of mantissa; for GPUs that do not
    convert. Subnormals are whole multiples of the smallest, which is the last bit of a sum with SHIFT."""
    CUT: tl.constexpr = 23 - MANTISSA
    SHIFT: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    rounded = (bits + ((1 << (CUT - 1)) - 1) + ((bits >> CUT) & 1)) >> CUT
    normal = rounded - ((127 - BIAS) << MANTISSA)
    shift = tl.full(x.shape, SHIFT, tl.float32)
    subnormal = (size + shift).to(tl.int32, bitcast=True) - shift.to(tl.int32, bitcast=True)
    byte = tl.where(size < 2.0 ** (1 - BIAS), subnormal, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(x == x, byte, 0x7F) | sign).to(tl.uint8)


@triton.jit
def scale_and_zero(x, mask, given_scale, FORMAT: tl.constexpr, AFFINE: tl.constexpr, GIVEN: tl.constexpr):
    """Scale and zero point [N] of groups x [N, ELEMENTS], fp32; 1 where a scale is 0: a group of zeros, or of one value
    beside a zero point."""
    LOW: tl.constexpr = bound("low", FORMAT, AFFINE)
    HIGH: tl.constexpr = bound("high", FORMAT, AFFINE)
    zero = tl.full(given_scale.shape, bound("middle", FORMAT, AFFINE), tl.float32)
    scale = given_scale
    if AFFINE:
        smallest = tl.min(tl.where(mask, x, float("inf")), 1)
        scale = tl.div_rn(tl.max(tl.where(mask, x, -float("inf")), 1) - smallest, HIGH - LOW)
        scale = tl.where(scale > 0, scale, 1.0)
        zero = LOW - tl.div_rn(smallest, scale)
    elif not GIVEN:
        scale = tl.div_rn(tl.max(tl.where(mask, tl.abs(x), 0.0), 1), bound("top", FORMAT, AFFINE))
        scale = tl.where(scale > 0, scale, 1.0)
    return scale, zero


@triton.jit
def quantise(x, scale, zero, FORMAT: tl.constexpr, AFFINE: tl.constexpr, HAS_FP8: tl.constexpr):
    """Groups x [N, ELEMENTS], fp32, as what the cache stores: fp8, int8, or [N, ELEMENTS / 2] bytes of two int4."""
    LOW: tl.constexpr = bound("low", FORMAT, AFFINE)
    HIGH: tl.constexpr = bound("high", FORMAT, AFFINE)
    y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if FORMAT == "e4m3" or FORMAT == "e5m2":
        if HAS_FP8:
            numbers = convert(y, 1.0, tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5)
        else:
            y = tl.where(y > HIGH, HIGH, tl.where(y < LOW, LOW, y))
            numbers = fp8_byte(y, 3 if FORMAT == "e4m3" else 2, 7 if FORMAT == "e4m3" else 15)
    else:
        y = tl.minimum(tl.maximum(y + zero[:, None], LOW), HIGH)
        numbers = ((y + ROUNDER) - ROUNDER).to(tl.int32)
        if FORMAT == "int4":
            low, high = tl.split(tl.reshape(numbers, [x.shape[0], x.shape[1] // 2, 2]))
            numbers = (low | high << 4).to(tl.uint8)
        else:
            numbers = numbers.to(tl.int8)
    return numbers


@triton.jit
def group_tile(first_row, num_rows, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Row [N] int64, group [N], and whether there are such, for N = BLOCK_ROWS times GROUPS, up to a power of two."""
    BLOCK_GROUPS: tl.constexpr = triton.next_power_of_2(GROUPS)
    i = tl.arange(0, BLOCK_ROWS * BLOCK_GROUPS)
    row, group = first_row + i // BLOCK_GROUPS, i % BLOCK_GROUPS
    return row, group, (row < num_rows) & (group < GROUPS)


@triton.jit
def load_groups(x_ptr, row_offs, group, in_range, DIM: tl.constexpr, GROUPS: tl.constexpr):
    """Groups [N, ELEMENTS] of the rows at row_offs, and which elements there are."""
    ELEMENTS: tl.constexpr = DIM // GROUPS
    cols = tl.arange(0, triton.next_power_of_2(ELEMENTS))
    mask = in_range[:, None] & (cols < ELEMENTS)[None, :]
    return tl.load(x_ptr + (row_offs + group * ELEMENTS)[:, None] + cols[None, :], mask=mask, other=0.0), mask


@triton.jit
def load_scale(given, divisor, token, head, in_range):
    """The scale [N] fp32 of rows: given = (pointer, stride of a token, of a head), or the divisor."""
    scale = tl.full(token.shape, 1.0, tl.float32) * divisor
    if given is not None:
        scale_ptr, stride_token, stride_head = given
        scale = tl.load(scale_ptr + token * stride_token + head * stride_head, mask=in_range, other=1.0).to(tl.float32)
    return scale


@triton.jit
def store_factor(factor, values, page, slot, head, group, found):
    """Scales or zero points [N] to factor = (pointer, strides of a page, a slot, a head, a group); None: nowhere."""
    if factor is not None:
        factor_ptr, stride_page, stride_slot, stride_head, stride_group = factor
        offs = page * stride_page + slot.to(tl.int64) * stride_slot + head * stride_head + group * stride_group
        tl.store(factor_ptr + offs, values, mask=found)


@triton.jit
def store_groups(
    out_ptr, row_offs, x, mask, page, slot, head, group, found, given_scale, scale_out, zero_out,
    FORMAT: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, HAS_FP8: tl.constexpr,
):  # fmt: skip
    """Quantise groups x [N, ELEMENTS] and store what comes of it, where found: numbers to the rows at row_offs."""
    PACK: tl.constexpr = 2 if FORMAT == "int4" else 1
    WIDTH: tl.constexpr = DIM // GROUPS // PACK
    cols = tl.arange(0, x.shape[1] // PACK)
    numbers = x
    if FORMAT != "plain":
        AFFINE: tl.constexpr = zero_out is not None
        x = x.to(tl.float32)
        scale, zero = scale_and_zero(x, mask, given_scale, FORMAT, AFFINE, scale_out is None)
        numbers = quantise(x, scale, zero, FORMAT, AFFINE, HAS_FP8)
        store_factor(scale_out, scale, page, slot, head, group, found)
        store_factor(zero_out, zero, page, slot, head, group, found)
    offs = (row_offs + group * WIDTH)[:, None] + cols[None, :]
    tl.store(out_ptr + offs, numbers, mask=found[:, None] & (cols < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_rows", "batch_size", "num_pages"])
def quantize_append_kernel(
    k_cache_ptr, v_cache_ptr, k_scale, v_scale, k_zero, v_zero, key_ptr, value_ptr,
    k_given, v_given, k_divisor, v_divisor,
    batch_indices_ptr, positions_ptr, kv_indices_ptr, kv_indptr_ptr, num_rows, batch_size, num_pages,
    stride_k_page, stride_k_slot, stride_k_head, stride_v_page, stride_v_slot, stride_v_head,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    NUM_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    K_FORMAT: tl.constexpr, DIM_K: tl.constexpr, K_GROUPS: tl.constexpr,
    V_FORMAT: tl.constexpr, DIM_V: tl.constexpr, V_GROUPS: tl.constexpr, HAS_FP8: tl.constexpr,
):  # fmt: skip
    """Quantise rows [num_rows] = (token, head) of key and value into their slots; strides of these in units."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    k_row, k_group, k_in_range = group_tile(first_row, num_rows, K_GROUPS, BLOCK_ROWS)
    v_row, v_group, v_in_range = group_tile(first_row, num_rows, V_GROUPS, BLOCK_ROWS)
    # The rows first: they need no index, so that they arrive while the page is looked up.
    key_offs = row_offsets(k_row, NUM_HEADS, stride_key_token, stride_key_head, UNIT)
    value_offs = row_offsets(v_row, NUM_HEADS, stride_value_token, stride_value_head, UNIT)
    key, key_mask = load_groups(key_ptr, key_offs, k_group, k_in_range, DIM_K, K_GROUPS)
    value, value_mask = load_groups(value_ptr, value_offs, v_group, v_in_range, DIM_V, V_GROUPS)
    k_token, k_head, v_token, v_head = k_row // NUM_HEADS, k_row % NUM_HEADS, v_row // NUM_HEADS, v_row % NUM_HEADS
    k_factor = load_scale(k_given, k_divisor, k_token, k_head, k_in_range)
    v_factor = load_scale(v_given, v_divisor, v_token, v_head, v_in_range)
    k_page, k_slot, k_found = find_slot(
        k_token, k_in_range, batch_indices_ptr, positions_ptr, kv_indices_ptr, kv_indptr_ptr,
        batch_size, num_pages, PAGE_SIZE,
    )  # fmt: skip
    v_page, v_slot, v_found = find_slot(
        v_token, v_in_range, batch_indices_ptr, positions_ptr, kv_indices_ptr, kv_indptr_ptr,
        batch_size, num_pages, PAGE_SIZE,
    )  # fmt: skip
    k_offs = (k_page * stride_k_page + k_slot * stride_k_slot + k_head * stride_k_head) * UNIT
    v_offs = (v_page * stride_v_page + v_slot * stride_v_slot + v_head * stride_v_head) * UNIT
    store_groups(
        k_cache_ptr, k_offs, key, key_mask, k_page, k_slot, k_head, k_group, k_found, k_factor, k_scale, k_zero,
        K_FORMAT, DIM_K, K_GROUPS, HAS_FP8,
    )  # fmt: skip
    store_groups(
        v_cache_ptr, v_offs, value, value_mask, v_page, v_slot, v_head, v_group, v_found, v_factor, v_scale, v_zero,
        V_FORMAT, DIM_V, V_GROUPS, HAS_FP8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def quantize_kernel(
    out_ptr, scale_out, zero_out, x_ptr, given, num_rows, stride_out_token, stride_out_head, stride_x_token,
    stride_x_head, NUM_HEADS: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    FORMAT: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, HAS_FP8: tl.constexpr,
):  # fmt: skip
    """Quantise rows [num_rows] = (token, head) of x; strides of x and out in units."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row, group, in_range = group_tile(first_row, num_rows, GROUPS, BLOCK_ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    x_offs = row_offsets(row, NUM_HEADS, stride_x_token, stride_x_head, UNIT)
    out_offs = row_offsets(row, NUM_HEADS, stride_out_token, stride_out_head, UNIT)
    x, mask = load_groups(x_ptr, x_offs, group, in_range, DIM, GROUPS)
    factor = load_scale(given, 1.0, token, head, in_range)
    slot = tl.zeros_like(group)
    store_groups(
        out_ptr, out_offs, x, mask, token, slot, head, group, in_range, factor, scale_out, zero_out,
        FORMAT, DIM, GROUPS, HAS_FP8,
    )  # fmt: skip


def quantize_kv(out: Tensor, scale: Tensor | None, zero: Tensor | None, x: Tensor, given_scale: Tensor | None) -> None:
    """out [tokens, num_kv_heads, dim] (packed: dim / 2) = the numbers of x; scale, zero: those of [..., groups]."""
    tokens, num_heads, dim = x.shape
    if x.numel() == 0:
        return
    tile = _tile(tokens * num_heads, dim)
    unit = alignment(out, x)
    has_fp8 = _has_fp8(out.device)
    quantize_kernel[(tile.num_programs(tokens * num_heads),)](
        _storage(out, has_fp8), *(_by_token(f) for f in (scale, zero)), x, _argument(given_scale), tokens * num_heads,
        *strides(out, unit), *strides(x, unit),
        NUM_HEADS=num_heads, UNIT=unit, BLOCK_ROWS=tile.block_rows, FORMAT=FORMATS[out.dtype], DIM=dim,
        GROUPS=_groups(scale), HAS_FP8=has_fp8, num_warps=tile.num_warps,
    )  # fmt: skip


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
    nnz, num_heads, dim_k = append_key.shape
    dim_v = append_value.shape[2]
    if nnz == 0:
        return
    tile = _tile(nnz * num_heads, max(dim_k, dim_v))
    unit = alignment(k_cache, v_cache, append_key, append_value)
    has_fp8 = _has_fp8(k_cache.device)
    given = (None if x is None else x.expand(nnz, num_heads) for x in (k_given, v_given))
    formats = ("plain" if x.dtype == append_key.dtype else FORMATS[x.dtype] for x in (k_cache, v_cache))
    k_format, v_format = formats
    quantize_append_kernel[(tile.num_programs(nnz * num_heads),)](
        _storage(k_cache, has_fp8), _storage(v_cache, has_fp8),
        *(_argument(f) for f in (k_scale, v_scale, k_zero, v_zero)), append_key, append_value,
        *(_argument(x) for x in given), float(k_divisor), float(v_divisor),
        batch_indices, positions, kv_indices, kv_indptr, nnz * num_heads, kv_indptr.shape[0] - 1, k_cache.shape[0],
        *(stride // unit for stride in k_cache.stride()[:3]), *(stride // unit for stride in v_cache.stride()[:3]),
        *strides(append_key, unit), *strides(append_value, unit),
        NUM_HEADS=num_heads, PAGE_SIZE=k_cache.shape[1], UNIT=unit, BLOCK_ROWS=tile.block_rows,
        K_FORMAT=k_format, DIM_K=dim_k, K_GROUPS=_groups(k_scale),
        V_FORMAT=v_format, DIM_V=dim_v, V_GROUPS=_groups(v_scale), HAS_FP8=has_fp8, num_warps=tile.num_warps,
    )  # fmt: skip


def _tile(num_rows: int, dim: int) -> RowTile:
    """Half as many elements a thread as a copy: they are held in fp32."""
    return row_tile(num_rows, dim, bulk=2048, per_thread=16)


@cache
def _has_fp8(device: torch.device) -> bool:
    """Whether it converts to fp8: compute capability 8.9 and later do, Triton's interpreter does not exactly."""
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def _storage(x: Tensor, has_fp8: bool) -> Tensor:
    """x, or its bytes if they are fp8 and a kernel makes these itself."""
    return x if has_fp8 or x.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) else x.view(torch.uint8)


def _groups(scale: Tensor | None) -> int:
    return 1 if scale is None else scale.shape[-1]


def _argument(x: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor with its strides, as kernels take it."""
    return None if x is None else (x, *x.stride())


def _by_token(x: Tensor | None) -> tuple[Any, ...] | None:
    """[tokens, num_kv_heads, groups] with pages of one token."""
    return None if x is None else _argument(x.unsqueeze(1))


def compile_cases() -> Iterator[CompileCase]:
    """Every format; scales of rows and groups, with zero points and without; given ones; few tokens and many."""
    for nnz, heads, dims, page_size, caches, dtype, groups, zero in (
        (4096, 8, (128, 128), 16, ("e4m3", "e4m3"), torch.bfloat16, 0, False),
        (4096, 2, (72, 72), 1, ("e5m2", "e5m2"), torch.float16, 1, False),
        (1, 8, (128, 128), 16, ("int8", "int8"), torch.bfloat16, 1, False),
        (4096, 8, (128, 128), 16, ("int8", "int8"), torch.bfloat16, 1, True),
        (4096, 8, (128, 128), 16, ("int8", "int8"), torch.bfloat16, 0, False),
        (1, 8, (128, 128), 16, ("int4", "int4"), torch.bfloat16, 4, True),
        (4096, 8, (128, 128), 16, ("int4", "int4"), torch.bfloat16, 4, True),
        (4096, 8, (128, 128), 17, ("int4", "int4"), torch.float32, 1, True),
        (4096, 3, (96, 64), 16, ("int4", "int8"), torch.float16, 1, False),
        (4096, 1, (512, 512), 16, ("int4", "int4"), torch.bfloat16, 4, True),
        (4096, 8, (128, 64), 64, ("plain", "int4"), torch.bfloat16, 2, True),
    ):
        key, value = (torch.empty(nnz, heads, dim, dtype=dtype, device="meta") for dim in dims)
        index = torch.empty(nnz, dtype=torch.int32, device="meta")
        dtypes = {name: narrow for narrow, name in FORMATS.items()} | {"plain": dtype}
        tensors: dict[str, Any] = {"given": torch.empty(heads, device="meta")}
        for side, kv_format, dim in zip("kv", caches, dims, strict=True):
            width = dim // 2 if kv_format == "int4" else dim
            rows = (1024, page_size, heads)
            tensors[side] = torch.empty(*rows, width, dtype=dtypes[kv_format], device="meta")
            factors = torch.empty(*rows, groups, device="meta") if groups and kv_format != "plain" else None
            tensors |= {f"{side}_scale": factors, f"{side}_zero": factors if zero else None}
        given = None if groups else tensors["given"]
        launch = partial(
            quantize_append, tensors["k"], tensors["v"], tensors["k_scale"], tensors["v_scale"], tensors["k_zero"],
            tensors["v_zero"], key, value, given, None, 1.0, 1.0, *[index] * 4,
        )  # fmt: skip
        name = f"nnz={nnz} heads={heads} dims={dims} page={page_size} {caches} {dtype} groups={groups} zero={zero}"
        # older GPUs make the bytes of fp8 by other instructions
        fp8 = {"min_capability": 90} if caches[0] in ("e4m3", "e5m2") else {}
        yield recorded(f"quantize_append {name}", quantize_append_kernel, launch, **fp8)
        if fp8:
            case = recorded(f"quantize_append by bits {name}", quantize_append_kernel, launch, max_capability=80)
            pointers = dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*u8")
            yield replace(case, signature=case.signature | pointers, constexprs=case.constexprs | {"HAS_FP8": False})
    x, out, scale = (torch.empty(4096, 8, n, dtype=t, device="meta")
                     for n, t in ((128, torch.bfloat16), (64, torch.uint8), (4, torch.float32)))  # fmt: skip
    yield recorded("quantize_kv int4", quantize_kernel, partial(quantize_kv, out, scale, scale, x, None))
    out = x.to(torch.float8_e4m3fn)
    yield recorded(
        "quantize_kv e4m3", quantize_kernel, partial(quantize_kv, out, None, None, x, scale[..., 0]), min_capability=90
    )
