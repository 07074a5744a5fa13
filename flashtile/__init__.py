"""flashtile: attention and companion kernels for LLM serving, in pure Python.

Triton on every CUDA GPU, Gluon on Hopper, PyTorch on the CPU, behind FlashInfer's public names. Importing the package
needs neither a GPU nor Triton: kernels are imported on their first use.
"""

from flashtile.decode import BatchDecodeWithPagedKVCacheWrapper, single_decode_with_kv_cache
from flashtile.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)

__version__ = "0.1.0"

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]
