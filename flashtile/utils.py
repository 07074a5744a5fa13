"""What FlashInfer's `utils` offers to callers of attention: its enumerations, and the slopes of ALiBi."""

from enum import Enum

from torch import Tensor

from flashtile.plan import encoding


class PosEncodingMode(Enum):
    """Position encodings that attention can apply; entry points take a member or its name."""

    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(Enum):
    """Which keys a query row sees."""

    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class TensorLayout(Enum):
    """Whether tokens or heads come first in K and V."""

    NHD = 0
    HND = 1


def get_alibi_slopes(n_heads: int) -> Tensor:
    """ALiBi's slope of each query head (arXiv:2108.12409), [n_heads] fp32 on the CPU.

    n_heads: any number; of a power of 2, 2 ** (-8 i / n_heads) for i = 1..n_heads.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads: expected at least 1, got {n_heads}")
    return encoding.alibi_slopes(n_heads).float()
