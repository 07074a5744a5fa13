"""FlashInfer's names for single Triton kernels. (This package is not Triton itself, and importing it does not import it.)"""
