"""FlashInfer's names for single Triton kernels. This package is not Triton, nor does importing it import Triton."""
