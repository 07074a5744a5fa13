"""Every op of the library with arguments for torch.library.opcheck, and calls that torch.compile must take as one graph
for all lengths: run by tests/ on the CPU and on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import logits_processor, rope, sampling, topk
from flashtile.testing.tensors import randn
from flashtile.triton.sm_constraint_gemm import gemm_persistent

Args = tuple[Any, ...]
LENGTHS = (11, 2, 3, 5, 8, 64, 100, 999)  # the first is no other size: torch.compile takes equal sizes for one
FP8 = torch.float8_e4m3fn
EPS = 1e-6
FACTORS = ("k_scale", "v_scale", "k_zero", "v_zero")


def registered_ops() -> set[str]:
    """The names of all ops of the library."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("flashtile::") for name in names if name.startswith("flashtile::")}


def check_op(name: str, device: str) -> None:
    """PyTorch's own checks of schema, fakes and functionalisation."""
    for args in op_arguments(device)[name]:
        torch.library.opcheck(getattr(torch.ops.flashtile, name).default, args)


def op_arguments(device: str) -> dict[str, list[Args]]:
    """Name of an op -> calls of it. Outputs are not fp8, which opcheck cannot compare."""
    return {
        **_row_ops(device),
        **_rope_ops(device),
        **_cache_ops(device),
        **_sampling_ops(device),
        **_merge_ops(device),
        **_gemm_ops(device),
    }


def _row_ops(device: str) -> dict[str, list[Args]]:
    x, residual, weight, out = (randn(*shape, device=device) for shape in ((3, 8), (3, 8), (8,), (3, 8)))
    scale, half = torch.ones(1, device=device), out[:, :4].contiguous()
    qkv, outs = randn(4, 24, device=device), [randn(4, 1, 8, device=device) for _ in range(3)]
    gated = [(half, x, None, 1.0, False), (half.half(), x, scale, 1.0, False)]
    return {
        "rmsnorm": [(out, x, weight, EPS, 1.0, True, None, 1.0, False)],
        "fused_add_rmsnorm": [(x, residual, weight, EPS, 0.0, False)],
        "fused_add_rmsnorm_quant": [(out, residual, x, weight, EPS, scale, 1.0, False)],
        "layernorm": [(out, x, weight, weight, EPS, scale, 1.0)],
        "qk_norm_rope": [
            (*outs, qkv, weight, weight, [1, 2, 2], [4, 2, 2], EPS, 1e4, [2.0, 0.0, 1.0], 1.1, True, True, 1.0, 1.0)
        ],
        "silu_and_mul": gated,
        "gelu_and_mul": gated,
        "gelu_tanh_and_mul": gated,
    }


def _rope_ops(device: str) -> dict[str, list[Args]]:
    q, k, table = (randn(*shape, device=device) for shape in ((3, 2, 8), (3, 1, 8), (4, 8)))
    pos_ids, outputs = torch.arange(3, device=device), (torch.empty_like(q), torch.empty_like(k))
    frequencies = [(pos_ids, 8, 1.0, 1e4, None, False), (pos_ids, 8, 8.0, 5e5, [1.0, 4.0, 8192.0], True)]
    parts = [randn(3, *shape, device=device) for shape in ((2, 8), (2, 4), (1, 8), (1, 4))]
    outs = [torch.empty_like(x) for x in parts]
    how = (pos_ids, table, True, 1.0, 1.0, False)
    caches = [torch.zeros(2, 2, 1, dim, device=device) for dim in (8, 4, 8)]
    indices = (pos_ids * 0, pos_ids, *(torch.tensor(x, device=device) for x in ([1, 0], [0, 2])))
    return {
        "rope": [(*outputs, q, k, *by) for by in frequencies],
        "rope_inplace": [(q, k, *by) for by in frequencies],
        "rope_cached": [(*outputs, q, k, pos_ids, table, True)],
        "rope_cached_inplace": [(q, k, pos_ids, table, True)],
        "rope_quantize": [(*outs, *parts, *how)],
        "rope_quantize_append": [(*outs[:2], *caches, *parts, randn(3, 1, 8, device=device), *how, *indices)],
    }


def _cache_ops(device: str) -> dict[str, list[Args]]:
    caches, new = [torch.zeros(4, 2, 1, 8, device=device) for _ in range(2)], randn(2, 1, 8, device=device)
    ints = partial(torch.tensor, dtype=torch.int32, device=device)
    out, flags = torch.empty(5, dtype=torch.int32, device=device), randn(9, device=device) > 0
    packed = torch.empty(2, dtype=torch.uint8, device=device)
    where = ints([0, 0]), ints([0, 1]), ints([3]), ints([0, 1])
    int8, int4 = (torch.zeros(4, 2, 1, *n, device=device).to(t) for n, t in (((8,), torch.int8), ((4,), torch.uint8)))
    written, factors = torch.ones(4, 4, 2, 1, 1, device=device), torch.ones(2, 2, 1, 1, device=device)
    one = torch.ones(1, device=device)
    return {
        "append_paged_kv_cache": [(*caches, new, new, *where)],
        "quantize_append": [
            (int8, int4, *written, new, new, None, None, 1.0, 1.0, *where),
            (int8, int8.clone(), None, written[0], None, None, new, new, one, None, 1.0, 1.0, *where),
            (int8, caches[0], None, None, None, None, new, new, None, None, 0.5, 1.0, *where),
        ],
        "quantize_kv": [
            (int4[0], *factors, new, None),
            (int8[0], None, None, new, one.expand(2, 1)),
        ],
        "get_batch_indices_positions": [(out, out.clone(), ints([0, 2, 5]), ints([4, 3]))],
        "packbits": [(packed, flags, True)],
        "segment_packbits": [(packed, flags, ints([0, 5, 9]), ints([0, 1, 2]), False)],
    }


def _sampling_ops(device: str) -> dict[str, list[Args]]:
    probs, out = torch.softmax(randn(3, 40, device=device), -1), torch.empty(3, 40, device=device)
    ids, valid = torch.zeros(3, dtype=torch.int32, device=device), torch.zeros(3, dtype=torch.bool, device=device)
    state = (torch.tensor([5], device=device), 0, None, 0)
    top_k = torch.tensor([1, 2, 3], dtype=torch.int32, device=device)
    few = torch.empty(3, 5, dtype=torch.int32, device=device)
    chain = torch.softmax(randn(3, 3, 40, device=device), -1)
    tokens = torch.tensor([[1, 2]] * 3, dtype=torch.int32, device=device)
    return {
        "sample_from_probs": [
            (ids, valid, probs, None, top_k, 0, None, 0.9, None, 0.0, False, *state),
            (ids, valid, probs, ids.clone(), None, 0, None, 1.0, None, 0.1, False, None, 5, None, 1),
        ],
        "sample_from_logits": [(ids, valid, probs, ids.clone(), *state)],
        "softmax": [(out, probs, None, 0.5, None)],
        "renorm_probs": [(out, probs, top_k, 0, None, 1.0)],
        "mask_logits": [(out, probs, None, 3)],
        "top_k": [(few, probs, None, top_k, True)],
        "chain_speculative": [(few[:, :3].contiguous(), ids, ids.clone(), chain[:, :2], tokens, chain, *state)],
    }


def _merge_ops(device: str) -> dict[str, list[Args]]:
    v, s = randn(3, 2, 1, 8, device=device), randn(3, 2, 1, device=device)
    out, (a, b) = (v[:, 0].clone(), s[:, 0].clone()), zip(v.unbind(1), s.unbind(1), strict=True)
    mask, indptr = (torch.tensor(x, device=device) for x in ([True, False, True], [0, 1, 1, 3]))
    return {
        "merge_state": [(*out, *a, *b)],
        "merge_state_in_place": [(*out, *b, None), (*out, *b, mask)],
        "merge_states": [(*out, v, s)],
        "merge_ragged_states": [(*out, v[:, 0], s[:, 0], indptr)],
    }


def _gemm_ops(device: str) -> dict[str, list[Args]]:
    x, weights, out = (randn(*shape, device=device) for shape in ((1, 6, 8), (2, 8, 4), (1, 6, 4)))
    indptr, indices = (torch.tensor(x, device=device) for x in ([1, 3, 6], [1, 0]))
    scale = torch.ones(1, device=device)
    return {
        "grouped_gemm": [
            (out, x, weights, indptr, indices, None, None, 1.0, 0.0, 0, "auto"),
            (out, x, weights[:1], None, None, scale, None, 0.5, 0.0, 4, "auto"),
        ]
    }


def check_one_compilation(name: str, device: str) -> None:
    """Compiled once as one graph, a call gives for every length the bits of the eager one, mutated arguments too."""
    call, inputs = compiled_calls(device)[name]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for n in LENGTHS:
        args, again = inputs(n), inputs(n)
        for got, want in zip(_bits((compiled(*args), args)), _bits((call(*again), again)), strict=True):
            assert torch.equal(got, want), f"{name}: other results compiled than eager at length {n}"
    assert len(graphs) == 1, f"{name}: compiled {len(graphs)} times for {len(LENGTHS)} lengths"


def check_no_sync_and_captured(name: str) -> None:
    """On CUDA: a call waits for nothing, and a captured one does what the eager one does."""
    call, inputs = compiled_calls("cuda")[name]
    call(*inputs(64))  # compiles the kernels
    args, again = inputs(64), inputs(64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = call(*again)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*args)
    graph.replay()
    for got, expected in zip(_bits((result, args)), _bits((want, again)), strict=True):
        assert torch.equal(got, expected), f"{name}: other results from a graph than eager"


def _bits(x: Any) -> list[Tensor]:
    """All tensors in nested tuples, as bytes."""
    if isinstance(x, Tensor):
        return [x.contiguous().view(torch.uint8)]
    return [t for part in x for t in _bits(part)] if isinstance(x, tuple) else []


def compiled_calls(device: str) -> dict[str, tuple[Callable[..., Any], Callable[[int], Args]]]:
    """Name -> a call of public functions, and its arguments for n tokens (or rows)."""
    weight, table, pages = randn(64, device=device), randn(1000, 64, device=device), 1000
    seed, scale = torch.tensor([7], device=device), torch.tensor(0.25, device=device)
    rows = partial(randn, device=device)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def positions(n: int) -> Tensor:
        return torch.arange(n, device=device)

    def qk(n: int) -> tuple[Tensor, Tensor]:
        return rows(n, 4, 64, seed=1), rows(n, 2, 64, seed=2)

    def probs(n: int) -> Tensor:
        return torch.softmax(rows(n, 300, seed=3), -1)

    def slots(n: int) -> Args:
        return torch.zeros(n, dtype=torch.int32, device=device), positions(n)

    def cache(*row: int) -> Tensor:
        return torch.zeros(pages, 1, *row, device=device)

    wrapper = flashtile.SegmentGEMMWrapper(weight)
    pipe = logits_processor.LogitsPipe(
        [logits_processor.Temperature(), logits_processor.Softmax(), logits_processor.TopP(), logits_processor.Sample()]
    )
    page_list, indptr, one = torch.arange(pages, device=device), ints(0, pages), ints(1)
    samplers: dict[str, Callable[..., Any]] = {
        "sampling_from_probs": lambda p: sampling.sampling_from_probs(p, seed=seed, return_valid=True),
        "sampling_from_logits": lambda p: sampling.sampling_from_logits(p, seed=seed, offset=seed),
        "top_p_sampling_from_probs": lambda p: sampling.top_p_sampling_from_probs(p, 0.9, seed=seed),
        "top_k_sampling_from_probs": lambda p: sampling.top_k_sampling_from_probs(p, 9, seed=seed),
        "min_p_sampling_from_probs": lambda p: sampling.min_p_sampling_from_probs(p, 0.1, seed=seed),
        "top_k_top_p_sampling_from_probs": lambda p: sampling.top_k_top_p_sampling_from_probs(p, 9, 0.9, seed=seed),
        "top_k_top_p_sampling_from_logits": lambda p: sampling.top_k_top_p_sampling_from_logits(p, 9, 0.9, seed=seed),
        "top_p_renorm_probs": lambda p: sampling.top_p_renorm_probs(p, 0.9),
        "top_k_renorm_probs": lambda p: sampling.top_k_renorm_probs(p, 9),
        "top_k_mask_logits": lambda p: sampling.top_k_mask_logits(p, 9),
        "softmax": lambda p: sampling.softmax(p, 0.7),
        "top_k": lambda p: topk.top_k(p, 9),
        "LogitsPipe": lambda p: pipe(p, temperature=0.7, top_p=0.9, seed=seed),
    }
    return {
        "rmsnorm": (lambda x: flashtile.rmsnorm(x, weight), lambda n: (rows(n, 64),)),
        "gemma_rmsnorm": (lambda x: flashtile.gemma_rmsnorm(x, weight), lambda n: (rows(n, 64),)),
        "fused_add_rmsnorm": (
            lambda x, residual: flashtile.fused_add_rmsnorm(x, residual, weight),
            lambda n: (rows(n, 64), rows(n, 64, seed=1)),
        ),
        "gemma_fused_add_rmsnorm": (
            lambda x, residual: flashtile.gemma_fused_add_rmsnorm(x, residual, weight),
            lambda n: (rows(n, 64), rows(n, 64, seed=1)),
        ),
        "rmsnorm_quant": (
            lambda out, x: flashtile.rmsnorm_quant(out, x, weight, 0.5),
            lambda n: (rows(n, 64).to(FP8), rows(n, 64)),
        ),
        "fused_add_rmsnorm_quant": (
            lambda out, x, residual: flashtile.fused_add_rmsnorm_quant(out, x, residual, weight, 0.5),
            lambda n: (rows(n, 64).to(FP8), rows(n, 64), rows(n, 64, seed=1)),
        ),
        "layernorm": (lambda x: flashtile.layernorm(x, weight, weight), lambda n: (rows(n, 64),)),
        "layernorm_quant": (
            lambda out, x: flashtile.layernorm_quant(out, x, weight, weight, 0.5),
            lambda n: (rows(n, 64).to(FP8), rows(n, 64)),
        ),
        "fused_rmsnorm_silu": (lambda x: flashtile.fused_rmsnorm_silu(x, weight), lambda n: (rows(n, 64),)),
        "silu_and_mul": (flashtile.silu_and_mul, lambda n: (rows(n, 64),)),
        "gelu_and_mul": (flashtile.gelu_and_mul, lambda n: (rows(n, 64),)),
        "gelu_tanh_and_mul": (
            lambda x, out: flashtile.gelu_tanh_and_mul(x, out, scale=0.5),
            lambda n: (rows(n, 64), rows(n, 32).to(FP8)),
        ),
        "apply_rope": (
            lambda q, k, lens, offsets: flashtile.apply_rope(q, k, lens, offsets),
            lambda n: (*qk(n), ints(0, n), ints(5)),
        ),
        "apply_rope_pos_ids": (flashtile.apply_rope_pos_ids, lambda n: (*qk(n), positions(n))),
        "apply_llama31_rope_pos_ids_inplace": (
            flashtile.apply_llama31_rope_pos_ids_inplace,
            lambda n: (*qk(n), positions(n)),
        ),
        "apply_rope_with_cos_sin_cache": (
            lambda p, q, k: flashtile.apply_rope_with_cos_sin_cache(p, q, k, 64, table),
            lambda n: (positions(n), *qk(n)),
        ),
        "rope_quantize_fp8": (
            lambda q, k, p: rope.rope_quantize_fp8(q, k, None, None, table, p),
            lambda n: (*qk(n), positions(n)),
        ),
        "rope_quantize_fp8_append_paged_kv_cache": (
            lambda q, k, p, i, k_cache, v_cache: rope.rope_quantize_fp8_append_paged_kv_cache(
                q, k, None, None, k, table, p, (k_cache, v_cache), page_list, indptr, i, p, page_size=1
            ),
            lambda n: (*qk(n), positions(n), slots(n)[0], *(cache(2, 64).to(FP8) for _ in range(2))),
        ),
        "append_paged_kv_cache": (
            lambda k, i, p, cache: flashtile.append_paged_kv_cache(k, k, i, p, cache, page_list, indptr, one),
            lambda n: (rows(n, 2, 64), *slots(n), torch.stack([cache(2, 64)] * 2, 1)),
        ),
        "append_paged_kv_cache, int4": (
            lambda k, i, p, cache, *factors: flashtile.append_paged_kv_cache(
                k, k, i, p, cache, page_list, indptr, one, **dict(zip(FACTORS, factors, strict=True))
            ),
            lambda n: (
                rows(n, 2, 64), *slots(n), torch.stack([cache(2, 32).to(torch.uint8)] * 2, 1),
                *(cache(2, 2) for _ in FACTORS),
            ),
        ),
        "append_paged_kv_cache, fp8": (
            lambda k, i, p, k_cache, v_cache: flashtile.append_paged_kv_cache(
                k, k, i, p, (k_cache, v_cache), page_list, indptr, one, k_scale=0.5, v_scale=scale
            ),
            lambda n: (rows(n, 2, 64), *slots(n), *(cache(2, 64).to(FP8) for _ in range(2))),
        ),
        "quantize_kv_fp8": (flashtile.quantize_kv_fp8, lambda n: (rows(n, 2, 64),)),
        "quantize_kv_int8": (lambda x: flashtile.quantize_kv_int8(x, 0.5)[0], lambda n: (rows(n, 2, 64),)),
        "quantize_kv_int4": (lambda x: flashtile.quantize_kv_int4(x, 32), lambda n: (rows(n, 2, 64),)),
        "append_paged_mla_kv_cache": (
            lambda ckv, kpe, i, p, cache, rest: flashtile.append_paged_mla_kv_cache(
                ckv, kpe, i, p, cache, rest, page_list, indptr, one
            ),
            lambda n: (
                rows(n, 64), rows(n, 16), *slots(n), *(cache(d) for d in (64, 16)),
            ),
        ),
        "get_batch_indices_positions": (
            flashtile.get_batch_indices_positions,
            lambda n: (ints(0, n), ints(n + 5), n),
        ),
        "get_seq_lens": (
            lambda x, last: flashtile.get_seq_lens(x, last, 4),
            lambda n: (torch.arange(n + 1, device=device), positions(n)),
        ),
        "packbits": (flashtile.packbits, lambda n: (rows(n) > 0,)),
        "chain_speculative_sampling": (
            lambda draft, tokens, target: sampling.chain_speculative_sampling(draft, tokens, target, seed=seed),
            lambda n: (
                probs(2 * n).view(n, 2, 300), ints(*range(2 * n)).view(n, 2) % 300, probs(3 * n).view(n, 3, 300),
            ),
        ),
        "SegmentGEMMWrapper": (
            lambda x, weights, lens: wrapper.run(x, weights, 2, True, seg_lens=lens),
            lambda n: (rows(n, 64), rows(2, 48, 64, seed=1), ints(n // 2, n - n // 2)),
        ),
        "bmm_fp8": (
            lambda a, b: flashtile.bmm_fp8(a, b, 0.5, 2.0, torch.bfloat16),
            lambda n: (rows(2, n, 64).to(FP8), rows(2, 48, 64, seed=1).to(FP8).transpose(1, 2)),
        ),
        "gemm_persistent": (
            lambda a, b: gemm_persistent(a, b, num_sms=2),
            lambda n: (rows(n, 64), rows(64, 48, seed=1)),
        ),
        "merge_state": (
            flashtile.merge_state,
            lambda n: (rows(n, 2, 64), rows(n, 2), rows(n, 2, 64, seed=1), rows(n, 2, seed=1)),
        ),
        "merge_states": (flashtile.merge_states, lambda n: (rows(n, 3, 2, 64), rows(n, 3, 2))),
        **{name: (call, lambda n: (probs(n),)) for name, call in samplers.items()},
    }  # fmt: skip
