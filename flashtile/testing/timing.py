"""The project's one timer, and the ceilings that its figures are read against.

On CUDA a call is captured in a graph, so that no host time is measured, and every replay starts with its inputs out
of L2: a buffer larger than L2 is read first, outside the timed events. Calls to be compared take turns, round by
round, so that a card that slows down at its power limit slows all of them alike. On the CPU the wall clock is read.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

GRAPH_WARM_UP = 3  # calls before the capture: the first ones compile kernels and fill allocator pools
SPIN_CYCLES = 2**18  # of an idle kernel, some 0.15 ms, that gives the host time to queue a replay
WARM_UP_ROUNDS = 3  # untimed rounds; the last one also estimates how many rounds fit the budget
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Timing:
    """Times of one call over `rounds` rounds, in microseconds."""

    median_us: float
    min_us: float
    p90_us: float
    rounds: int


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches on the two plainest jobs: rates in GB/s (1e9 bytes) and TFLOP/s (1e12 operations)."""

    copy_gbps: float
    read_gbps: float
    matmul_tflops: float


def time_graph(
    fn: Callable[[], object],
    *,
    device: torch.device | str | None = None,
    cold_l2: bool = True,
    budget_ms: float = 200.0,
) -> Timing:
    """Time one call by itself; see `time_interleaved`, which comparisons must use."""
    return time_interleaved({"": fn}, device=device, cold_l2=cold_l2, budget_ms=budget_ms)[""]


def time_interleaved(
    fns: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str | None = None,
    cold_l2: bool = True,
    budget_ms: float = 200.0,
) -> dict[str, Timing]:
    """Time several calls in turns; each round starts with another one of them.

    Args:
        fns: name -> call. On CUDA it must be fit for graph capture: no host sync, launches on the current stream.
        device: where the calls run; default: the current CUDA device if there is one, else the CPU.
        cold_l2: CUDA only: read a buffer larger than L2 before each timed replay.
        budget_ms: time to spend on each call, in milliseconds; between 5 and 200 rounds are timed.

    Returns:
        name -> its Timing, in the order of `fns`.

    Raises:
        ValueError: no calls.
    """
    if not fns:
        raise ValueError("fns: expected at least one call to time, got none")
    place = default_device() if device is None else torch.device(device)
    if place.type == "cuda":
        with torch.cuda.device(place):
            return _summaries(fns, _rounds_cuda(fns, cold_l2, budget_ms))
    return _summaries(fns, _rounds_cpu(fns, budget_ms))


def default_device() -> torch.device:
    """The current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def measure_ceilings(device: torch.device | str | None = None) -> Ceilings:
    """All ceilings of a device. Percentages are of the copy or the product; the read rate is for information."""
    return Ceilings(copy_ceiling(device), read_ceiling(device), matmul_ceiling(device))


def copy_ceiling(device: torch.device | str | None = None) -> float:
    """GB/s of a large device copy, counting the bytes read and the bytes written.

    The project's yardstick for every op that is bound by memory, decode included, which writes next to nothing: pure
    reads can exceed this rate by a little.
    """
    place = default_device() if device is None else torch.device(device)
    source = torch.ones(_ceiling_bytes(place) // 4, dtype=torch.float32, device=place)
    target = torch.empty_like(source)
    # by a kernel: a captured copy_() becomes a memcpy node, which is a fifth slower (2,430 against 3,004 GB/s, H100)
    timing = time_graph(lambda: torch.neg(source, out=target), device=place)
    return 2 * source.nbytes / timing.median_us / 1e3


def read_ceiling(device: torch.device | str | None = None) -> float:
    """GB/s of summing a large buffer: a lower bound of what pure reads can reach."""
    place = default_device() if device is None else torch.device(device)
    source = torch.ones(_ceiling_bytes(place) // 4, dtype=torch.float32, device=place)
    return 4 * source.numel() / time_graph(source.sum, device=place).median_us / 1e3


def matmul_ceiling(device: torch.device | str | None = None) -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product in bf16; 1024^3 in fp32 on the CPU. Of random data: zeros run faster."""
    place = default_device() if device is None else torch.device(device)
    size, dtype = (8192, torch.bfloat16) if place.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=place) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / time_graph(lambda: torch.mm(a, b, out=out), device=place).median_us / 1e6


def _ceiling_bytes(device: torch.device) -> int:
    return 2**30 if device.type == "cuda" else 2**26  # far beyond any cache, and quick enough to copy


def _rounds_cpu(fns: Mapping[str, Callable[[], object]], budget_ms: float) -> dict[str, list[float]]:
    def one_round(shift: int) -> dict[str, float]:
        times = {}
        for name in _rotated(list(fns), shift):
            begin = time.perf_counter()
            fns[name]()
            times[name] = (time.perf_counter() - begin) * 1e6
        return times

    estimates = [one_round(shift) for shift in range(WARM_UP_ROUNDS)]
    rounds = [one_round(shift) for shift in range(_num_rounds(sum(estimates[-1].values()), len(fns), budget_ms))]
    return {name: [times[name] for times in rounds] for name in fns}


def _rounds_cuda(fns: Mapping[str, Callable[[], object]], cold_l2: bool, budget_ms: float) -> dict[str, list[float]]:
    graphs = {name: _capture(fn) for name, fn in fns.items()}
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    # 4 x L2 and at least 256 MB: the read lasts some 0.1 ms, in which the host can queue the next replay; otherwise the
    # GPU would wait for it between the events. Writing would leave L2 full of dirty lines, and the timed call would pay
    # for their way to memory: 50 MB, some 15 us on an H100.
    flush = torch.zeros(max(l2_bytes, 2**26), dtype=torch.int32, device="cuda") if cold_l2 else None
    total = torch.empty((), dtype=torch.int64, device="cuda")

    def one_round(shift: int) -> dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]:
        events = {}
        for name in _rotated(list(graphs), shift):
            begin, end = _event(), _event()
            if flush is not None:
                torch.sum(flush, (), out=total)
            else:
                torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            graphs[name].replay()
            end.record()
            events[name] = begin, end
        return events

    def elapsed(events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]) -> dict[str, float]:
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) * 1e3 for name, (begin, end) in events.items()}

    estimates = [elapsed(one_round(shift)) for shift in range(WARM_UP_ROUNDS)]
    count = _num_rounds(sum(estimates[-1].values()) + 100 * len(fns), len(fns), budget_ms)
    rounds = [elapsed(events) for events in [one_round(shift) for shift in range(count)]]
    return {name: [times[name] for times in rounds] for name in fns}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _capture(fn: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call. The calls before it run on a side stream, as capture asks for."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM_UP):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


def _num_rounds(round_us: float, num_fns: int, budget_ms: float) -> int:
    return int(min(max(budget_ms * 1e3 * num_fns / max(round_us, 1.0), MIN_ROUNDS), MAX_ROUNDS))


def _rotated(names: list[str], shift: int) -> list[str]:
    shift %= len(names)
    return names[shift:] + names[:shift]


def _summaries(fns: Mapping[str, object], times: Mapping[str, list[float]]) -> dict[str, Timing]:
    return {name: _summary(times[name]) for name in fns}


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    return Timing(median(ordered), ordered[0], ordered[int(0.9 * (len(ordered) - 1))], len(ordered))
