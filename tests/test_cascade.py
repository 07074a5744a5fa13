"""Merging attention states on the CPU: against the oracle, laws, graphs, errors."""

import pytest
import torch

from flashtile import cascade
from flashtile.testing import cases_merge as cases


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_merge_states(case: cases.MergeCase) -> None:
    cases.check_merge_states(case, "cpu")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_merge_state(case: cases.MergeCase) -> None:
    cases.check_merge_state(case, "cpu")


def test_empty_states() -> None:
    cases.check_empty_states("cpu")


def test_any_split_gives_the_whole() -> None:
    cases.check_any_split_gives_the_whole("cpu")


def test_ragged_rows_of_any_length() -> None:
    v, s = torch.randn(7, 2, 8), torch.randn(7, 2)
    got_v, got_s = cascade.variable_length_merge_states(v, s, torch.tensor([0, 3, 3, 7]))
    assert torch.equal(got_v[1], torch.zeros(2, 8))
    assert torch.equal(got_s[1], torch.full((2,), -torch.inf))
    for row, states in ((0, slice(0, 3)), (2, slice(3, 7))):
        expected = cascade.merge_states(v[None, states], s[None, states])
        torch.testing.assert_close((got_v[row], got_s[row]), (expected[0][0], expected[1][0]))


def test_compiles_as_one_graph() -> None:
    def level(v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        v_ab, s_ab = cascade.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
        cascade.merge_state_in_place(v_ab, s_ab, *cascade.merge_states(v, s))
        return v_ab

    v, s = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    assert torch.equal(torch.compile(level, fullgraph=True, backend="aot_eager")(v, s), level(v, s))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(3, 8)}, r"v: expected shape \[n, num_heads, head_dim\], got \[3, 8\]"),
        ({"v": torch.ones(3, 2, 8).int()}, "v: expected dtype float16 or bfloat16 or float32, got int32"),
        ({"s": torch.ones(3, 2).half()}, "s: expected dtype float32, got float16"),
        ({"s": torch.ones(3, 3)}, r"s: expected shape \[3, 2\], got \[3, 3\]"),
        ({"v_other": torch.ones(3, 2, 8).half()}, "v_other: expected the dtype of v"),
        ({"s_other": torch.ones(2, 2)}, r"s_other: expected shape \[3, 2\], got \[2, 2\]"),
        ({"mask": torch.ones(3)}, "mask: expected dtype bool, got float32"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask: expected shape \[3\], got \[4\]"),
    ],
)
def test_errors(change: dict[str, torch.Tensor], message: str) -> None:
    args = {
        "v": torch.ones(3, 2, 8),
        "s": torch.ones(3, 2),
        "v_other": torch.ones(3, 2, 8),
        "s_other": torch.ones(3, 2),
    }
    with pytest.raises(ValueError, match=message):
        cascade.merge_state_in_place(**(args | change))


def test_ragged_errors() -> None:
    v, s = torch.ones(3, 2, 8), torch.ones(3, 2)
    with pytest.raises(ValueError, match="indptr: expected values from 0 to 3, got 4 at offset 1"):
        cascade.variable_length_merge_states(v, s, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="indptr: offsets must not decrease"):
        cascade.variable_length_merge_states(v, s, torch.tensor([0, 2, 1]))
