"""LogitsPipe: the functions it stands for, its fusions, what it refuses, and what users may add."""

from typing import Any

import pytest
import torch

from flashtile import sampling
from flashtile.logits_processor import (
    CompileError,
    Compiler,
    FusionRule,
    LegalizationError,
    LogitsPipe,
    LogitsProcessor,
    MinP,
    Op,
    ParameterizedOp,
    Sample,
    Softmax,
    TaggedTensor,
    Temperature,
    TensorType,
    TopK,
    TopP,
    compile_pipeline,
    legalize_processors,
)

LOGITS, PROBS = TensorType.LOGITS, TensorType.PROBS
X = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 2
P = torch.softmax(X, -1)
HEAT, TOP_K, TOP_P = torch.tensor([0.5, 1.0, 2.0, 0.7]), torch.tensor([1, 5, 50, 9]), torch.tensor([0.1, 0.5, 0.9, 1.0])


def _state() -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(11)}


PIPES: tuple[tuple[list[LogitsProcessor], TensorType, dict[str, Any], str, Any], ...] = (
    ([Temperature()], LOGITS, {"temperature": 0.5}, "TemperatureOp", lambda s: X / 0.5),
    ([Softmax()], LOGITS, {}, "SoftmaxOp", lambda s: sampling.softmax(X)),
    ([Temperature(), Softmax()], LOGITS, {"temperature": HEAT}, "FusedTemperatureSoftmaxOp",
     lambda s: sampling.softmax(X, HEAT)),
    ([TopK()], LOGITS, {"top_k": 7}, "LogitsTopKOp", lambda s: sampling.top_k_mask_logits(X, 7)),
    ([TopK()], PROBS, {"top_k": TOP_K}, "ProbsTopKOp", lambda s: sampling.top_k_renorm_probs(P, TOP_K)),
    ([TopP()], PROBS, {"top_p": TOP_P}, "TopPOp", lambda s: sampling.top_p_renorm_probs(P, TOP_P)),
    ([Sample()], LOGITS, {}, "LogitsSampleOp", lambda s: sampling.sampling_from_logits(X, **s)),
    ([Sample()], PROBS, {}, "ProbsSampleOp", lambda s: sampling.sampling_from_probs(P, **s)),
    ([TopK(), Sample()], PROBS, {"top_k": 7}, "FusedProbsTopKSampleOp",
     lambda s: sampling.top_k_sampling_from_probs(P, 7, **s)),
    ([TopP(), Sample()], PROBS, {"top_p": 0.6}, "FusedProbsTopPSampleOp",
     lambda s: sampling.top_p_sampling_from_probs(P, 0.6, **s)),
    ([MinP(), Sample()], PROBS, {"min_p": 0.2}, "FusedProbsMinPSampleOp",
     lambda s: sampling.min_p_sampling_from_probs(P, 0.2, **s)),
    (
        [TopK(joint_topk_topp=True), TopP(), Sample()],
        PROBS,
        {"top_k": 7, "top_p": 0.6},
        "FusedProbsTopKTopPSampleOp",
        lambda s: sampling.top_k_top_p_sampling_from_probs(P, 7, 0.6, filter_apply_order="joint", **s),
    ),
    (
        [TopK(), TopP(), Sample()],
        PROBS,
        {"top_k": 7, "top_p": 0.6},
        "ProbsTopKOp -> FusedProbsTopPSampleOp",
        lambda s: sampling.top_k_top_p_sampling_from_probs(P, 7, 0.6, **s),
    ),
    (
        [TopK(), Softmax(), TopP(), Sample()],
        LOGITS,
        {"top_k": TOP_K, "top_p": TOP_P},
        "LogitsTopKOp -> SoftmaxOp -> FusedProbsTopPSampleOp",
        lambda s: sampling.top_k_top_p_sampling_from_logits(X, TOP_K, TOP_P, **s),
    ),
    (
        [Temperature(), Softmax(), TopK(joint_topk_topp=True), TopP(), Sample()],
        LOGITS,
        {"temperature": 0.8, "top_k": 7, "top_p": 0.6},
        "FusedTemperatureSoftmaxOp -> FusedProbsTopKTopPSampleOp",
        lambda s: sampling.top_k_top_p_sampling_from_logits(X / 0.8, 7, 0.6, filter_apply_order="joint", **s),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("processors", "kind", "kwargs", "fused", "direct"), PIPES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_pipe_is_the_functions_it_stands_for(
    processors: list[LogitsProcessor], kind: TensorType, kwargs: dict[str, Any], fused: str, direct: Any
) -> None:
    pipe = LogitsPipe(processors, input_type=kind)
    assert repr(pipe).endswith(f"compiled_ops=[{fused}])")
    x = X if kind is LOGITS else P
    got = pipe(x, **kwargs, **_state())
    assert torch.equal(got, direct(_state()))
    assert torch.equal(pipe(TaggedTensor(x, kind), **kwargs, **_state()), got)
    if "TopKTopP" in fused:
        return
    plain = LogitsPipe(processors, compile=False, input_type=kind)
    assert plain.compiled_ops is None
    torch.testing.assert_close(plain(x, **kwargs, **_state()), got)
    plain.compile()
    assert repr(plain) == repr(pipe)


def test_repr() -> None:
    pipe = LogitsPipe([TopK(), Sample()], input_type=PROBS)
    text = "LogitsPipe([TopK -> Sample], ops=[ProbsTopKOp -> ProbsSampleOp], compiled_ops=[FusedProbsTopKSampleOp])"
    assert repr(pipe) == text


def test_min_p_alone_renormalises() -> None:
    for min_p in (0.3, torch.tensor([0.1, 0.2, 0.3, 1.0])):
        rows = LogitsPipe([MinP()])(P, min_p=min_p)
        share = torch.as_tensor(min_p).reshape(-1, 1)
        assert torch.equal(rows > 0, share * P.amax(1, keepdim=True) <= P)
        torch.testing.assert_close(rows.sum(1), torch.ones(4))


def test_indices_seed_and_offset() -> None:
    indices = torch.tensor([0, 0, 3])
    pipe = LogitsPipe([TopP(), Sample(deterministic=False)])
    got = pipe(P, top_p=0.7, indices=indices, seed=4, offset=2)
    assert torch.equal(got, sampling.top_p_sampling_from_probs(P, 0.7, indices=indices, seed=4, offset=2))


def test_defaults_given_to_processors() -> None:
    pipe = LogitsPipe([Temperature(temperature=0.5), Softmax(enable_pdl=False), TopK(top_k=3), Sample()])
    ids = pipe(X, seed=1)
    assert torch.equal(ids, sampling.top_k_sampling_from_probs(sampling.softmax(X, 0.5), 3, seed=1))
    assert torch.equal(pipe(X, top_k=1, seed=1), X.argmax(1).int())


def test_input_type_is_inferred() -> None:
    assert LogitsPipe([Softmax(), Sample()]).initial_type is LOGITS
    assert LogitsPipe([TopP()]).initial_type is PROBS
    assert LogitsPipe([MinP()]).initial_type is PROBS
    for first in (TopK(), Sample()):
        with pytest.raises(ValueError, match="takes logits and probabilities; give TensorType"):
            LogitsPipe([first])


@pytest.mark.parametrize(
    ("processors", "kind", "error", "message"),
    [
        ([], None, LegalizationError, "processors: expected at least one, got none"),
        ([], LOGITS, LegalizationError, "processors: expected at least one, got none"),
        (["softmax"], None, LegalizationError, "processors: expected a LogitsProcessor, got str"),
        ([Softmax(), TopP], None, LegalizationError, "processors: expected a LogitsProcessor, got type"),
        ([Softmax(), Softmax()], None, LegalizationError, "Softmax: takes LOGITS, got PROBS"),
        ([Softmax(), Temperature()], None, LegalizationError, "Temperature: takes LOGITS, got PROBS"),
        ([TopP()], LOGITS, LegalizationError, "TopP: takes PROBS, got LOGITS"),
        ([Sample(), TopK()], LOGITS, LegalizationError, "TopK: nothing can follow a step that gives token ids"),
        ([Sample(), Sample()], PROBS, LegalizationError, "Sample: nothing can follow"),
        ([Sample()], TensorType.INDICES, ValueError, "input_type: expected TensorType.LOGITS or TensorType.PROBS"),
    ],
)
def test_refused_chains(processors: list[Any], kind: TensorType | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        LogitsPipe(processors, input_type=kind)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_p": 0.9}, "temperature: FusedTemperatureSoftmaxOp needs it"),
        ({"temperature": 0.5}, "top_p: FusedProbsTopPSampleOp needs it"),
        ({"temperature": 0.0, "top_p": 0.9}, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": torch.tensor([1.0, 1, 1, -1]), "top_p": 0.9}, "temperature: expected a number above 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected a number above 0, got 0.0"),
        ({"temperature": 1.0, "top_p": 0.9, "topk": 3}, "topk: no step takes it; expected some of temperature"),
    ],
)
def test_refused_parameters(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitsPipe([Temperature(), Softmax(), TopP(), Sample()])(X, **kwargs)


def test_other_refusals() -> None:
    pipe = LogitsPipe([Softmax()])
    with pytest.raises(ValueError, match="x: the pipe takes LOGITS, got PROBS"):
        pipe(TaggedTensor.probs(P))
    with pytest.raises(ValueError, match="x: expected a torch.Tensor, got list"):
        pipe([[1.0]])  # type: ignore[arg-type]
    assert pipe(X, top_k=3, min_p=0.1).shape == X.shape  # parameters of other pipes are welcome
    with pytest.raises(ValueError, match="joint_topk_topp: needs"):
        LogitsPipe([TopK(joint_topk_topp=True), TopP(), Sample()], compile=False, input_type=PROBS)(
            P, top_k=3, top_p=0.5
        )


def test_lower_level_functions() -> None:
    chain = legalize_processors([Temperature(), Softmax(), TopK(), Sample()])
    assert [repr(op) for op in chain] == ["TemperatureOp", "SoftmaxOp", "ProbsTopKOp", "ProbsSampleOp"]
    assert [repr(op) for op in compile_pipeline(chain)] == ["FusedTemperatureSoftmaxOp", "FusedProbsTopKSampleOp"]
    with pytest.raises(CompileError, match="ops: expected at least one"):
        compile_pipeline([])
    with pytest.raises(CompileError, match="TemperatureOp: takes LOGITS, but SoftmaxOp gives PROBS"):
        compile_pipeline([chain[1], chain[0]])
    with pytest.raises(CompileError, match="nothing can follow ProbsSampleOp"):
        compile_pipeline([chain[3], chain[2]])


class ToLogits(Op):
    """log."""

    IN, OUT = PROBS, LOGITS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        return TaggedTensor.logits(tensor.data.log())


class Bias(LogitsProcessor):
    """Adds `bias` of the call to the logits."""

    def legalize(self, input_type: TensorType) -> list[Op]:
        return [BiasOp(**self.params)]


class BiasOp(ParameterizedOp):
    """Its op."""

    IN, OUT = LOGITS, LOGITS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        return TaggedTensor.logits(tensor.data + self.parameter("bias", kwargs))


def test_at_most_one_softmax() -> None:
    softmax = legalize_processors([Softmax()])[0]
    with pytest.raises(CompileError, match="Softmax: expected at most one"):
        compile_pipeline([softmax, ToLogits(), softmax])


def test_custom_processor() -> None:
    pipe = LogitsPipe([Bias(bias=1.0), Softmax(), Sample()])
    assert pipe.initial_type is LOGITS
    bias = torch.linspace(0, 5, 50)
    assert torch.equal(pipe(X, bias=bias, seed=2), sampling.sampling_from_probs(sampling.softmax(X + bias), seed=2))


@pytest.mark.parametrize("pattern", [(BiasOp, Softmax), (Bias, Softmax)])
def test_custom_fusion_rule(pattern: tuple[type, ...]) -> None:
    class BiasSoftmaxOp(Op):
        IN, OUT = LOGITS, PROBS

        def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
            return TaggedTensor.probs(sampling.softmax(tensor.data + kwargs["bias"]))

    def rule(wanted: bool) -> FusionRule:
        return FusionRule(pattern, lambda window: wanted, lambda window: BiasSoftmaxOp(), prio=20)

    pipe = LogitsPipe([Bias(), Softmax(), Sample()], custom_fusion_rules=[rule(True)])
    assert [repr(op) for op in pipe.compiled_ops or []] == ["BiasSoftmaxOp", "ProbsSampleOp"]
    assert torch.equal(pipe(X, bias=1.0, seed=1), LogitsPipe([Bias(), Softmax(), Sample()])(X, bias=1.0, seed=1))
    assert len(LogitsPipe([Bias(), Softmax()], custom_fusion_rules=[rule(False)]).compiled_ops or []) == 2
    later = LogitsPipe([Bias(), Softmax(), Sample()], compile=False)
    later.compile(custom_fusion_rules=[rule(True)])
    assert repr(later) == repr(pipe)


def test_rules_of_higher_priority_are_tried_first() -> None:
    first = FusionRule((Temperature, Softmax), lambda window: True, lambda window: ToProbs(), prio=20)

    class ToProbs(Op):
        IN, OUT = LOGITS, PROBS

    compiler = Compiler()
    compiler.register_fusion_rule(first)
    chain = legalize_processors([Temperature(), Softmax(), Sample()])
    assert [repr(op) for op in compiler.compile(chain)] == ["ToProbs", "ProbsSampleOp"]


def test_custom_validity_check() -> None:
    def no_sampling(chain: list[Op]) -> None:
        if any(op.OUT is TensorType.INDICES for op in chain):
            raise CompileError("no sampling here")

    LogitsPipe([Softmax()], custom_validity_checks=[no_sampling])
    with pytest.raises(ValueError, match="no sampling here"):
        LogitsPipe([Softmax(), Sample()], custom_validity_checks=[no_sampling])
    with pytest.raises(ValueError, match="no sampling here"):
        LogitsPipe([Softmax(), Sample()], compile=False).compile(custom_validity_checks=[no_sampling])
    compiler = Compiler()
    compiler.register_validity_check(no_sampling)
    with pytest.raises(CompileError, match="no sampling here"):
        compiler.compile(legalize_processors([Sample()]))


def test_ops_keep_their_word() -> None:
    class Liar(ToLogits):
        def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
            return tensor

    class Lies(LogitsProcessor):
        OPS = {PROBS: Liar}

    with pytest.raises(ValueError, match="Liar: expected to return a TaggedTensor of LOGITS"):
        LogitsPipe([Lies()])(P)


def test_tagged_tensor() -> None:
    tagged = TaggedTensor.logits(X)
    assert (tagged.shape, tagged.dtype, tagged.device, tagged.size(), tagged.size(1)) == (
        X.shape, X.dtype, X.device, X.shape, 50,
    )  # fmt: skip
    assert [make(X).type for make in (TaggedTensor.logits, TaggedTensor.probs, TaggedTensor.indices)] == list(
        TensorType
    )


def test_compiles_as_one_graph() -> None:
    pipe = LogitsPipe([Temperature(), Softmax(), TopP(), Sample()])
    compiled = torch.compile(
        lambda x, seed: pipe(x, temperature=0.7, top_p=0.8, seed=seed), fullgraph=True, backend="aot_eager"
    )
    seed = torch.tensor([3])
    assert torch.equal(compiled(X, seed), pipe(X, temperature=0.7, top_p=0.8, seed=seed))
