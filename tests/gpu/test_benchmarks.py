"""The timer and the runner on a CUDA device, which must have nothing else to do meanwhile."""

from pathlib import Path

import torch

from benchmarks.__main__ import main
from benchmarks.report import read_rows
from flashtile.testing.timing import measure_ceilings, time_graph


def test_an_evicted_buffer_is_slower_to_read() -> None:
    x = torch.randn(2**22, device="cuda")  # 16 MB: fits in L2
    cold, warm = time_graph(x.sum, cold_l2=True), time_graph(x.sum, cold_l2=False)
    assert warm.min_us < cold.min_us  # the rounds that nothing disturbed


def test_ceilings_are_plausible() -> None:
    ceilings = measure_ceilings("cuda")
    assert 100 < ceilings.copy_gbps < 20_000
    assert 0.5 < ceilings.read_gbps / ceilings.copy_gbps < 1.5
    assert 10 < ceilings.matmul_tflops < 5_000


def test_a_run(tmp_path: Path) -> None:
    """One small case of each area that is built; rivals in the same run."""
    out = tmp_path / "rows.jsonl"
    small = r"t128$|b1\.v32000|decode/b1\.kv1024\.h32/8\.bf16|(prefill|paged)/b32\.s512\.h32/8\.causal|append.*q4"
    nowhere = str(tmp_path / "none.jsonl")
    assert (
        main(["--device", "cuda", "--budget-ms", "5", "--filter", small, "--out", str(out), "--baseline", nowhere]) == 0
    )
    rows = read_rows(out)
    assert {row.case.partition("/")[0] for row in rows} >= {"prefill", "paged", "append", "decode", "elem", "sample"}
    assert [row for row in rows if not 0 < row.percent_of_ceiling < 120] == []
    assert {"sdpa.flash", "torch"} <= {row.peer for row in rows}
