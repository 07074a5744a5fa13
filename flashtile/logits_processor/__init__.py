"""Steps from logits to tokens: processors, chained in a `LogitsPipe`, fused where one kernel does several."""

from flashtile.logits_processor.compiler import CompileError, Compiler, FusionRule, compile_pipeline
from flashtile.logits_processor.ops import Op, ParameterizedOp
from flashtile.logits_processor.pipe import LogitsPipe
from flashtile.logits_processor.processors import (
    LegalizationError,
    LogitsProcessor,
    MinP,
    Sample,
    Softmax,
    Temperature,
    TopK,
    TopP,
    legalize_processors,
)
from flashtile.logits_processor.types import TaggedTensor, TensorType

__all__ = [
    "CompileError",
    "Compiler",
    "FusionRule",
    "LegalizationError",
    "LogitsPipe",
    "LogitsProcessor",
    "MinP",
    "Op",
    "ParameterizedOp",
    "Sample",
    "Softmax",
    "TaggedTensor",
    "Temperature",
    "TensorType",
    "TopK",
    "TopP",
    "compile_pipeline",
    "legalize_processors",
]
