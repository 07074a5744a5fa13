"""Sampling on the CPU: against the definition, distributions, randomness, graphs, errors."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from flashtile import config, sampling, topk
from flashtile.config import SamplingConfig
from flashtile.kernels.cpu import sampling as cpu
from flashtile.randomness import random_state
from flashtile.reference import sampling as reference
from flashtile.testing import cases_sampling as cases
from flashtile.testing.cases_sampling import SamplingCase

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_sampler(case: SamplingCase) -> None:
    cases.check_sampler(case, "cpu")


@pytest.mark.parametrize("case", [case for case in cases.SMALL_CASES if not case.top_p_alone], ids=str)
def test_filtered_draw_is_the_draw_from_renormalised_probabilities(case: SamplingCase) -> None:
    cases.check_filtered_is_renormalised(case, "cpu")


@pytest.mark.parametrize("case", cases.DISTRIBUTION_CASES, ids=str)
def test_distribution(case: SamplingCase) -> None:
    cases.check_distribution(case, 10**6, "cpu")
    cases.check_distribution(case, 10**4, "cpu", shared=False)


@pytest.mark.parametrize("order", [None, "top_k_first", "joint"])
def test_distribution_of_logits(order: str | None) -> None:
    cases.check_distribution_of_logits(order, 10**6, "cpu")


def test_distribution_of_speculative_sampling() -> None:
    cases.check_distribution_of_chains(2 * 10**5, "cpu")


def test_chi_square_finds_a_wrong_distribution() -> None:
    probs = torch.tensor([0.25, 0.25, 0.5])
    assert cases.chi_square(torch.tensor([2500, 2500, 5000]), probs) < 0
    assert cases.chi_square(torch.tensor([2700, 2300, 5000]), probs) > 4


@pytest.mark.parametrize("case", cases.RENORM_CASES, ids=str)
def test_renorm(case: SamplingCase) -> None:
    cases.check_renorm(case, "cpu")


def test_renorm_per_row() -> None:
    cases.check_renorm_per_row("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 2500])
def test_top_k_mask_logits(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_mask_logits(vocab_size, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 5003])
def test_softmax(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_softmax(vocab_size, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 5003])
def test_sampling_from_logits(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_sampling_from_logits(vocab_size, dtype, "cpu")


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_top_k_top_p_sampling_from_logits(order: str) -> None:
    cases.check_top_k_top_p_from_logits(order, "cpu")


@pytest.mark.parametrize("filters", cases.FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [300, 5003])
def test_bad_rows_are_isolated(vocab_size: int, filters: dict[str, Any]) -> None:
    cases.check_bad_rows(vocab_size, filters, "cpu")


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_row_alone_or_in_a_batch(case: SamplingCase) -> None:
    cases.check_row_alone(case, "cpu")


@pytest.mark.parametrize("vocab_size", [700, 2500])
def test_indices(vocab_size: int) -> None:
    cases.check_indices(vocab_size, "cpu")


@pytest.mark.parametrize("row_len", cases.TOP_K_ROWS)
def test_top_k(row_len: int) -> None:
    cases.check_top_k(row_len, torch.float16, "cpu")
    values, ids = topk.top_k(torch.tensor([[1.0, torch.nan, 3.0]]), 1)
    assert (ids.tolist(), bool(values.isnan())) == ([[1]], True)


def test_top_k_page_table_transform_and_top_k_ragged_transform() -> None:
    cases.check_top_k_windows("cpu")


def test_top_k_varlen() -> None:
    cases.check_top_k_varlen("cpu")


@pytest.mark.parametrize("case", cases.CHAIN_CASES, ids=str)
def test_chain_speculative_sampling(case: cases.ChainCase) -> None:
    cases.check_chain(case, "cpu")


def test_equal_distributions_accept_all() -> None:
    case = cases.ChainCase(4, 50, 1.0)
    ids, accepted, emitted = sampling.chain_speculative_sampling(*case.chains())
    assert (accepted == 4).all()
    assert (emitted == 4).all()
    assert (ids >= 0).all()


@pytest.mark.parametrize("case", cases.REFUSING_CASES, ids=str)
def test_all_first_candidates_refused(case: SamplingCase) -> None:
    assert config.WHOLE_ROW_DRAWS == reference.WHOLE_ROW_DRAWS
    assert cases.first_candidates_refused(case) > 0
    cases.check_sampler(case, "cpu")
    cases.check_row_alone(case, "cpu")


def test_top_p_at_the_boundary() -> None:
    cases.check_top_p_boundary(10_000, "cpu")


# Randomness


def test_philox_known_answers() -> None:
    """From the authors' test vectors (Random123)."""
    ones = 2**32 - 1
    assert reference.philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 2**63 - 1), (-5, -1), (2**62 + 12345, 2**33)])
def test_uniforms(seed: int, offset: int) -> None:
    for draw in (0, 3):
        want = [reference.uniform(seed, offset, i, draw) for i in range(5)]
        assert cpu.uniforms(5, None, seed, None, offset, draw).tolist() == want
    seeds, offsets = torch.full((5,), seed), torch.arange(5) + offset
    want = [reference.uniform(seed, int(o), 0) for o in offsets]
    assert cpu.uniforms(5, seeds, 0, offsets, 0).tolist() == want


def test_uniforms_are_uniform() -> None:
    u = cpu.uniforms(10**6, None, 7, None, 0)
    assert ((u >= 0) & (u < 1)).all()
    assert cases.chi_square((u * 1000).long().bincount(minlength=1000), torch.full((1000,), 1e-3)) < 4


def _draw(**state: Any) -> list[int]:
    ids = sampling.sampling_from_probs(torch.full((64, 1000), 1e-3), **state)
    return [int(i) for i in ids]


def test_generator_state_advances() -> None:
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    draws = [_draw(generator=first), _draw(generator=first)]
    assert draws[0] != draws[1]
    assert draws == [_draw(generator=second), _draw(generator=second)]


def test_default_generator() -> None:
    torch.manual_seed(3)
    draws = [_draw(), _draw()]
    torch.manual_seed(3)
    assert draws == [_draw(), _draw()]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(("of", "current"), [("cuda", 1), ("cuda", 0), ("cuda:1", 0), ("cuda:0", 1)])
def test_generator_of_a_gpu(monkeypatch: pytest.MonkeyPatch, of: str, current: int) -> None:
    """torch.Generator("cuda") names no index: it is of the current device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    generator = Mock(device=torch.device(of), initial_seed=lambda: 5, get_offset=lambda: 8)
    if of == "cuda:1" or (of, current) == ("cuda", 1):
        assert random_state(generator, None, None, 3, torch.device("cuda:1")) == (None, 5, None, 8)
        generator.set_offset.assert_called_once_with(12)
    else:
        with pytest.raises(ValueError, match=f"generator: expected one of the CPU or of cuda:1, got one of {of}"):
            random_state(generator, None, None, 3, torch.device("cuda:1"))


def test_seed_and_offset() -> None:
    assert _draw(seed=5) == _draw(seed=5, offset=0) == _draw(seed=torch.tensor([5]), offset=torch.tensor([0]))
    assert _draw(seed=-1) == _draw(seed=2**64 - 1)
    assert _draw(seed=torch.tensor([5], dtype=torch.uint64)) == _draw(seed=5)
    assert len({tuple(_draw(seed=s, offset=o)) for s in (5, 6) for o in (0, 1)}) == 4
    assert _draw(seed=5, deterministic=False) == _draw(seed=5)


# Laws and errors


def test_nothing_to_draw() -> None:
    probs = torch.empty(0, 10)
    for filters in cases.FILTERS:
        assert SamplingCase("", 10, filters).sampler()(probs).shape == (0,)
    assert sampling.sampling_from_logits(probs).shape == (0,)
    for rows in (
        sampling.softmax(probs),
        sampling.top_k_renorm_probs(probs, 3),
        sampling.top_p_renorm_prob(probs, 0.5),
        sampling.top_k_mask_logits(probs, 3),
    ):
        assert rows.shape == (0, 10)
    assert topk.top_k(probs, 3)[1].shape == (0, 3)


def test_check_nan() -> None:
    probs = torch.full((2, 4), 0.25)
    sampling.sampling_from_probs(probs, check_nan=True)
    probs[1, 2] = torch.nan
    for filters in cases.FILTERS:
        with pytest.raises(ValueError, match=r"Input probs contains NaN\."):
            SamplingCase("", 4, filters).sampler()(probs, check_nan=True)
    with pytest.raises(ValueError, match=r"Input logits contains NaN\."):
        sampling.sampling_from_logits(probs, check_nan=True)


PROBS = torch.full((2, 8), 0.125)
HALF = torch.tensor([0.5, 0.5])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sampling.sampling_from_probs(PROBS[0]),
            ValueError,
            r"probs: expected shape \[batch_size, vocab_size\]",
        ),
        (lambda: sampling.sampling_from_probs(PROBS.int()), ValueError, "probs: expected dtype float16 or"),
        (lambda: sampling.sampling_from_probs(PROBS.t()), ValueError, "probs: the last dimension must be contiguous"),
        (lambda: sampling.sampling_from_probs(PROBS[:, :0]), ValueError, "probs: expected a vocab_size from 1"),
        (lambda: sampling.sampling_from_probs(PROBS, HALF), ValueError, "indices: expected dtype int32 or int64"),
        (lambda: sampling.sampling_from_probs(PROBS, torch.tensor([0, 2])), ValueError, "indices: .* got 2 at index 1"),
        (lambda: sampling.top_k_sampling_from_probs(PROBS, 0), ValueError, "top_k: expected 1 or more, got 0"),
        (lambda: sampling.top_k_sampling_from_probs(PROBS, 1.5), TypeError, "top_k: expected an int or a torch.Tensor"),
        (
            lambda: sampling.top_k_sampling_from_probs(PROBS, torch.tensor([1, 0])),
            ValueError,
            "top_k: .* got 0 at index 1",
        ),
        (lambda: sampling.top_k_sampling_from_probs(PROBS, torch.tensor([1, 2, 3])), ValueError, r"top_k: .* \[2\]"),
        (
            lambda: sampling.top_p_sampling_from_probs(PROBS, 1.5),
            ValueError,
            "top_p: expected numbers from 0 to 1, got 1.5",
        ),
        (lambda: sampling.top_p_sampling_from_probs(PROBS, -HALF), ValueError, "top_p: expected numbers from 0 to 1"),
        (
            lambda: sampling.top_p_sampling_from_probs(PROBS, "0.5"),
            TypeError,
            "top_p: expected a number or a torch.Tensor",
        ),
        (lambda: sampling.min_p_sampling_from_probs(PROBS, float("nan")), ValueError, "min_p: expected numbers from 0"),
        (
            lambda: sampling.top_k_top_p_sampling_from_probs(PROBS, 2, 0.5, filter_apply_order="top_p_first"),
            ValueError,
            "filter_apply_order: expected 'top_k_first' or 'joint', got 'top_p_first'",
        ),
        (lambda: sampling.softmax(PROBS, 0.0), ValueError, "temperature: expected finite numbers above 0"),
        (lambda: sampling.softmax(PROBS, float("inf")), ValueError, "temperature: expected finite numbers above 0"),
        (lambda: sampling.softmax(PROBS, -HALF), ValueError, "temperature: expected finite numbers above 0"),
        (lambda: sampling.top_p_sampling_from_probs(PROBS, 1e300), ValueError, "top_p: expected numbers from 0 to 1"),
        (lambda: sampling.sampling_from_probs(PROBS, offset=3), ValueError, "offset: got one without seed"),
        (
            lambda: sampling.sampling_from_probs(PROBS, seed=3, generator=torch.Generator()),
            ValueError,
            "generator: got one beside seed",
        ),
        (lambda: sampling.sampling_from_probs(PROBS, seed=0.5), TypeError, "seed: expected an int or a torch.Tensor"),
        (
            lambda: sampling.sampling_from_probs(PROBS, seed=torch.tensor([1, 2, 3])),
            ValueError,
            r"seed: expected shape \[1\]",
        ),
        (lambda: sampling.sampling_from_probs(PROBS, seed=HALF), ValueError, "seed: expected dtype int32 or int64"),
        (lambda: topk.top_k(PROBS, 9), ValueError, "k: expected 1 to the row length 8, got 9"),
        (lambda: topk.top_k(PROBS, 2, tie_break=3), ValueError, "tie_break: expected a TopKTieBreak"),
        (
            lambda: topk.top_k_varlen(PROBS, torch.tensor([8, 8]), 2, backend="radix"),
            NotImplementedError,
            "backend='radix' is not implemented yet",
        ),
        (
            lambda: sampling.chain_speculative_sampling(PROBS[None], torch.tensor([[1, 8]]), PROBS[:1].expand(1, 3, 8)),
            ValueError,
            "draft_token_ids: expected values from 0 to 7, got 8",
        ),
        (
            lambda: sampling.chain_speculative_sampling(PROBS[None], torch.tensor([[1, 2]]), PROBS[None]),
            ValueError,
            r"target_probs: expected shape \[1, 3, 8\], got \[1, 2, 8\]",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 3000}, "chunk: expected a power of two from 128, got 3000"),
        ({"sample": 64}, "sample: expected a power of two from 128, got 64"),
        ({"slots": 4096}, "slots: expected a multiple of 4 from 8 to chunk = 2048, got 4096"),
    ],
)
def test_config_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)


# Graphs


def test_compiles_as_one_graph() -> None:
    def step(logits: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        probs = sampling.softmax(logits, 0.8)
        kept = sampling.top_p_renorm_probs(probs, top_p)
        ids = sampling.top_k_top_p_sampling_from_probs(kept, 20, 0.9, seed=seed, offset=seed)
        greedy = topk.top_k(sampling.top_k_mask_logits(logits, 3), 1)[1]
        return torch.stack([ids, sampling.sampling_from_logits(logits, seed=seed, offset=seed), greedy[:, 0]])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(4, 60), torch.linspace(0.2, 1, 4), torch.tensor([9])
    assert torch.equal(compiled(*inputs), step(*inputs))


def test_compiled_draws_differ() -> None:
    draw = torch.compile(lambda p: sampling.sampling_from_probs(p), fullgraph=True, backend="aot_eager")
    probs = torch.full((64, 1000), 1e-3)
    assert not torch.equal(draw(probs), draw(probs))
