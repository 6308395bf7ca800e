"""Mean and std inside the graph, model((x - mean) / std): x, attacks and gradients are in pixels.

    x --> node ...      becomes      x --> Sub(x, mean) --> Div(., std) --> node ...

The graph's input keeps its name, type and shape; a value that is left out leaves out its node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from jr_onnx.errors import (
    ModelError,
    NotRetrofittedError,
    ParameterError,
    UnsupportedOpsetError,
)
from jr_onnx.model import Model, Names, NodeBuilder, dtype_name, scopes
from jr_onnx.model.graphs import decode_node, node_field, opset_of
from jr_onnx.model.wire import encode
from jr_onnx.preprocess.preprocessing import check_normalization
from jr_onnx.rewrite import manifest as manifests
from jr_onnx.rewrite import original_of
from jr_onnx.rewrite.manifest import Entry, Manifest

Array = np.ndarray[Any, Any]
_PREFIX = "jr_onnx/normalize"
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def normalized(
    model: Model,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    *,
    layout: str | None = None,
) -> Model:
    """Returns the model with (x - mean) / std in front of it.

    A hardened model stays one: restoring the result gives the normalised original.

    Args:
        model: one float input `(batch, ...)`, opset 7 or newer.
        mean: one number or one a channel, in units of x; None subtracts nothing.
        std: one number or one a channel, in units of x; None divides by nothing.
        layout: `nchw` or `nhwc`, where the channels are; None finds the axis of that size.

    Raises:
        ParameterError: mean and std do not fit the input, or the model is normalised already.
        ModelError: the model does not have one float input, or was edited after its retrofit.
        UnsupportedOpsetError: the opset is below 7.
    """
    if mean is None and std is None:
        return model
    check_normalization(mean, std)
    if is_normalized(model):
        raise ParameterError(
            f"{model.name}: has mean and std in front already, a second time would be wrong. "
            "Leave them out"
        )
    value = only_input(model)
    front = _Front(value.name, *_constants(model, value, mean, std, layout))
    manifest = manifests.read(model)
    if manifest is None:
        return front.before(model)
    return _hardened(model, manifest, front)


@dataclass(frozen=True)
class Input:
    """The one input of a model.

    Attributes:
        name: of the value.
        element: its `TensorProto.DataType`.
        shape: numbers, symbols or None, the batch first.
    """

    name: str
    element: int
    shape: tuple[int | str | None, ...]


def only_input(model: Model) -> Input:
    """Returns the model's input; weights that are listed as inputs are none.

    Raises:
        ModelError: there are several, or it has no known rank.
    """
    graph = model.proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = [value.name for value in inputs]
        raise ModelError(f"{model.name}: a classifier with one input is needed, got {names}")
    tensor = inputs[0].type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in tensor.shape.dim
    )
    if not shape:
        raise ModelError(
            f"{model.name}: the input {inputs[0].name!r} has no shape; expected (batch, ...). "
            "Export the model with one"
        )
    return Input(inputs[0].name, tensor.elem_type, shape)


def is_normalized(model: Model) -> bool:
    """Whether `normalized` made this model."""
    return _PREFIX.encode() in model.content


def _constants(
    model: Model,
    value: Input,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    layout: str | None,
) -> tuple[Array | None, Array | None]:
    """Returns mean and std in the input's type, shaped to broadcast."""
    opset = opset_of(model.proto.opset_import)
    if opset < 7:
        raise UnsupportedOpsetError(
            f"{model.name}: mean and std need opset 7, the model has {opset}. Export it again, or "
            "run onnx.version_converter"
        )
    if value.element not in _FLOATS:
        raise ModelError(
            f"{model.name}: the input {value.name!r} is {dtype_name(value.element)}; mean and std "
            "need a float16, float32 or float64 one"
        )
    count = max(len(mean or ()), len(std or ()))
    axis = _channels(value, count, layout) if count > 1 else len(value.shape) - 1
    shape = (-1, *[1] * (len(value.shape) - 1 - axis))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.element)
    arrays = [
        np.asarray(numbers, dtype).reshape(shape if len(numbers) > 1 else ()) if numbers else None
        for numbers in (mean, std)
    ]
    if arrays[1] is not None and not arrays[1].all():
        raise ParameterError(f"std {std} is 0 in {dtype}, the type of the input {value.name!r}")
    return arrays[0], arrays[1]


def _channels(value: Input, count: int, layout: str | None) -> int:
    """Returns the axis with so many channels."""
    last = len(value.shape) - 1
    if layout is not None:
        candidates = [last if layout == "nhwc" else 1]
    else:
        candidates = list(dict.fromkeys((1, last)))
    sure = [axis for axis in candidates if value.shape[axis] == count]
    found = sure or [axis for axis in candidates if not isinstance(value.shape[axis], int)]
    if not found or (sure and len(found) > 1):
        spelled = ", ".join(str(size or "any") for size in value.shape)
        reason = "several axes have that size: set layout" if found else "no such axis"
        raise ParameterError(
            f"mean and std have {count} numbers, the input {value.name!r} is ({spelled}): {reason}"
        )
    return found[0]


class _Front:
    """The nodes to put in front of a model, and what their last value is called."""

    def __init__(self, x: str, mean: Array | None, std: Array | None) -> None:
        build = NodeBuilder(Names(()), _PREFIX)  # nothing in the model has the prefix
        self._x = self._y = x
        for op_type, constant in (("Sub", mean), ("Div", std)):
            if constant is not None:
                self._y = build.op(op_type, self._y, build.constant(constant))
        self.nodes = build.nodes

    def before(self, model: Model) -> Model:
        """Returns the model behind the nodes."""
        proto = model.parse()
        for scope in scopes(proto):
            if not scope.is_function:
                for node in scope.graph.node:
                    self.reconnect(node)
        rest = list(proto.graph.node)
        del proto.graph.node[:]
        proto.graph.node.extend([*self.nodes, *rest])
        return model.derived(proto.SerializeToString())

    def reconnect(self, node: onnx.NodeProto) -> None:
        """Gives a node the last value in place of x."""
        for at, name in enumerate(node.input):
            if name == self._x:
                node.input[at] = self._y


def _hardened(model: Model, manifest: Manifest, front: _Front) -> Model:
    """Returns a hardened model behind the nodes, with a manifest that knows of them."""
    original = front.before(original_of(model))
    content = manifests.without_function(manifests.without(model.content))
    behind = front.before(model.derived(content)).content
    entries = [_moved(entry, front) for entry in manifest.entries]
    result = model.derived(manifests.add(behind, original, entries, manifest.spilled))
    try:
        same = original_of(result).content == original.content
    except NotRetrofittedError:
        same = False
    if not same:
        raise ModelError(
            f"{model.name}: encoded in a way that its manifest does not survive mean and std. "
            "Retrofit jr_onnx.preprocess.normalized(original) instead"
        )
    return result


def _moved(entry: Entry, front: _Front) -> Entry:
    """Returns a manifest's entry as it is when nodes come before all others."""
    count = len(front.nodes)
    node = decode_node(entry.field)
    scope, at = entry.scope, entry.at
    if scope == ("graph",):
        at += count
    elif scope[0] == "graph":
        scope = ("graph", int(scope[1]) + count, *scope[2:])
    if scope[0] == "graph":
        front.reconnect(node)
    field = encode(node_field(scope), node.SerializeToString())
    return entry._replace(scope=scope, at=at, field=field)
