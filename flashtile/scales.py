"""Reading what run() is told about the scales of a cache: numbers fold into sm_scale, tensors go to the kernel as they
are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtile.checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_device,
    check_dtype,
    check_inner_contiguous,
    not_implemented,
)
from flashtile.plan.plan import Plan
from flashtile.plan.scales import Factor, Scales
from flashtile.quantization import KV_GROUP_SIZES

Scale = float | Tensor | None
ZERO_DTYPES = (*FLOAT_DTYPES, torch.int8, torch.uint8, *INDEX_DTYPES)


def read_scales(
    plan: Plan,
    k: Tensor,
    v: Tensor,
    kv_layout: str,
    sm_scale: float,
    *,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    k_zero: Scale = None,
    v_zero: Scale = None,
    without_page_dim: bool = False,
) -> tuple[float, Scales | None]:
    """sm_scale with all factors that are known here, and the Scales for the kernels (None: there are none).

    Args:
        k, v: the caches as NHD views.
        kv_layout: of the scales, which are shaped as the caches without head_dim.
        without_page_dim: the caches came in the short form of page_size 1, and so do the scales.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: a shape, dtype or device that does not fit, or a zero point for another format than int8 and int4.
    """
    if q_scale is None and k_scale is None and v_scale is None and k_zero is None and v_zero is None:
        return sm_scale, None
    read = _Reader(plan, kv_layout, without_page_dim)
    p = plan.problem
    factors: dict[str, Factor | None] = {}
    numbers = {"k": 1.0, "v": 1.0}
    for side, x, dim, fmt, scale, zero in (
        ("k", k, p.head_dim_qk, p.k_format, k_scale, k_zero),
        ("v", v, p.head_dim_vo, p.v_format, v_scale, v_zero),
    ):
        found = read(f"{side}_scale", scale, x, dim, FLOAT_DTYPES)
        if isinstance(found, float):  # known on the host
            numbers[side], found = found, None
        zero_found = read(f"{side}_zero", zero, x, dim, ZERO_DTYPES)
        if zero_found is not None and fmt not in ("int8", "int4"):
            raise ValueError(f"{side}_zero: only caches of int8 and int4 have zero points, this one is {x.dtype}")
        factors[side], factors[f"{side}_zero"] = _matched(found, zero_found, x)
    q_found = read("q_scale", q_scale, k, p.head_dim_qk, FLOAT_DTYPES)
    if isinstance(q_found, Factor):
        factors["k"] = _product(q_found, factors["k"])
        q_found = 1.0
    if q_found is not None:
        sm_scale *= q_found
    scales = Scales(factors["k"], factors["v"], factors["k_zero"], factors["v_zero"], out=numbers["v"])
    empty = not any(factors.values()) and scales.out == 1.0
    return sm_scale * numbers["k"], None if empty else scales


class _Reader:
    """Turns an argument into a number or a Factor."""

    def __init__(self, plan: Plan, kv_layout: str, without_page_dim: bool) -> None:
        self.plan, self.kv_layout, self.without_page_dim = plan, kv_layout, without_page_dim

    def __call__(
        self, name: str, x: Scale, cache: Tensor, head_dim: int, dtypes: Sequence[torch.dtype]
    ) -> float | Factor | None:
        if x is None:
            return None
        if not isinstance(x, Tensor):
            if not isinstance(x, (int, float)):
                raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(x).__name__}")
            return float(x)
        check_dtype(name, x, dtypes)
        heads = self.plan.problem.num_kv_heads
        if x.numel() == 1 and x.device.type == "cpu":
            return float(x)
        check_device(name, x, self.plan.device)
        if x.numel() == 1:  # reading it here would wait for the GPU
            return Factor("head", x.reshape(1).expand(heads))
        if x.dim() == 1 and x.shape[0] == heads:
            return Factor("head", x)
        return self._per_row(name, x, cache, head_dim)

    def _per_row(self, name: str, x: Tensor, cache: Tensor, head_dim: int) -> Factor:
        paged = self.plan.problem.paged
        rows = x
        if paged and self.without_page_dim and x.dim() in (2, 3):
            rows = x.unsqueeze(1 if self.kv_layout == "NHD" else 2)
        at = (1, 2) if paged else (0, 1)
        if self.kv_layout == "HND" and rows.dim() > at[1]:
            rows = rows.transpose(*at)
        shape = tuple(cache.shape[:-1])
        if tuple(rows.shape) == shape:
            return Factor("token", rows)
        if tuple(rows.shape[:-1]) == shape and rows.shape[-1] == 1:
            return Factor("token", rows[..., 0])
        if tuple(rows.shape[:-1]) == shape and head_dim / rows.shape[-1] in KV_GROUP_SIZES:
            check_inner_contiguous(name, rows)
            return Factor("group", rows)
        raise ValueError(
            f"{name}: expected one value, [{self.plan.problem.num_kv_heads}] (per KV head), the shape of the cache "
            f"without head_dim, or that and groups of {KV_GROUP_SIZES} elements of head_dim {head_dim}; "
            f"got {list(x.shape)} for a cache of {shape} rows ({'pages, tokens, heads' if paged else 'tokens, heads'})"
        )


def _matched(scale: Factor | None, zero: float | Factor | None, cache: Tensor) -> tuple[Factor | None, Factor | None]:
    """Scale and zero point in forms that go together (plan/scales.py): both "group" if one is, a zero point never
    "head"."""
    if zero is None:
        return scale, None
    if isinstance(zero, float):
        zero = Factor("head", torch.full((1,), zero, device=cache.device).expand(cache.shape[-2]))
    rows = cache.shape[:-1]
    groups = [f.values.shape[-1] for f in (scale, zero) if f is not None and f.form == "group"]
    if not groups:
        return scale, zero if zero.form == "token" else Factor("token", zero.values.expand(rows))
    if scale is None:
        scale = Factor("head", torch.ones(1, device=cache.device).expand(cache.shape[-2]))
    spread = [f.values if f.form == "group" else f.values[..., None].expand(*rows, groups[0]) for f in (scale, zero)]
    if spread[0].shape != spread[1].shape:
        raise ValueError(
            f"a scale in {spread[0].shape[-1]} groups needs a zero point in as many, got {spread[1].shape[-1]}"
        )
    return Factor("group", spread[0]), Factor("group", spread[1])


def _product(q_scale: Factor, k_scale: Factor | None) -> Factor:
    """A q_scale that lies on the GPU, with K's."""
    if k_scale is None:
        return q_scale
    if k_scale.form != "head":
        raise not_implemented("q_scale", "a tensor on the GPU beside a k_scale per token; pass a Python float")
    return Factor("head", q_scale.values * k_scale.values)
