"""Area elem: norms, activation, rope and cache append, bf16, at the sizes of Llama-3-8B."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from benchmarks.workload import Call, NotAvailable, Overrides, Workload, public
from flashtile.testing.cases_bench import HEAD_DIM, HIDDEN_SIZE, ROPE_HEADS, ElementwiseBench

TOKENS_PER_REQUEST = 128  # of append_kv
PAGE_SIZE = 16


def elementwise(case: ElementwiseBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """The workload of one op; PyTorch's own is the rival where it has one."""
    if overrides:
        raise NotAvailable("takes no --config: only attention and sample have one")
    if case.op.startswith("append_kv_"):
        return _quantising_append(case.op.removeprefix("append_kv_"), case.num_tokens, device, with_rivals)
    makers = {
        "rmsnorm": _rmsnorm,
        "fused_add_rmsnorm": _fused_add_rmsnorm,
        "silu_and_mul": _silu_and_mul,
        "rope": _rope,
        "append_kv": _append_kv,
    }
    ours, torch_call = makers[case.op](case.num_tokens, device)
    return Workload({"flashtile": ours}, {"torch": torch_call} if with_rivals and torch_call else {})


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _rmsnorm(num_tokens: int, device: torch.device) -> tuple[Call, Call | None]:
    rmsnorm = public("rmsnorm")
    x, weight = _randn(device, num_tokens, HIDDEN_SIZE), _randn(device, HIDDEN_SIZE)
    out = torch.empty_like(x)
    return lambda: rmsnorm(x, weight, out=out), lambda: rms_norm(x, (HIDDEN_SIZE,), weight, 1e-6)


def _fused_add_rmsnorm(num_tokens: int, device: torch.device) -> tuple[Call, Call | None]:
    fused_add_rmsnorm = public("fused_add_rmsnorm")
    x, weight = _randn(device, num_tokens, HIDDEN_SIZE), _randn(device, HIDDEN_SIZE)
    residual = torch.randn_like(x)
    return lambda: fused_add_rmsnorm(x, residual, weight), None


def _silu_and_mul(num_tokens: int, device: torch.device) -> tuple[Call, Call | None]:
    silu_and_mul = public("silu_and_mul")
    x = _randn(device, num_tokens, 2 * HIDDEN_SIZE)
    out = x.new_empty(num_tokens, HIDDEN_SIZE)
    gate, up = x.chunk(2, dim=-1)
    return lambda: silu_and_mul(x, out=out), lambda: silu(gate) * up


def _rope(num_tokens: int, device: torch.device) -> tuple[Call, Call | None]:
    apply_rope = public("apply_rope_with_cos_sin_cache_inplace")
    q, k = (_randn(device, num_tokens, heads * HEAD_DIM) for heads in ROPE_HEADS)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    angles = torch.outer(positions.float(), 1e4 ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM))
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return lambda: apply_rope(positions, q, k, HEAD_DIM, table), None


def _append_kv(num_tokens: int, device: torch.device) -> tuple[Call, Call | None]:
    append = public("append_paged_kv_cache")
    k, v = (_randn(device, num_tokens, ROPE_HEADS[1], HEAD_DIM) for _ in range(2))
    where, table = _slots(num_tokens, device)
    rows = (len(table[0]), 2, PAGE_SIZE, ROPE_HEADS[1])
    cache = torch.zeros(*rows, HEAD_DIM, dtype=torch.bfloat16, device=device)
    return lambda: append(k, v, *where, cache, *table), None


def _quantising_append(kv_dtype: str, num_tokens: int, device: torch.device, with_rivals: bool) -> Workload:
    """In one launch; the rival, "steps", is the quantiser and then plain appends. int4: zero points, groups of 32."""
    append, quantise = public("append_paged_kv_cache"), public(f"quantize_kv_{kv_dtype}")
    k, v = (_randn(device, num_tokens, ROPE_HEADS[1], HEAD_DIM) for _ in range(2))
    where, table = _slots(num_tokens, device)
    dtype, width = {
        "fp8": (torch.float8_e4m3fn, HEAD_DIM),
        "int8": (torch.int8, HEAD_DIM),
        "int4": (torch.uint8, HEAD_DIM // 2),
    }[kv_dtype]
    rows = (len(table[0]), 2, PAGE_SIZE, ROPE_HEADS[1])
    cache = torch.zeros(*rows, width, dtype=dtype, device=device)
    scale, zero = (torch.zeros(*rows, {"int8": 1, "int4": HEAD_DIM // 32}.get(kv_dtype, 0), device=device)
                   for _ in range(2))  # fmt: skip
    written = {"fp8": (), "int8": (scale,), "int4": (scale, zero)}[kv_dtype]
    options = {"fp8": (1.0,), "int8": (), "int4": (32,)}[kv_dtype]
    named = dict(zip(("scale", "zero"), written, strict=False))
    factors = {f"{side}_{name}": x[:, i] for name, x in named.items() for i, side in enumerate("kv")}

    def ours() -> None:
        append(k, v, *where, cache, *table, **factors)

    def steps() -> None:
        results = zip(quantise(k, *options), quantise(v, *options), strict=True)
        for memory, (of_k, of_v) in zip((cache, *written), results, strict=False):
            shape = (num_tokens, *memory.shape[3:])
            append(of_k.view(shape), of_v.view(shape), *where, memory, *table)

    return Workload({"flashtile": ours}, {"steps": steps} if with_rivals else {})


def _slots(num_tokens: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(batch_indices, positions) and (kv_indices, kv_indptr, kv_last_page_len) of requests on scattered pages."""
    length = min(num_tokens, TOKENS_PER_REQUEST)
    batch_size, pages = num_tokens // length, -(-length // PAGE_SIZE)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    indices = torch.randperm(batch_size * pages, device=device).int()
    indptr = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * pages
    last_page_len = torch.full((batch_size,), length - (pages - 1) * PAGE_SIZE, dtype=torch.int32, device=device)
    return (tokens // length, tokens % length), (indices, indptr, last_page_len)
