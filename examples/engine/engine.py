"""The engine's loop: schedule, plan, run the model on one ragged batch, choose a token for each request, repeat."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashtile
from examples.engine.kv_cache import KVCache, Slots
from examples.engine.model import Batch, Llama
from examples.engine.scheduler import Request, Sampling, Scheduler

WORKSPACE_BYTES = 128 << 20  # partial results of requests whose KV is split over several CTAs
SAMPLE_TOKENS = 1024  # of a prompt that an engine with an int4 cache reads when it starts


@dataclass
class Stats:
    """Counts since the engine was made, or since they were last replaced."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.new_tokens / max(self.seconds, 1e-9)
        return (
            f"{self.new_tokens} new tokens in {self.seconds:.2f} s: {rate:.1f} tokens/s "
            f"({self.prompt_tokens} prompt tokens, {self.steps} steps)"
        )


class Engine:
    """Serves token sequences with one model; text is the caller's business (see text.py)."""

    def __init__(
        self,
        model: Llama,
        *,
        num_pages: int | None = None,
        page_size: int = 16,
        chunk: int = 512,
        kv_dtype: str = "auto",
    ) -> None:
        """
        Args:
            num_pages: pages of the KV cache. Default: room for 8192 tokens.
            page_size: tokens of a page.
            chunk: prompt tokens of one step, over all requests, at most.
            kv_dtype: of the KV cache: "auto", the model's, or a name in kv_cache.KV_DTYPES.
        """
        self.model = model
        if num_pages is None:
            num_pages = -(-8192 // max(page_size, 1))
        self.cache = KVCache(
            len(model.layers),
            num_pages,
            page_size,
            model.num_kv_heads,
            model.head_dim,
            model_dtype=model.dtype,
            kv_dtype=kv_dtype,
            device=model.device,
        )
        if kv_dtype == "int4":
            self.cache.key_transforms = sample_key_transforms(model)
        self.scheduler = Scheduler(self.cache.pool, page_size, chunk, model.context)
        self.stats = Stats()
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=model.device)
        self._prefill = flashtile.BatchPrefillWithPagedKVCacheWrapper(workspace)
        self._decode = flashtile.BatchDecodeWithPagedKVCacheWrapper(workspace)

    def submit(
        self, prompt: Sequence[int], sampling: Sampling | None = None, on_token: Callable[[int], None] | None = None
    ) -> Request:
        """Queue a prompt. The request fills up as step() is called; on_token is called with each new token."""
        request = Request(list(prompt), sampling or Sampling(), on_token)
        self.scheduler.submit(request)
        return request

    def run(self, on_step: Callable[[int], None] | None = None) -> None:
        """Serve until no request is left. on_step is called after each step with the number of new tokens."""
        while self.scheduler.waiting or self.scheduler.running:
            before = self.stats.new_tokens
            self.step()
            if on_step:
                on_step(self.stats.new_tokens - before)

    @torch.inference_mode()
    def step(self) -> None:
        """One run of the model: every running request feeds its newest token, or the next piece of its prompt."""
        begin = time.perf_counter()
        step = self.scheduler.next_step()
        # a request speaks if this step feeds its last known token; others are still in the middle of their prompt
        speaks = [request.num_cached + count == request.num_tokens for request, count in step]
        ends = torch.tensor([count for _, count in step]).cumsum(0)
        batch = self.plan(step, (ends - 1)[torch.tensor(speaks)])
        logits = self.model.forward(batch, self.cache)
        speakers = [request for (request, _), s in zip(step, speaks, strict=True) if s]
        new_tokens = choose(logits, speakers).tolist()
        for request, count in step:
            request.num_cached += count
            self.stats.prompt_tokens += 0 if request.output else count
        for request, token in zip(speakers, new_tokens, strict=True):
            self._accept(request, token)
        self.stats.steps += 1
        self.stats.new_tokens += len(new_tokens)
        self.stats.seconds += time.perf_counter() - begin

    def plan(self, step: list[tuple[Request, int]], logit_rows: Tensor) -> Batch:
        """The step as one ragged batch: index tensors, made on the host, and the planned attention.

        logit_rows: the tokens of the step, of all its requests in a row, whose logits are wanted.
        """
        model, page_size = self.model, self.cache.page_size
        counts = torch.tensor([count for _, count in step], dtype=torch.int32)
        kv_lens = torch.tensor([request.num_cached for request, _ in step], dtype=torch.int32) + counts
        num_pages = (kv_lens + page_size - 1) // page_size
        qo_indptr, kv_indptr = indptr(counts), indptr(num_pages)
        last_page_len = kv_lens - (num_pages - 1) * page_size
        tables = zip(step, num_pages.tolist(), strict=True)
        kv_indices = torch.cat([request.page_table[:pages] for (request, _), pages in tables])  # type: ignore[index]
        tokens = torch.tensor([token for request, count in step for token in request.uncached(count)])
        batch_indices, positions = flashtile.get_batch_indices_positions(qo_indptr, kv_lens, len(tokens))

        heads = (model.num_qo_heads, model.num_kv_heads, model.head_dim, page_size)
        dtypes: dict[str, Any] = {
            "q_data_type": self.cache.query_dtype,
            "kv_data_type": self.cache.dtype,
            "o_data_type": model.dtype,
        }
        attention: flashtile.BatchDecodeWithPagedKVCacheWrapper | flashtile.BatchPrefillWithPagedKVCacheWrapper
        if len(tokens) == len(step):  # one token each: plain decode
            attention = self._decode
            attention.plan(kv_indptr, kv_indices, last_page_len, *heads, **dtypes)
        else:  # prompt pieces, and decoding requests as pieces of one token
            attention = self._prefill
            attention.plan(qo_indptr, kv_indptr, kv_indices, last_page_len, *heads, causal=True, **dtypes)

        def move(x: Tensor) -> Tensor:
            return x.to(model.device, non_blocking=True)

        return Batch(
            tokens=move(tokens),
            slots=Slots(*map(move, (batch_indices, positions, kv_indptr, kv_indices, last_page_len))),
            logit_rows=move(logit_rows),
            attention=attention,
        )

    def _accept(self, request: Request, token: int) -> None:
        request.output.append(token)
        if request.on_token:
            request.on_token(token)
        if token in self.model.eos_tokens and not request.sampling.ignore_eos:
            self.scheduler.finish(request, "eos")
        elif request.num_tokens >= request.max_tokens:
            self.scheduler.finish(request, "length")


def sample_key_transforms(model: Llama) -> list[flashtile.KeyTransform]:
    """For an int4 cache, fitted to the keys and queries of random tokens: their large channels are those of any text,
    and an engine need not be given one. Equal models give equal transforms, whatever pages and chunks they have."""
    length = min(SAMPLE_TOKENS, model.context - 1)
    engine = Engine(model, num_pages=1, page_size=length + 1, chunk=length)
    engine.cache.key_transforms = []  # each layer fits its own when it sees its first keys
    tokens = torch.randint(len(model.embedding), (length,), generator=torch.Generator().manual_seed(0))
    engine.submit(tokens.tolist(), Sampling(max_new_tokens=1))
    engine.run()
    return engine.cache.key_transforms


def indptr(counts: Tensor) -> Tensor:
    """Offsets [n + 1], int32, of groups of the given sizes [n]."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def choose(logits: Tensor, requests: list[Request]) -> Tensor:
    """The next token of each request, [n], from its logits, [n, vocab], fp32.

    A request's random numbers follow from its seed and the number of its tokens alone: whatever is served beside it, in
    whatever chunks, it gives the same tokens (as far as its logits, computed in another batch, round alike).
    """
    tokens = logits.argmax(-1)
    rows = [i for i, request in enumerate(requests) if request.sampling.temperature > 0]
    if rows:
        sampled = [requests[i].sampling for i in rows]

        def column(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=logits.device)

        probs = flashtile.softmax(logits[rows], column([s.temperature for s in sampled]))
        ids = flashtile.top_k_top_p_sampling_from_probs(
            probs,
            top_k=column([s.top_k or logits.shape[-1] for s in sampled]),
            top_p=column([s.top_p for s in sampled]),
            seed=column([s.seed for s in sampled]),
            offset=column([len(requests[i].output) for i in rows]),
        )
        assert isinstance(ids, Tensor)  # a pair only with return_valid
        tokens[rows] = ids.long()
    return tokens
