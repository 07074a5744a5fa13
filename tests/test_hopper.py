"""What the Hopper family decides on the host: how tensors become matrices for TMA, and what fits into shared memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flashtile import config
from flashtile.config import HOPPER_DIMS, Config, box_rows, hopper, hopper_refusal
from flashtile.kernels.hopper.attention import (
    SHARED_BYTES,
    SMALL_BYTES,
    Matrix,
    as_matrix,
    fit,
    near,
    portable_plan,
    shared_bytes,
    takes,
)
from flashtile.kernels.hopper.spec import Spec, v_empty
from flashtile.plan.encoding import Rope
from flashtile.plan.plan import Lengths, make_plan
from flashtile.plan.problem import Problem, Workload

VIEWS = {
    "nhd": torch.zeros(7, 3, 64),
    "hnd": torch.zeros(3, 7, 64).transpose(0, 1),
    "strided": torch.zeros(9, 5, 80)[1:8, 1:4, 8:72],
    "hnd.strided": torch.zeros(5, 9, 80)[1:4, 1:8, 8:72].transpose(0, 1),
    "shared_head": torch.zeros(7, 1, 64).expand(7, 3, 64),
    "one_head": torch.zeros(7, 1, 64),
    "paged.nhd": torch.zeros(4, 16, 3, 64),
    "paged.hnd": torch.zeros(4, 3, 16, 64).transpose(1, 2),
    "paged.one_tensor": torch.zeros(4, 2, 16, 3, 64)[:, 1],
    "paged.one_tensor.hnd": torch.zeros(4, 2, 3, 16, 64)[:, 1].transpose(1, 2),
    "paged.layers": torch.zeros(4, 5, 2, 16, 3, 64)[:, 2, 0],
    "paged.strided": torch.zeros(4, 17, 4, 72)[:, 1:, 1:, :64],
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_element_is_where_the_matrix_says(name: str) -> None:
    x = VIEWS[name]
    m = as_matrix(x)
    assert isinstance(m, Matrix)
    pages = range(x.shape[0]) if x.dim() == 4 else [None]
    for page in pages:
        part = x if page is None else x[page]
        for token in range(part.shape[0]):
            for head in range(part.shape[1]):
                row = (page or 0) * m.pages + token + head * m.head_rows
                assert row < m.rows
                assert head * m.head_cols + x.shape[-1] <= m.cols
                at = row * m.stride + head * m.head_cols
                assert part[token, head].storage_offset() == x.storage_offset() + at


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(7, 3, 65)[..., :64],  # rows of odd length
        torch.zeros(7 * 3 * 64 + 1)[1:].view(7, 3, 64),  # an odd base
        torch.zeros(1, 3, 64).expand(7, 3, 64),  # tokens that share their rows
        torch.zeros(4, 17, 3, 64)[:, :16].as_strided((4, 16, 3, 64), (16 * 192 + 8, 192, 64, 1)),  # pages between rows
    ],
)
def test_strides_that_tma_cannot_express(x: torch.Tensor) -> None:
    assert as_matrix(x) is None


def test_boxes() -> None:
    assert [box_rows(n, 128) for n in (0, 1, 4, 8, 16, 24, 64, 128, 192, 256)] == [128, 0, 0, 8, 16, 0, 64, 128, 0, 128]


@pytest.mark.parametrize("dims", sorted(HOPPER_DIMS))
@pytest.mark.parametrize("qo_len", [4, 64, 1000])
@pytest.mark.parametrize("gather", [False, True])
def test_shared_memory(dims: tuple[int, int], qo_len: int, gather: bool) -> None:
    half = torch.bfloat16
    c = hopper(Problem(32, 8, *dims, half, half, half), Workload(8, 8 * qo_len, qo_len, 8000, 1000))
    spec = fit(Spec(*dims, c.block_n, c.block_m // 64, c.num_stages, q_slots=2, gather=gather))
    assert shared_bytes(spec) <= SHARED_BYTES - SMALL_BYTES


def test_long_tiles_of_head_dim_64_take_three_consumers() -> None:
    half = torch.bfloat16
    p = Problem(32, 8, 64, 64, half, half, half, window_right=0)
    long, short = Workload(4, 4 * 4096, 4096, 4 * 4096, 4096), Workload(16, 16 * 1024, 1024, 16 * 1024, 1024)
    assert (hopper(p, long).block_m, hopper(p, long).num_stages) == (192, 3)
    assert hopper(p, short).block_m == 128
    assert hopper(replace(p, logits_soft_cap=30.0), long).block_m == 128
    assert hopper(replace(p, page_size=16), long).block_m == 192
    assert hopper(replace(p, page_size=1), long).block_m == 128


def test_stages_are_bounded_by_the_named_barriers() -> None:
    for block_m, stages in ((64, 4), (128, 4), (192, 3)):
        c = Config("hopper", block_m, 64, 1, num_stages=stages)
        spec = Spec(64, 64, c.block_n, block_m // 64, stages, q_slots=2)
        assert v_empty(spec) + stages <= 16
        with pytest.raises(ValueError, match="num_stages"):
            replace(c, num_stages=stages + 1)


def test_appends_over_few_keys() -> None:
    half = torch.bfloat16
    p = Problem(32, 8, 128, 128, half, half, half, page_size=16, window_right=0)

    def chosen(p: Problem, qo_len: int, kv_len: int) -> tuple[str, int, int]:
        c = config.choose(p, Workload(1, qo_len, qo_len, kv_len, kv_len), torch.device("cuda"))
        return c.family, c.block_m, c.num_stages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "capability", lambda device: (9, 0))
        patch.setattr(config, "num_sms", lambda device: 132)
        assert chosen(p, 16, 4096) == ("portable", 64, 5)
        assert chosen(replace(p, page_size=1), 16, 4096)[0] == chosen(p, 16, 32768)[0] == "hopper"
        assert chosen(p, 64, 4096)[:2] == ("hopper", 64)
        assert chosen(p, 64, 32768)[:2] == ("hopper", 128)
        many = Workload(64, 64 * 16, 16, 64 * 128, 128)
        assert config.choose(p, many, torch.device("cuda")).family == "hopper"


def test_refusals() -> None:
    half = torch.bfloat16
    assert hopper_refusal(Problem(32, 8, 128, 128, half, half, half), (9, 0)) is None
    assert "9.0" in (hopper_refusal(Problem(32, 8, 128, 128, half, half, half), (8, 0)) or "")
    assert "80/80" in (hopper_refusal(Problem(32, 8, 80, 80, half, half, half), (9, 0)) or "")
    for encoding, mode in (({"rope": Rope()}, "ROPE_LLAMA"), ({"alibi": True}, "ALIBI")):
        problem = Problem(32, 8, 128, 128, half, half, half, **encoding)  # type: ignore[arg-type]
        assert mode in (hopper_refusal(problem, (9, 0)) or "")
    assert "float8" in (hopper_refusal(Problem(32, 8, 128, 128, half, torch.float8_e4m3fn, half), (9, 0)) or "")


def test_rope_is_served_after_a_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "capability", lambda device: (9, 0))
    monkeypatch.setattr(config, "num_sms", lambda device: 132)
    half, device = torch.bfloat16, torch.device("cuda")
    rope = Problem(32, 8, 128, 128, half, half, half, page_size=16, rope=Rope())
    alibi = replace(rope, rope=None, alibi=True)

    def chosen(problem: Problem, qo_len: int, backend: str = "auto") -> tuple[str, bool]:
        c = config.choose(problem, Workload(8, 8 * qo_len, qo_len, 8 * 4096, 4096), device, backend)
        return c.family, c.copy_first

    assert chosen(rope, 1024) == ("hopper", True)
    for dims, turned in ((128, 128), True), ((96, 96), False), ((192, 128), False), ((256, 256), True):
        p = replace(rope, head_dim_qk=dims[0], head_dim_vo=dims[1])
        c = config.choose(p, Workload(8, 8 * 1024, 1024, 8 * 4096, 4096), device)
        assert (c.copy_first, c.turn_q) == (True, turned and config.ROOMY_PTXAS)
    assert not config.choose(replace(rope, rope=None), Workload(8, 8 * 1024, 1024, 8 * 4096, 4096), device).turn_q
    assert chosen(rope, 64) == chosen(rope, 1) == ("portable", False)
    assert chosen(rope, 64, "fa3") == ("hopper", True)
    assert chosen(rope, 1024, "fa2") == ("portable", False)
    rows = replace(rope, rope=None, page_size=1)
    assert chosen(rows, 4096) == ("hopper", True), "K and V are gathered first where many tiles would gather them"
    assert chosen(rows, 2048) == ("hopper", False)
    assert config.choose(rows, Workload(8, 8 * 4096, 4096, 8 * 4096, 4096), device, may_copy=False).copy_first is False
    assert chosen(alibi, 1024) == ("portable", False)
    assert chosen(replace(rope, rope=None), 1024) == ("hopper", False)
    with pytest.raises(NotImplementedError, match="ALIBI"):
        chosen(alibi, 1024, "fa3")


def test_offsets_of_gathered_rows_are_32_bits_wide() -> None:
    shape, row = (2, 1, 8, 128), (1024, 128, 1)
    assert near(torch.empty_strided(shape, (2**35 - 2048, *row), dtype=torch.bfloat16, device="meta"))
    assert not near(torch.empty_strided(shape, (2**35, *row), dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("dim", [128, 256])
def test_values_out_of_reach_are_refused_before_keys_are_turned(dim: int) -> None:
    half = torch.bfloat16
    lengths = Lengths(np.array([0, 300]), np.array([0]), np.array([700]))
    problem = Problem(8, 2, dim, dim, half, half, half, window_right=0, rope=Rope())
    c = replace(hopper(replace(problem, rope=None), lengths.workload()), copy_first=True, turn_q=True)
    plan = make_plan(problem, c, lengths, torch.zeros(1, dtype=torch.int32), torch.device("cpu"))
    q = torch.empty(300, 8, dim, dtype=half, device="meta")

    def values(head_step: int) -> torch.Tensor:
        return torch.empty_strided((700, 2, dim), (dim, head_step, 1), dtype=half, device="meta")

    assert takes(plan, q, values(700 * dim), q, 1.0)
    assert takes(plan, q, values(700 * dim + 8), q, 1.0) == (dim == 128), "rows are gathered at head_dim 128"
    assert not takes(plan, q, values(2**36 + 8), q, 1.0), "beyond 32 bits, and no whole number of tokens apart"
    assert not takes(plan, q, values(700 * dim), q, -1.0)
    assert plan.inner is not None
    with pytest.raises(AssertionError, match="turned again"):
        portable_plan(plan.inner)
    assert portable_plan(plan).problem == problem


def test_tensors_as_scales_are_left_to_the_portable_family() -> None:
    half, device = torch.bfloat16, torch.device("cpu")
    lengths = Lengths(np.array([0, 300]), np.array([0]), np.array([700]))
    problem = Problem(8, 2, 128, 128, half, half, half, page_size=1, window_right=0)
    for copy_first in (False, True):
        served = replace(problem, page_size=0) if copy_first else problem
        c = replace(hopper(served, lengths.workload()), copy_first=copy_first)
        plan = make_plan(problem, c, lengths, torch.zeros(700, dtype=torch.int32), device)
        other = portable_plan(plan)
        assert (other.config.family, other.problem, other.workspace_size()) == ("portable", problem, 0)
