"""What turns the numbers of a cache into keys and values: the scales and zero points of one layer."""

from dataclasses import dataclass

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


NO_SCALES = Scales()
