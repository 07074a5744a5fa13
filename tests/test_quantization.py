"""Packed bits on the CPU: against the definition and numpy, ops, errors."""

import pytest
import torch

from flashtile import quantization
from flashtile.testing import cases_quantization as cases


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_packbits(n: int) -> None:
    cases.check_packbits(n, "cpu")


@pytest.mark.parametrize("lengths", cases.SEGMENTS, ids=str)
def test_segment_packbits(lengths: tuple[int, ...]) -> None:
    cases.check_segment_packbits(lengths, "cpu")


def test_ops() -> None:
    x, out = torch.randint(2, (9,), dtype=torch.bool), torch.empty(2, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.flashtile.packbits.default, (out, x, True))
    indptr, out_indptr = torch.tensor([0, 5, 9]), torch.tensor([0, 1, 2], dtype=torch.int32)
    torch.library.opcheck(torch.ops.flashtile.segment_packbits.default, (out, x, indptr, out_indptr, False))


def test_compiles_as_one_graph() -> None:
    x = torch.randint(2, (77,), dtype=torch.bool)
    compiled = torch.compile(quantization.packbits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), quantization.packbits(x))


def test_errors() -> None:
    x = torch.ones(8, dtype=torch.bool)
    with pytest.raises(ValueError, match="bitorder: expected 'big' or 'little', got 'middle'"):
        quantization.packbits(x, "middle")
    with pytest.raises(ValueError, match="x: expected dtype bool or uint8, got float32"):
        quantization.packbits(x.float())
    with pytest.raises(ValueError, match=r"x: expected shape \[n\], got \[2, 4\]"):
        quantization.packbits(x.view(2, 4))
    with pytest.raises(ValueError, match="indptr: expected values from 0 to 8, got 9 at offset 1"):
        quantization.segment_packbits(x, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="indptr: offsets must not decrease, got 5 then 3 at offset 1"):
        quantization.segment_packbits(x, torch.tensor([0, 5, 3]))
