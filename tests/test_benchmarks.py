"""The benchmarks without a GPU: names, counts of bytes and operations, the runner, the baseline."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main, parse_config, select
from benchmarks.report import Row
from flashtile.testing.cases_bench import EXTRA_NAMES, parse_case
from flashtile.testing.timing import Ceilings, Timing, copy_ceiling, matmul_ceiling, read_ceiling, time_interleaved

ROW = Row("decode/x", "flashtile", 100.0, 99.0, 101.0, 1.0, 1.0, 1.0, report.PUBLISHED_DEVICE, "2", "3", "today", "run")


def figures() -> list[dict[str, str]]:
    with report.PUBLISHED.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["us"]]


# --- cases -----------------------------------------------------------------------------------------------------------


def test_counts_agree_with_published_rates() -> None:
    """Operations and bytes over each published time are the published rates, up to their rounding."""
    wrong = []
    for row in figures():
        case, us = parse_case(row["case"]), float(row["us"])
        counted = {"tflops": case.flops / us / 1e6, "gbps": case.bytes / us / 1e3}
        for rate, value in counted.items():
            slack = 0.51 + value * 0.051 / us  # whole TFLOP/s and GB/s; times to 0.1 us
            # the published GB/s of cached attention leave out q and out
            low = 0.8 * value if rate == "gbps" and case.area in ("decode", "append", "mla") else value
            if not low - slack <= float(row[rate]) <= value + slack:
                wrong.append(f"{case.name} {row['peer']}: {value:.2f} {rate}, published {row[rate]}")
    assert wrong == []


def test_parse_attention_names() -> None:
    case = parse_case("decode/b64.kv4096.h32/8.fp8.page16")
    assert (case.batch_size, case.qo_len, case.kv_len) == (64, 1, 4096)
    assert (case.num_qo_heads, case.num_kv_heads, case.page_size, case.kv_dtype) == (32, 8, 16, "fp8")
    case = parse_case("paged/b2.s8192.h32/8.causal.page1")
    assert (case.qo_len, case.kv_len, case.causal, case.page_size) == (8192, 8192, True, 1)
    case = parse_case("append/b64.q4.kv4096.h32/8.page1")
    assert (case.qo_len, case.kv_len, case.causal, case.page_size) == (4, 4096, True, 1)
    assert parse_case("decode/b64.kv4096.h32/8.bf16.page16.rope").encoding == "rope"
    assert case.encoding == "none"
    assert not parse_case("prefill/b1.s16384.h32/32.full").causal


def test_every_name_parses_to_itself() -> None:
    assert all(parse_case(name).name == name for name in (*report.published(), *EXTRA_NAMES))


@pytest.mark.parametrize("name", ["", "decode", "decode/b64", "host/decode.b64", "prefill/b1.s1.h1/1.causal.page4"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name: expected a case such as"):
        parse_case(name)


# --- the timer -------------------------------------------------------------------------------------------------------


def test_calls_take_turns() -> None:
    order: list[str] = []
    timings = time_interleaved({name: partial(order.append, name) for name in "abc"}, device="cpu", budget_ms=0)
    assert list(timings) == ["a", "b", "c"]
    assert all(t.min_us <= t.median_us <= t.p90_us and t.rounds >= 5 for t in timings.values())
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds[:4] == ["abc", "bca", "cab", "abc"]


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match="fns: expected at least one call"):
        time_interleaved({}, device="cpu")


@pytest.mark.parametrize("ceiling", [copy_ceiling, read_ceiling, matmul_ceiling])
def test_ceilings_on_the_cpu(ceiling: Callable[[str], float]) -> None:
    assert 0 < ceiling("cpu") < 1e4


# --- the report ------------------------------------------------------------------------------------------------------


def test_percent_of_ceiling_is_of_the_binding_ceiling() -> None:
    case = parse_case("prefill/b1.s16384.h32/8.causal")
    about = {"device": "d", "torch": "t", "triton": "t", "date": "d", "command": "c"}
    row = report.make_row(case, "flashtile", Timing(5000.0, 4900.0, 5100.0, 9), Ceilings(3000.0, 3000.0, 800.0), about)
    assert row.percent_of_ceiling == pytest.approx(100 * row.tflops / 800, abs=0.1)
    assert row.gbps < 3000 / 4


def test_best_rival_prefers_figures_of_the_same_run() -> None:
    case = "prefill/b1.s16384.h32/8.causal"
    ours, fa3 = replace(ROW, case=case), replace(ROW, case=case, peer="fa3_fwd", us=9000.0)
    assert report.best_rival(case, [ours]) == ("fa3_fwd*", 3016.4)
    assert report.best_rival(case, [ours, fa3]) == ("flashinfer.fa3.single*", 3306.2)
    elsewhere = [replace(row, device="another GPU") for row in (ours, fa3)]
    assert report.best_rival(case, elsewhere) == ("fa3_fwd", 9000.0)
    assert report.best_rival(case, elsewhere[:1]) is None


def test_geometric_mean_takes_our_fastest_row() -> None:
    def group(case: str, ours: float, single: float, rival: float) -> list[Row]:
        peers = {"flashtile": ours, "flashtile.single": single, "torch": rival}
        peers |= {"flashtile.dense": 0.1, "flashtile.plain[block_m=64]": 0.1}  # of other problems
        return [replace(ROW, case=case, peer=peer, us=us, device="d") for peer, us in peers.items()]

    means = report.geometric_means([*group("elem/a", 4.0, 2.0, 4.0), *group("elem/b", 1.0, 3.0, 8.0)])
    (area, (mean, count)), *others = means.items()
    assert (area, count, others) == ("elem", 2, [])
    assert mean == pytest.approx(4.0)


def test_a_row_15_percent_over_its_baseline_is_a_regression() -> None:
    rows = [replace(ROW, us=114.9), replace(ROW, case="decode/y", us=115.1), replace(ROW, case="decode/new")]
    baseline = [ROW, replace(ROW, case="decode/y"), replace(ROW, case="decode/gone")]
    assert report.regressions(rows, baseline) == ["decode/y flashtile: 115.1 us, baseline 100.0 us"]
    assert report.regressions([replace(ROW, peer="torch", us=math.inf)], [replace(ROW, peer="torch")]) == []


# --- the runner ------------------------------------------------------------------------------------------------------


def test_select() -> None:
    names = [case.name for case in select(["attention"], "kv1024.h32/8.bf16.page1$|s512.*full")]
    assert names[0].startswith("prefill/")
    assert {name.partition("/")[0] for name in names} == {"prefill", "decode"}
    assert len(select([], "")) == len(report.published()) + len(set(EXTRA_NAMES) - set(report.published()))


def test_parse_config() -> None:
    assert parse_config("block_m=64,split=False,item_cost=0.5,family=portable") == {
        "block_m": 64,
        "split": False,
        "item_cost": 0.5,
        "family": "portable",
    }


@pytest.mark.parametrize("argument", ["nowhere", "--config=block_k=3"])
def test_wrong_arguments_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([argument, "--device", "cpu"])
    assert "unknown" in capsys.readouterr().err


def test_a_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One small case of each kind; what is not built is listed, and a baseline ten times faster fails the run."""
    out = tmp_path / "rows.jsonl"
    small = r"rmsnorm.t1$|decode/b1.kv1024.h32/8.bf16.page16|grouped.g8.m16.k4096.n16$|mla/b1.kv1024.h16.page1$|"
    small += r"s16384.h32/32.full"
    arguments = ["--device", "cpu", "--budget-ms", "1", "--filter", small]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1 of mla: flashtile.mla.BatchMLAPagedAttentionWrapper is not built yet" in printed
    assert "1 of prefill: needs 0.54 GB" in printed
    rows = report.read_rows(out)
    assert {row.case for row in rows} >= {
        "elem/rmsnorm.t1",
        "decode/b1.kv1024.h32/8.bf16.page16",
        "gemm/grouped.g8.m16.k4096.n16",
    }
    assert all(row.us > 0 and row.torch == torch.__version__ for row in rows)

    baseline = tmp_path / "baseline.jsonl"
    baseline.write_text("".join(json.dumps({**json.loads(row.to_json()), "us": row.us / 10}) + "\n" for row in rows))
    assert main([*arguments, "--no-rivals", "--baseline", str(baseline)]) == 1
    assert "15 % slower than baseline.jsonl:" in capsys.readouterr().out
