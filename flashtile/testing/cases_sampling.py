"""Cases of sampling, and what must hold for each: run by tests/ on the CPU, in Triton's interpreter and on a GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashtile import sampling, topk
from flashtile.backend import kernels
from flashtile.config import SamplingConfig
from flashtile.reference import sampling as reference
from flashtile.testing.cases_bench import SamplingBench, parse_case
from flashtile.testing.tensors import name, randn, strided
from flashtile.testing.tolerance import assert_close

SEED, OFFSET = 2**40 + 7, 3
MASS_ROUNDING = 2e-6  # what fp32 sums may differ by, relative to the row's mass

# The shapes with a figure in benchmarks/peers_h100.csv; the names are its keys.
BENCH_CASES: tuple[SamplingBench, ...] = tuple(
    parse_case(f"sample/{op}.b{batch_size}.v{vocab_size}")  # type: ignore[misc]
    for vocab_size in (32000, 128256)
    for batch_size in (1, 64, 512)
    for op in ("sample", "top_p", "top_k_top_p.joint", "top_k_top_p.first")
)


@dataclass(frozen=True)
class SamplingCase:
    """rows: how probabilities are distributed (see `probs`); filters: top_k, top_p, min_p, as for `reference.filtered`,
    and order, for top_k with top_p."""

    rows: str
    vocab_size: int
    filters: dict[str, Any] = field(default_factory=dict, hash=False)
    batch_size: int = 3
    dtype: torch.dtype = torch.float32
    strided: bool = False

    def __str__(self) -> str:
        filters = " ".join(f"{k}={v}" for k, v in self.filters.items())
        kind = f"{name(self.dtype)}{' strided' if self.strided else ''}"
        return f"{self.rows} vocab={self.vocab_size} batch={self.batch_size} {kind} {filters or 'unfiltered'}"

    def probs(self, device: str) -> Tensor:
        """[batch_size, vocab_size]; each kind is hard for some part of a search for thresholds."""
        x = randn(self.batch_size, self.vocab_size, seed=self.vocab_size)
        makers: dict[str, Callable[[], Tensor]] = {
            "flat": lambda: torch.softmax(x, -1),
            "steep": lambda: torch.softmax(x * 4, -1),
            "tied": lambda: torch.softmax((x * 2).round(), -1),
            "uniform": lambda: torch.full_like(x, 1 / self.vocab_size),
            "sorted": lambda: torch.softmax(x.sort(descending=True).values, -1),
            "few": lambda: torch.softmax(x.masked_fill(x < 1.5, -torch.inf), -1),
            "one": lambda: torch.nn.functional.one_hot(x.argmax(-1), self.vocab_size).float(),
            "unnormalised": lambda: torch.softmax(x, -1) * torch.tensor([[300.0]]),
            "tiny": lambda: torch.softmax(x, -1) * 1e-20,
        }
        probs = makers[self.rows]().to(self.dtype).to(device)
        return strided(probs) if self.strided else probs

    def sampler(self) -> Callable[..., Any]:
        """The public function of the filters; it takes probs."""
        given = {k: v for k, v in self.filters.items() if k != "order"}
        names = "_".join(given) or "none"
        order = {"filter_apply_order": self.filters["order"]} if "order" in self.filters else {}
        functions: dict[str, Callable[..., Any]] = {
            "none": sampling.sampling_from_probs,
            "top_k": sampling.top_k_sampling_from_probs,
            "top_p": sampling.top_p_sampling_from_probs,
            "min_p": sampling.min_p_sampling_from_probs,
            "top_k_top_p": sampling.top_k_top_p_sampling_from_probs,
        }
        return partial(functions[names], **given, **order)

    @property
    def top_p_alone(self) -> bool:
        """Whether tokens are drawn by rejection: `reference.top_p_token`."""
        return self.filters.keys() == {"top_p"}

    def distribution(self, row: Tensor, slack: float = 0.0) -> Tensor:
        """What the row is drawn from, by definition, fp64; slack: how much more mass top-p keeps."""
        given = {k: v for k, v in self.filters.items() if k != "order"}
        if slack and 0 < given.get("top_p", 0) < 1:
            given["top_p"] += slack
        return reference.filtered(row, **given, joint=self.filters.get("order") == "joint")


FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.05},
    {"top_p": 0.9999},
    {"top_p": 0.0},
    {"top_p": 1.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**6},
    {"min_p": 0.1},
    {"min_p": 0.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.8, "order": "joint"},
    {"top_k": 10**6, "top_p": 0.8},
    {"top_k": 40, "top_p": 1.0, "order": "joint"},
)
# Every filter over a vocabulary of one chunk, then rows that are hard for guesses over vocabularies of several chunks.
SMALL_CASES = tuple(SamplingCase("flat", 300, filters) for filters in FILTERS) + (
    SamplingCase("flat", 1, {"top_k": 3}, batch_size=1),
    SamplingCase("tied", 2048, {"top_k": 700, "top_p": 0.5}, dtype=torch.float16, strided=True),
    SamplingCase("one", 2049, {"top_p": 0.9}),
    SamplingCase("flat", 5003, {}, strided=True),
    SamplingCase("flat", 5003, {"top_p": 0.9}, strided=True),
    SamplingCase("flat", 5003, {"top_k": 2500, "top_p": 0.6}),
    SamplingCase("steep", 5003, {"top_k": 20, "top_p": 0.9, "order": "joint"}),
    SamplingCase("steep", 5003, {"top_p": 0.99}, dtype=torch.float16),
    SamplingCase("tied", 5003, {"top_p": 0.7}),
    SamplingCase("tied", 5003, {"top_k": 4000}),
    SamplingCase("uniform", 5003, {"top_p": 0.5}, batch_size=1),
    SamplingCase("sorted", 5003, {"top_p": 0.8}, batch_size=1),
    SamplingCase("few", 5003, {"top_k": 4000}),
    SamplingCase("few", 5003, {"min_p": 0.5}),
    SamplingCase("unnormalised", 5003, {"top_p": 0.9}, batch_size=1),
    SamplingCase("tiny", 5003, {"top_k": 100, "top_p": 0.5}, batch_size=1),
)
CASES = SMALL_CASES + tuple(
    SamplingCase(rows, vocab_size, filters, batch_size=2, dtype=dtype)
    for rows, vocab_size, dtype in (
        ("flat", 32000, torch.float32),
        ("steep", 128256, torch.float32),
        ("tied", 50257, torch.bfloat16),
        ("few", 128256, torch.float16),
    )
    for filters in ({}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.02})
)


def check_sampler(case: SamplingCase, device: str) -> None:
    """The token is the one that the definition draws with the row's uniform numbers."""
    probs = case.probs(device)
    ids, valid = case.sampler()(probs, seed=SEED, offset=OFFSET, return_valid=True)
    assert ids.dtype == torch.int32
    assert valid.tolist() == [True] * case.batch_size
    for i, row in enumerate(probs.cpu().float()):
        check_token(case, row, int(ids[i]), partial(reference.uniform, SEED, OFFSET, i))


BRACKETED = SamplingConfig(row=0)  # rows of several chunks are searched in three steps, however short
BRACKETED_CASES = tuple(c for c in CASES if c.vocab_size > BRACKETED.chunk and {"top_k", "top_p"} & c.filters.keys())


def check_config(case: SamplingCase, config: SamplingConfig, device: str) -> None:
    """As `check_sampler`, with a configuration forced."""
    probs, given = case.probs(device), case.filters
    ids = torch.empty(case.batch_size, dtype=torch.int32, device=device)
    valid = torch.zeros(case.batch_size, dtype=torch.bool, device=device)
    filters = (None, given.get("top_k", 0), None, given.get("top_p", 1.0), None, 0.0, given.get("order") == "joint")
    launch = kernels("sampling", probs.device).sample_from_probs
    launch(ids, valid, probs, None, *filters, None, SEED, None, OFFSET, config=config)
    assert valid.tolist() == [True] * case.batch_size
    for i, row in enumerate(probs.cpu().float()):
        check_token(case, row, int(ids[i]), partial(reference.uniform, SEED, OFFSET, i))


REFUSING_CASES = tuple(
    SamplingCase(rows, 5003, {"top_p": top_p}, batch_size=8) for rows, top_p in (("steep", 0.05), ("flat", 0.0))
)


def first_candidates_refused(case: SamplingCase) -> int:
    """In how many rows top-p refuses all the candidates that are drawn from the whole row."""
    draws = []

    def uniform(output: int, draw: int) -> float:
        draws.append(draw)
        return reference.uniform(SEED, OFFSET, output, draw)

    for i, row in enumerate(case.probs("cpu").float()):
        reference.top_p_token(row, case.filters["top_p"], partial(uniform, i))
    return draws.count(reference.WHOLE_ROW_DRAWS)


def check_refused(case: SamplingCase, config: SamplingConfig, device: str) -> None:
    """As `check_config`, of rows some of which refuse all the candidates that are drawn from the whole row."""
    assert first_candidates_refused(case) > 0
    check_config(case, config, device)


def check_top_p_boundary(num_draws: int, device: str) -> None:
    """Nothing outside the nucleus is ever drawn, where its mass is top_p to the bit, and where entries tie."""
    probs = torch.tensor([[0.03125, 0, 0.9375, 0.03125], [0.25, 0.125, 0.125, 0.5], [0.375, 0.125, 0.375, 0.125]])
    indices = torch.arange(3, device=device).repeat_interleave(num_draws)
    top_p = torch.tensor([0.9375, 0.5, 0.5], device=device)[indices]
    ids = sampling.top_p_sampling_from_probs(probs.to(device), top_p, indices, seed=SEED)
    assert [set(part.tolist()) for part in ids.split(num_draws)] == [{2}, {3}, {0, 2}]


def check_rejection_paths_agree(vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """Rows held in registers and rows read from memory give the same tokens: with indices, a top_p, a seed and an
    offset for each output, and rows that are no distribution."""
    probs = SamplingCase("steep", vocab_size, batch_size=6, dtype=dtype).probs(device).clone()
    probs[1, vocab_size // 3] = torch.nan
    probs[2] = 0
    probs[3, 0] = torch.inf
    probs[5] = probs[5] > probs[5].float().mean()  # ties
    indices = torch.arange(24, device=device) % 6
    top_p, seeds = torch.linspace(0, 1, 24, device=device), torch.arange(24, device=device) + 2**40
    run = kernels("sampling", probs.device).sample_from_probs

    def outputs(config: SamplingConfig) -> list[Tensor]:
        ids, valid = torch.empty_like(indices), torch.empty_like(indices, dtype=torch.bool)
        run(ids, valid, probs, indices, None, 0, top_p, 1.0, None, 0.0, False, seeds, 0, seeds % 7, 0, config=config)
        return [ids, valid]

    in_registers, in_memory = outputs(SamplingConfig(row=2**15)), outputs(BRACKETED)
    assert torch.equal(in_registers[0], in_memory[0])
    assert torch.equal(in_registers[1], in_memory[1])
    assert torch.equal(in_memory[1].cpu(), torch.tensor([True, False, False, False, True, True])[indices.cpu()])


def check_brackets_find_the_same(vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """Thresholds are those of a search in the whole row: what is kept of probabilities and logits, and selected."""
    logits = randn(4, vocab_size, seed=vocab_size).mul_(2).to(dtype).to(device)
    logits[1] = logits[1].float().round().to(dtype)  # ties
    logits[2, ::3] = -torch.inf
    probs = torch.softmax(logits.float(), -1).to(dtype)
    run = kernels("sampling", logits.device)

    def outputs(config: SamplingConfig) -> list[Tensor]:
        masked, renormed = (torch.empty(4, vocab_size, device=device) for _ in range(2))
        ids = torch.empty(4, 40, dtype=torch.int32, device=device)
        run.mask_logits(masked, logits, None, 40, config=config)
        run.renorm_probs(renormed, probs, None, 700, None, 0.9, config=config)
        run.top_k(ids, logits, None, None, False, config=config)
        return [masked, renormed > 0, ids]

    for got, want in zip(outputs(BRACKETED), outputs(SamplingConfig(row=2**15)), strict=True):
        assert torch.equal(got, want)


def check_token(case: SamplingCase, row: Tensor, token: int, uniform: Callable[[int], float]) -> None:
    """The token is that of the definition, up to the rounding of sums: at the ends of the token's part of the
    cumulative distribution and at the threshold of top-p. uniform: the row's numbers."""
    dist, more = case.distribution(row), case.distribution(row, MASS_ROUNDING)
    assert row[token] > 0
    assert more[token] > 0, f"token {token}, which the filter removes, was drawn"
    if case.top_p_alone:
        check_top_p_token(case.filters["top_p"], row, token, uniform)
        return
    end = float(dist[: token + 1].sum())
    begin = end - float(dist[token])
    # entries at the threshold that rounding lets in or out move all that lies behind them
    slack, u = MASS_ROUNDING + float((more - dist).abs().sum()), uniform(0)
    assert begin - slack <= u <= end + slack, f"token {token} covers {begin}..{end}, drawn with {u}"


def check_top_p_token(top_p: float, row: Tensor, token: int, uniform: Callable[[int], float]) -> None:
    """The token is that of `reference.top_p_token`, or lies between those that rounding might lead to."""
    shifts = (-MASS_ROUNDING, 0.0, MASS_ROUNDING)
    tokens = []
    for shift in shifts:
        shifted = [min(max(uniform(draw) + shift, 0.0), 1.0) for draw in range(64)]
        for more in shifts if 0 < top_p < 1 else (0.0,):
            tokens.append(reference.top_p_token(row, top_p + more, shifted.__getitem__))
    assert min(tokens) <= token <= max(tokens), f"drew {token}, expected one of {sorted(set(tokens))}"


def check_filtered_is_renormalised(case: SamplingCase, device: str) -> None:
    """A filtered draw is the plain draw from the renormalised probabilities; not so for top-p alone."""
    probs = case.probs(device)
    dist = torch.stack([case.distribution(row) for row in probs.cpu().float()]).float().to(device)
    ids = case.sampler()(probs, seed=SEED, offset=OFFSET)
    plain = sampling.sampling_from_probs(dist, seed=SEED, offset=OFFSET)
    for i, row in enumerate(probs.cpu().float()):
        if ids[i] != plain[i]:  # only at a boundary
            check_token(case, row, int(plain[i]), partial(reference.uniform, SEED, OFFSET, i))


RENORM_CASES = tuple(
    SamplingCase(rows, vocab_size, filters, dtype=dtype)
    for rows, vocab_size, dtype in (
        ("flat", 300, torch.float32),
        ("tied", 2500, torch.float16),
        ("few", 5003, torch.float32),
    )
    for filters in ({"top_k": 1}, {"top_k": 33}, {"top_k": 10**6}, {"top_p": 0.0}, {"top_p": 0.6}, {"top_p": 1.0})
)


def check_renorm(case: SamplingCase, device: str) -> None:
    """Kept probabilities are divided by their sum, the others are 0."""
    probs = case.probs(device)
    renorm = sampling.top_k_renorm_probs if "top_k" in case.filters else sampling.top_p_renorm_probs
    got = renorm(probs, *case.filters.values())
    assert got.dtype == torch.float32
    rows = probs.cpu().float()
    oracle = torch.stack([case.distribution(row) for row in rows])
    assert torch.equal(got.cpu() > 0, oracle > 0)
    kept = rows * (oracle > 0)
    assert_close(got, oracle, kept / kept.sum(-1, keepdim=True))


def check_renorm_per_row(device: str) -> None:
    """Tensors of top_k and top_p give each row its own."""
    probs = SamplingCase("steep", 2500, batch_size=4).probs(device)
    top_k, top_p = torch.tensor([1, 5, 10**6, 40]), torch.tensor([0.0, 0.5, 1.0, 0.9])
    for i in range(4):
        one = sampling.top_k_renorm_probs(probs[i : i + 1], int(top_k[i]))
        assert torch.equal(sampling.top_k_renorm_probs(probs, top_k.to(device))[i : i + 1], one)
        one = sampling.top_p_renorm_probs(probs[i : i + 1], float(top_p[i]))
        assert torch.equal(sampling.top_p_renorm_probs(probs, top_p.to(device))[i : i + 1], one)


def check_mask_logits(vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """Logits below the k-th largest become -inf, the others stay; also negative ones, ties, -inf and NaN.

    Around the middle of row 0 are zeros, and of row 4 nothing else, of both signs: equal floats of unequal bits.
    """
    logits = (randn(5, vocab_size, seed=1) * 3).round(decimals=1).to(dtype)
    logits[1, ::2] = -torch.inf
    logits[2, 1:] = -torch.inf
    logits[3, 5] = torch.nan
    logits[4] *= 0
    logits[4, : vocab_size // 4] = 1
    largest = logits.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for k in (1, 7, vocab_size // 2, vocab_size, 10 * vocab_size):
        got = sampling.top_k_mask_logits(logits.to(device), k).cpu()
        want = [row.masked_fill(~reference.top_k_keep(order, k), -torch.inf)
                for row, order in zip(logits.float(), largest, strict=True)]  # fmt: skip
        torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=0, equal_nan=True)


def check_softmax(vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """Against fp64; -inf gives 0, a row of -inf zeros, and NaN stays in its row."""
    logits = (randn(5, vocab_size, seed=2) * 5).to(dtype)
    logits[1, ::3] = -torch.inf
    logits[2] = -torch.inf
    logits[3] += 1e4
    for temperature in (None, 0.7, torch.tensor([0.5, 1.0, 2.0, 3.0, 1e-2])):
        heat = temperature if not isinstance(temperature, Tensor) else temperature.to(device)
        got = sampling.softmax(logits.to(device), heat)
        oracle = reference.softmax(logits.double(), temperature)
        scaled = logits.float() / (1 if temperature is None else torch.as_tensor(temperature).reshape(-1, 1))
        assert_close(got, oracle, torch.softmax(scaled, -1).nan_to_num(0))
        assert (got[2] == 0).all()
    logits[4, 0] = torch.nan
    assert torch.equal(sampling.softmax(logits.to(device)).isnan().any(1).cpu(), torch.arange(5) == 4)


def check_sampling_from_logits(vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """The token that `sampling_from_probs` draws from the softmax; -inf never, other rows whatever a bad one holds."""
    logits = (randn(6, vocab_size, seed=3) * 2).to(dtype)
    logits[1, ::2] = -torch.inf
    logits[2, 1:] = -torch.inf
    clean = sampling.sampling_from_logits(logits.to(device), seed=SEED, offset=OFFSET)
    case = SamplingCase("logits", vocab_size)
    for i, row in enumerate(logits):
        uniform = partial(reference.uniform, SEED, OFFSET, i)
        check_token(case, reference.softmax(row.double()).float(), int(clean[i]), uniform)
    logits[3] = -torch.inf
    logits[4, vocab_size // 2] = torch.nan
    ids, valid = sampling.sampling_from_logits(logits.to(device), seed=SEED, offset=OFFSET, return_valid=True)
    assert valid.tolist() == [True, True, True, False, False, True]
    assert torch.equal(ids.cpu(), torch.where(valid.cpu(), clean.cpu(), 0))


def check_top_k_top_p_from_logits(order: str, device: str) -> None:
    """The tokens of the same filters over the softmax; "top_k_first": of top-p alone, over that of the top-k."""
    logits = randn(4, 2500, seed=4) * 3
    top_k, top_p = torch.tensor([1, 20, 3000, 50]), torch.tensor([0.5, 0.9, 0.8, 1.0])
    ids = sampling.top_k_top_p_sampling_from_logits(
        logits.to(device), top_k.to(device), top_p.to(device), filter_apply_order=order, seed=SEED, offset=OFFSET
    )
    for i, row in enumerate(logits):
        filters: dict[str, Any] = {"top_k": int(top_k[i]), "top_p": float(top_p[i]), "order": order}
        if order == "top_k_first":
            row = row.masked_fill(~reference.top_k_keep(row, filters.pop("top_k")), -torch.inf)
            del filters["order"]
        case = SamplingCase("logits", 2500, filters)
        check_token(case, torch.softmax(row, -1), int(ids[i]), partial(reference.uniform, SEED, OFFSET, i))
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):  # the last: in all of the row
        logits[row, 700 if row < 2 else slice(None)] = value
    again, valid = sampling.top_k_top_p_sampling_from_logits(
        logits.to(device), top_k.to(device), top_p.to(device), filter_apply_order=order, seed=SEED, offset=OFFSET,
        return_valid=True,
    )  # fmt: skip
    assert valid.tolist() == [False, False, False, True]
    assert torch.equal(again, torch.where(valid, ids, 0))


def check_bad_rows(vocab_size: int, filters: dict[str, Any], device: str) -> None:
    """Rows that are no distribution give id 0 and valid False, and change no other row's token."""
    case = SamplingCase("flat", vocab_size, filters, batch_size=6)
    probs, sampler = case.probs(device), case.sampler()
    clean = sampler(probs, seed=SEED, offset=OFFSET)
    probs = probs.clone()
    probs[1, vocab_size // 3] = torch.nan
    probs[2] = torch.nan
    probs[3] = 0
    probs[4, 0] = torch.inf
    ids, valid = sampler(probs, seed=SEED, offset=OFFSET, return_valid=True)
    assert valid.tolist() == [True, False, False, False, False, True]
    assert torch.equal(ids, torch.where(valid, clean, 0))


def check_row_alone(case: SamplingCase, device: str) -> None:
    """A row with its own seed draws one token, wherever it stands in whatever batch; the first row always does."""
    probs, sampler = case.probs(device), case.sampler()
    count = case.batch_size
    seeds = torch.arange(100, 100 + count, device=device)
    offsets = torch.arange(count, device=device) * 4
    together = sampler(probs, seed=seeds, offset=offsets)
    for i in range(count):
        alone = sampler(probs[i : i + 1], seed=seeds[i : i + 1], offset=offsets[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])
        assert torch.equal(alone, sampler(probs[i : i + 1], seed=100 + i, offset=4 * i))
    order = torch.arange(count - 1, -1, -1, device=device)
    flipped = sampler(probs, indices=order, seed=seeds[order], offset=offsets[order])
    assert torch.equal(flipped.flip(0), together.to(flipped.dtype))
    first = sampler(probs, seed=SEED, offset=OFFSET)[:1]
    assert torch.equal(sampler(probs[:1], seed=SEED, offset=OFFSET), first)


def check_indices(vocab_size: int, device: str, num_outputs: int = 40) -> None:
    """Output i comes from row indices[i], with the numbers of output i and its own parameters."""
    probs = SamplingCase("steep", vocab_size, batch_size=3).probs(device)
    indices = torch.arange(num_outputs, device=device) % 3
    for filters in ({}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": torch.linspace(0.1, 1, num_outputs, device=device)}):
        case = SamplingCase("", vocab_size, filters)
        got = case.sampler()(probs, indices=indices, seed=SEED)
        assert got.dtype == indices.dtype
        assert torch.equal(got, case.sampler()(probs[indices], seed=SEED).long())
        assert case.sampler()(probs, indices=indices.int(), seed=SEED).dtype == torch.int32
    got = sampling.sampling_from_logits(probs.log(), indices=indices, seed=SEED)
    assert torch.equal(got, sampling.sampling_from_logits(probs.log()[indices], seed=SEED).long())


TOP_K_ROWS = (1, 37, 2048, 5003)


def check_top_k(row_len: int, dtype: torch.dtype, device: str) -> None:
    """Exactly k ids, ties by the smaller or the larger id; sorted by value or by id."""
    x = (randn(3, row_len, seed=5) * 4).round().to(dtype)
    x[1, row_len // 2 :] = -torch.inf
    for k in sorted({1, (row_len + 2) // 3, row_len}):
        for tie_break in topk.TopKTieBreak:
            values, ids = topk.top_k(x.to(device), k, sorted=True, tie_break=tie_break)
            by_id = topk.top_k(x.to(device), k, tie_break=tie_break)
            for i, row in enumerate(x):
                want = reference.top_k(row.float(), k, tie_break == topk.TopKTieBreak.LARGE)
                assert ids[i].tolist() == want
                assert torch.equal(values[i].cpu(), row[want])
                assert by_id[1][i].tolist() == sorted(want)
                assert torch.equal(by_id[0][i].cpu(), row[sorted(want)])


def check_top_k_windows(device: str, row_len: int = 2500) -> None:
    """The transforms of sparse attention: positions within windows, mapped, padded with -1."""
    scores = randn(5, row_len, seed=6).half()
    starts, lengths = torch.tensor([0, 10, 2400, 3, 0]), torch.tensor([row_len, 1000, 50, 0, 7])
    k, page_size = 64, 16
    raw, out = (torch.full((5, k), 99, dtype=torch.int32, device=device) for _ in range(2))
    table = torch.randperm(3 * 200, generator=torch.Generator().manual_seed(0)).reshape(3, 200).int()
    rows = torch.tensor([0, 1, 2, 0, 1])
    pages = topk.top_k_page_table_transform(
        scores.to(device), table.to(device), lengths.to(device), k,
        row_to_batch=rows.to(device), row_starts=starts.to(device), page_size=page_size, out=out, out_raw_indices=raw,
    )  # fmt: skip
    assert pages is out
    shift = torch.tensor([0, 5, 100, 7, 9])
    ragged = topk.top_k_ragged_transform(
        scores.to(device), shift.to(device), lengths.to(device), k, row_starts=starts.to(device)
    )
    assert pages.dtype == ragged.dtype == torch.int32
    for i in range(5):
        window = scores[i, starts[i] : starts[i] + lengths[i]].float()
        ids = sorted(reference.top_k(window, k))
        pad = [-1] * (k - len(ids))
        assert raw[i].tolist() == ids + pad
        assert ragged[i].tolist() == [j + int(shift[i]) for j in ids] + pad
        tokens = [j + int(starts[i]) for j in ids]
        assert (
            pages[i].tolist() == [int(table[rows[i], t // page_size]) * page_size + t % page_size for t in tokens] + pad
        )


def check_top_k_varlen(device: str) -> None:
    """Each row of a request counts one score more; compressed caches count fewer."""
    scores, lens = randn(6, 300, seed=7), torch.tensor([5, 300, 40])
    out = torch.full((6, 16), 99, dtype=torch.int32, device=device)
    for ratio in (1, 4):
        ids, values = topk.top_k_varlen(
            scores.to(device), lens.to(device), 16, compress_ratio=ratio, next_n=2, return_values=True, out_indices=out
        )
        assert ids is out
        for r in range(6):
            row = scores[r, : (int(lens[r // 2]) - 2 + r % 2 + 1) // ratio]
            want = sorted(reference.top_k(row, 16))
            assert ids[r].tolist() == want + [-1] * (16 - len(want))
            assert values is not None
            assert values[r].tolist() == row[want].tolist() + [-math.inf] * (16 - len(want))


@dataclass(frozen=True)
class ChainCase:
    """closeness: how near the draft is to the target; 1: equal, so that every proposal is accepted."""

    num_tokens: int
    vocab_size: int
    closeness: float
    batch_size: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"n={self.num_tokens} vocab={self.vocab_size} closeness={self.closeness} {name(self.dtype)}"

    def chains(self) -> tuple[Tensor, Tensor, Tensor]:
        """draft_probs, draft_token_ids, target_probs."""
        shape = self.batch_size, self.num_tokens + 1, self.vocab_size
        target, noise = randn(*shape, seed=8) * 2, randn(*shape, seed=9) * 2
        draft = target * self.closeness + noise * (1 - self.closeness)
        probs = [torch.softmax(x, -1).to(self.dtype) for x in (draft[:, :-1], target)]
        tokens = randn(*shape, seed=10)[:, :-1].add(probs[0].float().log()).argmax(-1)
        return probs[0], tokens.int(), probs[1]


CHAIN_CASES = (
    ChainCase(0, 50, 0.5),
    ChainCase(1, 50, 0.0),
    ChainCase(3, 50, 0.7, batch_size=9),
    ChainCase(4, 2500, 1.0),
    ChainCase(5, 2500, 0.8, dtype=torch.float16),
)


def check_chain(case: ChainCase, device: str) -> None:
    """Against the definition; counters are added to in place."""
    draft, tokens, target = case.chains()
    accepted, emitted = (torch.full((case.batch_size,), n, dtype=torch.int32, device=device) for n in (10, 20))
    got = sampling.chain_speculative_sampling(
        draft.to(device), tokens.to(device), target.to(device), accepted, emitted, seed=SEED, offset=OFFSET
    )
    assert got[1] is accepted
    assert got[2] is emitted
    for i in range(case.batch_size):
        u = [reference.uniform(SEED, OFFSET, i, draw) for draw in range(case.num_tokens + 1)]
        ids, passed, end = reference.chain_speculative_sampling(
            draft[i].float(), tokens[i].tolist(), target[i].float(), u
        )
        assert got[0][i].tolist() == ids
        assert (int(accepted[i]), int(emitted[i])) == (10 + passed, 20 + end)


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """How many standard deviations the chi-square statistic of `counts` [n] lies above its mean, had they been drawn
    from `probs` [n] (Wilson and Hilferty's transform). Outcomes expected fewer than 8 times are counted together."""
    expected = probs.double() * counts.sum()
    rare = expected < 8
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected)]
    observed, expected = (x[pooled[1] > 0] for x in pooled)
    assert counts[probs == 0].sum() == 0, "an outcome of probability 0 was drawn"
    freedom = len(expected) - 1
    if freedom == 0:
        return 0.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def check_draws(ids: Tensor, probs: Tensor) -> None:
    """Draws [n] fit the distribution probs [vocab]."""
    counts = ids.cpu().long().bincount(minlength=len(probs))
    assert counts.numel() == len(probs), "an id outside the vocabulary was drawn"
    assert chi_square(counts, probs) < 4


def check_distribution(case: SamplingCase, num_draws: int, device: str, shared: bool = True) -> None:
    """Many draws from a row fit the filtered distribution; shared: the row is given once, with indices."""
    probs = case.probs(device)[:1]
    if shared:
        ids = case.sampler()(probs, indices=torch.zeros(num_draws, dtype=torch.int32, device=device), seed=SEED)
    else:
        ids = case.sampler()(probs.expand(num_draws, -1), seed=SEED)
    check_draws(ids, case.distribution(probs[0].cpu().float()))


def check_distribution_of_logits(order: str | None, num_draws: int, device: str) -> None:
    """As `check_distribution`, of the softmax; order: of its filters, None: without any."""
    logits = torch.linspace(-3, 3, 50).masked_fill(torch.arange(50) % 7 == 0, -torch.inf)
    probs, indices = torch.softmax(logits.double(), -1), torch.zeros(num_draws, dtype=torch.int32, device=device)
    rows = logits[None].to(device)
    if order is None:
        ids = sampling.sampling_from_logits(rows, indices, seed=SEED)
    else:
        ids = sampling.top_k_top_p_sampling_from_logits(rows, 30, 0.9, indices, order, seed=SEED)
        probs = reference.filtered(probs, 30, 0.9, joint=order == "joint")
    check_draws(ids, probs)


def check_distribution_of_chains(num_draws: int, device: str) -> None:
    """The tokens of a chain are distributed as the target says, whatever was proposed, each time there is one; and
    proposals are accepted as often as the distributions overlap."""
    vocab_size, num_tokens = 12, 2
    draft = torch.softmax(randn(num_tokens, vocab_size, seed=11), -1)
    target = torch.softmax(randn(num_tokens + 1, vocab_size, seed=12), -1)
    target[:, 3] = 0
    target /= target.sum(-1, keepdim=True)
    shape, one = (num_draws, -1, -1), torch.zeros(num_draws, dtype=torch.int32, device=device)
    proposals = [sampling.sampling_from_probs(p[None].to(device), one, seed=i) for i, p in enumerate(draft)]
    ids, accepted, emitted = sampling.chain_speculative_sampling(
        draft.to(device).expand(shape), torch.stack(proposals, 1), target.to(device).expand(shape), seed=SEED
    )
    for place in range(num_tokens + 1):
        check_draws(ids[:, place][ids[:, place] >= 0], target[place])
    overlap = torch.minimum(draft, target[:-1]).sum(-1)
    passes = [(1 - overlap[0]) * (1 - overlap[1]), 1 - overlap[0] * overlap[1], overlap[0] * overlap[1]]
    passes[1] -= passes[0]
    check_draws(accepted, torch.stack(passes))
    check_draws(emitted, torch.stack([1 - overlap[0], overlap[0] * (1 - overlap[1]), overlap[0] * overlap[1]]))


DISTRIBUTION_CASES = tuple(
    SamplingCase(rows, vocab_size, filters, batch_size=1)
    for rows, vocab_size in (("steep", 50), ("few", 1000))
    for filters in FILTERS
) + tuple(
    SamplingCase(rows, 300, {"top_p": top_p}, batch_size=1)
    for rows in ("tied", "uniform", "one")
    for top_p in (0.05, 0.5, 0.9999)
)
