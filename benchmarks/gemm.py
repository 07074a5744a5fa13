"""Area gemm: grouped products of experts (square) and LoRA (down to a rank and up again), and batched fp8 products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Call, NotAvailable, Overrides, Workload, public
from flashtile.testing.cases_bench import GemmBench


def gemm(case: GemmBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """The workload of one product; rivals are PyTorch's grouped or scaled product, and a loop of plain ones."""
    if overrides:
        raise NotAvailable("takes no --config: only attention and sample have one")
    ours, rivals = (_bmm_fp8 if case.op == "bmm_fp8" else _grouped)(case, device)
    return Workload({"flashtile": ours}, rivals if with_rivals else {})


def _grouped(case: GemmBench, device: torch.device) -> tuple[Call, dict[str, Call]]:
    wrapper = public("SegmentGEMMWrapper")(torch.empty(1, device=device))
    x = torch.randn(case.groups * case.rows, case.d_in, dtype=torch.bfloat16, device=device)
    weights = torch.empty(case.groups, case.d_out, case.d_in, dtype=torch.bfloat16, device=device)
    for weight in weights:
        weight.normal_()
    indptr = torch.arange(case.groups + 1, device=device) * case.rows
    out, theirs = (x.new_empty(x.shape[0], case.d_out) for _ in range(2))
    each = (case.groups, case.rows, -1)
    segments = list(zip(x.view(each), weights.transpose(1, 2), theirs.view(each), strict=True))

    def loop() -> None:
        for rows, weight, result in segments:
            torch.mm(rows, weight, out=result)

    rivals: dict[str, Call] = {"torch.mm": loop}
    if (grouped := _grouped_mm()) is not None:
        ends = indptr[1:].int()
        rivals["torch.grouped_mm"] = lambda: grouped(x, weights.transpose(1, 2), offs=ends)
    return lambda: wrapper.run(x, weights, case.groups, True, out=out, seg_indptr=indptr), rivals


def _grouped_mm() -> Callable[..., Tensor] | None:
    """PyTorch's grouped product, public from 2.10 on."""
    found: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    return found  # type: ignore[no-any-return]


def _bmm_fp8(case: GemmBench, device: torch.device) -> tuple[Call, dict[str, Call]]:
    bmm_fp8 = public("bmm_fp8")
    a, b = (
        torch.randn(case.groups, n, case.d_in, device=device).to(torch.float8_e4m3fn) for n in (case.rows, case.d_out)
    )
    scale = torch.ones((), device=device)
    out = torch.empty(case.groups, case.rows, case.d_out, dtype=torch.bfloat16, device=device)

    def scaled(fast: bool) -> Call:
        def loop() -> None:
            for x, weight in zip(a, b, strict=True):
                torch._scaled_mm(x, weight.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=fast)

        return loop

    rivals = {"torch._scaled_mm": scaled(False), "torch._scaled_mm.fast": scaled(True)}
    return lambda: bmm_fp8(a, b.transpose(1, 2), scale, scale, torch.bfloat16, out=out), rivals
