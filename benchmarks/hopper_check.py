"""Dense and paged prefill of the Hopper family under forced configurations, beside FlashAttention-3 and cuDNN."""

import json
import os
import sys
import time
from dataclasses import replace

import torch

from benchmarks import rivals
from flashtile import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from flashtile.config import hopper
from flashtile.plan.problem import Problem, Workload
from flashtile.testing.timing import time_interleaved

DT = torch.bfloat16
WS = torch.empty(2**28, dtype=torch.uint8, device="cuda")


def config(b, qo, kv, hq, hk, d, dv, causal, page, **kw):
    p = Problem(hq, hk, d, dv, DT, DT, DT, page_size=page, window_right=0 if causal else -1)
    return replace(hopper(p, Workload(b, b * qo, qo, b * kv, kv)), **kw)


def flops(b, qo, kv, hq, d, dv, causal):
    pairs = qo * kv - (qo * (qo - 1) // 2 if causal else 0)
    return 2 * b * hq * (d + dv) * pairs


def ragged(b, s, hq, hk, d, dv, causal, **kw):
    q = torch.randn(b * s, hq, d, dtype=DT, device="cuda")
    k = torch.randn(b * s, hk, d, dtype=DT, device="cuda")
    v = torch.randn(b * s, hk, dv, dtype=DT, device="cuda")
    indptr = torch.arange(b + 1, dtype=torch.int32) * s
    out = torch.empty(b * s, hq, dv, dtype=DT, device="cuda")
    calls = {}
    for name, opts in kw.items():
        w = BatchPrefillWithRaggedKVCacheWrapper(WS, "NHD")
        w._config = config(b, s, s, hq, hk, d, dv, causal, 0, **opts)
        w.plan(indptr, indptr, hq, hk, d, dv, causal=causal, q_data_type=DT)
        calls[name] = lambda w=w: w.run(q, k, v, out=out)
    if d == dv or d == 192:
        r = rivals.dense_attention(q.view(b, s, hq, d), k.view(b, s, hk, d), v.view(b, s, hk, dv), causal)
        calls |= {n: f for n, f in r.items() if n != "sdpa.flash"}
    return calls


def paged(b, qo, kv, hq, hk, d, page, causal, **kw):
    q = torch.randn(b * qo, hq, d, dtype=DT, device="cuda")
    pages = -(-kv // page)
    cache = torch.randn(b * pages, 2, page, hk, d, dtype=DT, device="cuda")
    idx = torch.randperm(b * pages, dtype=torch.int32, device="cuda")
    indptr = torch.arange(b + 1, dtype=torch.int32) * pages
    last = torch.full((b,), kv - (pages - 1) * page, dtype=torch.int32)
    out = torch.empty_like(q)
    calls = {}
    for name, opts in kw.items():
        w = BatchPrefillWithPagedKVCacheWrapper(WS, "NHD")
        w._config = config(b, qo, kv, hq, hk, d, d, causal, page, **opts)
        w.plan(torch.arange(b + 1, dtype=torch.int32) * qo, indptr, idx, last, hq, hk, d, page, causal=causal, q_data_type=DT)
        calls[name] = lambda w=w: w.run(q, cache, out=out)
    return calls


def main(which, budget):
    rows = []
    t0 = time.time()
    limit = float(os.environ.get("LIMIT", "140"))
    for name, make, fl in CASES[which]():
        if time.time() - t0 > limit:
            print("out of time before", name)
            break
        try:
            t = time_interleaved(make(), budget_ms=budget)
        except Exception as e:
            print(name, "FAILED", repr(e)[:300], flush=True)
            continue
        row = {"case": name, **{n: round(fl / x.median_us / 1e6) for n, x in t.items()}, "us": {n: round(x.median_us, 1) for n, x in t.items()}}
        rows.append(row)
        print({k: v for k, v in row.items() if k != "us"}, flush=True)
    if "OUT" in os.environ:
        with open(os.environ["OUT"] + f"/{which}.json", "w") as f:
            json.dump(rows, f)


def headline(heads=((32, 8), (32, 32)), sizes=(512, 1024, 2048, 4096, 8192, 16384), d=128, dv=128, masks=(True, False), **kw):
    kw = kw or {"ours": {}}
    for hq, hk in heads:
        for causal in masks:
            for s in sizes:
                b = 16384 // s
                yield (f"{d} {hq}/{hk} {'c' if causal else 'f'}{s}", lambda b=b, s=s, hq=hq, hk=hk, causal=causal: ragged(b, s, hq, hk, d, dv, causal, **kw), flops(b, s, s, hq, d, dv, causal))


def paged_cases(**kw):
    kw = kw or {"ours": {}}
    for page in (16, 1):
        for s in (512, 1024, 2048, 4096, 8192, 16384):
            b = 16384 // s
            yield f"paged{page} c{s}", lambda b=b, s=s, page=page: paged(b, s, s, 32, 8, 128, page, True, **kw), flops(b, s, s, 32, 128, 128, True)


CASES = {
    "first": lambda: headline(heads=((32, 8),), sched={"dynamic": False, "section_tiles": 1}, dyn={"dynamic": True, "section_tiles": 1024}, sect={"dynamic": False, "section_tiles": 1024}),
    "headline": headline,
    "paged": paged_cases,
}

if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 60.0)
