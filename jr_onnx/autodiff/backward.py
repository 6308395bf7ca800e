"""The reverse walk: a forward graph and a loss head -> the graph of the input's gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper

from jr_onnx.autodiff.emit import Emitter
from jr_onnx.autodiff.losses import LOSSES
from jr_onnx.autodiff.registry import Call, Rule, find_rule, is_zero_gradient, opset_for
from jr_onnx.errors import ModelError, ParameterError, UnsupportedOpError, UnsupportedOpsetError
from jr_onnx.model import Constants, Model, Names, Scope, Tensor, ValueTypes, scopes

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
    if model.proto.functions:
        inlined = onnx.inliner.inline_local_functions(model.parse())
        model = model.derived(inlined.SerializeToString())
    proto = model.parse()
    scope = next(scopes(proto))
    if scope.opset < _OLDEST_OPSET:
        raise UnsupportedOpsetError(
            f"{model.name}: gradients need opset {_OLDEST_OPSET} or newer, the model has "
            f"{scope.opset}. Export it again, or run onnx.version_converter"
        )
    types = _Types(ValueTypes(model), Constants(model), scope)
    x, logits = _ends(proto, model.name)
    names = Names.of(proto)
    emit = Emitter(names, "gradient", scope.opset)
    labels = names.fresh("labels")
    value, seed = LOSSES[loss](emit, logits, labels, types.of(logits))
    cotangents = _walk_back(proto, emit, types, {logits: seed}, x)
    if x not in cotangents:
        raise ModelError(f"{model.name}: the output {logits!r} does not depend on the input {x!r}")
    gradient = emit.op("Identity", cotangents[x])
    proto.graph.node.extend(emit.nodes)
    _declare(proto.graph, types.of(x), types.of(logits), labels, value, gradient)
    return InputGradient(Model.of(proto, model.folder), x, labels, logits, value, gradient)


@dataclass(frozen=True)
class _Types:
    """What is known of one scope's values."""

    types: ValueTypes
    constants: Constants
    scope: Scope

    def of(self, name: str) -> Tensor:
        return self.types.of(self.scope, name)

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        return self.constants.value(self.scope, name)


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
    proto: onnx.ModelProto, emit: Emitter, types: _Types, cotangents: dict[str, str], x: str
) -> dict[str, str]:
    active = _depends_on(proto.graph, x)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    problems: list[str] = []
    for node in reversed(proto.graph.node):
        known = tuple(cotangents.get(name, "") for name in node.output)
        if not any(name in cotangents for name in node.output) or is_zero_gradient(node):
            continue
        tensors = {name: types.of(name) for name in (*node.input, *node.output)}
        for wrt, name in enumerate((*node.input, *_captured(node))):
            if name not in active:
                continue
            try:
                rule = _rule_for(node, opsets, wrt, known)
                call = Call(node, emit, known, wrt, tensors, types.constant)
                contribution = rule(call) if any(known) else ""
            except NotImplementedError as reason:
                problems.append(f"{_spelled(node)}: {reason}")
                contribution = ""
            before = cotangents.get(name)
            if contribution:
                cotangents[name] = emit.op("Add", before, contribution) if before else contribution
            elif problems:  # the walk goes on, only to find the other problems
                cotangents.setdefault(name, "")
    if problems:
        raise UnsupportedOpError(problems)
    return cotangents


def _rule_for(
    node: onnx.NodeProto, opsets: dict[str, int], wrt: int, known: tuple[str, ...]
) -> Rule:
    if wrt >= len(node.input):
        raise NotImplementedError("its body uses values that depend on the input")
    found = find_rule(node, opsets, wrt)
    if found is None:
        raise NotImplementedError(f"no rule at opset {opset_for(node, opsets)}, input {wrt}")
    if any(known[1:]) and not found.all_outputs:
        others = [name for name, g in zip(node.output[1:], known[1:], strict=True) if g]
        raise NotImplementedError(f"no rule for the gradient of its outputs {others}")
    return found.rule


def _depends_on(graph: onnx.GraphProto, x: str) -> set[str]:
    """Returns the values that vary with x, of whatever type: only named operators cut a path."""
    active = {x}
    for node in graph.node:
        used = {*node.input, *_captured(node)}
        if not is_zero_gradient(node) and not active.isdisjoint(used):
            active.update(name for name in node.output if name)
    return active


def _captured(node: onnx.NodeProto) -> list[str]:
    """Returns the names that the bodies of If, Loop and Scan use, their own values included."""
    names: list[str] = []
    for attribute in node.attribute:
        bodies = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        for body in bodies:
            names += [output.name for output in body.output]
            for inner in body.node:
                names += [*inner.input, *_captured(inner)]
    return names


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
