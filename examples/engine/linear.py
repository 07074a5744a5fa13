"""x @ weight.T + bias, with the weight laid out once, when the model is loaded, as the machine likes to read it."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Linear:
    """A linear layer without gradients.

    On the CPU, oneDNN keeps an fp32 weight in blocks of the size its kernels read: 8 tokens through all layers and the
    head of the 135M model take 43 ms instead of 80 ms (one core, AVX-512), long prompts 0.8 of the time. torch.compile
    packs weights with these two ops when it freezes a model; they have no public name, so a torch without them is
    served too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out_features, in_features]. bias: [out_features]."""
        self._bias = bias
        self._packed = weight.device.type == "cpu" and weight.dtype == torch.float32 and can_pack()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)


def can_pack() -> bool:
    """Whether this torch has oneDNN and the ops that pack a weight for it."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
