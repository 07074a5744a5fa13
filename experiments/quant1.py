# ruff: noqa: E501
"""Decode over int8 and int4 caches: which part costs what, on a GPU. An experiment, not part of the library.

    python experiments/quant1.py [seconds]

Phases: compile in parallel; check against fp64; what the cache's layout and the scales cost; configurations in turns.
"""

import ctypes
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import flashtile
from benchmarks import attention
from benchmarks.__main__ import parse_config
from flashtile.config import portable
from flashtile.plan.problem import Problem, Workload
from flashtile.quantization import dequantize_kv_int4, dequantize_kv_int8
from flashtile.testing.cases_bench import parse_case
from flashtile.testing.timing import copy_ceiling, time_interleaved

START = time.time()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU: to try the checks in the interpreter
BUDGET = float(sys.argv[1]) if len(sys.argv) > 1 and __name__ == "__main__" else 85.0
HEADS2 = "ways=4,heads=2,ctas_per_sm=2"
HEADS4 = "num_warps=8,ways=8,heads=4,ctas_per_sm=1"
VARIANTS = {
    "int4": [
        "", "block_n=128", "block_n=128,raw=True", "block_n=128,raw=True,num_stages=5",
        f"{HEADS2},block_n=128", f"{HEADS2},block_n=128,raw=True", f"{HEADS2},block_n=128,raw=True,num_stages=5",
        f"{HEADS2},block_n=64,raw=True", f"{HEADS2},block_n=64,raw=True,num_stages=5",
        f"{HEADS4},block_n=128,raw=True,num_stages=5", f"{HEADS4},block_n=64,raw=True,num_stages=5",
        "ways=4,heads=4,ctas_per_sm=2,block_n=64,raw=True,num_stages=5",
        "num_warps=8,ways=8,heads=8,ctas_per_sm=1,block_n=64,raw=True,num_stages=5",
        "ways=4,block_n=256,raw=True,ctas_per_sm=2",
    ],
    "int8": [
        "", "block_n=256,ctas_per_sm=2", "block_n=256,ctas_per_sm=2,raw=True",
        f"{HEADS2},block_n=64", f"{HEADS2},block_n=64,raw=True", f"{HEADS2},block_n=64,raw=True,num_stages=5",
        f"{HEADS4},block_n=64,raw=True,num_stages=5", f"{HEADS4},block_n=32,raw=True,num_stages=7",
    ],
    "fp8": ["", f"{HEADS2},block_n=64", f"{HEADS2},block_n=64,num_stages=5", "block_n=128,max_registers=128"],
    "bf16": [""],
}  # fmt: skip
LARGE = {
    "int4": ["", "block_n=128,raw=True", f"{HEADS2},block_n=128,raw=True,num_stages=5",
             f"{HEADS4},block_n=128,raw=True,num_stages=5", f"{HEADS2},block_n=128,raw=True"],
    "int8": ["", "block_n=256,ctas_per_sm=2", f"{HEADS2},block_n=64,raw=True", f"{HEADS2},block_n=64,raw=True,num_stages=5",
             f"{HEADS4},block_n=64,raw=True,num_stages=5"],
    "fp8": ["", f"{HEADS2},block_n=64,num_stages=5"],
    "bf16": [""],
}  # fmt: skip
SMALL = {
    "int4": ["", "block_n=128", "block_n=128,raw=True,num_stages=5", f"{HEADS2},block_n=128,raw=True,num_stages=5",
             f"{HEADS2},block_n=64,raw=True,num_stages=5", "ways=4,block_n=256,raw=True,ctas_per_sm=1",
             "ways=4,heads=2,block_n=128,raw=True,num_stages=5,ctas_per_sm=1"],
    "int8": ["", "block_n=128,num_stages=5", f"{HEADS2},block_n=64,raw=True,num_stages=5",
             "ways=4,heads=2,block_n=64,raw=True,num_stages=5,ctas_per_sm=1"],
    "fp8": ["block_n=128", f"{HEADS2},block_n=64,num_stages=5"],
    "bf16": [""],
}  # fmt: skip
DIAGNOSED = ["block_n=128", f"{HEADS2},block_n=128,raw=True,num_stages=5"]
HEADS, DIM, PAGE = (32, 8), 128, 16


def say(*words):
    print(f"[{time.time() - START:5.1f}]", *words, flush=True)


def problem_of(fmt, dtype=torch.bfloat16):
    kv = dtype if fmt == "bf16" else attention.DTYPES[fmt]
    return Problem(*HEADS, DIM, DIM, dtype, kv, dtype, PAGE)


def make(
    fmt, batch, kv_len, text, layout="NHD", scales="token", dtype=torch.bfloat16, chosen_for=None, seed=0, gain=1.0
):
    """A call, and its tensors; chosen_for: lengths (batch, kv_len) that the configuration is chosen for."""
    torch.manual_seed(seed)
    device = DEVICE
    lens = kv_len if isinstance(kv_len, tuple) else (kv_len,) * batch
    pages = [-(-n // PAGE) for n in lens]
    width = DIM // 2 if fmt == "int4" else DIM
    rows = (HEADS[1], PAGE) if layout == "HND" else (PAGE, HEADS[1])
    kv_dtype = dtype if fmt == "bf16" else attention.DTYPES[fmt]
    cache = attention._values((sum(pages), 2, *rows, width), kv_dtype, device)
    q = torch.randn(batch, HEADS[0], DIM, dtype=dtype, device=device) * gain
    indptr = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    last = torch.tensor([n - (p - 1) * PAGE for n, p in zip(lens, pages, strict=True)], dtype=torch.int32)
    indices = torch.randperm(sum(pages), dtype=torch.int32, device=device)
    b, n = chosen_for or (batch, max(lens))
    config = replace(portable(problem_of(fmt, dtype), Workload(b, b, 1, b * n, n), (9, 0), 132), **parse_config(text))
    w = flashtile.BatchDecodeWithPagedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, device=device), layout)
    w._config = config
    w.plan(indptr, indices, last, *HEADS, DIM, PAGE, q_data_type=dtype, kv_data_type=kv_dtype)
    factors = {}
    if fmt.startswith("int") and scales != "none":
        shape = cache[:, 0].shape[:-1]
        for name in ("k_scale", "v_scale"):
            if scales == "token":
                factors[name] = torch.rand(shape, device=device) / 32
            else:  # the same for all pages: the loads of the scales, without their way to memory
                factors[name] = (torch.rand(shape[1:], device=device) / 32).expand(shape)
    out = torch.empty_like(q)
    parts = (cache[:, 0], cache[:, 1])
    return (lambda: w.run(q, parts, out=out, **factors)), (q, parts, factors, indptr, indices, lens, out)


def warm(task):
    fmt, text, layout, scales, dtype, chosen_for = task
    try:
        call, _ = make(fmt, 2, 256, text, layout, scales, getattr(torch, dtype), chosen_for)
        call()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{task}: {type(error).__name__}: {str(error)[:300]}"
    return None


def check(fmt, text, lens, dtype=torch.bfloat16, gain=1.0):
    call, (q, (k, v), factors, indptr, indices, lens, out) = make(fmt, len(lens), lens, text, dtype=dtype, gain=gain)
    call()
    worst = 0.0
    for r, n in enumerate(lens):
        rows = indices[indptr[r] : indptr[r + 1]].long()
        full = []
        for side, x in (("k_scale", k), ("v_scale", v)):
            x = x[rows]
            if fmt == "int8":
                x = dequantize_kv_int8(x, factors[side][rows][..., None])
            elif fmt == "int4":
                x = dequantize_kv_int4(x, factors[side][rows][..., None])
            full.append(x.flatten(0, 1)[:n].double().repeat_interleave(HEADS[0] // HEADS[1], 1))
        s = torch.einsum("hd,nhd->hn", q[r].double(), full[0]) * DIM**-0.5
        expected = torch.einsum("hn,nhd->hd", s.softmax(-1), full[1])
        worst = max(worst, ((out[r].double() - expected).abs().max() / expected.abs().max()).item())
    return worst


def fetch_granularity(value=None):
    cuda = ctypes.CDLL("libcuda.so.1")
    if value is not None:
        cuda.cuCtxSetLimit(5, ctypes.c_size_t(value))
    got = ctypes.c_size_t()
    code = cuda.cuCtxGetLimit(ctypes.byref(got), 5)
    return got.value if code == 0 else f"error {code}"


def kv_bytes(fmt, tokens, scales="token"):
    each = {"bf16": 256, "fp8": 128, "int8": 128, "int4": 64}[fmt]
    return tokens * HEADS[1] * 2 * (each + (4 if fmt.startswith("int") and scales == "token" else 0))


def show(title, timings, size, copy):
    say(title)
    for name, t in timings.items():
        rate = size[name] / t.median_us / 1e3
        print(
            f"    {t.median_us:8.1f} us  min {t.min_us:8.1f}  {rate:6.0f} GB/s {100 * rate / copy:5.1f} %  {name or 'default'}"
        )
    sys.stdout.flush()


def compare(batch, kv_len, table, copy, budget=25.0):
    for fmt, texts in table.items():
        if time.time() - START > BUDGET:
            say("out of time before", fmt, batch, kv_len)
            return
        calls, size = {}, {}
        case = parse_case(f"decode/b{batch}.kv{kv_len}.h32/8.{fmt}.page16")
        for text in texts:
            try:
                call = attention.decode(case, torch.device("cuda"), parse_config(text), False).ours["flashtile"]
                call()
                torch.cuda.synchronize()
                calls[text], size[text] = call, kv_bytes(fmt, batch * kv_len)
            except Exception as error:
                say("FAILED", fmt, text, type(error).__name__, str(error)[:200])
        show(f"{batch} x {kv_len} {fmt}", time_interleaved(calls, budget_ms=budget), size, copy)
        del calls
        torch.cuda.empty_cache()


def main():
    tasks = set()
    for table, (b, n) in ((VARIANTS, (64, 4096)), (LARGE, (64, 16384)), (SMALL, (16, 4096)), (SMALL, (1, 16384))):
        for fmt, texts in table.items():
            tasks |= {(fmt, t, "NHD", "token", "bfloat16", (b, n)) for t in texts}
    for text in DIAGNOSED:
        tasks |= {
            ("int4", text, "NHD", "none", "bfloat16", (64, 4096)),
            ("int4", text, "HND", "token", "bfloat16", (64, 4096)),
        }
    tasks |= {("int8", "block_n=256,ctas_per_sm=2", "HND", "token", "bfloat16", (64, 4096))}
    raw = {fmt: [t for t in VARIANTS[fmt] if "raw" in t] for fmt in ("int4", "int8")}
    tasks |= {(fmt, t, "NHD", "token", "float16", (64, 4096)) for fmt in raw for t in (raw[fmt][0], raw[fmt][-1])}
    seen, unique = set(), []
    for task in sorted(tasks, key=str):  # one task for each kernel
        config = replace(
            portable(problem_of(task[0]), Workload(task[5][0], 1, 1, 1, task[5][1]), (9, 0), 132),
            **{**parse_config(task[1]), "ctas_per_sm": 0},
        )
        if (key := (task[0], *task[2:5], config)) not in seen:
            seen.add(key)
            unique.append(task)
    with ProcessPoolExecutor(15, get_context("spawn")) as pool:
        for problem in pool.map(warm, unique):
            if problem:
                say("FAILED", problem)
    say(f"compiled {len(unique)} kernels")
    copy = copy_ceiling()
    say(f"{torch.cuda.get_device_name()}, copy {copy:.0f} GB/s, L2 fetch granularity {fetch_granularity()}")

    say("errors, largest over the largest value; bf16 rounds by 0.002 to 0.004, fp16 by 0.0003 to 0.0005")
    for fmt, texts in VARIANTS.items():
        print("    ", fmt, *(f"{check(fmt, t, (4096, 333, 1)):.5f}" for t in texts))
    for fmt, texts in raw.items():
        for text in (texts[0], texts[-1]):
            flat = check(fmt, text + ",split=False", (65536,), torch.float16, 0.01)
            print(
                f"     {fmt} fp16 {text}: {check(fmt, text, (4096, 333, 1), torch.float16):.6f}, flat 65536 tokens {flat:.6f}"
            )
        print(
            f"     {fmt} fp16, not raw: flat 65536 tokens {check(fmt, 'split=False', (65536,), torch.float16, 0.01):.6f}"
        )
    sys.stdout.flush()

    # what the layout of the cache (64 bytes of a head beside the next head's) and the scales cost
    calls, size = {}, {}
    for fmt, text, layout, scales in (
        *(("int4", t, x, s) for t in DIAGNOSED for x, s in (("NHD", "token"), ("NHD", "none"), ("NHD", "same"), ("HND", "token"))),
        *(("int8", "block_n=256,ctas_per_sm=2", x, "token") for x in ("NHD", "HND")),
    ):  # fmt: skip
        name = f"{fmt} {layout} scales {scales} {text}"
        calls[name], size[name] = make(fmt, 64, 4096, text, layout, scales)[0], kv_bytes(fmt, 64 * 4096, scales)
    show("64 x 4096: layouts", time_interleaved(calls, budget_ms=25), size, copy)
    before = fetch_granularity()
    for bytes_ in (32, 64, 128):
        fetch_granularity(bytes_)
        show(
            f"64 x 4096: L2 fetch granularity {fetch_granularity()}", time_interleaved(calls, budget_ms=15), size, copy
        )
    fetch_granularity(before if isinstance(before, int) else None)
    del calls
    torch.cuda.empty_cache()

    compare(64, 4096, VARIANTS, copy)
    compare(16, 4096, SMALL, copy)
    compare(64, 16384, LARGE, copy, 40.0)
    compare(1, 16384, SMALL, copy)
    say("done")


if __name__ == "__main__":
    main()
