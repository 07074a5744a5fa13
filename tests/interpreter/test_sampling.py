"""Sampling kernels through Triton's interpreter: the small cases of the CPU tests."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from flashtile.config import SamplingConfig
from flashtile.kernels.sampling.guess import key_of, value_of
from flashtile.testing import cases_sampling as cases
from flashtile.testing.cases_sampling import SamplingCase

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@triton.jit  # type: ignore[untyped-decorator]
def _keys_kernel(keys_ptr, values_ptr, x_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, SIZE)
    keys = key_of(tl.load(x_ptr + offs))
    tl.store(keys_ptr + offs, keys)
    tl.store(values_ptr + offs, value_of(keys))


def test_keys_have_the_order_of_floats() -> None:
    """Equal floats have equal keys, zeros of both signs too: or a search by key may never end."""
    x = torch.tensor([-torch.inf, -2.5, -1e-38, -1e-45, -0.0, 0.0, 1e-45, torch.inf])
    keys, values = torch.empty(8, dtype=torch.int32), torch.empty(8)
    _keys_kernel[(1,)](keys, values, x, SIZE=8)
    assert torch.equal(values, x)
    assert torch.equal(keys.diff() > 0, x.diff() > 0)
    assert keys[3:7].tolist() == [-1, 0, 0, 1]


@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=str)
def test_sampler(case: SamplingCase) -> None:
    cases.check_sampler(case, "cpu")


def test_distribution() -> None:
    cases.check_distribution(SamplingCase("steep", 30, batch_size=1), 200, "cpu")
    cases.check_distribution(SamplingCase("steep", 30, {"top_p": 0.9}, batch_size=1), 100, "cpu", shared=False)
    cases.check_distribution(SamplingCase("flat", 30, {"top_p": 0.2}, batch_size=1), 200, "cpu")


@pytest.mark.parametrize("case", [c for c in cases.RENORM_CASES if c.rows != "few" or "top_k" in c.filters], ids=str)
def test_renorm(case: SamplingCase) -> None:
    cases.check_renorm(case, "cpu")


def test_renorm_per_row() -> None:
    cases.check_renorm_per_row("cpu")


@pytest.mark.parametrize("vocab_size", [37, 2500])
def test_top_k_mask_logits(vocab_size: int) -> None:
    cases.check_mask_logits(vocab_size, torch.float32, "cpu")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(37, torch.float16), (5003, torch.float32)])
def test_softmax(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_softmax(vocab_size, dtype, "cpu")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(37, torch.float16), (5003, torch.float32)])
def test_sampling_from_logits(vocab_size: int, dtype: torch.dtype) -> None:
    cases.check_sampling_from_logits(vocab_size, dtype, "cpu")


def test_top_k_top_p_sampling_from_logits() -> None:
    cases.check_top_k_top_p_from_logits("top_k_first", "cpu")


@pytest.mark.parametrize(
    ("vocab_size", "filters"),
    [(300, {"top_p": 0.9}), (5003, {}), (5003, {"top_k": 9, "top_p": 0.9}), (300, {"min_p": 0.1})],
)
def test_bad_rows_are_isolated(vocab_size: int, filters: dict[str, Any]) -> None:
    cases.check_bad_rows(vocab_size, filters, "cpu")


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_row_alone_or_in_a_batch(filters: dict[str, Any]) -> None:
    cases.check_row_alone(SamplingCase("steep", 2500, filters), "cpu")


@pytest.mark.parametrize("vocab_size", [70, 2500])
def test_indices(vocab_size: int) -> None:
    cases.check_indices(vocab_size, "cpu", num_outputs=4)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_large_batches_run_in_slices(filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile.kernels.sampling import rows

    case = SamplingCase("flat", 2500, filters, batch_size=5)
    whole = case.sampler()(case.probs("cpu"), seed=3)
    monkeypatch.setattr(rows, "WORKSPACE_BYTES", 1)
    assert torch.equal(case.sampler()(case.probs("cpu"), seed=3), whole)


def test_large_batches_run_in_slices_of_rows_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile.kernels.sampling import rows

    monkeypatch.setattr(rows, "WORKSPACE_BYTES", 1000)
    cases.check_config(SamplingCase("steep", 5003, {"top_p": 0.3}, batch_size=9), cases.BRACKETED, "cpu")


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(chunk=512, sweep_warps=1, slots=64, sample=256, guess_warps=1, row=0),
        SamplingConfig(chunk=4096, slots=1024, slot_tile=512, sigmas=3.0, row=0),  # slots that registers do not hold
        SamplingConfig(chunk=1024, sigmas=0.5, row=0),  # brackets that miss: rows are swept again
        SamplingConfig(chunk=512, row=8192),
    ],
    ids=str,
)
def test_forced_config(config: SamplingConfig) -> None:
    """Tiles may be any: the tokens are those of the definition."""
    cases.check_config(SamplingCase("steep", 5003, {"top_k": 700, "top_p": 0.95}), config, "cpu")


@pytest.mark.parametrize("case", [case for case in cases.BRACKETED_CASES if case.vocab_size <= 5003], ids=str)
def test_sampler_of_brackets(case: SamplingCase) -> None:
    cases.check_config(case, cases.BRACKETED, "cpu")


@pytest.mark.parametrize("config", [SamplingConfig(row=0), SamplingConfig(chunk=512, row=8192)], ids=["memory", "row"])
@pytest.mark.parametrize("case", cases.REFUSING_CASES, ids=str)
def test_all_first_candidates_refused(case: SamplingCase, config: SamplingConfig) -> None:
    cases.check_refused(case, config, "cpu")


def test_top_p_at_the_boundary() -> None:
    cases.check_top_p_boundary(20, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rejection_in_registers_and_in_memory(dtype: torch.dtype) -> None:
    cases.check_rejection_paths_agree(5003, dtype, "cpu")


def test_brackets_find_the_same() -> None:
    cases.check_brackets_find_the_same(5003, torch.float16, "cpu")


def test_vocabulary_too_long() -> None:
    with pytest.raises(NotImplementedError, match="vocab_size: more than 4194304 is not implemented on CUDA"):
        SamplingCase("", 2**22 + 1).sampler()(torch.empty(1, 2**22 + 1))


@pytest.mark.parametrize("row_len", cases.TOP_K_ROWS)
def test_top_k(row_len: int) -> None:
    cases.check_top_k(row_len, torch.float16, "cpu")


def test_top_k_of_windows() -> None:
    cases.check_top_k_windows("cpu")
    cases.check_top_k_varlen("cpu")


@pytest.mark.parametrize("case", cases.CHAIN_CASES, ids=str)
def test_chain_speculative_sampling(case: cases.ChainCase) -> None:
    cases.check_chain(case, "cpu")
