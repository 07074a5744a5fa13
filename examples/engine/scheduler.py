"""Continuous batching: which requests run in the next step, and how many tokens of each.

Policy: first come, first served, and a request is admitted only when the pool has pages for its longest possible end
(prompt + max_new_tokens). So a running request never runs out of pages: there is no preemption, no recomputation and no
deadlock, and a long request cannot be starved by short ones behind it. The price is that pages reserved for tokens not
yet made lie idle, so fewer requests run at once than could with preemption.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.engine.kv_cache import PagePool


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen and when it ends."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0  # of this request's random numbers
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1 (off)"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {wanted}, got {getattr(self, name)}")


@dataclass(eq=False)
class Request:
    """One prompt on its way; the engine fills all but the first three fields."""

    prompt: list[int]
    sampling: Sampling = Sampling()
    on_token: Callable[[int], None] | None = None  # called with each new token, streaming
    output: list[int] = field(default_factory=list)
    num_cached: int = 0  # tokens of prompt + output whose K and V are in the cache
    max_tokens: int = 0  # prompt + output may not grow beyond this
    pages: list[int] = field(default_factory=list)
    page_table: Tensor | None = None  # `pages` as int32, on the host
    finish_reason: str | None = None  # "eos", "length", or "refused" (then see `error`)
    error: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.prompt) + len(self.output)

    def uncached(self, count: int) -> list[int]:
        """The next `count` tokens to be fed to the model."""
        if self.output:  # decoding: all but the newest token are in the cache
            return self.output[-1:]
        return self.prompt[self.num_cached : self.num_cached + count]


class Scheduler:
    """Holds the queue of waiting requests and the list of running ones."""

    def __init__(self, pool: PagePool, page_size: int, chunk: int, context: int) -> None:
        """chunk: prompt tokens of one step, over all requests, at most. context: tokens the model can attend to."""
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._pool, self._page_size, self._chunk, self._context = pool, page_size, chunk, context

    def submit(self, request: Request) -> None:
        """Queue a request; one that can never run is marked as refused instead, with the reason in its `error`."""
        length = len(request.prompt)
        request.max_tokens = min(length + request.sampling.max_new_tokens, self._context)
        capacity = self._pool.num_pages * self._page_size
        if length == 0:
            request.error = "the prompt has no tokens"
        elif length >= self._context:
            request.error = f"the prompt has {length} tokens, but the context holds {self._context}, one of them new"
        elif self._num_pages(request) > self._pool.num_pages:
            request.error = (
                f"needs room for {request.max_tokens} tokens, but the cache holds {capacity}; raise num_pages"
            )
        if request.error:
            request.finish_reason = "refused"
        else:
            self.waiting.append(request)

    def next_step(self) -> list[tuple[Request, int]]:
        """The requests of the next step and how many tokens each feeds: one when decoding, else a piece of its prompt.

        Prompt pieces share a budget of `chunk` tokens, so long prompts do not hold up those who already talk.
        """
        while self.waiting and (pages := self._pool.allocate(self._num_pages(self.waiting[0]))) is not None:
            request = self.waiting.popleft()
            request.pages, request.page_table = pages, torch.tensor(pages, dtype=torch.int32)
            self.running.append(request)
        step, budget = [], self._chunk
        for request in self.running:
            count = 1 if request.output else min(len(request.prompt) - request.num_cached, budget)
            budget -= 0 if request.output else count
            if count:
                step.append((request, count))
        return step

    def finish(self, request: Request, reason: str) -> None:
        """Take a request out of the running ones and release its pages."""
        request.finish_reason = reason
        self.running.remove(request)
        self._pool.release(request.pages)
        request.pages, request.page_table = [], None

    def _num_pages(self, request: Request) -> int:
        return -(-request.max_tokens // self._page_size)
