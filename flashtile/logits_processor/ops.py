"""Ops: the typed steps that processors turn into, each a call of one function of flashtile.sampling."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashtile import sampling
from flashtile.logits_processor.types import TaggedTensor, TensorType

LOGITS, PROBS, INDICES = TensorType
PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "indices", "generator", "seed", "offset")


class Op:
    """One step. A subclass says what it takes and gives (IN, OUT), and what it does (`__call__`).

    default_params are fixed when the pipe is built; a custom op may give them any meaning.
    """

    IN: ClassVar[TensorType]
    OUT: ClassVar[TensorType]

    def __init__(self, **default_params: Any) -> None:
        self.default_params = default_params
        self.processor: type | None = None  # the class it comes from, set by `legalize_processors`

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """The step, given all runtime parameters of the pipe."""
        raise NotImplementedError(f"{type(self).__name__}: define __call__(self, tensor, **kwargs)")

    def __repr__(self) -> str:
        return type(self).__name__


class ParameterizedOp(Op):
    """An op with parameters that are given when the pipe is called; those it was built with are their defaults."""

    def parameter(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A required parameter: of the call, or its default. ValueError if there is neither."""
        value = kwargs.get(name)
        value = self.default_params.get(name) if value is None else value
        if value is None:
            raise ValueError(f"{name}: {self!r} needs it; give {name}= to the call of the pipe")
        return value

    def positive(self, name: str, kwargs: dict[str, Any]) -> Any:
        """As `parameter`; ValueError also if it is not above 0. Of tensors, those on the CPU are checked."""
        value = self.parameter(name, kwargs)
        on_host = not isinstance(value, Tensor) or (value.device.type == "cpu" and not torch.compiler.is_compiling())
        if on_host and not bool(torch.as_tensor(value > 0).all()):
            raise ValueError(f"{name}: expected a number above 0, got {value}")
        return value


def _random(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ("indices", "generator", "seed", "offset") if name in kwargs}


class TemperatureOp(ParameterizedOp):
    """logits / temperature, fp32."""

    IN, OUT = LOGITS, LOGITS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs temperature."""
        heat = self.positive("temperature", kwargs)
        if isinstance(heat, Tensor) and heat.dim():
            heat = heat.reshape(-1, 1)
        return TaggedTensor.logits(tensor.data.float() / heat)


class SoftmaxOp(Op):
    """`softmax`."""

    IN, OUT = LOGITS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs nothing."""
        return TaggedTensor.probs(sampling.softmax(tensor.data, enable_pdl=self.default_params.get("enable_pdl")))


class LogitsTopKOp(ParameterizedOp):
    """`top_k_mask_logits`."""

    IN, OUT = LOGITS, LOGITS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs top_k."""
        return TaggedTensor.logits(sampling.top_k_mask_logits(tensor.data, self.positive("top_k", kwargs)))


class ProbsTopKOp(ParameterizedOp):
    """`top_k_renorm_probs`."""

    IN, OUT = PROBS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs top_k."""
        if self.default_params.get("joint_topk_topp"):
            raise ValueError("joint_topk_topp: needs TopP() and Sample() right after TopK(), and a compiled pipe")
        return TaggedTensor.probs(sampling.top_k_renorm_probs(tensor.data, self.positive("top_k", kwargs)))


class TopPOp(ParameterizedOp):
    """`top_p_renorm_probs`."""

    IN, OUT = PROBS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs top_p."""
        return TaggedTensor.probs(sampling.top_p_renorm_probs(tensor.data, self.positive("top_p", kwargs)))


class MinPOp(ParameterizedOp):
    """Probabilities of at least min_p times the largest of their row, renormalised."""

    IN, OUT = PROBS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs min_p."""
        share = self.positive("min_p", kwargs)
        if isinstance(share, Tensor) and share.dim():
            share = share.reshape(-1, 1)
        probs = tensor.data.float()
        kept = probs.masked_fill(probs < share * probs.amax(-1, keepdim=True), 0)
        return TaggedTensor.probs(kept / kept.sum(-1, keepdim=True))


class _SampleOp(ParameterizedOp):
    """Tokens, by one function of flashtile.sampling, under the parameters it needs."""

    OUT = INDICES
    NEEDS: ClassVar[tuple[str, ...]] = ()
    DRAW: ClassVar[Callable[..., Any]]

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs what NEEDS names; takes indices, generator, seed and offset."""
        filters = {name: self.positive(name, kwargs) for name in self.NEEDS}
        fixed = ("deterministic", "filter_apply_order")
        options = {name: value for name, value in self.default_params.items() if name in fixed}
        return TaggedTensor.indices(type(self).DRAW(tensor.data, **filters, **options, **_random(kwargs)))


class LogitsSampleOp(_SampleOp):
    """`sampling_from_logits`."""

    IN = LOGITS
    DRAW = staticmethod(sampling.sampling_from_logits)


class ProbsSampleOp(_SampleOp):
    """`sampling_from_probs`."""

    IN = PROBS
    DRAW = staticmethod(sampling.sampling_from_probs)


class FusedTemperatureSoftmaxOp(ParameterizedOp):
    """`softmax` with a temperature."""

    IN, OUT = LOGITS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Needs temperature."""
        heat, enable_pdl = self.positive("temperature", kwargs), self.default_params.get("enable_pdl")
        return TaggedTensor.probs(sampling.softmax(tensor.data, heat, enable_pdl))


class FusedProbsTopKSampleOp(_SampleOp):
    """`top_k_sampling_from_probs`."""

    IN, NEEDS = PROBS, ("top_k",)
    DRAW = staticmethod(sampling.top_k_sampling_from_probs)


class FusedProbsTopPSampleOp(_SampleOp):
    """`top_p_sampling_from_probs`."""

    IN, NEEDS = PROBS, ("top_p",)
    DRAW = staticmethod(sampling.top_p_sampling_from_probs)


class FusedProbsMinPSampleOp(_SampleOp):
    """`min_p_sampling_from_probs`."""

    IN, NEEDS = PROBS, ("min_p",)
    DRAW = staticmethod(sampling.min_p_sampling_from_probs)


class FusedProbsTopKTopPSampleOp(_SampleOp):
    """`top_k_top_p_sampling_from_probs`, joint."""

    IN, NEEDS = PROBS, ("top_k", "top_p")
    DRAW = staticmethod(sampling.top_k_top_p_sampling_from_probs)
