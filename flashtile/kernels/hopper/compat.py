"""The one module that imports Gluon: the names the Hopper kernels use, whatever Triton calls them (3.6 to 3.9)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.config import ROOMY_PTXAS

# The old names still exist in 3.9, but raise: look for the new ones first.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
cp_async_arrive = async_copy.mbarrier_arrive
_SharedMemory = gl.shared_memory_descriptor
# (buffer, dtype, shape, layout)
reinterpret = getattr(_SharedMemory, "reinterpret", None) or _SharedMemory._reinterpret

ROOMY = gl.constexpr(ROOMY_PTXAS)

__all__ = [
    "ROOMY",
    "TensorDescriptor",
    "cp_async",
    "cp_async_arrive",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "mma_v2",
    "reinterpret",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
