"""Kernels through Triton's CPU interpreter: the variable must be set before Triton is imported, so these tests have
a pytest process of their own (`make test` starts it)."""

import os

os.environ["TRITON_INTERPRET"] = "1"
