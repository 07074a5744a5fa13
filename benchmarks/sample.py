"""Area sample: one token from fp32 probabilities, flat enough that no filter keeps only a handful of ids."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.workload import Call, NotAvailable, Overrides, Workload, public
from flashtile.backend import kernels
from flashtile.config import choose_sampling
from flashtile.testing.cases_bench import SamplingBench

TOP_K, TOP_P = 50, 0.9
LOGIT_SCALE = 2.0  # standard deviation of the normal logits
SEED = 1
ORDERS = {"top_k_top_p.joint": "joint", "top_k_top_p.first": "top_k_first"}


def sampling(case: SamplingBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """One sampler; the rival filters by sorting and draws by an exponential race, which needs no host sync."""
    if overrides and device.type != "cuda":
        raise NotAvailable("takes no --config on a CPU: its configuration is of the CUDA kernels")
    probs = torch.randn(case.batch_size, case.vocab_size, device=device).mul_(LOGIT_SCALE).softmax(dim=-1)
    ours = _forced(case.op, probs, overrides) if overrides else _ours(case.op, probs)
    return Workload({"flashtile": ours}, {"torch": _torch(case.op, probs)} if with_rivals else {})


def _ours(op: str, probs: Tensor) -> Call:
    # a fixed seed: the kernel alone, without the draw of a seed that a captured call would add
    if op == "sample":
        sample = public("sampling_from_probs")
        return lambda: sample(probs, seed=SEED)
    if op == "top_p":
        top_p = public("top_p_sampling_from_probs")
        return lambda: top_p(probs, TOP_P, seed=SEED)
    top_k_top_p = public("top_k_top_p_sampling_from_probs")
    return lambda: top_k_top_p(probs, TOP_K, TOP_P, filter_apply_order=ORDERS[op], seed=SEED)


def _forced(op: str, probs: Tensor, overrides: Overrides) -> Call:
    """What `_ours` launches, with some fields of the SamplingConfig replaced."""
    ids = torch.empty(len(probs), dtype=torch.int32, device=probs.device)
    valid = torch.empty(len(probs), dtype=torch.bool, device=probs.device)
    top_k, top_p = TOP_K if op in ORDERS else 0, 1.0 if op == "sample" else TOP_P
    filters = (None, top_k, None, top_p, None, 0.0, ORDERS.get(op) == "joint")
    launch = kernels("sampling", probs.device).sample_from_probs
    config = replace(choose_sampling(probs.shape[1]), **overrides)
    return lambda: launch(ids, valid, probs, None, *filters, None, SEED, None, 0, config=config)


def _torch(op: str, probs: Tensor) -> Call:
    def race(p: Tensor) -> Tensor:
        return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)

    def filtered() -> Tensor:
        ordered, ids = probs.sort(dim=-1, descending=True)
        if op != "top_p":
            ordered[:, TOP_K:] = 0
        total = ordered.sum(dim=-1, keepdim=True) if op == "top_k_top_p.first" else 1
        ordered.masked_fill_(ordered.cumsum(dim=-1) - ordered >= TOP_P * total, 0)
        return ids.gather(1, race(ordered)[:, None])

    return (lambda: race(probs)) if op == "sample" else filtered
