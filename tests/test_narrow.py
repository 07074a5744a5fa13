"""What is decided on the host about decode over narrow caches on Hopper: when, by what tiles, and for which tensors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flashtile import config
from flashtile.config import Config, narrow_refusal
from flashtile.kernels.hopper.attention import SHARED_BYTES
from flashtile.kernels.hopper.narrow.attention import boxable, descriptor, portable_plan, suits
from flashtile.kernels.hopper.narrow.spec import NarrowSpec, empty, pieces_of_way, room, shared_bytes
from flashtile.plan.encoding import Rope
from flashtile.plan.plan import Lengths, Plan, make_plan
from flashtile.plan.problem import PARTS, Problem, Workload
from flashtile.plan.scales import NO_SCALES, Factor, Scales
from flashtile.testing.cases_attention import CASES, make_inputs, make_wrapper, run_case

INT4 = Problem(32, 8, 128, 128, torch.bfloat16, torch.uint8, torch.bfloat16, page_size=16)


def test_narrow_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "capability", lambda device: (9, 0))
    monkeypatch.setattr(config, "num_sms", lambda device: 132)

    def chosen(p: Problem, batch_size: int, kv_len: int, backend: str = "auto") -> tuple[str, int]:
        work = Workload(batch_size, batch_size, 1, batch_size * kv_len, kv_len)
        c = config.choose(p, work, torch.device("cuda"), backend)
        return c.family, c.heads

    assert chosen(INT4, 64, 4096) == ("narrow", 4)
    assert chosen(INT4, 256, 1024) == ("narrow", 8)
    assert chosen(INT4, 1, 4096) == ("portable", 1)
    assert chosen(INT4, 1, 4096, "fa3") == ("narrow", 4)
    assert chosen(INT4, 256, 1024, "fa2")[0] == "portable"
    int8 = replace(INT4, kv_dtype=torch.int8)
    assert chosen(int8, 16, 4096)[0] == "portable", "it would be cut"
    assert chosen(int8, 64, 1024)[0] == "narrow"
    assert chosen(replace(INT4, rope=Rope()), 64, 4096)[0] == "portable"
    with pytest.raises(NotImplementedError, match="narrow family cannot serve.*position encoding"):
        chosen(replace(INT4, alibi=True), 64, 4096, "fa3")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_qo_heads": 36, "num_kv_heads": 4}, "at most 8 query heads"),
        ({"num_kv_heads": 2}, "multiple of 4 KV heads"),
        ({"head_dim_qk": 96, "head_dim_vo": 96}, "head_dim 64 or 128"),
        ({"head_dim_vo": 64}, "head_dim 64 or 128"),
        ({"v_dtype": torch.int8}, "one narrow type"),
        ({"kv_dtype": torch.bfloat16}, "one narrow type"),
        ({"q_dtype": torch.float32, "o_dtype": torch.float32}, "fp16 or bf16"),
    ],
)
def test_narrow_refusals(fields: dict[str, Any], said: str) -> None:
    one = Workload(8, 8, 1, 8 * 4096, 4096)
    assert narrow_refusal(INT4, one, (9, 0)) is None
    assert "9.0" in (narrow_refusal(INT4, one, (10, 0)) or "")
    assert "one query token" in (narrow_refusal(INT4, replace(one, max_qo_len=2), (9, 0)) or "")
    assert said in (narrow_refusal(replace(INT4, **fields), one, (9, 0)) or "")


@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("kv_dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_narrow_rows_fit(batch_size: int, head_dim: int, kv_dtype: torch.dtype, page_size: int) -> None:
    p = replace(INT4, head_dim_qk=head_dim, head_dim_vo=head_dim, kv_dtype=kv_dtype, page_size=page_size)
    c = config.narrow(p, Workload(batch_size, batch_size, 1, batch_size * 1000, 1000), 132)
    words, parts = head_dim // PARTS[p.k_format], PARTS[p.k_format]
    spec = NarrowSpec(p.k_format, words, parts, c.block_n, c.num_stages, c.heads, page_size, page_size != 1)
    scaled = replace(spec, k_form="token", v_form="token")
    most = replace(scaled, k_zero=True, v_zero=True)
    assert shared_bytes(most) <= SHARED_BYTES - 4096, "besides barriers, and states that are exchanged"
    assert shared_bytes(scaled) > SHARED_BYTES * 0.75, "what is not on its way is lost"
    assert empty(spec) + c.num_stages <= 16, "named barriers"
    assert pieces_of_way(spec) >= 1
    assert c.heads == 8 or room(spec) >= parts
    c.tiling(p, 132)
    with pytest.raises(ValueError, match="block_n"):
        replace(c, block_n=8 if c.heads == 8 else 16).tiling(p, 132)
    with pytest.raises(ValueError, match="num_stages"):
        replace(c, num_stages=13)
    with pytest.raises(ValueError, match="heads"):
        replace(c, heads=2)


def plan_of(p: Problem) -> Plan:
    lengths = Lengths(np.arange(3), np.array([0, 32]), np.array([500, 640]))
    pages = torch.zeros(80, dtype=torch.int32)
    return make_plan(p, config.narrow(p, lengths.workload(), 132), lengths, pages, torch.device("cpu"))


def test_boxes() -> None:
    nhd = torch.empty(8, 16, 8, 32, dtype=torch.int16)
    assert boxable(nhd, 16)
    assert boxable(nhd, 0)
    assert not boxable(nhd, 8)
    assert not boxable(nhd[:1].expand(8, 16, 8, 32), 16)
    d = descriptor(nhd, 4)
    assert (list(d.shape), list(d.strides)) == ([8, 8, 16, 32], [4096, 32, 256, 1])
    assert list(d.block_shape) == [1, 4, 16, 32]
    ragged = descriptor(nhd.view(128, 8, 32), 8)
    assert list(ragged.shape) == [1, 8, 128, 32]


def test_what_suits() -> None:
    q = torch.empty(2, 32, 128, dtype=torch.bfloat16)
    k = torch.empty(8, 16, 8, 32, dtype=torch.int16)

    def fits(scales: Scales = NO_SCALES, k: torch.Tensor = k, out: torch.Tensor = q) -> bool:
        return suits(k, k, out, scales)

    token = Factor("token", torch.empty(8, 16, 8))
    assert fits()
    assert fits(Scales(token, Factor("head", torch.empty(8, dtype=torch.float16))))
    half = Factor("token", token.values.half())
    assert fits(Scales(token, token, token, token))
    assert fits(Scales(half, half, half))
    assert not fits(Scales(token, half)), "of two kinds"
    assert not fits(Scales(Factor("group", torch.empty(8, 16, 8, 4)), token))
    assert not fits(k=torch.empty(8, 16, 8, 36, dtype=torch.int16)[..., :32])
    assert not fits(k=k[:0])
    assert not fits(out=torch.empty(2, 32, 132, dtype=torch.bfloat16)[..., :128])


def test_portable_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashtile.plan.plan.num_sms", lambda device: 132)
    monkeypatch.setattr("flashtile.kernels.hopper.narrow.attention.num_sms", lambda device: 132)
    plan = plan_of(INT4)
    other = portable_plan(plan, 2**20)
    assert other.config.family == "portable"
    assert other.num_merges == 2
    assert portable_plan(plan, 2**20) is other
    assert portable_plan(plan_of(INT4), 100).num_merges == 0, "where there is no room for partial states"


def test_plan_expects_scales_of_the_last_runs_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose = config.choose

    def spy(problem: Problem, work: Workload, device: torch.device, backend: str = "auto", **fields: Any) -> Config:
        asked.append(backend)
        return choose(problem, work, device, backend, **fields)

    monkeypatch.setattr(config, "choose", spy)
    cases = {case.name: case for case in CASES}
    for name in ("decode.int4.token", "decode.int4.group32", "decode.int4.token", "decode.int4.group32"):
        x = make_inputs(cases[name], torch.bfloat16, "cpu")
        if not asked:
            wrapper = make_wrapper(x, "cpu")
        else:
            wrapper.plan(x.kv_indptr, x.kv_indices, x.last_page_len, 4, 2, 64, 16, q_data_type=torch.bfloat16,
                         kv_data_type=torch.uint8)  # fmt: skip
        run_case(x, wrapper)
    wrapper.plan(x.kv_indptr, x.kv_indices, x.last_page_len, 4, 2, 64, 16, q_data_type=torch.bfloat16)
    assert asked == ["auto", "auto", "fa2", "auto", "auto"], "a plain cache has no scales"
