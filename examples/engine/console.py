"""Answers on a terminal: as they come, or after a progress bar."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from examples.engine.engine import Engine
from examples.engine.scheduler import Request, Sampling
from examples.engine.text import TextStream, Tokenizer, encode


def answer(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, *, raw: bool, stream: bool
) -> list[Request]:
    """Serve all prompts at once and print them with their answers, in order; refusals go to stderr.

    Prompt i is sampled under sampling.seed + i.
    """
    requests: list[Request] = []
    printer = InOrder(prompts, tokenizer)
    for i, prompt in enumerate(prompts):
        on_token = (lambda token, i=i: printer.push(i, token)) if stream else None  # type: ignore[misc]
        tokens = encode(tokenizer, prompt, raw=raw)
        requests.append(engine.submit(tokens, replace(sampling, seed=sampling.seed + i), on_token))
    served = [r for r in requests if not r.finish_reason]
    most = sum(r.max_tokens - len(r.prompt) for r in served)
    # no bar when stderr is not a terminal (None), or when text streams (True)
    with tqdm(total=most, unit=" tokens", disable=stream or None, leave=False) as bar:

        def on_step(new_tokens: int) -> None:
            bar.update(new_tokens)
            bar.set_postfix(running=len(engine.scheduler.running), waiting=len(engine.scheduler.waiting), refresh=False)
            if stream:
                printer.show(requests)

        printer.show(requests)
        engine.run(on_step)
    if not stream:
        for i, request in enumerate(requests):
            for token in request.output:
                printer.push(i, token)
    printer.show(requests)
    return requests


class InOrder:
    """Prints the answers of requests that talk at the same time one after the other: the first one that is not finished
    is shown live, what the later ones say waits for their turn."""

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer) -> None:
        self._prompts = prompts
        self._streams = [TextStream(tokenizer) for _ in prompts]
        self._pieces = ["" for _ in prompts]
        self._current = 0
        self._opened = False

    def push(self, index: int, token: int) -> None:
        """One more token of request `index`."""
        self._pieces[index] += self._streams[index].push(token)

    def show(self, requests: Sequence[Request]) -> None:
        """Print all that may be printed now."""
        while self._current < len(requests):
            i, request = self._current, requests[self._current]
            if not self._opened and (self._pieces[i] or request.finish_reason):
                print(f"\n> {self._prompts[i]}")
                self._opened = True
            if request.finish_reason:
                self._pieces[i] += self._streams[i].flush()
            print(self._pieces[i], end="", flush=True)
            self._pieces[i] = ""
            if not request.finish_reason:
                return
            if request.finish_reason == "refused":
                sys.stdout.flush()
                print(f"refused: {request.error}", file=sys.stderr, flush=True)
            else:
                print()
            self._current, self._opened = i + 1, False
