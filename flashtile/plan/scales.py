"""What turns the numbers of a cache into keys and values, and back: the scales and zero points of one layer."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factor:
    """A scale or zero point, on the device of the cache.

    form "head": values [num_kv_heads]. "token": [pages, page_size, num_kv_heads] or, ragged, [nnz_kv, num_kv_heads].
    "group": as "token" with one more dimension, the groups of equal size that head_dim is cut into, contiguous. Any
    other strides; those of 0 broadcast.
    """

    form: str
    values: Tensor


@dataclass(frozen=True, eq=False)
class Scales:
    """A number n of the cache stands for (n - zero) * scale. None: 1, and 0 (8 for int4).

    k_zero and v_zero are "token" or "group"; where a scale or a zero point is "group", the other of the pair is too.
    out: one more factor on the output.
    """

    k: Factor | None = None
    v: Factor | None = None
    k_zero: Factor | None = None
    v_zero: Factor | None = None
    out: float = 1.0

    def factors(self) -> list[Factor]:
        """Those that there are."""
        return [f for f in (self.k, self.v, self.k_zero, self.v_zero) if f is not None]

    def token_dtypes(self) -> set[torch.dtype]:
        """Of the factors that each token has of its own."""
        return {f.values.dtype for f in self.factors() if f.form == "token"}


NO_SCALES = Scales()


@dataclass(frozen=True)
class Numbers:
    """The numbers low..high of a format. Without a zero point they lie around `middle`, and the largest element of a
    group becomes one that is `top` away from it."""

    low: float
    high: float
    middle: float
    top: float


# (format of plan/problem.py, with a zero point: so that all numbers are used) -> its numbers
NUMBERS = {
    ("e4m3", False): Numbers(-448.0, 448.0, 0.0, 448.0),
    ("e5m2", False): Numbers(-57344.0, 57344.0, 0.0, 57344.0),
    ("int8", False): Numbers(-127.0, 127.0, 0.0, 127.0),
    ("int8", True): Numbers(-128.0, 127.0, 0.0, 127.0),
    ("int4", False): Numbers(0.0, 15.0, 8.0, 7.0),
    ("int4", True): Numbers(0.0, 15.0, 8.0, 7.0),
}
