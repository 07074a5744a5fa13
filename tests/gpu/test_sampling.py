"""Sampling on a CUDA device: the cases of the CPU tests; no host sync, graphs, the same tokens as on the CPU."""

from typing import Any

import pytest
import torch

from flashtile import sampling, topk
from flashtile.config import SamplingConfig
from flashtile.testing import cases_sampling as cases
from flashtile.testing.cases_sampling import SamplingCase

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_sampler(case: SamplingCase) -> None:
    cases.check_sampler(case, "cuda")


@pytest.mark.parametrize("case", cases.BRACKETED_CASES, ids=str)
def test_sampler_of_brackets(case: SamplingCase) -> None:
    cases.check_config(case, cases.BRACKETED, "cuda")


@pytest.mark.parametrize("config", [SamplingConfig(row=0), SamplingConfig(row=32768)], ids=["memory", "row"])
@pytest.mark.parametrize("case", cases.REFUSING_CASES, ids=str)
def test_all_first_candidates_refused(case: SamplingCase, config: SamplingConfig) -> None:
    cases.check_refused(case, config, "cuda")


def test_top_p_at_the_boundary() -> None:
    cases.check_top_p_boundary(10_000, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5003, 16000])
def test_rejection_in_registers_and_in_memory(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_rejection_paths_agree(vocab_size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5003, 32000])
def test_brackets_find_the_same(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_brackets_find_the_same(vocab_size, dtype, "cuda")


@pytest.mark.parametrize("case", [case for case in cases.SMALL_CASES if not case.top_p_alone], ids=str)
def test_filtered_draw_is_the_draw_from_renormalised_probabilities(case: SamplingCase) -> None:
    cases.check_filtered_is_renormalised(case, "cuda")


@pytest.mark.parametrize("case", cases.DISTRIBUTION_CASES, ids=str)
def test_distribution(case: SamplingCase) -> None:
    cases.check_distribution(case, 10**6, "cuda")
    cases.check_distribution(case, 10**6, "cuda", shared=False)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("filters", cases.FILTERS, ids=str)
def test_distribution_of_a_long_row(filters: dict[str, Any], shared: bool) -> None:
    cases.check_distribution(SamplingCase("steep", 20000, filters, batch_size=1), 10**6, "cuda", shared)


@pytest.mark.parametrize("order", [None, "top_k_first", "joint"])
def test_distribution_of_logits(order: str | None) -> None:
    cases.check_distribution_of_logits(order, 10**6, "cuda")


def test_distribution_of_speculative_sampling() -> None:
    cases.check_distribution_of_chains(10**6, "cuda")


@pytest.mark.parametrize("case", cases.RENORM_CASES, ids=str)
def test_renorm(case: SamplingCase) -> None:
    cases.check_renorm(case, "cuda")


def test_renorm_per_row() -> None:
    cases.check_renorm_per_row("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 2500, 50257])
def test_top_k_mask_logits(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_mask_logits(vocab_size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 5003, 128256])
def test_softmax(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_softmax(vocab_size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 5003, 128256])
def test_sampling_from_logits(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_sampling_from_logits(vocab_size, dtype, "cuda")


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("rows", ["steep", "tied"])
def test_distribution_of_top_p_of_a_row_in_memory(rows: str, top_p: float) -> None:
    cases.check_distribution(SamplingCase(rows, 50257, {"top_p": top_p}, batch_size=1), 10**6, "cuda")


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_top_k_top_p_sampling_from_logits(order: str) -> None:
    cases.check_top_k_top_p_from_logits(order, "cuda")


@pytest.mark.parametrize("filters", cases.FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [300, 5003])
def test_bad_rows_are_isolated(vocab_size: int, filters: dict[str, Any]) -> None:
    cases.check_bad_rows(vocab_size, filters, "cuda")


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_row_alone_or_in_a_batch(case: SamplingCase) -> None:
    cases.check_row_alone(case, "cuda")


@pytest.mark.parametrize("filters", cases.FILTERS, ids=str)
def test_row_in_a_large_batch(filters: dict[str, Any]) -> None:
    cases.check_row_alone(SamplingCase("flat", 32000, filters, batch_size=64), "cuda")


@pytest.mark.parametrize("vocab_size", [700, 2500, 128256])
def test_indices(vocab_size: int) -> None:
    cases.check_indices(vocab_size, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_len", cases.TOP_K_ROWS)
def test_top_k(row_len: int, dtype: torch.dtype) -> None:
    cases.check_top_k(row_len, dtype, "cuda")


def test_top_k_of_windows() -> None:
    cases.check_top_k_windows("cuda")
    cases.check_top_k_varlen("cuda")


@pytest.mark.parametrize("case", cases.CHAIN_CASES, ids=str)
def test_chain_speculative_sampling(case: cases.ChainCase) -> None:
    cases.check_chain(case, "cuda")


def test_same_tokens_as_on_the_cpu() -> None:
    """Up to the rounding of sums: of 512 rows, a few at most lie that near to a boundary."""
    probs = torch.softmax(torch.randn(512, 32000, generator=torch.Generator().manual_seed(0)) * 3, -1)
    for filters in cases.FILTERS:
        sampler = SamplingCase("", 32000, filters).sampler()
        assert (sampler(probs.cuda(), seed=1).cpu() != sampler(probs, seed=1)).sum() <= 2


def _everything(probs: torch.Tensor, state: dict[str, Any]) -> list[torch.Tensor]:
    logits = probs.log()
    samples = [SamplingCase("", probs.shape[1], filters).sampler()(probs, **state) for filters in cases.FILTERS]
    rows = [
        sampling.softmax(logits, 0.5),
        sampling.top_k_renorm_probs(probs, 30),
        sampling.top_p_renorm_probs(probs, 0.7),
        sampling.top_k_mask_logits(logits, 30),
    ]
    from_logits = [
        sampling.sampling_from_logits(logits, **state),
        sampling.top_k_top_p_sampling_from_logits(logits, 30, 0.7, **state),
    ]
    count = len(probs) // 3  # as many chains of two proposals
    draft, target = probs[: 2 * count].view(count, 2, -1), probs[-3 * count :].view(count, 3, -1)
    tokens = torch.ones(count, 2, dtype=torch.int32, device=probs.device)
    chains = sampling.chain_speculative_sampling(draft, tokens, target, **state)
    return [*samples, *rows, *from_logits, *chains, *topk.top_k(probs, 30)]


def test_no_host_sync() -> None:
    probs = SamplingCase("steep", 32000).probs("cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    _everything(probs, {"generator": generator})
    torch.cuda.set_sync_debug_mode("error")
    try:
        _everything(probs, {"generator": generator})
        _everything(probs, {})
        _everything(probs, {"seed": 7, "offset": 1})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("vocab_size", [300, 32000])
def test_graph(vocab_size: int) -> None:
    """A replay reads new probabilities and new seeds; without seeds it draws new numbers by itself."""
    probs, seed = SamplingCase("steep", vocab_size, batch_size=64).probs("cuda"), torch.tensor([5], device="cuda")
    state = {"seed": seed, "offset": seed}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            _everything(probs, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _everything(probs, state)
        unseeded = sampling.sampling_from_probs(probs)
    for step in range(3):
        probs.copy_(probs.roll(1, 0).flip(1))
        seed.fill_(step)
        graph.replay()
        for got, want in zip(outputs, _everything(probs, state), strict=True):
            assert torch.equal(got, want)
    flat = torch.full_like(probs, 1 / vocab_size)
    probs.copy_(flat)
    draws = set()
    for _ in range(3):
        graph.replay()
        draws.add(tuple(unseeded.tolist()))
    assert len(draws) == 3


def test_repeats_give_one_result() -> None:
    probs = SamplingCase("flat", 128256, batch_size=64).probs("cuda")
    for filters in cases.FILTERS:
        sampler = SamplingCase("", 128256, filters).sampler()
        first = sampler(probs, seed=2)
        assert all(torch.equal(sampler(probs, seed=2), first) for _ in range(50))


def test_generators() -> None:
    probs = torch.full((64, 1000), 1e-3, device="cuda")
    for device in ("cuda", "cpu"):
        first, second = (torch.Generator(device).manual_seed(7) for _ in range(2))
        draws = [sampling.sampling_from_probs(probs, generator=first) for _ in range(2)]
        assert not torch.equal(*draws)
        for draw in draws:
            assert torch.equal(draw, sampling.sampling_from_probs(probs, generator=second))
    with pytest.raises(ValueError, match="generator: expected one of the CPU or of cpu, got one of cuda"):
        sampling.sampling_from_probs(probs.cpu(), generator=torch.Generator("cuda"))


def test_row_beyond_2_31_elements() -> None:
    vocab_size = 128256
    num_rows = 2**31 // vocab_size + 2
    if torch.cuda.mem_get_info()[0] < 3 * num_rows * vocab_size:
        pytest.skip("needs 7 GB of GPU memory")
    probs = torch.zeros(num_rows, vocab_size, dtype=torch.float16, device="cuda")
    probs[-1, 77] = 1.0
    last = torch.tensor([num_rows - 1], device="cuda")
    for filters in cases.FILTERS:
        assert SamplingCase("", vocab_size, filters).sampler()(probs, indices=last).tolist() == [77]
