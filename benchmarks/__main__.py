"""The runner: `python -m benchmarks [area ...]` times flashtile and its rivals on named cases and prints a table."""

import argparse
import gc
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import attention, elem, gemm, report, sample
from benchmarks.report import Row
from benchmarks.workload import Call, NotAvailable, Overrides, Workload
from flashtile.config import Config, SamplingConfig
from flashtile.testing.cases_bench import EXTRA_NAMES, BenchCase, parse_case
from flashtile.testing.timing import Ceilings, default_device, measure_ceilings, time_interleaved

Maker = Callable[[Any, torch.device, Overrides, bool], Workload]
T = TypeVar("T")

MAKERS: dict[str, Maker] = {
    "prefill": attention.prefill,
    "ragged": attention.ragged,
    "paged": attention.paged,
    "append": attention.paged,
    "decode": attention.decode,
    "elem": elem.elementwise,
    "sample": sample.sampling,
    "gemm": gemm.gemm,
}
NOT_BUILT = {"mla": "flashtile.mla.BatchMLAPagedAttentionWrapper"}
AREAS = (*MAKERS, *NOT_BUILT)
GROUPS = {"attention": ("prefill", "ragged", "paged", "append", "decode")}
CPU_BYTES = 2**26  # the largest case that is sensible on a CPU: 64 MB of inputs and outputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 1 if a case failed or fell 15 % behind its baseline."""
    options = parser().parse_args(argv)
    if options.areas and (unknown := set(options.areas) - {*AREAS, *GROUPS}):
        parser().error(f"unknown area {', '.join(sorted(unknown))}: choose from {', '.join((*AREAS, *GROUPS))}")
    cases = select(options.areas, options.filter)
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    device = torch.device(options.device) if options.device else default_device()
    variants: dict[str, Overrides] = {text: parse_config(text) for text in options.config or [""]}
    known = {field.name for kind in (Config, SamplingConfig) for field in fields(kind)}
    if unknown := {name for overrides in variants.values() for name in overrides} - known:
        parser().error(f"--config: unknown field {', '.join(sorted(unknown))} of Config and SamplingConfig")
    rows, failures = run(cases, device, variants, options)
    return finish(rows, failures, options, device)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("areas", nargs="*", metavar="area", help=f"{', '.join((*GROUPS, *AREAS))}; default: all")
    p.add_argument("--filter", metavar="REGEX", default="", help="only cases whose name contains a match")
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--device", help="cuda, cuda:1, cpu; default: CUDA if there is one")
    p.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True, help="time other libraries too")
    p.add_argument(
        "--config", metavar="FIELD=N,...", action="append",
        help="force fields of Config (attention) or SamplingConfig; given again, one more variant in turns with the "
        "others ('': none forced)",
    )  # fmt: skip
    p.add_argument("--budget-ms", type=float, default=200.0, help="time for each call, milliseconds")
    p.add_argument("--out", type=Path, metavar="FILE", help="append the rows to a JSONL file")
    p.add_argument("--baseline", type=Path, metavar="FILE", help="default: benchmarks/baseline_<device>.jsonl")
    return p


def select(areas: Sequence[str], pattern: str) -> list[BenchCase]:
    """The cases of some areas (all, if none is named), those of one area together."""
    wanted = [area for name in areas or AREAS for area in GROUPS.get(name, (name,))]
    names = (*report.published(), *EXTRA_NAMES)
    chosen = [name for area in wanted for name in names if name.startswith(f"{area}/")]
    return [parse_case(name) for name in dict.fromkeys(chosen) if re.search(pattern, name)]


def parse_config(text: str) -> dict[str, Any]:
    """ "block_m=64,split=False" -> {"block_m": 64, "split": False}."""
    kinds: dict[str, Any] = {"True": True, "False": False}
    pairs = (item.partition("=") for item in text.split(",") if item)
    return {key: kinds[value] if value in kinds else _number(value) for key, _, value in pairs}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run(
    cases: Sequence[BenchCase], device: torch.device, variants: dict[str, Overrides], options: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    """Time all cases, printing each as it is done. Returns the rows, and a line for each case that failed."""
    about = describe(device)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}")
    ceilings = measure_ceilings(device)
    print(
        f"ceilings: copy {ceilings.copy_gbps:.0f} GB/s (read + write; the yardstick), "
        f"read {ceilings.read_gbps:.0f} GB/s, matrix product {ceilings.matmul_tflops:.1f} TFLOP/s"
    )
    print(report.table_header())
    rows: list[Row] = []
    failures: list[str] = []
    missing: Counter[str] = Counter()
    for case in progress(cases):
        try:
            group = time_case(case, device, variants, options, ceilings, about)
        except (NotAvailable, NotImplementedError) as reason:
            missing[f"{case.area}: {reason}"] += 1
            continue
        except Exception as error:  # one broken case must not cost the others their time on a GPU
            failures.append(f"{case.name}: {type(error).__name__}: {first_line(error)}")
            say(f"{case.name:44} FAILED: {failures[-1]}")
            continue
        finally:
            release_memory()
        for row in group:
            if row.peer.startswith("flashtile"):
                say(report.table_line(row, report.best_rival(case.name, group) if report.answers(row.peer) else None))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.writelines(row.to_json() + "\n" for row in group)
        rows += group
    for what, count in missing.items():
        print(f"not available, {count} of {what}")
    return rows, failures


def time_case(
    case: BenchCase,
    device: torch.device,
    variants: dict[str, Overrides],
    options: argparse.Namespace,
    ceilings: Ceilings,
    about: dict[str, str],
) -> list[Row]:
    """The rows of one case: ours, then the rivals, timed in turns."""
    if case.area in NOT_BUILT:
        raise NotAvailable(f"{NOT_BUILT[case.area]} is not built yet")
    limit = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_BYTES
    if case.bytes > limit:
        raise NotAvailable(f"needs {case.bytes / 1e9:.2f} GB, more than {limit / 1e9:.2f} GB on this device")
    calls: dict[str, Call] = {}
    rivals: dict[str, Call] = {}
    for text, overrides in variants.items():
        workload = MAKERS[case.area](case, device, overrides, options.rivals and not rivals)
        calls |= {f"{peer}[{text}]" if text else peer: call for peer, call in workload.ours.items()}
        rivals |= workload.rivals
    ours = dict(calls)
    for call in ours.values():
        call()
    for peer, call in rivals.items():
        try:
            call()
        except Exception as error:  # whatever another library raises for a shape that it does not take
            say(f"  {peer} cannot run {case.name}: {first_line(error)}")
        else:
            calls[peer] = call
    try:
        timings = time_interleaved(calls, device=device, budget_ms=options.budget_ms)
    except RuntimeError as error:  # a rival that runs, but cannot be captured in a graph, must not cost us our row
        if len(calls) == len(ours):
            raise
        say(f"  {case.name} without rivals: {first_line(error)}")
        timings = time_interleaved(ours, device=device, budget_ms=options.budget_ms)
    return [report.make_row(case, peer, timing, ceilings, about) for peer, timing in timings.items()]


def finish(rows: list[Row], failures: list[str], options: argparse.Namespace, device: torch.device) -> int:
    """Print the means, the failures and the rows that fell behind; the exit code."""
    for area, (mean, count) in report.geometric_means(rows).items():
        print(f"{area}: geometric mean of {count} cases over the best rival {mean:.3f}")
    path = options.baseline or report.baseline_path(describe(device)["device"])
    slower = report.regressions(rows, report.read_rows(path)) if path.exists() else []
    for title, lines in (("failed", failures), (f"15 % slower than {path.name}", slower)):
        if lines:
            print(f"{title}:", *lines, sep="\n  ")
    return 1 if failures or slower else 0


def describe(device: torch.device) -> dict[str, str]:
    """The columns that say where and how a row came about."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def installed_version(package: str) -> str:
    """The version of an installed package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def release_memory() -> None:
    """Give a case's tensors back before the next one allocates."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def progress(items: Sequence[T]) -> Iterator[T]:
    """The items under a progress bar, where tqdm is installed and someone watches; else with a count now and then."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return _counted(items)
        return iter(tqdm(items, unit="case"))
    return _counted(items)


def _counted(items: Sequence[T]) -> Iterator[T]:
    for index, item in enumerate(items):
        if index and index % 25 == 0:
            say(f"  {index} of {len(items)} cases")
        yield item


def say(line: str) -> None:
    """Print a line at once, above the progress bar if there is one."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line)
    else:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
