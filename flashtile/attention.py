"""What all attention entry points share: reading lengths and caches, planning, and the plan/run life cycle."""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtile import config as configs
from flashtile.backend import attention_family
from flashtile.checks import (
    FLOAT_DTYPES,
    check_device,
    check_inner_contiguous,
    check_layout,
    check_shape,
    check_tensor,
    not_implemented,
)
from flashtile.config import Config
from flashtile.plan.plan import Lengths, Plan, make_plan
from flashtile.plan.problem import FORMATS, Problem
from flashtile.plan.scales import Scales
from flashtile.plan.worklist import Ints
from flashtile.pos_encoding import PosEncoding
from flashtile.scales import Scale, read_scales

PagedKV = Tensor | tuple[Tensor, Tensor]


DType = str | torch.dtype
KVDType = DType | tuple[DType, DType] | None  # of K and V, or of each


def to_dtype(name: str, dtype: object) -> torch.dtype:
    """A torch dtype from itself or its name, e.g. "float16"; "int4" is uint8. TypeError for anything else."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, "uint8" if dtype == "int4" else dtype, None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype or its name, e.g. 'bfloat16', got {dtype!r}")
    return found


def cache_dtypes(kv_data_type: KVDType, q_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the K and V caches from kv_data_type.

    Raises:
        ValueError: a dtype that attention does not take. TypeError: no dtype.
    """
    if q_dtype not in FLOAT_DTYPES:
        raise ValueError(f"q dtype: expected float16, bfloat16 or float32, got {q_dtype}")
    pair = kv_data_type if isinstance(kv_data_type, tuple) else (kv_data_type, kv_data_type)
    if len(pair) != 2:
        raise TypeError(f"kv_data_type: expected one dtype, or a tuple of K's and V's, got {kv_data_type!r}")
    k_dtype, v_dtype = (q_dtype if d is None else to_dtype("kv_data_type", d) for d in pair)
    for dtype in (k_dtype, v_dtype):
        if dtype != q_dtype and dtype not in FORMATS:
            raise ValueError(
                f"kv_data_type: expected the dtype of q, {q_dtype}, or one of float8_e4m3fn, float8_e5m2, int8, and "
                f"uint8 for packed int4; got {dtype}"
            )
    return k_dtype, v_dtype


def reject(**arguments: Any) -> None:
    """NotImplementedError for the first argument that is set (not None, False or 0)."""
    for name, value in arguments.items():
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise not_implemented(name)


def host_ints(name: str, x: object, size: int | None = None) -> Ints:
    """An index tensor [n], of any integer dtype, stride and device, as int64 on the host. Stalls the GPU if it lies
    there.

    Raises:
        TypeError: no tensor. ValueError: not 1-D, not of integers, or not of `size`.
    """
    t = check_tensor(name, x)
    if t.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {list(t.shape)}")
    if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool:
        raise ValueError(f"{name}: expected int32 or int64, got {t.dtype}")
    if size is not None and t.numel() != size:
        raise ValueError(f"{name}: expected shape [{size}], got {list(t.shape)}")
    values: Ints = t.detach().cpu().numpy().astype(np.int64)
    return values


def check_indptr(name: str, indptr: Ints) -> None:
    """ValueError unless an indptr starts at 0 and never decreases."""
    if len(indptr) == 0:
        raise ValueError(
            f"{name}: expected shape (batch_size + 1,), got (0,); give one offset per request, then the total"
        )
    if indptr[0] != 0:
        raise ValueError(f"{name}: expected the first offset to be 0, got {int(indptr[0])}")
    falls = np.flatnonzero(np.diff(indptr) < 0)
    if len(falls):
        r = int(falls[0])
        raise ValueError(
            f"{name}: offsets must not decrease, got {int(indptr[r])} then {int(indptr[r + 1])} at request {r}"
        )


def paged_lengths(kv_indptr: Ints, last_page_len: Ints, page_size: int) -> Ints:
    """KV tokens of each request, [batch_size]; ValueError if a last page is not 1..page_size (0 without pages)."""
    pages = np.diff(kv_indptr)
    wrong = np.flatnonzero((pages > 0) & ((last_page_len < 1) | (last_page_len > page_size)))
    if len(wrong):
        r = int(wrong[0])
        raise ValueError(
            f"last_page_len: expected 1..{page_size} (page_size) for request {r}, got {int(last_page_len[r])}; "
            "a full last page has page_size tokens"
        )
    return np.where(pages > 0, (pages - 1) * page_size + last_page_len, 0)


def split_paged_cache(cache: PagedKV, kv_layout: str) -> tuple[Tensor, Tensor]:
    """K and V as [pages, page_size, heads, dim] views, from a tuple or one tensor, in either layout; nothing is copied.

    Raises:
        KeyError: neither a tensor nor a tuple of two. ValueError: another rank.
    """
    page_dim = -3 if kv_layout == "NHD" else -2
    if isinstance(cache, tuple) and len(cache) == 2:
        members = []
        for name, x in zip(("k_cache", "v_cache"), cache, strict=True):
            check_tensor(name, x)
            if x.dim() not in (3, 4):
                raise ValueError(f"paged_kv_cache: {name} must be 3D or 4D, got shape {list(x.shape)}")
            members.append(x.unsqueeze(page_dim) if x.dim() == 3 else x)
        k, v = members
    elif isinstance(cache, Tensor):
        if cache.dim() not in (4, 5):
            raise ValueError(f"paged_kv_cache: must be 4D or 5D, got shape {list(cache.shape)}")
        if cache.shape[1] != 2:
            raise ValueError(
                f"paged_kv_cache: expected K and V in dimension 1 of size 2, got shape {list(cache.shape)}"
            )
        k, v = (cache.unsqueeze(page_dim) if cache.dim() == 4 else cache).unbind(dim=1)
    else:
        raise KeyError(f"Unrecognized paged_kv_cache type {type(cache).__name__}: expected a tensor or a tuple (k, v)")
    return (k, v) if kv_layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))


def without_page_dim(cache: PagedKV) -> bool:
    """Whether a cache came in the short form of page_size 1."""
    return cache[0].dim() == 3 if isinstance(cache, tuple) else cache.dim() == 4


def check_out(name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`x`, checked, or a new tensor if it is None."""
    if x is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if not isinstance(x, Tensor) or tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        got = f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"Invalid shape of {name}: expected {list(shape)} {dtype} on {device}, got {got}")
    check_inner_contiguous(name, x)
    return x


def launch(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor,
    sm_scale: float,
    sinks: Tensor | None = None,
    scales: Scales | None = None,
) -> tuple[Tensor, Tensor]:
    """Check the tensors of one layer against a plan and launch its kernels; never waits for the GPU.

    Args:
        k, v: NHD views, paged [pages, page_size, heads, dim] or ragged [nnz_kv, heads, dim].
        workspace: at least plan.workspace_size() bytes, uint8, on the device.
        scales: of the caches, checked.
    """
    p = plan.problem
    check_shape("q", q, (plan.work.nnz_qo, p.num_qo_heads, p.head_dim_qk))
    if q.dtype != p.q_dtype:
        raise ValueError(
            f"The dtype of q {q.dtype} does not match the q_data_type {p.q_dtype} specified in plan function."
        )
    rows = ("pages", p.page_size) if p.paged else ("nnz_kv",)
    for name, x, dim, dtype, fmt in (
        ("k", k, p.head_dim_qk, p.kv_dtype, p.k_format),
        ("v", v, p.head_dim_vo, p.v_dtype or p.kv_dtype, p.v_format),
    ):
        if x.dtype != dtype:
            raise ValueError(
                f"The dtype of {name} {x.dtype} does not match the kv_data_type {dtype} specified in plan function."
            )
        check_shape(name, x, (*rows, p.num_kv_heads, dim // 2 if fmt == "int4" else dim))
        if fmt != "plain" and (x.data_ptr() % 2 or any(s % 2 for s in x.stride()[:-1])):
            raise ValueError(
                f"{name}: rows of a {dtype} cache must start at even bytes, got strides {tuple(x.stride())}; "
                "they are read by two bytes at a time"
            )
        if x.shape[0] < plan.kv_rows:
            unit = "page" if p.paged else "token"
            raise ValueError(
                f"{name}: the plan reads {unit} {plan.kv_rows - 1} (request {plan.kv_rows_request}), "
                f"got only {x.shape[0]} {unit}s"
            )
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        check_device(name, x, plan.device)
        check_inner_contiguous(name, x)
    if sinks is not None:
        check_shape("sinks", sinks, (p.num_qo_heads,))
        check_device("sinks", sinks, plan.device)
        sinks = sinks.float().contiguous()
    lse = check_out("lse", lse, (plan.work.nnz_qo, p.num_qo_heads), torch.float32, plan.device)
    dense_lse = lse if lse.is_contiguous() else torch.empty_like(lse, memory_format=torch.contiguous_format)
    out_scale = 1.0
    if scales is not None and (plan.config.family == "hopper" or plan.inner is not None):
        if scales.k is not None or scales.v is not None:  # tensors: the Hopper kernels take numbers only
            plan = attention_family("hopper").portable_plan(plan)
        else:
            out_scale, scales = scales.out, None
    if plan.config.turn_q and not attention_family("hopper").takes(plan, q, v, out, sm_scale):
        plan = attention_family("hopper").portable_plan(plan)  # over the keys as they are: it turns them itself
    if plan.inner is not None:
        q, k, v, workspace = attention_family("copied").copy(plan, q, k, v, workspace)
        plan = plan.inner
    arguments = (plan, q, k, v, out, dense_lse, workspace, sm_scale, sinks)
    if scales is None:
        attention_family(plan.config.family).run(*arguments)
    else:
        attention_family(plan.config.family).run(*arguments, scales=scales)
    if out_scale != 1.0:
        out.mul_(out_scale)
    if dense_lse is not lse:
        lse.copy_(dense_lse)
    return out, lse


class PlannedOp:
    """Workspace and plan/run life cycle, once for all wrappers.

    A subclass translates its plan() arguments into a Problem and Lengths and calls `_schedule`; its run() calls
    `_launch`.
    """

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", backend: str = "auto") -> None:
        check_layout(kv_layout)
        if backend not in configs.BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(configs.BACKENDS)}, got {backend!r}")
        self._kv_layout = kv_layout
        self._backend = backend
        self._plan: Plan | None = None
        self._sm_scale = 1.0
        self._config: Config | None = None
        self._narrow_scales = True  # whether the last run's scales suited the narrow family
        self.reset_workspace_buffer(float_workspace_buffer)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() writes into fixed buffers that a captured graph reads."""
        return False

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None = None
    ) -> None:
        """Use another workspace from the next plan() on.

        float_workspace_buffer: any dtype, contiguous, on the device of the computation. int_workspace_buffer: not
        needed, taken for compatibility; the work list has a buffer of its own.
        """
        check_tensor("float_workspace_buffer", float_workspace_buffer)
        if not float_workspace_buffer.is_contiguous():
            raise ValueError("float_workspace_buffer: expected a contiguous tensor; call .contiguous()")
        self.device = float_workspace_buffer.device
        self._workspace = float_workspace_buffer.view(-1).view(torch.uint8)
        self._int_workspace = int_workspace_buffer

    def workspace_size(self) -> int:
        """Bytes of float workspace that the current plan needs. RuntimeError before plan().

        The number of CTAs of the device bounds them, but for two kinds of prefill on Hopper: with ROPE_LLAMA, and over
        pages of fewer than 8 tokens. There copies of the batch's KV (of rotated q, too, where the kernel does not turn
        it itself) are counted, unless the workspace given has no room for them and another way needs none.
        """
        return self._planned().workspace_size()

    def _planned(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("run() before plan(): call plan() with the lengths of the batch first")
        return self._plan

    def _schedule(
        self,
        problem: Problem,
        lengths: Lengths,
        kv_indices: Tensor,
        sm_scale: float | None,
        kv_rows: int,
        kv_rows_request: int,
    ) -> None:
        problem.check()
        backend = self._backend
        if backend == "auto" and problem.quantised and not self._narrow_scales:
            backend = "fa2"  # the scales that run() will be given are most likely of the last run's kind
        config = self._config or configs.choose(problem, lengths.workload(), self.device, backend)
        skip = -self._workspace.data_ptr() % 16
        plan = make_plan(problem, config, lengths, kv_indices, self.device, kv_rows, kv_rows_request)
        need = plan.workspace_size()
        optional = self._backend == "auto" or problem.rope is None
        if config.copy_first and need + skip > self._workspace.numel() and optional:
            # no room for copies of q, K and V
            config = configs.choose(problem, lengths.workload(), self.device, self._backend, may_copy=False)
            plan = make_plan(problem, config, lengths, kv_indices, self.device, kv_rows, kv_rows_request)
            need = plan.workspace_size()
        if need + skip > self._workspace.numel() and need:
            raise ValueError(
                f"float_workspace_buffer: this plan needs {need} bytes{f' (plus {skip} to align it)' if skip else ''}, "
                f"got {self._workspace.numel()}; allocate a larger one"
            )
        self._plan = plan
        self._scratch = self._workspace[skip : skip + (self._workspace.numel() - skip) // 4 * 4]
        self._sm_scale = problem.head_dim_qk**-0.5 if sm_scale is None else sm_scale

    def _schedule_paged(
        self,
        problem: Problem,
        qo_indptr: Ints,
        kv_indptr: Ints,
        kv_indices: Tensor,
        last_page_len: Ints,
        sm_scale: float | None,
    ) -> None:
        """Plan a batch over a page table; checks the table as far as it lies on the host."""
        check_indptr("paged_kv_indptr", kv_indptr)
        kv_len = paged_lengths(kv_indptr, last_page_len, problem.page_size)
        ids = check_tensor("kv_indices", kv_indices)
        if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"kv_indices: expected a 1-D tensor of int32 or int64, got {list(ids.shape)} {ids.dtype}")
        used = int(kv_indptr[-1])
        if ids.numel() < used:
            raise ValueError(f"kv_indices: paged_kv_indptr counts {used} pages, got only {ids.numel()} page ids")
        kv_rows, request = 0, 0
        if used and (ids.device.type == "cpu" or debugging()):
            host = ids[:used].cpu()
            last = int(host.argmax())
            kv_rows, request = int(host[last]) + 1, int(np.searchsorted(kv_indptr, last, side="right")) - 1
            if int(host.min()) < 0:
                where = int(host.argmin())
                owner = int(np.searchsorted(kv_indptr, where, side="right")) - 1
                raise ValueError(
                    f"kv_indices: page ids must not be negative, got {int(host[where])} for request {owner}"
                )
        ids = ids.to(self.device, torch.int32, non_blocking=True).contiguous()
        lengths = Lengths(qo_indptr, kv_indptr[:-1], kv_len)
        self._schedule(problem, lengths, ids, sm_scale, kv_rows, request)

    def _launch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor | None,
        sinks: Tensor | None,
        without_page_dim: bool = False,
        **scales: Scale,
    ) -> tuple[Tensor, Tensor]:
        plan = self._planned()
        p = plan.problem
        check_tensor("q", q)
        sm_scale, read = read_scales(
            plan, k, v, self._kv_layout, self._sm_scale, without_page_dim=without_page_dim, **scales
        )
        out = check_out("out", out, (plan.work.nnz_qo, p.num_qo_heads, p.head_dim_vo), p.o_dtype, self.device)
        self._narrow_scales = read is None or configs.narrow_takes(read)
        return launch(plan, q, k, v, out, lse, self._scratch, sm_scale, sinks, read)


@lru_cache(maxsize=512)
def _single_plan(problem: Problem, qo_len: int, kv_len: int, device: torch.device, backend: str) -> Plan:
    problem.check()
    lengths = Lengths(np.array([0, qo_len]), np.array([0]), np.array([kv_len]))
    config = configs.choose(problem, lengths.workload(), device, backend)
    return make_plan(problem, config, lengths, torch.zeros(1, dtype=torch.int32, device=device), device)


def single(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_layout: str,
    causal: bool,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    encoding: PosEncoding,
    backend: str = "auto",
    o_dtype: torch.dtype | None = None,
    **scales: Scale,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one request: q [qo_len, num_qo_heads, head_dim_qk], k and v in kv_layout without a batch
    dimension."""
    check_layout(kv_layout)
    check_shape("q", q, ("qo_len", "num_qo_heads", "head_dim_qk"))
    for name, x in (("k", k), ("v", v)):
        check_shape(
            name, x, ("kv_len", "num_kv_heads", "dim") if kv_layout == "NHD" else ("num_kv_heads", "kv_len", "dim")
        )
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    cache_dtypes((k.dtype, v.dtype), q.dtype)
    check_shape("k", k, ("kv_len", "num_kv_heads", q.shape[2] // (2 if k.dtype == torch.uint8 else 1)))
    check_shape("v", v, (*k.shape[:2], "head_dim_vo"))
    problem = Problem(
        num_qo_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim_qk=q.shape[2],
        head_dim_vo=v.shape[2] * (2 if v.dtype == torch.uint8 else 1),
        q_dtype=q.dtype,
        kv_dtype=k.dtype,
        v_dtype=v.dtype if v.dtype != k.dtype else None,
        o_dtype=o_dtype or q.dtype,
        kv_heads_first=kv_layout == "HND",
        window_left=window_left,
        window_right=0 if causal else -1,
        logits_soft_cap=logits_soft_cap or 0.0,
        rope=encoding.rope,
        alibi=encoding.alibi,
    )
    plan = _single_plan(problem, q.shape[0], k.shape[0], q.device, backend)
    out = torch.empty(q.shape[0], problem.num_qo_heads, problem.head_dim_vo, dtype=problem.o_dtype, device=q.device)
    workspace = torch.empty(plan.workspace_size(), dtype=torch.uint8, device=q.device)
    scale = q.shape[2] ** -0.5 if sm_scale is None else sm_scale
    sm_scale, read = read_scales(plan, k, v, kv_layout, scale, **scales)  # type: ignore[arg-type]
    if plan.config.family == "narrow" and read is not None and not configs.narrow_takes(read):
        plan = _single_plan(problem, q.shape[0], k.shape[0], q.device, "fa2")
        workspace = torch.empty(plan.workspace_size(), dtype=torch.uint8, device=q.device)
    return launch(plan, q, k, v, out, None, workspace, sm_scale, scales=read)


def debugging() -> bool:
    """Whether values on the GPU are checked too (FLASHTILE_DEBUG=1), at the price of waiting for it."""
    return os.environ.get("FLASHTILE_DEBUG", "0") not in ("", "0")
