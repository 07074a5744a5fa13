"""`python -m examples.engine.perplexity`: what a KV cache of fewer bits costs in perplexity on a real text."""

import math
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from examples.engine import cli

BASELINE = "bfloat16"  # others are compared with a cache of this format


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table in Markdown, a row for each format."""
    parser = cli.parser(
        "python -m examples.engine.perplexity",
        "Perplexity of a text, all of whose tokens attend to a KV cache of a given format; a table in Markdown.",
        all_kv_dtypes=True,
    )
    parser.set_defaults(kv_dtype="all")
    parser.add_argument("--text", metavar="FILE", help="what to read; None: the topics of Python's help()")
    parser.add_argument("--tokens", type=cli.positive, default=8192, help="of the text, at most")
    parser.add_argument("--window", type=cli.positive, default=1024, help="tokens read in one context")
    args = parser.parse_args(argv)
    if args.window < 2:
        parser.error("argument --window: expected at least 2 tokens, the first of which is not guessed")
    name, text = read_text(args.text)
    source, tokenizer = cli.load_source(args)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: args.tokens]
    if len(tokens) < 2:
        raise cli.UserError(f"--text {args.text}: expected at least 2 tokens, got {len(tokens)}")
    # a last window of one token has nothing to guess
    windows = [w for i in range(0, len(tokens), args.window) if len(w := tokens[i : i + args.window]) > 1]
    engine = cli.make_engine(args, source)
    model = engine.model
    del source, engine

    from tqdm import tqdm

    formats = list(dict.fromkeys([BASELINE, *cli.kv_dtypes(args)]))
    if "int4" in formats:
        formats.append("int4, keys as they are")
    rows = []
    # no bar when stderr is not a terminal
    with tqdm(total=len(formats) * sum(map(len, windows)), unit=" tokens", disable=None, leave=False) as bar:
        for kv_dtype in formats:
            bar.set_postfix_str(kv_dtype)
            engine = cli.another_engine(model, args, kv_dtype.split(",")[0])
            if kv_dtype.endswith("as they are"):
                engine.cache.key_transforms = None
            likelihood = 0.0
            for window in windows:
                likelihood += log_likelihood(engine, window)
                bar.update(len(window))
            rows.append(
                (kv_dtype, engine.cache.bytes_per_token, math.exp(-likelihood / sum(len(w) - 1 for w in windows)))
            )
    print(about(args, name, windows, argv))
    print(table(rows))
    return 0


def log_likelihood(engine: Any, tokens: Sequence[int]) -> float:
    """ln p(tokens[1:] | tokens[0]), by prefill in the engine's chunks. A token, and those of its own chunk, is read
    from the cache by all that attend to it.

    Raises:
        cli.UserError: more tokens than the context or the cache holds.
    """
    import torch

    from examples.engine.scheduler import Sampling

    request = engine.submit(tokens, Sampling(max_new_tokens=1))
    if request.error:
        raise cli.UserError(f"--window {len(tokens)}: {request.error}")
    likelihood = 0.0
    with torch.inference_mode():
        while request.num_cached < len(tokens):
            step = engine.scheduler.next_step()
            ((_, count),) = step
            logits = engine.model.forward(engine.plan(step, torch.arange(count)), engine.cache)
            request.num_cached += count
            nexts = tokens[request.num_cached - count + 1 : request.num_cached + 1]
            target = torch.tensor(nexts, device=logits.device)
            likelihood -= torch.nn.functional.cross_entropy(logits[: len(nexts)], target, reduction="sum").item()
    engine.scheduler.finish(request, "read")
    return likelihood


def read_text(path: str | None) -> tuple[str, str]:
    """A text and what to call it."""
    if path is None:
        from pydoc_data.topics import topics

        name = f"pydoc_data.topics of Python {platform.python_version()}, in alphabetical order"
        return name, "\n\n".join(topics[key] for key in sorted(topics))
    try:
        return path, Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise cli.UserError(f"--text {path}: {error}") from error


def about(args: Any, name: str, windows: Sequence[Sequence[int]], argv: Sequence[str] | None) -> str:
    """What was measured, where and with what."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    command = shlex.join(["python", "-m", "examples.engine.perplexity", *(sys.argv[1:] if argv is None else argv)])
    return f"""# Perplexity by format of the KV cache

- Model: {args.model or cli.DEFAULT_PACKAGE}, weights and activations in {args.dtype}.
- Text: {name}; {sum(map(len, windows))} tokens in windows of {args.window}, each read in chunks of {args.chunk}.
- Every key and value is read from the cache, those of a token's own chunk too.
- {gpu}, torch {torch.__version__}, transformers {transformers.__version__}; {date.today()}.
- `{command}`
"""


def table(rows: Sequence[tuple[str, int, float]]) -> str:
    """Rows of (format, bytes per token, perplexity), the first being the baseline."""
    lines = [f"| KV cache | bytes per token | perplexity | against {BASELINE} |", "|---|---:|---:|---:|"]
    for name, size, perplexity in rows:
        lines.append(f"| {name} | {size} | {perplexity:.3f} | {100 * (perplexity / rows[0][2] - 1):+.2f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
