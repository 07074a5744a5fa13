"""Packed bits on the CPU: against the definition and numpy, graphs, errors."""

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
