"""Checks of a chain of ops, and its fusion: runs of ops that one kernel can do are replaced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flashtile.logits_processor import ops
from flashtile.logits_processor.ops import Op
from flashtile.logits_processor.types import TensorType

ValidityCheck = Callable[[list[Op]], None]


class CompileError(ValueError):
    """A chain of ops that makes no sense."""


@dataclass(frozen=True)
class FusionRule:
    """Replace a run of ops by one.

    pattern: classes of the ops, or of the processors that they come from. guard: whether to replace this run. build:
        what
    takes its place. prio: rules of higher priority are tried first, then longer ones.
    """

    pattern: tuple[type, ...]
    guard: Callable[[list[Op]], bool]
    build: Callable[[list[Op]], Op]
    prio: int = 0

    def matches(self, window: list[Op]) -> bool:
        """Whether the run is of this pattern, and the guard agrees."""
        pairs = zip(window, self.pattern, strict=True)
        return all(isinstance(op, kind) or op.processor is kind for op, kind in pairs) and self.guard(window)


def _joined(kind: type[Op]) -> Callable[[list[Op]], Op]:
    def build(window: list[Op]) -> Op:
        params: dict[str, Any] = {}
        for op in window:
            params |= op.default_params
        if kind is ops.FusedProbsTopKTopPSampleOp:
            params["filter_apply_order"] = "joint"
        return kind(**params)

    return build


def _always(window: list[Op]) -> bool:
    return True


def _is_joint(window: list[Op]) -> bool:
    return bool(window[0].default_params.get("joint_topk_topp"))


def _is_not_joint(window: list[Op]) -> bool:
    return not _is_joint(window)


# TopK and TopP one after the other stay two ops: the second judges what the first has rounded and stored.
FUSION_RULES = (
    FusionRule((ops.TemperatureOp, ops.SoftmaxOp), _always, _joined(ops.FusedTemperatureSoftmaxOp), 10),
    FusionRule(
        (ops.ProbsTopKOp, ops.TopPOp, ops.ProbsSampleOp), _is_joint, _joined(ops.FusedProbsTopKTopPSampleOp), 10
    ),
    FusionRule((ops.ProbsTopKOp, ops.ProbsSampleOp), _is_not_joint, _joined(ops.FusedProbsTopKSampleOp), 5),
    FusionRule((ops.TopPOp, ops.ProbsSampleOp), _always, _joined(ops.FusedProbsTopPSampleOp), 5),
    FusionRule((ops.MinPOp, ops.ProbsSampleOp), _always, _joined(ops.FusedProbsMinPSampleOp), 5),
)


def _check_types(chain: list[Op]) -> None:
    for op, follower in pairwise(chain):
        if op.OUT is TensorType.INDICES:
            raise CompileError(f"{follower!r}: nothing can follow {op!r}, which gives token ids")
        if op.OUT is not follower.IN:
            raise CompileError(f"{follower!r}: takes {follower.IN.name}, but {op!r} gives {op.OUT.name}")


def _check_one_softmax(chain: list[Op]) -> None:
    if sum(isinstance(op, (ops.SoftmaxOp, ops.FusedTemperatureSoftmaxOp)) for op in chain) > 1:
        raise CompileError("Softmax: expected at most one in a pipe")


class Compiler:
    """Checks chains and fuses their ops."""

    def __init__(
        self,
        custom_fusion_rules: Sequence[FusionRule] | None = None,
        custom_validity_checks: Sequence[ValidityCheck] | None = None,
    ) -> None:
        self.rules = [*FUSION_RULES, *(custom_fusion_rules or ())]
        self.checks: list[ValidityCheck] = [_check_types, _check_one_softmax, *(custom_validity_checks or ())]

    def register_fusion_rule(self, rule: FusionRule) -> None:
        """Try this rule too."""
        self.rules.append(rule)

    def register_validity_check(self, check: ValidityCheck) -> None:
        """Make this check too: it raises a CompileError for a chain that it rejects."""
        self.checks.append(check)

    def check(self, chain: Sequence[Op]) -> None:
        """Raise a CompileError if the chain makes no sense."""
        if not chain:
            raise CompileError("ops: expected at least one, got none")
        for check in self.checks:
            check(list(chain))

    def compile(self, ops: Sequence[Op]) -> list[Op]:
        """The ops, checked and fused."""
        self.check(ops)
        fused = list(ops)
        rules = sorted(self.rules, key=lambda rule: (-rule.prio, -len(rule.pattern)))
        for rule in rules:
            begin, length = 0, len(rule.pattern)
            while begin + length <= len(fused):
                window = fused[begin : begin + length]
                if rule.matches(window):
                    fused[begin : begin + length] = [rule.build(window)]
                begin += 1
        _check_types(fused)
        return fused


def compile_pipeline(
    ops: Sequence[Op],
    custom_fusion_rules: Sequence[FusionRule] | None = None,
    custom_validity_checks: Sequence[ValidityCheck] | None = None,
) -> list[Op]:
    """The ops, checked and fused; see `Compiler`.

    Raises:
        CompileError: a chain that makes no sense, or that a custom check rejects.
    """
    return Compiler(custom_fusion_rules, custom_validity_checks).compile(ops)
