"""The reverse walk: a forward graph and a loss head -> the graph of the input's gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from jr_onnx.autodiff.emit import Emitter
from jr_onnx.autodiff.losses import LOSSES
from jr_onnx.autodiff.registry import ZERO_GRADIENT, Call, find_rule
from jr_onnx.errors import ModelError, ParameterError, UnsupportedOpError, UnsupportedOpsetError
from jr_onnx.model import Model, Names, Scope, Tensor, ValueTypes, scopes

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
_OLDEST_OPSET = 9


@dataclass(frozen=True)
class InputGradient:
    """A gradient graph, and the names of its inputs and outputs.

    Attributes:
        model: the graph as a model of its own.
        x: the model's input.
        labels: int64 `(batch,)`.
        logits: the model's output, `(batch, classes)`.
        loss: float `(batch,)`, per example.
        gradient: like x: d loss[i] / d x[i].
    """

    model: Model = field(repr=False)
    x: str
    labels: str
    logits: str
    loss: str
    gradient: str


def input_gradient(model: Model, *, loss: str = "cross_entropy") -> InputGradient:
    """Builds the graph that gives logits, loss and d loss / d input in one pass.

    Examples must not influence each other: the graph gives the gradient of the summed losses.

    Args:
        model: one float input `(batch, ...)`, one float output `(batch, classes)`.
        loss: a name in `LOSSES`.

    Raises:
        ModelError: the model has other inputs or outputs than that.
        UnsupportedOpError: nodes without a rule, all of them listed.
        UnsupportedOpsetError: an opset older than 9.
        ParameterError: no such loss.
    """
    if loss not in LOSSES:
        raise ParameterError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    proto = model.parse()
    scope = next(scopes(proto))
    if scope.opset < _OLDEST_OPSET:
        raise UnsupportedOpsetError(
            f"{model.name}: gradients need opset {_OLDEST_OPSET} or newer, the model has "
            f"{scope.opset}. Export it again, or run onnx.version_converter"
        )
    types = _Types(ValueTypes(model), scope)
    x, logits = _ends(proto, model.name)
    names = Names.of(proto)
    emit = Emitter(names, "gradient", scope.opset)
    labels = names.fresh("labels")
    value, seed = LOSSES[loss](emit, logits, labels, types.of(logits))
    cotangents = _walk_back(proto.graph, emit, types, {logits: seed}, x)
    if x not in cotangents:
        raise ModelError(f"{model.name}: the output {logits!r} does not depend on the input {x!r}")
    gradient = emit.op("Identity", cotangents[x])
    proto.graph.node.extend(emit.nodes)
    _declare(proto.graph, types.of(x), types.of(logits), labels, value, gradient)
    return InputGradient(Model.of(proto, model.path), x, labels, logits, value, gradient)


class _Types:
    """The types of one scope's values."""

    def __init__(self, types: ValueTypes, scope: Scope) -> None:
        self._types, self._scope = types, scope

    def of(self, name: str) -> Tensor:
        return self._types.of(self._scope, name)


def _ends(proto: onnx.ModelProto, where: str) -> tuple[str, str]:
    # Old exporters (IR 3) list the weights among the inputs.
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value.name for value in proto.graph.input if value.name not in weights]
    outputs = [value.name for value in proto.graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"{where}: a classifier with one input and one output (the logits) is needed, got "
            f"inputs {inputs} and outputs {outputs}"
        )
    return inputs[0], outputs[0]


def _walk_back(
    graph: onnx.GraphProto, emit: Emitter, types: _Types, cotangents: dict[str, str], x: str
) -> dict[str, str]:
    active = _depends_on(graph, x, types)
    problems: list[str] = []
    for node in reversed(graph.node):
        g = cotangents.get(node.output[0]) if node.output else None
        if g is None or node.op_type in ZERO_GRADIENT:
            continue
        tensors = {name: types.of(name) for name in (*node.input, *node.output)}
        for wrt, name in enumerate(node.input):
            if name not in active:
                continue
            rule = find_rule(node, emit.opset, wrt)
            try:
                if rule is None:
                    raise NotImplementedError(f"no rule at opset {emit.opset}, input {wrt}")
                contribution = rule(Call(node, emit, g, wrt, tensors))
            except NotImplementedError as reason:
                problems.append(f"{_spelled(node)}: {reason}")
                contribution = g  # whatever: the walk goes on only to find the other problems
            known = cotangents.get(name)
            cotangents[name] = emit.op("Add", known, contribution) if known else contribution
    if problems:
        raise UnsupportedOpError(problems)
    return cotangents


def _depends_on(graph: onnx.GraphProto, x: str, types: _Types) -> set[str]:
    """Returns the float values that vary with x."""
    active = {x}
    for node in graph.node:
        if node.op_type not in ZERO_GRADIENT and not active.isdisjoint(node.input):
            active.update(name for name in node.output if types.of(name).element in (0, *_FLOATS))
    return active


def _spelled(node: onnx.NodeProto) -> str:
    domain = f"{node.domain}::" if node.domain else ""
    return f"{domain}{node.op_type} {node.name or node.output[0]!r}"


def _declare(
    graph: onnx.GraphProto, x: Tensor, z: Tensor, labels: str, loss: str, gradient: str
) -> None:
    batch = x.shape[:1] if x.shape else None
    element = TensorProto.DOUBLE if z.element == TensorProto.DOUBLE else TensorProto.FLOAT
    value_info = helper.make_tensor_value_info
    graph.input.append(value_info(labels, TensorProto.INT64, batch))
    graph.output.append(value_info(loss, element, batch))
    graph.output.append(value_info(gradient, x.element, x.shape))
