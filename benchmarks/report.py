"""Rows of figures: their JSONL form, the printed table, the published figures of rivals, and the baseline."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from flashtile.testing.cases_bench import BenchCase
from flashtile.testing.timing import Ceilings, Timing

FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "peers_h100.csv"
PUBLISHED_DEVICE = "NVIDIA H100 80GB HBM3"
SLOWER_FAILS = 1.15  # a row this many times its baseline fails


@dataclass(frozen=True)
class Row:
    """One call of one case. us: median, microseconds; rates: 1e12 operations and 1e9 bytes a second.

    percent_of_ceiling: the time that the copy rate or the matrix product would allow, whichever is longer, over `us`.
    """

    case: str
    peer: str
    us: float
    min_us: float
    p90_us: float
    tflops: float
    gbps: float
    percent_of_ceiling: float
    device: str
    torch: str
    triton: str
    date: str
    command: str

    def to_json(self) -> str:
        """The row as one line of JSONL."""
        return json.dumps(asdict(self))


def make_row(case: BenchCase, peer: str, timing: Timing, ceilings: Ceilings, about: Mapping[str, str]) -> Row:
    """A row from one timing; `about` holds the columns device, torch, triton, date and command."""
    us = timing.median_us
    floor_us = max(case.bytes / ceilings.copy_gbps / 1e3, case.flops / ceilings.matmul_tflops / 1e6)
    return Row(
        case=case.name,
        peer=peer,
        us=round(us, 3),
        min_us=round(timing.min_us, 3),
        p90_us=round(timing.p90_us, 3),
        tflops=round(case.flops / us / 1e6, 2),
        gbps=round(case.bytes / us / 1e3, 1),
        percent_of_ceiling=round(100 * floor_us / us, 3),  # a small case by a slow peer: 0.04
        **about,
    )


@cache
def published() -> dict[str, dict[str, float]]:
    """case -> peer -> microseconds, from peers_h100.csv (rows without a figure are left out)."""
    figures: dict[str, dict[str, float]] = {}
    with PUBLISHED.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["us"]:
                figures.setdefault(row["case"], {})[row["peer"]] = float(row["us"])
    return figures


BESIDE = ("flashtile.plain", "flashtile.dense")  # another problem, timed in turns to compare with: no rival's


def answers(peer: str) -> bool:
    """Whether a peer's row is ours, of the case itself."""
    return peer.startswith("flashtile") and not peer.startswith(BESIDE)


def best_rival(case: str, rows: Iterable[Row]) -> tuple[str, float] | None:
    """The fastest rival of a case and its microseconds: as measured in this run, else as published for this device.

    A published figure is marked by a * after the name, and counts only for peers that did not run.
    """
    rows = list(rows)
    times = {row.peer: row.us for row in rows if not row.peer.startswith("flashtile")}
    if rows and rows[0].device == PUBLISHED_DEVICE:
        times.update({f"{peer}*": us for peer, us in published().get(case, {}).items() if peer not in times})
    return min(times.items(), key=lambda item: item[1]) if times else None


def table_header() -> str:
    """The heading of the lines that `table_line` makes."""
    return (
        f"{'case':44} {'us':>9} {'TFLOP/s':>8} {'GB/s':>7} {'% ceil':>6}  {'best rival (* published)':28} {'ratio':>6}"
    )


def table_line(row: Row, rival: tuple[str, float] | None) -> str:
    """One row of the table; ratio is the rival's time over ours: above 1 we are faster."""
    name = row.case + row.peer.removeprefix("flashtile")
    line = f"{name:44} {row.us:9.1f} {row.tflops:8.1f} {row.gbps:7.0f} {row.percent_of_ceiling:6.1f}"
    return line if rival is None else f"{line}  {f'{rival[0]} {rival[1]:.1f}':28} {rival[1] / row.us:6.2f}"


def geometric_means(rows: Iterable[Row]) -> dict[str, tuple[float, int]]:
    """area -> (geometric mean of the ratios to the best rival, number of cases), by our fastest row of each case."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    ratios: dict[str, list[float]] = {}
    for case, group in by_case.items():
        ours = [row.us for row in group if answers(row.peer)]
        rival = best_rival(case, group)
        if ours and rival:
            ratios.setdefault(case.partition("/")[0], []).append(rival[1] / min(ours))
    return {area: (math.exp(sum(map(math.log, r)) / len(r)), len(r)) for area, r in ratios.items()}


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]


def baseline_path(device: str) -> Path:
    """Where the committed baseline of a device lies, if there is one."""
    slug = "_".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    return FOLDER / f"baseline_{slug}.jsonl"


def regressions(rows: Iterable[Row], baseline: Iterable[Row]) -> list[str]:
    """One line for each of our rows that is 15 % slower than the same row of the baseline."""
    before = {(row.case, row.peer): row.us for row in baseline}
    return [
        f"{row.case} {row.peer}: {row.us:.1f} us, baseline {before[row.case, row.peer]:.1f} us"
        for row in rows
        if row.peer.startswith("flashtile") and row.us > SLOWER_FAILS * before.get((row.case, row.peer), math.inf)
    ]
