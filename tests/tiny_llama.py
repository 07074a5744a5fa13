"""A tiny random Llama, a tokenizer of bytes and prompts for them: what tests of the engine need without a download."""

from collections.abc import Sequence
from typing import Any

import tokenizers
import torch
import transformers

from examples.engine.engine import Engine
from examples.engine.scheduler import Sampling


def byte_tokenizer() -> Any:
    """A token per byte, then <eos>: any sequence of tokens is some bytes, mostly not valid UTF-8."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def tiny_source(**options: Any) -> Any:
    """A random Llama of transformers, wide enough in its weights that its greedy tokens vary."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 257,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | options)).eval()
    for name, parameter in source.named_parameters():  # biases are made as zeros
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return source


def tiny_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


def serve(engine: Engine, prompts: Sequence[list[int]], *samplings: Sampling) -> list[list[int]]:
    """Outputs of prompts served together, with one sampling for all or one each."""
    each = samplings * len(prompts) if len(samplings) == 1 else samplings
    requests = [engine.submit(prompt, sampling) for prompt, sampling in zip(prompts, each, strict=True)]
    engine.run()
    assert engine.cache.pool.num_free == engine.cache.pool.num_pages
    return [request.output for request in requests]
