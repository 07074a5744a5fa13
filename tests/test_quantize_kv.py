"""Quantised keys and values on the CPU, alone and on their way into the paged cache: cases, errors."""

import pytest
import torch

import flashtile
from flashtile.testing import cases_quantize_kv as cases


@pytest.mark.parametrize("case", cases.FORMAT_CASES, ids=str)
def test_quantize_kv(case: cases.FormatCase) -> None:
    cases.check_quantize_kv(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_value_in_fp8(dtype: torch.dtype) -> None:
    cases.check_every_value_in_fp8(dtype, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_quantize_append(case: cases.QuantiseCase) -> None:
    cases.check_quantize_append(case, "cpu")


def arguments(cache: torch.dtype = torch.int8, width: int = 64) -> dict[str, object]:
    """Three tokens for four pages of two, one head of 64 dims."""
    return {
        "append_key": torch.ones(3, 1, 64),
        "append_value": torch.ones(3, 1, 64),
        "batch_indices": torch.tensor([0, 0, 1]),
        "positions": torch.tensor([1, 2, 0]),
        "paged_kv_cache": torch.zeros(4, 2, 2, 1, width).to(cache),
        "kv_indices": torch.tensor([0, 1, 2]),
        "kv_indptr": torch.tensor([0, 2, 3]),
        "kv_last_page_len": torch.tensor([1, 1]),
    }


FP8, INT8 = arguments(torch.float8_e4m3fn), arguments()
INT4 = arguments(torch.uint8, 32)
WRITTEN = {name: torch.zeros(4, 2, 1) for name in ("k_scale", "v_scale", "k_zero", "v_zero")}
GROUPS = {name: torch.zeros(4, 2, 1, 2) for name in WRITTEN}
GIVEN = {"k_scale": 0.5, "v_scale": 0.5}


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            INT8,
            ValueError,
            "k_scale: an int8 cache needs a tensor to write scales to, .*, or a given scale: .*got None",
        ),
        (INT8 | {"k_scale": 0.5}, ValueError, "v_scale: an int8 cache needs .*got None"),
        (INT4, ValueError, "k_scale: an int4 cache needs a tensor to write scales to, .*got None"),
        (INT4 | GIVEN, ValueError, r"k_scale: an int4 cache needs a tensor .*its place; got 0\.5"),
        (
            INT4 | WRITTEN | {"v_scale": torch.ones(1)},
            ValueError,
            r"v_scale: an int4 cache needs .*got a tensor of shape \[1\]",
        ),
        (INT8 | {"k_scale": "1"}, TypeError, "k_scale: expected a number or a torch.Tensor, got str"),
        (INT8 | GIVEN | {"v_scale": 0.0}, ValueError, "v_scale: expected a number other than 0"),
        (
            INT8 | GIVEN | {"k_scale": torch.ones(3)},
            ValueError,
            r"k_scale: expected one value or \[1\] .*got a tensor of shape \[3\]",
        ),
        (
            INT8 | GIVEN | {"k_scale": torch.ones(1).long()},
            ValueError,
            "k_scale: expected dtype float16 or bfloat16 or float32, got int64",
        ),
        (
            INT8 | GIVEN | {"v_zero": WRITTEN["v_zero"]},
            ValueError,
            r"v_zero: expected None, since a given scale has no zero point; got a tensor of shape \[4, 2, 1\]",
        ),
        (FP8 | WRITTEN, ValueError, "k_zero: expected None, since fp8 has no zero point"),
        (FP8 | {"k_scale": GROUPS["k_scale"]}, ValueError, "k_scale: expected the cache's shape without head_dim, got"),
        (
            INT4 | WRITTEN | {"k_scale": torch.zeros(4, 1, 2)},
            ValueError,
            r"k_scale: expected \[4, 2, 1\], the cache's shape .*got a tensor of shape \[4, 1, 2\]",
        ),
        (
            INT4 | GROUPS | {"v_scale": torch.zeros(4, 2, 1, 4)},
            ValueError,
            r"v_scale: expected the cache's shape without head_dim, or that and groups of \(32, 64, 128\) elements of "
            r"head_dim 64, got a tensor of shape \[4, 2, 1, 4\]",
        ),
        (
            INT4 | GROUPS | {"k_zero": WRITTEN["k_zero"]},
            ValueError,
            r"k_zero: expected the shape of k_scale, a tensor of shape \[4, 2, 1, 2\], got .* \[4, 2, 1\]",
        ),
        (INT4 | WRITTEN | {"k_zero": 8.0}, TypeError, "k_zero: expected a torch.Tensor, got float"),
        (
            INT4 | WRITTEN | {"k_scale": WRITTEN["k_scale"].half()},
            ValueError,
            "k_scale: expected dtype float32, got float16",
        ),
        (arguments(torch.float32) | GIVEN, ValueError, "k_scale: expected None for rows that have the cache's dtype"),
        (
            INT4 | WRITTEN | {"append_key": torch.ones(3, 1, 32)},
            ValueError,
            r"append_key: expected shape \[nnz, 1, 64\], got \[3, 1, 32\]",
        ),
        (
            INT8 | GIVEN | {"append_key": torch.ones(3, 1, 64).long(), "append_value": torch.ones(3, 1, 64).long()},
            ValueError,
            r"paged_kv_cache \(k\): expected dtype int64, got int8",
        ),
        (
            arguments(torch.bfloat16),
            ValueError,
            r"paged_kv_cache \(k\): expected dtype float32 or float8_e4m3fn or .*uint8, got bfloat16",
        ),
        (
            arguments(torch.uint8, 6)
            | WRITTEN
            | {"append_key": torch.ones(3, 1, 12), "append_value": torch.ones(3, 1, 12)},
            ValueError,
            "append_key: expected a head_dim that is a multiple of 8, got 12",
        ),
    ],
)
def test_append_errors(args: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flashtile.append_paged_kv_cache(**args)  # type: ignore[arg-type]


def test_rows_of_the_cache_dtype_are_copied() -> None:
    """int4 that came quantised: bytes in, bytes out."""
    numbers, _, _ = flashtile.quantize_kv_int4(torch.randn(3, 1, 64))
    args = INT4 | {"append_key": numbers, "append_value": numbers, "paged_kv_cache": torch.zeros(4, 2, 2, 1, 32).byte()}
    flashtile.append_paged_kv_cache(**args)  # type: ignore[arg-type]
    cache = args["paged_kv_cache"]
    assert isinstance(cache, torch.Tensor)
    assert torch.equal(cache[[0, 1, 2], :, [1, 0, 0]], torch.stack([numbers] * 2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.5, "symmetric": False}, "scale: given numbers are symmetric"),
        ({"scale": 0.5, "group_size": 32}, "scale: expected None with group_size 32"),
        ({"group_size": 48}, "group_size: expected one of"),
        ({"scale": torch.ones(7)}, r"scale: expected one value, \[2\] or \[5, 2\], got \[7\]"),
    ],
)
def test_quantize_kv_int8_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flashtile.quantize_kv_int8(torch.ones(5, 2, 96), **options)  # type: ignore[arg-type]


def test_rows_need_heads() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[..., num_kv_heads, head_dim\], got \[64\]"):
        flashtile.quantize_kv_int4(torch.ones(64))


def test_a_group_too_small_for_a_scale_is_zeros() -> None:
    """The largest element over 127 is 0 in fp32: such a scale would divide by zero."""
    numbers, scale, _ = flashtile.quantize_kv_int8(torch.full((1, 1, 16), 1e-45))
    assert scale.tolist() == [[1.0]]
    assert not numbers.any()
