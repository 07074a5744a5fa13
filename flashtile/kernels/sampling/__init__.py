"""Launchers of sampling, Triton: see rows.py for what the kernels share, threshold.py for how thresholds are found,
and rejection.py for top-p alone, which needs none.

Launches depend on shapes alone, and nothing waits for the GPU: all of it can be captured in a CUDA graph. On sm_90 the
kernels of one call overlap (programmatic dependent launch): each is scheduled while the one before it ends, and loads
what does not depend on it.

All take `config`, by default that of config.py for the vocabulary: tests and tuning runs force one."""

from torch import Tensor

from flashtile.config import SamplingConfig
from flashtile.kernels.sampling import draw, rejection, threshold
from flashtile.kernels.sampling.filters import mask_logits, renorm_probs
from flashtile.kernels.sampling.logits import sample_from_logits, softmax
from flashtile.kernels.sampling.rows import Random, chunks_of
from flashtile.kernels.sampling.select_ids import top_k
from flashtile.kernels.sampling.speculative import chain_speculative
from flashtile.kernels.sampling.threshold import Filters

__all__ = [
    "chain_speculative",
    "mask_logits",
    "renorm_probs",
    "sample_from_logits",
    "sample_from_probs",
    "softmax",
    "top_k",
]


def sample_from_probs(
    ids: Tensor,
    valid: Tensor,
    probs: Tensor,
    indices: Tensor | None,
    top_k: Tensor | None,
    top_k_value: int,
    top_p: Tensor | None,
    top_p_value: float,
    min_p: Tensor | None,
    min_p_value: float,
    joint: bool,
    seed: Tensor | None,
    seed_value: int,
    offset: Tensor | None,
    offset_value: int,
    pdl: bool | None = None,
    config: SamplingConfig | None = None,
) -> None:
    """ids[i] from row indices[i] of probs [rows, vocab] under its filters; valid[i]: that row is a distribution."""
    if not len(ids):
        return
    random = Random(seed, seed_value, offset, offset_value)
    filters = Filters(top_k, top_k_value, top_p, top_p_value, joint)
    on, chunks = filters.keywords(probs.shape[1]), chunks_of(probs.shape[1], config, probs.device)
    if not (on["USE_K"] or on["USE_P"]):
        draw.draw(ids, valid, probs, indices, min_p, min_p_value, random, chunks, pdl)
    elif top_k is None and top_k_value == 0 and min_p is None and min_p_value == 0:
        rejection.sample_top_p(ids, valid, probs, indices, filters, random, chunks, pdl)
    elif min_p is None and min_p_value == 0:
        threshold.sample(ids, valid, probs, indices, filters, random, chunks, pdl)
    else:
        raise NotImplementedError("min_p together with top_k or top_p is not implemented on CUDA")
