"""`python -m examples.engine.demo`: answer eight prompts, then compare tokens and speed with transformers."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from examples.engine import cli
from examples.engine.prompts import PROMPTS

ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if greedy tokens in float32 differ from those of transformers."""
    parser = cli.parser(
        "python -m examples.engine.demo",
        "Answer eight prompts; compare tokens and speed with transformers, and of all formats of the KV cache.",
        all_kv_dtypes=True,
    )
    parser.set_defaults(dtype="float32")  # token for token equality is a matter of fp32
    args = parser.parse_args(argv)
    source, tokenizer = cli.load_source(args)
    engine = cli.make_engine(args, source)
    import torch

    from examples.engine.console import answer
    from examples.engine.engine import Engine
    from examples.engine.scheduler import Sampling

    assert isinstance(engine, Engine)
    requests = answer(engine, tokenizer, PROMPTS, Sampling(args.max_new_tokens), raw=False, stream=True)
    print(f"\n{engine.stats}\n{engine.cache}")

    prompts = [r.prompt for r in requests if r.finish_reason != "refused"]
    source.to(engine.model.device, engine.model.dtype)
    where = f"{args.device}, {args.dtype}, CPU threads: {torch.get_num_threads()}"
    print(f"\nOnce more, {args.max_new_tokens} tokens each, ends of text ignored, best of {ROUNDS} ({where}):")
    ours, theirs, rates = compare(engine, source, prompts, args.max_new_tokens)
    print(f"  this engine               {rates[0]:8.1f} tokens/s")
    print(f"  transformers' generate()  {rates[1]:8.1f} tokens/s  (one left-padded batch, its own attention: sdpa)")
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=False)]
    equal = sum(a == b for a, b in pairs)
    print(f"  greedy tokens equal to transformers': {'yes' if equal == len(pairs) else 'NO'}, {equal} of {len(pairs)}")
    if args.kv_dtype == "all":
        print(f"\nThe same {len(prompts)} prompts from each format of the KV cache:")
        compare_kv_dtypes(engine, prompts, args)
    exact = engine.model.dtype == engine.cache.dtype == torch.float32
    return 1 if equal < len(pairs) and exact else 0


def compare_kv_dtypes(engine: Any, prompts: Sequence[list[int]], args: Any) -> None:
    """Print cache bytes, best rates and tokens of each format that --kv-dtype asks for; `engine` has the first."""
    names, model = cli.kv_dtypes(args), engine.model
    print(f"  {'KV cache':<10} {'bytes/token':>11} {'pool MiB':>9} {'tokens/s':>9}   greedy tokens as from {names[0]}")
    first: list[int] = []
    for name in names:
        engine = engine if name == names[0] else cli.another_engine(model, args, name)
        rate = 0.0
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            tokens = [t for output in engine_generate(engine, prompts, args.max_new_tokens) for t in output]
            rate = max(rate, len(tokens) / (time.perf_counter() - begin))
        first = first or tokens
        equal = sum(a == b for a, b in zip(first, tokens, strict=True))
        cache = engine.cache
        size = cache.num_bytes / 2**20
        print(
            f"  {name:<10} {cache.bytes_per_token:>11} {size:>9.1f} {rate:>9.1f}   {equal} of {len(first)}", flush=True
        )


def compare(
    engine: Any, source: Any, prompts: Sequence[list[int]], max_new_tokens: int, rounds: int = ROUNDS
) -> tuple[list[list[int]], list[list[int]], tuple[float, float]]:
    """Greedy tokens of the engine and of transformers, and both best rates in tokens/s, measured in turn."""
    rates = [0.0, 0.0]
    outputs: list[list[list[int]]] = [[], []]
    for _ in range(rounds):
        for i, generate in enumerate((engine_generate, transformers_generate)):
            begin = time.perf_counter()
            outputs[i] = generate(engine if i == 0 else source, prompts, max_new_tokens)
            rate = sum(len(output) for output in outputs[i]) / (time.perf_counter() - begin)
            rates[i] = max(rates[i], rate)
    return outputs[0], outputs[1], (rates[0], rates[1])


def engine_generate(engine: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy tokens of the engine, past any end of text."""
    from examples.engine.scheduler import Sampling

    requests = [engine.submit(prompt, Sampling(max_new_tokens, ignore_eos=True)) for prompt in prompts]
    engine.run()
    return [request.output for request in requests]


def transformers_generate(source: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The same from transformers: one batch, padded on the left."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    source.generation_config.eos_token_id = None  # go on past an end of text
    out = source.generate(
        ids.to(source.device), attention_mask=mask.to(source.device), max_new_tokens=max_new_tokens, do_sample=False
    )
    return [row[longest:].tolist() for row in out]


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
