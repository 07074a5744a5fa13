"""The pipe: a chain of processors as one call."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flashtile.logits_processor.compiler import CompileError, Compiler, FusionRule, ValidityCheck
from flashtile.logits_processor.ops import PARAMETERS, Op
from flashtile.logits_processor.processors import LogitsProcessor, infer_input_type, legalize_processors
from flashtile.logits_processor.types import TaggedTensor, TensorType


class LogitsPipe:
    """From logits to tokens, in named steps.

    >>> pipe = LogitsPipe([Temperature(), Softmax(), TopP(), Sample()])
    >>> tokens = pipe(logits, temperature=0.7, top_p=0.9)

    Compiled, runs of steps that one function of flashtile.sampling does are done by it: Temperature and Softmax;
    TopK, TopP or MinP with Sample; TopK(joint_topk_topp=True), TopP and Sample. A pipe draws the tokens that these
    functions draw from an equal generator.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        compile: bool = True,
        input_type: TensorType | None = None,
        custom_fusion_rules: Sequence[FusionRule] | None = None,
        custom_validity_checks: Sequence[ValidityCheck] | None = None,
    ) -> None:
        """Check the chain, and compile it.

        Args:
            processors: the steps, at least one.
            compile: fuse now; otherwise `compile` may be called later, and until then each step runs by itself.
            input_type: LOGITS or PROBS; needed only if the first step takes both.
            custom_fusion_rules: tried beside the built-in ones, in order of priority.
            custom_validity_checks: called with the list of ops; each raises an error for a chain that it rejects.

        Raises:
            ValueError: no processors, steps that do not fit together, more than one Softmax, steps after Sample. A
                LegalizationError or a CompileError, which are ValueErrors.
        """
        self.processors = list(processors)
        if input_type is TensorType.INDICES:
            raise ValueError("input_type: expected TensorType.LOGITS or TensorType.PROBS, got TensorType.INDICES")
        self.initial_type = infer_input_type(self.processors) if input_type is None else input_type
        self.ops: list[Op] = legalize_processors(self.processors, self.initial_type)
        self.compiled_ops: list[Op] | None = None
        self._compiler = Compiler(custom_fusion_rules, custom_validity_checks)
        self._compiler.check(self.ops)
        if self.ops[0].IN is not self.initial_type:
            raise CompileError(
                f"{self.ops[0]!r}: takes {self.ops[0].IN.name}, but the pipe gets {self.initial_type.name}"
            )
        if compile:
            self.compile()

    def compile(
        self,
        custom_fusion_rules: Sequence[FusionRule] | None = None,
        custom_validity_checks: Sequence[ValidityCheck] | None = None,
    ) -> None:
        """Fuse the ops, by the rules and under the checks given to the pipe and those given here.

        Raises:
            CompileError: a check rejects the chain.
        """
        for rule in custom_fusion_rules or ():
            self._compiler.register_fusion_rule(rule)
        for check in custom_validity_checks or ():
            self._compiler.register_validity_check(check)
        self.compiled_ops = self._compiler.compile(self.ops)

    def __call__(self, x: Tensor | TaggedTensor, **kwargs: Any) -> Tensor:
        """Run the steps.

        Args:
            x: [batch_size, vocab_size], logits or probabilities, as the first step takes them.
            kwargs: temperature, top_k, top_p, min_p: what the steps need, above 0, numbers or [batch_size]; indices,
                generator, seed, offset: as for `sampling_from_probs`. A pipe may be given more of these than it needs.

        Returns:
            What the last step gives.

        Raises:
            ValueError: a parameter that is missing, not above 0 or unknown, or a tensor of another type.
        """
        chain = self.ops if self.compiled_ops is None else self.compiled_ops
        if isinstance(x, TaggedTensor) and x.type is not self.initial_type:
            raise ValueError(f"x: the pipe takes {self.initial_type.name}, got {x.type.name}")
        if not isinstance(x, (Tensor, TaggedTensor)):
            raise ValueError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        unknown = set(kwargs) - set(PARAMETERS)
        if unknown and all(type(op).__module__ == Op.__module__ for op in chain):  # others may read what they like
            raise ValueError(f"{sorted(unknown)[0]}: no step takes it; expected some of {', '.join(PARAMETERS)}")
        tensor = x if isinstance(x, TaggedTensor) else TaggedTensor(x, self.initial_type)
        for op in chain:
            tensor = op(tensor, **kwargs)
            if not isinstance(tensor, TaggedTensor) or tensor.type is not op.OUT:
                raise ValueError(f"{op!r}: expected to return a TaggedTensor of {op.OUT.name}, got {tensor!r}")
        return tensor.data

    def __repr__(self) -> str:
        parts = [" -> ".join(map(repr, self.processors)), f"ops=[{' -> '.join(map(repr, self.ops))}]"]
        if self.compiled_ops is not None:
            parts.append(f"compiled_ops=[{' -> '.join(map(repr, self.compiled_ops))}]")
        return f"LogitsPipe([{parts[0]}], {', '.join(parts[1:])})"
