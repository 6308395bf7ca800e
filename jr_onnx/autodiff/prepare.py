"""The working copy that a gradient graph is built in: the same function, fewer kinds of nodes.

opset 7, 8       read as opset 9
functions        inlined
jumps            found, and written as one node where that is exact
softmax endings  found: losses work on the logits before them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from jr_onnx.autodiff.dense import write_as_matrices
from jr_onnx.autodiff.expand import Refused, expand, inlined
from jr_onnx.autodiff.fold import fold
from jr_onnx.autodiff.jumps import PATH_KEY, Jump, find_jumps
from jr_onnx.autodiff.parts import write_as_split
from jr_onnx.errors import ModelError, UnsupportedOpsetError
from jr_onnx.model import (
    Constants,
    Model,
    Scope,
    Tensor,
    ValueTypes,
    attribute_of,
    scopes,
)
from jr_onnx.model.graphs import ONNX_DOMAINS, opset_of

_OLDEST_OPSET, _LIFTED_TO = 7, 9
_JUMP_FUNCTION = "jr_onnx::JumpReLU"  # its call has the site's name, not its body
_ENDINGS = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}
# Types of which onnxruntime has a kernel of ThresholdedRelu.
_THRESHOLDED = (TensorProto.FLOAT, TensorProto.FLOAT16)
# Nodes between a softmax and the output that change the shape at most.
_SHAPE_ONLY = ("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Known:
    """What is known of the values of one scope."""

    types: ValueTypes
    constants: Constants
    scope: Scope

    @classmethod
    def of(cls, model: Model) -> Known:
        """Reads the main graph."""
        return cls(ValueTypes(model), Constants(model), model.scopes[0])

    def tensor(self, name: str) -> Tensor:
        """Returns element type and shape."""
        return self.types.of(self.scope, name)

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """Returns the value that the model fixes, None if it may vary."""
        return self.constants.value(self.scope, name)


@dataclass(frozen=True)
class Prepared:
    """The working copy.

    Attributes:
        proto: a copy of the model, to which nodes may be added.
        known: of its values.
        x: its input.
        output: its output.
        logits: the value before a final softmax; the output itself where there is none.
        ending: `logits`, `softmax` or `log_softmax`.
        jumps: by the name of y.
        refused: why a node can have no gradient, by the names of its outputs.
    """

    proto: onnx.ModelProto
    known: Known
    x: str
    output: str
    logits: str
    ending: str
    jumps: dict[str, Jump]
    refused: Refused


def prepare(model: Model, *, x: str | None = None, output: str | None = None) -> Prepared:
    """Makes the working copy.

    Args:
        model: any model; it is not changed.
        x: the input to differentiate by, None for the only one.
        output: the output to differentiate, None for the only one.

    Raises:
        ModelError: which input or output is not said, or there is no such.
        UnsupportedOpsetError: an opset older than 7, or an operator that opset 9 reads otherwise.
    """
    proto = model.parse()
    _lift(proto, model.name)
    proto = _without_functions(proto)
    fold(proto)
    graph = proto.graph
    # Old exporters (IR 3) list the weights among the inputs.
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in weights]
    x = _one_of(inputs, x, "input", model.name)
    output = _one_of([value.name for value in graph.output], output, "output", model.name)
    proto, refused = expand(proto, x)
    graph = proto.graph
    known = Known.of(Model.of(proto, model.folder))
    jumps = [each for each in find_jumps(graph, known.constant, x) if _keeps_shape(each, known)]
    for jump in jumps:
        _write_as_one_node(jump, known, opset_of(proto.opset_import))
    logits, ending = _before_softmax(graph, known, output, opset_of(proto.opset_import))
    rewritten = write_as_matrices(proto, known.tensor, known.constant)
    if write_as_split(proto, known.tensor, known.constant) or rewritten:
        known = Known.of(Model.of(proto, model.folder))
    by_output = {jump.y: jump for jump in jumps}
    return Prepared(proto, known, x, output, logits, ending, by_output, refused)


def _one_of(names: list[str], asked: str | None, what: str, where: str) -> str:
    if asked is None and len(names) == 1:
        return names[0]
    if asked in names:
        return asked
    if asked is None:
        raise ModelError(
            f"{where}: a model with one {what} is needed, or the name of the {what} to "
            f"differentiate; it has {names}"
        )
    raise ModelError(f"{where}: there is no {what} {asked!r}, it has {names}")


def _lift(proto: onnx.ModelProto, where: str) -> None:
    """Reads opsets 7 and 8 as 9: the operators in use are the same, or get the new spelling."""
    opset = opset_of(proto.opset_import)
    if opset < _OLDEST_OPSET:
        raise UnsupportedOpsetError(
            f"{where}: gradients need opset {_OLDEST_OPSET} or newer, the model has {opset}. "
            "Export it again, or run onnx.version_converter"
        )
    if opset >= _LIFTED_TO:
        return
    for scope in scopes(proto):
        for node in scope.graph.node:
            if node.domain in ONNX_DOMAINS:
                _respell(node, where)
    for owner in (proto, *proto.functions):
        for entry in owner.opset_import:
            if entry.domain in ONNX_DOMAINS:
                entry.version = max(entry.version, _LIFTED_TO)


def _respell(node: onnx.NodeProto, where: str) -> None:
    spatial = attribute_of(node, "spatial")
    odd = node.op_type in ("Scan", "Upsample") or (spatial is not None and not spatial.i)
    if odd:
        raise UnsupportedOpsetError(
            f"{where}: {node.op_type} {node.name or node.output[0]!r} of opsets 7 and 8 has no "
            "gradient. Bring the model to opset 9 or newer (onnx.version_converter)"
        )
    if spatial is not None:
        node.attribute.remove(spatial)


def _without_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Inlines the local functions; nodes keep a note of the site path they had there."""
    if not proto.functions:
        return proto
    for scope in scopes(proto):
        if scope.is_function and scope.label != _JUMP_FUNCTION:
            for node in scope.graph.node:
                node.metadata_props.add(key=PATH_KEY, value=f"{scope.label}>{node.output[0]}")
    return inlined(proto)


def _keeps_shape(jump: Jump, known: Known) -> bool:
    """Whether y is shaped like x: a threshold with more axes or rows than x would repeat it."""
    before, after = known.tensor(jump.x).shape, known.tensor(jump.y).shape
    if before is not None and after is not None:
        return before == after
    threshold = known.constant(jump.threshold) if isinstance(jump.threshold, str) else np.zeros(())
    return threshold is not None and threshold.size == 1 and threshold.ndim < 2


def _write_as_one_node(jump: Jump, known: Known, opset: int) -> None:
    """Turns the last node of a jump into ThresholdedRelu where that is exact.

    One kernel takes the place of three, and onnxruntime drops those without a user. It gets the
    value that passes, not x: a cap is above the jump, so it does not change what is above.
    """
    if jump.node.op_type == "ThresholdedRelu" or isinstance(jump.threshold, float) or opset < 10:
        return
    threshold = known.constant(jump.threshold)
    cap = known.constant(jump.cap) if isinstance(jump.cap, str) else jump.cap
    element = known.tensor(jump.node.output[0]).element
    if threshold is None or threshold.size != 1 or element not in _THRESHOLDED:
        return
    alpha = float(threshold.reshape(-1)[0])
    capped = jump.cap is None or (cap is not None and alpha < cap)
    if alpha < 0 or not capped or float(np.float32(alpha)) != alpha:
        return
    del jump.node.attribute[:]
    del jump.node.input[:]
    jump.node.op_type = "ThresholdedRelu"
    jump.node.input.append(jump.passed)
    jump.node.attribute.append(helper.make_attribute("alpha", alpha))


def _before_softmax(
    graph: onnx.GraphProto, known: Known, output: str, opset: int
) -> tuple[str, str]:
    """Returns the logits, and what the model makes of them at its end."""
    made = {name: node for node in graph.node for name in node.output}
    node = made.get(output)
    shapes = [known.tensor(output).shape]
    while node is not None and node.domain in ONNX_DOMAINS and node.op_type in _SHAPE_ONLY:
        if node.op_type != "Identity":
            shapes.append(known.tensor(node.input[0]).shape)
        node = made.get(node.input[0])
    if node is None or node.domain not in ONNX_DOMAINS or node.op_type not in _ENDINGS:
        return output, "logits"
    if not _over_all_classes(node, known.tensor(node.input[0]).shape, opset):
        return output, "logits"
    # A reshape in between may have put several distributions into one row.
    batches = {shape[0] if shape else None for shape in shapes}
    if len(shapes) > 1 and (len(batches) > 1 or None in batches):
        return output, "logits"
    return node.input[0], _ENDINGS[node.op_type]


def _over_all_classes(softmax: onnx.NodeProto, shape: tuple[Any, ...] | None, opset: int) -> bool:
    """Whether it makes one distribution of each example, and not one of each pixel, say."""
    given = attribute_of(softmax, "axis")
    axis = given.i if given is not None else (-1 if opset >= 13 else 1)
    if opset < 13 and axis == 1:
        return True  # it normalises over all axes from this one on
    if shape is None:
        return False
    others = [size for at, size in enumerate(shape) if at not in (0, axis % len(shape))]
    return axis % len(shape) > 0 and all(size == 1 for size in others)
