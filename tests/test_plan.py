"""Laws of the scheduler: what must hold for every batch, whatever it looks like."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.config import Config
from flashtile.plan.plan import Lengths, make_plan
from flashtile.plan.problem import Problem
from flashtile.plan.worklist import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    Tiling,
    WorkList,
    choose_chunk,
    lone_tile,
    make_worklist,
    take_turns,
)

LENGTHS = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 3000)), min_size=1, max_size=12)
TILINGS = st.builds(
    lambda pack, block_m, block_n, heads, capacity, chunk: Tiling(
        block_m, block_n, pack, heads, heads, capacity, kv_chunk=chunk * block_n
    ),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from([16, 64, 128]),
    st.sampled_from([16, 64]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 8, 132, 528]),
    st.sampled_from([0, 0, 1, 5]),
)
WINDOWS = st.sampled_from([-1, 0, 17, 500])


def worklist(lengths: list[tuple[int, int]], tiling: Tiling, left: int, right: int) -> tuple[WorkList, dict, dict]:  # type: ignore[type-arg]
    qo = np.array([n for n, _ in lengths])
    kv = np.array([n for _, n in lengths])
    work = make_worklist(np.r_[0, qo.cumsum()], np.r_[0, kv.cumsum()[:-1]], kv, tiling, left, right)
    items = dict(zip(ITEM_FIELDS, work.items.T.astype(int), strict=True))
    merges = dict(zip(MERGE_FIELDS, work.merges.T.astype(int), strict=True))
    return work, items, merges


@settings(max_examples=150, deadline=None)
@given(LENGTHS, TILINGS, WINDOWS, st.sampled_from([-1, 0]))
def test_each_visible_key_of_each_row_is_in_exactly_one_item(lengths, tiling, left, right) -> None:  # type: ignore[no-untyped-def]
    work, items, merges = worklist(lengths, tiling, left, right)
    for r, (qo_len, kv_len) in enumerate(lengths):
        mine = items["request"] == r
        tiles = sorted(set(items["row_begin"][mine]))
        assert tiles == list(range(0, qo_len * tiling.pack, tiling.block_m))
        for tile in tiles:
            at = np.flatnonzero(mine & (items["row_begin"] == tile))
            ranges = sorted(zip(items["kv_begin"][at], items["kv_end"][at], strict=True))
            for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False):
                assert end == begin, "chunks of a tile must touch and not overlap"
            first, last = tile // tiling.pack, min((tile + tiling.block_m - 1) // tiling.pack, qo_len - 1)
            lo = 0 if left < 0 else max(first + kv_len - qo_len - left, 0)
            hi = kv_len if right < 0 else min(max(last + kv_len - qo_len + right + 1, 0), kv_len)
            if lo < hi:
                assert ranges[0][0] <= lo
                assert ranges[-1][1] == hi
            for begin, end in ranges:
                assert begin % tiling.block_n == 0
                assert begin <= end <= kv_len
            slots = sorted(items["slot"][at])
            if len(at) == 1:
                assert slots == [-1], "a whole tile writes its own result"
                continue
            m = np.flatnonzero(
                (merges["q_begin"] == items["q_begin"][at[0]])
                & (merges["row_begin"] == tile)
                & (merges["qo_len"] == qo_len)
            )
            owner = [j for j in m if slots[0] == merges["slot_begin"][j]]
            assert len(owner) == 1, "a cut tile has one merge entry"
            assert slots == list(range(slots[0], slots[0] + merges["num_slots"][owner[0]]))
    used = np.sort(items["slot"][items["slot"] >= 0])
    assert (used == np.arange(work.num_slots)).all(), "slots are used once and without gaps"


@settings(max_examples=100, deadline=None)
@given(LENGTHS, TILINGS)
def test_longest_items_come_first(lengths, tiling) -> None:  # type: ignore[no-untyped-def]
    _, items, _ = worklist(lengths, tiling, -1, 0)
    assert (np.diff(-(-(items["kv_end"] - items["kv_begin"]) // tiling.block_n)) <= 0).all(), "counted in steps"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 200_000), min_size=1, max_size=300),
    st.sampled_from([1, 8, 32]),
    st.sampled_from([132, 528]),
)
def test_slots_are_bounded_by_the_ctas(kv_lens, heads, capacity) -> None:  # type: ignore[no-untyped-def]
    tiling = Tiling(16, 64, 1, heads, heads, capacity)
    work, _, _ = worklist([(1, n) for n in kv_lens], tiling, -1, -1)
    assert work.num_slots * heads <= 8 * max(capacity, heads)


def test_few_long_requests_fill_the_gpu_and_many_are_not_cut() -> None:
    tiling = Tiling(16, 64, 4, 8, 8, 132)
    one = choose_chunk(np.array([131072]), tiling)
    assert 132 * 0.9 <= -(-131072 // one) * 8 <= 132 * 4
    assert choose_chunk(np.full(256, 1024), tiling) == 0
    assert choose_chunk(np.array([131072] + [1024] * 63), tiling) > 0, "one long request among short ones is cut"


def test_long_causal_prefill_is_not_cut() -> None:
    for length, batch_size in ((4096, 4), (16384, 1)):
        tiling = Tiling(128, 128, 1, 32, 8, 132, split_cost=4.0)
        work, _, _ = worklist([(length, length)] * batch_size, tiling, -1, 0)
        assert work.num_slots == 0, "short tiles fill the gaps of long ones"


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.sampled_from([1, 8, 132]), st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 64]), st.booleans())
def test_each_tile_has_one_turn(lengths, capacity, heads_per_item, section_tiles, pack_decode) -> None:  # type: ignore[no-untyped-def]
    tiling = Tiling(
        64, 64, 1, 4, heads_per_item, capacity,
        section_tiles=section_tiles, persistent=True, pack_decode=pack_decode,
    )  # fmt: skip
    work, items, _ = worklist(lengths, tiling, -1, 0)
    turns = take_turns(work.items, tiling)
    heads = range(heads_per_item)
    tiles = [
        entry * heads_per_item + head
        for entry, qo_len in enumerate(items["qo_len"])
        for head in (heads[:1] if pack_decode and qo_len == 1 else heads)
    ]
    assert sorted(turns[turns >= 0]) == tiles
    assert not tiles or list(turns[0]) == tiles[: turns.shape[1]], "the first one is known"
    for cta in turns.T:
        taken = np.flatnonzero(cta >= 0)
        assert list(taken) == list(range(len(taken))), "a CTA takes its tiles without a pause"
    assert (turns[-3:] == -1).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [2048, 4096, 16384])
def test_turns_are_balanced(length: int, causal: bool) -> None:
    tiling = Tiling(128, 128, 1, 32, 4, 132, split_cost=4.0, section_tiles=512 if causal else 1, persistent=True)
    work, items, _ = worklist([(length, length)] * (16384 // length), tiling, -1, 0 if causal else -1)
    steps = -(-(items["kv_end"] - items["kv_begin"]) // 128)
    turns = take_turns(work.items, tiling)
    done = np.where(turns >= 0, np.repeat(steps, 4)[turns], 0).sum(0)
    whole = causal or length < 8192  # tiles so short that cutting the last ones would not pay
    assert done.max() <= (1.032 if whole and not causal else 1.012) * done.mean()
    assert (work.num_slots == 0) == whole, "a last wave of few long tiles is cut"


def test_head_sections_cover_each_head_once() -> None:
    tiling = Tiling(128, 128, 1, 32, 8, 132)
    _, items, _ = worklist([(300, 300), (17, 500)], tiling, -1, 0)
    for tile in {(r, b) for r, b in zip(items["request"], items["row_begin"], strict=True)}:
        at = (items["request"] == tile[0]) & (items["row_begin"] == tile[1])
        assert sorted(items["head_begin"][at]) == [0, 8, 16, 24]


@pytest.mark.parametrize("window_left", [-1, 100])
@pytest.mark.parametrize("kv_chunk", [0, 64])
@pytest.mark.parametrize("kv_len", [0, 1, 300, 320])
def test_a_lone_tile_says_what_its_items_say(kv_len: int, kv_chunk: int, window_left: int) -> None:
    tiling = Tiling(16, 32, 4, 2, 2, 132, kv_chunk=kv_chunk)
    work, items, _ = worklist([(3, kv_len)], tiling, window_left, 0)
    lone = lone_tile(work.items, tiling)
    assert lone is not None
    begin = lone.begin + np.arange(len(work.items)) * lone.chunk
    assert np.array_equal(begin, items["kv_begin"])
    assert np.array_equal(np.minimum(begin + lone.chunk, lone.end), items["kv_end"])
    assert np.array_equal(items["slot"], np.arange(len(work.items)) if len(work.items) > 1 else [-1])
    for name in ("qo_len", "kv_base", "kv_len"):
        assert (items[name] == getattr(lone, name)).all()


@pytest.mark.parametrize("requests", [[(3, 50), (1, 50)], [(0, 50), (3, 50)], [(5, 50)]])
def test_several_tiles_are_not_a_lone_one(requests: list[tuple[int, int]]) -> None:
    tiling = Tiling(16, 32, 4, 2, 2, 132)
    work, _, _ = worklist(requests, tiling, -1, 0)
    assert lone_tile(work.items, tiling) is None
    assert lone_tile(work.items[:0], tiling) is None


def test_a_persistent_grid_reads_its_items() -> None:
    tiling = Tiling(16, 32, 4, 2, 2, 132, persistent=True)
    work, _, _ = worklist([(3, 50)], tiling, -1, 0)
    assert lone_tile(work.items, tiling) is None


def test_plan_prints_and_sizes_its_workspace() -> None:
    problem = Problem(8, 2, 64, 64, torch.float16, torch.float16, torch.float16, page_size=16)
    lengths = Lengths(np.array([0, 1]), np.array([0]), np.array([100]))
    plan = make_plan(
        problem, Config("portable", 16, 32, 4, kv_chunk=32), lengths, torch.zeros(7).int(), torch.device("cpu")
    )
    assert (plan.num_slots, plan.num_merges, plan.num_items) == (4, 1, 4)
    assert plan.workspace_size() == 4 * 2 * 16 * (64 + 1) * 4
    assert "page_size=16" in repr(problem)


def test_configurations_that_do_not_fit_are_refused() -> None:
    problem = Problem(12, 3, 64, 64, torch.float16, torch.int8, torch.float16, page_size=16)
    config = Config("portable", 16, 64, 4, ways=4, heads=2)
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        config.tiling(problem, 132)
    with pytest.raises(ValueError, match="shared evenly"):
        Config("portable", 16, 64, 4, num_warps=8, ways=4)
