"""What flows through a pipe: a tensor, and what its rows mean."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class TensorType(Enum):
    """The meaning of a tensor's rows."""

    LOGITS = "logits"
    PROBS = "probs"
    INDICES = "indices"


@dataclass(frozen=True, eq=False)
class TaggedTensor:
    """A tensor and its meaning."""

    data: Tensor
    type: TensorType

    @staticmethod
    def logits(data: Tensor) -> "TaggedTensor":
        """Rows of logits [batch_size, vocab_size]."""
        return TaggedTensor(data, TensorType.LOGITS)

    @staticmethod
    def probs(data: Tensor) -> "TaggedTensor":
        """Rows of probabilities [batch_size, vocab_size]."""
        return TaggedTensor(data, TensorType.PROBS)

    @staticmethod
    def indices(data: Tensor) -> "TaggedTensor":
        """Token ids [batch_size]."""
        return TaggedTensor(data, TensorType.INDICES)

    @property
    def device(self) -> torch.device:
        """That of the tensor."""
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor."""
        return self.data.dtype

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self.data.shape

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape of the tensor, or one of its sizes."""
        return self.data.shape if dim is None else self.data.shape[dim]
