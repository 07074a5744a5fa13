"""Processors: steps as a user names them. They become ops once it is known if they get logits or probabilities."""

from collections.abc import Sequence
from typing import Any, ClassVar

from flashtile.logits_processor import ops
from flashtile.logits_processor.ops import Op
from flashtile.logits_processor.types import TensorType

LOGITS, PROBS, INDICES = TensorType


class LegalizationError(ValueError):
    """A processor cannot take what the one before it gives."""


class LogitsProcessor:
    """A step of a pipe. params: defaults for parameters of the call, and options of the step.

    A subclass fills OPS, or overrides `legalize`.
    """

    OPS: ClassVar[dict[TensorType, type[Op]]] = {}

    def __init__(self, **params: Any) -> None:
        self.params = params

    def legalize(self, input_type: TensorType) -> list[Op]:
        """The ops that do this step on tensors of input_type. LegalizationError if there are none."""
        if input_type not in self.OPS:
            takes = " or ".join(kind.name for kind in self.OPS)
            raise LegalizationError(f"{self!r}: takes {takes}, got {input_type.name}")
        return [self.OPS[input_type](**self.params)]

    def __repr__(self) -> str:
        return type(self).__name__


class Temperature(LogitsProcessor):
    """Divides logits by temperature, which the call gives."""

    OPS: ClassVar = {LOGITS: ops.TemperatureOp}


class Softmax(LogitsProcessor):
    """Turns logits into probabilities. enable_pdl: as for `flashtile.sampling.softmax`."""

    OPS: ClassVar = {LOGITS: ops.SoftmaxOp}

    def __init__(self, enable_pdl: bool | None = None, **params: Any) -> None:
        super().__init__(enable_pdl=enable_pdl, **params)


class TopK(LogitsProcessor):
    """Keeps the top_k largest, which the call gives: masks logits, or renormalises probabilities.

    joint_topk_topp: judge the TopP that follows on the row itself, not on what top-k left of it.
    """

    OPS: ClassVar = {LOGITS: ops.LogitsTopKOp, PROBS: ops.ProbsTopKOp}

    def __init__(self, joint_topk_topp: bool = False, **params: Any) -> None:
        super().__init__(joint_topk_topp=joint_topk_topp, **params)


class TopP(LogitsProcessor):
    """Keeps the most probable tokens up to a mass of top_p, which the call gives, and renormalises."""

    OPS: ClassVar = {PROBS: ops.TopPOp}


class MinP(LogitsProcessor):
    """Keeps tokens of at least min_p times the largest probability; the call gives min_p. Renormalises."""

    OPS: ClassVar = {PROBS: ops.MinPOp}


class Sample(LogitsProcessor):
    """Draws a token from each row; the call may give indices, generator, seed and offset."""

    OPS: ClassVar = {LOGITS: ops.LogitsSampleOp, PROBS: ops.ProbsSampleOp}

    def __init__(self, deterministic: bool = True, **params: Any) -> None:
        super().__init__(deterministic=deterministic, **params)


def legalize_processors(
    processors: Sequence[LogitsProcessor], initial_type: TensorType = TensorType.LOGITS
) -> list[Op]:
    """The ops of a chain of processors whose first one gets tensors of initial_type.

    Raises:
        LegalizationError: no processors, something else among them, or one that cannot take what comes.
    """
    if not processors:
        raise LegalizationError("processors: expected at least one, got none")
    steps: list[Op] = []
    kind = initial_type
    for processor in processors:
        if not isinstance(processor, LogitsProcessor):
            raise LegalizationError(f"processors: expected a LogitsProcessor, got {type(processor).__name__}")
        if kind is INDICES:
            raise LegalizationError(f"{processor!r}: nothing can follow a step that gives token ids")
        for op in processor.legalize(kind):
            if not isinstance(op, Op):
                raise LegalizationError(f"{processor!r}: legalize() gave {type(op).__name__}, expected an Op")
            op.processor = type(processor)
            steps.append(op)
        kind = steps[-1].OUT if steps else kind
    return steps


def infer_input_type(processors: Sequence[LogitsProcessor]) -> TensorType:
    """What the first processor takes. LegalizationError if it takes logits as well as probabilities."""
    if not processors:
        raise LegalizationError("processors: expected at least one, got none")
    first = processors[0]
    if not isinstance(first, LogitsProcessor):
        raise LegalizationError(f"processors: expected a LogitsProcessor, got {type(first).__name__}")
    kinds = list(first.OPS) or [_taken_by(first)]
    if len(kinds) > 1:
        raise LegalizationError(
            f"input_type: {first!r} takes logits and probabilities; give TensorType.LOGITS or TensorType.PROBS"
        )
    return kinds[0]


def _taken_by(processor: LogitsProcessor) -> TensorType:
    """What a processor with a `legalize` of its own takes: what its first op says, if that is always the same."""
    taken = set()
    for kind in (LOGITS, PROBS):
        try:
            taken |= {op.IN for op in processor.legalize(kind)[:1]}
        except ValueError:  # it does not take this
            continue
    if len(taken) != 1:
        raise LegalizationError(f"input_type: what {processor!r} takes is not known; give TensorType.LOGITS or .PROBS")
    return taken.pop()
