"""Area sample: one token from fp32 probabilities, flat enough that no filter keeps only a handful of ids."""

import torch
from torch import Tensor

from benchmarks.workload import Call, NotAvailable, Overrides, Workload, public
from flashtile.testing.cases_bench import SamplingBench

TOP_K, TOP_P = 50, 0.9
LOGIT_SCALE = 2.0  # standard deviation of the normal logits
SEED = 1
ORDERS = {"top_k_top_p.joint": "joint", "top_k_top_p.first": "top_k_first"}


def sampling(case: SamplingBench, device: torch.device, overrides: Overrides, with_rivals: bool) -> Workload:
    """One sampler; the rival filters by sorting and draws by an exponential race, which needs no host sync."""
    if overrides:
        raise NotAvailable("takes no --config: only attention has one")
    probs = torch.randn(case.batch_size, case.vocab_size, device=device).mul_(LOGIT_SCALE).softmax(dim=-1)
    return Workload({"flashtile": _ours(case.op, probs)}, {"torch": _torch(case.op, probs)} if with_rivals else {})


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
