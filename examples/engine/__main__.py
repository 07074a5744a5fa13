"""`python -m examples.engine`: answer prompts from the command line or a file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from examples.engine import cli
from examples.engine.prompts import PROMPTS


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a prompt was refused."""
    parser = cli.parser("python -m examples.engine", "Answer prompts with a Llama model through flashtile.")
    parser.add_argument(
        "--prompt", action="append", default=[], help="may be given more than once; none: built-in ones"
    )
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they are: no chat template")
    parser.add_argument("--stream", action="store_true", help="print text as it comes, instead of a progress bar")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens after an end of text")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest with this mass; 1: off")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, for the first prompt; the next has the next")
    args = parser.parse_args(argv)
    prompts = args.prompt + (read_prompts(args.prompts_file) if args.prompts_file else [])

    from examples.engine.console import answer
    from examples.engine.scheduler import Sampling

    try:
        sampling = Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            ignore_eos=args.ignore_eos,
        )
    except ValueError as error:
        raise cli.UserError(str(error)) from error
    source, tokenizer = cli.load_source(args)
    engine = cli.make_engine(args, source)
    del source  # the engine has its own, fused copy of the weights
    requests = answer(engine, tokenizer, prompts or list(PROMPTS), sampling, raw=args.raw, stream=args.stream)
    print(f"\n{engine.stats}\n{engine.cache}")
    return 1 if any(r.finish_reason == "refused" for r in requests) else 0


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise cli.UserError(f"--prompts-file {path}: {error}") from error
    if not any(lines):
        raise cli.UserError(f"--prompts-file {path}: no prompt in it; write one a line")
    return [line for line in lines if line]


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
