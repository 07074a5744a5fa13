"""The example engine on a CUDA device gives the tokens it gives on the CPU."""

import pytest
import torch

pytest.importorskip("transformers")

from examples.engine import perplexity
from examples.engine.engine import Engine
from examples.engine.model import Llama
from examples.engine.scheduler import Sampling
from tests.tiny_llama import serve, tiny_prompts, tiny_source

PROMPTS = tiny_prompts(1, 5, 30, 2, 41)


def serve_on(device: str, sampling: Sampling, page_size: int) -> list[list[int]]:
    model = Llama(tiny_source(), dtype=torch.float32, device=device)
    return serve(Engine(model, page_size=page_size, chunk=7), PROMPTS, sampling)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_greedy_tokens_in_fp32_are_those_of_the_cpu(page_size: int) -> None:
    assert serve_on("cuda", Sampling(20), page_size) == serve_on("cpu", Sampling(20), page_size)


def test_sampled_tokens_in_fp32_are_those_of_the_cpu() -> None:
    sampling = Sampling(20, temperature=1.2, top_k=40, top_p=0.95, seed=5)
    assert serve_on("cuda", sampling, 16) == serve_on("cpu", sampling, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_repeats_itself(dtype: torch.dtype) -> None:
    model = Llama(tiny_source(), dtype=dtype, device="cuda")
    first, again = (serve(Engine(model, page_size=4, chunk=6), PROMPTS, Sampling(20)) for _ in range(2))
    assert first == again
    assert all(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "fp8", "fp8_e5m2", "int8", "int4"])
def test_each_format_of_the_cache_repeats_itself(kv_dtype: str, dtype: torch.dtype) -> None:
    model = Llama(tiny_source(), dtype=dtype, device="cuda")
    options = {"page_size": 4, "chunk": 6, "kv_dtype": kv_dtype}
    first, again = (serve(Engine(model, **options), PROMPTS, Sampling(20)) for _ in range(2))
    assert first == again
    assert all(first)


# Of mean log probabilities. A last bit of a key that differs between the devices may become a step of its format.
NEAR = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3, "fp8": 0.05, "fp8_e5m2": 0.1, "int8": 0.02, "int4": 0.1}


@pytest.mark.parametrize("kv_dtype", NEAR)
def test_likelihood_from_each_format_is_near_that_of_the_cpu(kv_dtype: str) -> None:
    (tokens,) = tiny_prompts(90)
    got, expected = (
        perplexity.log_likelihood(
            Engine(Llama(tiny_source(), dtype=torch.float32, device=device), kv_dtype=kv_dtype, chunk=40), tokens
        )
        for device in ("cuda", "cpu")
    )
    assert abs(got - expected) / 89 <= NEAR[kv_dtype]
