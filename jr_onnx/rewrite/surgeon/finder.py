"""The second opinion: the sites of a `gs.Graph`, found on gs's own objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jr_onnx.model import Address, Model, Scope, ValueTypes, scopes
from jr_onnx.model.graphs import ONNX_DOMAINS
from jr_onnx.rewrite.sites import FLOATS, INDEX_USERS, INTEGERS, Site
from jr_onnx.rewrite.surgeon.values import SMALL, lazy_message, leading

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Level:
    """A list of nodes in a `gs.Graph`, with what is known around it.

    Attributes:
        surgeon: the module onnx_graphsurgeon.
        graph: that has the nodes.
        scope: the same in the exported model.
        outer: the level it is in, None for the main graph and functions.
    """

    surgeon: Any
    graph: gs.Graph
    scope: Scope
    outer: _Level | None

    @cached_property
    def producers(self) -> dict[str, gs.Node]:
        return {tensor.name: node for node in self.graph.nodes for tensor in node.outputs}

    @cached_property
    def consumers(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for node in self.graph.nodes:
            for tensor in node.inputs:
                found.setdefault(tensor.name, set()).add(node.op)
        return found

    @cached_property
    def overridable(self) -> set[str]:
        proto = self.scope.graph
        return set() if self.scope.is_function else {value.name for value in proto.input}

    def value(self, tensor: gs.Tensor) -> Array | None:
        """Returns what a tensor always is, None if it may vary or is large."""
        if isinstance(tensor, self.surgeon.Constant):
            return None if tensor.name in self.overridable else _decoded(tensor)
        level: _Level | None = self
        while level is not None:
            node = level.producers.get(tensor.name)
            if node is not None:
                return level._made_by(node)
            level = level.outer
        return None

    def _made_by(self, node: gs.Node) -> Array | None:
        if (node.domain or "") not in ONNX_DOMAINS:
            return None
        if node.op == "Constant":
            return self._of_attribute(node)
        if node.op not in ("Identity", "Cast", "CastLike"):
            return None
        inner = self.value(node.inputs[0])
        if node.op != "Cast" or inner is None:
            return inner
        to = node.attrs.get("to")
        if not isinstance(to, (int, type)):  # by ONNX's number, or in a graph made by hand: numpy's
            return None
        return inner.astype(helper.tensor_dtype_to_np_dtype(to) if isinstance(to, int) else to)

    def _of_attribute(self, node: gs.Node) -> Array | None:
        for name, value in node.attrs.items():
            if isinstance(value, self.surgeon.Node.AttributeRef):
                return None
            if isinstance(value, self.surgeon.Constant):
                return _decoded(value)
            if name in ("value_float", "value_floats"):
                return np.asarray(value, np.float32)
            if name in ("value_int", "value_ints"):
                return np.asarray(value, np.int64)
        return None


def _levels(surgeon: Any, graph: gs.Graph, outline: Model) -> Iterator[_Level]:
    known = {scope.address: scope for scope in scopes(outline.proto)}

    def nested(graph: gs.Graph, address: Address, outer: _Level | None) -> Iterator[_Level]:
        level = _Level(surgeon, graph, known[address], outer)
        yield level
        for index, node in enumerate(graph.nodes, leading(surgeon, graph)):
            for which, value in enumerate(node.attrs.values()):
                if isinstance(value, surgeon.Graph):
                    yield from nested(value, (*address, index, which, -1), level)

    yield from nested(graph, ("graph",), None)
    for number, function in enumerate(graph.functions):
        yield from nested(function, ("function", number), None)


def find(surgeon: Any, graph: gs.Graph, outline: Model) -> Iterator[Site]:
    """Yields the sites of a graph; types, shapes and opsets are those of its export."""
    types = ValueTypes(outline)
    for level in _levels(surgeon, graph, outline):
        scope = level.scope
        for index, node in enumerate(level.graph.nodes, leading(surgeon, level.graph)):
            if (node.domain or "") not in ONNX_DOMAINS or not node.inputs or not node.outputs:
                continue
            found = _activation(node, level, types)
            if found is None:
                continue
            x, cap, jump = found
            y, tensor = node.outputs[0].name, types.of(scope, x.name)
            adapts = scope.address[0] == "function" and scope.opset >= 15
            typed = tensor.element in (*FLOATS, *INTEGERS)
            if tensor.element in INTEGERS and level.consumers.get(y, set()) & INDEX_USERS:
                continue
            if scope.opset < 7 or not (typed or (adapts and not tensor.element)):
                continue
            path = f"{scope.label}>{y}" if scope.label else y
            yield Site(
                path, node.op, node.name, x.name, y, cap, jump, tensor, scope.address, index,
                scope.opset,
            )  # fmt: skip


def _activation(
    node: gs.Node, level: _Level, types: ValueTypes
) -> tuple[gs.Tensor, float | None, float] | None:
    """Returns input, upper bound and jump of a ReLU-like node, None for any other node."""
    x = node.inputs[0]
    if node.op == "Relu":
        return x, None, 0.0
    if node.op == "LeakyRelu":
        return (x, None, 0.0) if _number(node, "alpha", 0.01) == 0 else None
    if node.op == "ThresholdedRelu":
        alpha = _number(node, "alpha", 1.0)
        return None if alpha is None else (x, None, alpha)
    if node.op == "PRelu":
        slopes = level.value(node.inputs[1]) if len(node.inputs) > 1 else None
        return None if slopes is None or slopes.any() else (x, None, 0.0)
    if node.op == "Max":
        return _max_with_zero(node, level, types)
    return _clip_at_zero(node, level) if node.op == "Clip" else None


def _number(node: gs.Node, name: str, default: float) -> float | None:
    """Returns an attribute as the float32 that it is exported as; None if the caller decides."""
    value = node.attrs.get(name, default)
    return float(np.float32(value)) if isinstance(value, (int, float, np.number)) else None


def _max_with_zero(
    node: gs.Node, level: _Level, types: ValueTypes
) -> tuple[gs.Tensor, float | None, float] | None:
    if len(node.inputs) != 2:
        return None
    zeros = [
        (value, other)
        for tensor, other in zip(node.inputs, reversed(node.inputs), strict=True)
        if (value := level.value(tensor)) is not None and value.size and not value.any()
    ]
    if len(zeros) != 1:
        return None
    zero, x = zeros[0]
    shape = types.of(level.scope, x.name).shape
    if _is_variance(x, level):
        return None
    if zero.size > 1 or zero.ndim > len(shape or ()):
        return None  # it may broadcast x
    return x, None, 0.0


def _clip_at_zero(node: gs.Node, level: _Level) -> tuple[gs.Tensor, float | None, float] | None:
    x = node.inputs[0]
    if level.scope.opset < 11:
        low, high = _number(node, "min", -np.inf), _number(node, "max", np.inf)
        if low is None or high is None:
            return None
    else:
        bounds = [-np.inf, np.inf]
        for which, tensor in enumerate(node.inputs[1:3]):
            value = None if tensor.is_empty() else level.value(tensor)
            if value is None and not tensor.is_empty():
                return None
            if value is not None:
                bounds[which] = float(value.reshape(-1)[0])
        low, high = bounds
    if low != 0 or _is_variance(x, level):
        return None
    offset = {6.0: 3.0, 1.0: 0.5}.get(high)
    if offset is not None and _is_gate(x, node.outputs[0], offset, level):
        return None
    return x, (None if high >= np.finfo(np.float32).max else high), 0.0


def _is_variance(x: gs.Tensor, level: _Level) -> bool:
    """Says whether x is E[u^2] - E[u]^2, which is only kept from going below 0."""
    difference = level.producers.get(x.name)
    if difference is None or difference.op != "Sub":
        return False
    square = level.producers.get(difference.inputs[1].name)
    if square is None or square.op not in ("Mul", "Pow"):
        return False
    one, other = square.inputs
    if square.op == "Mul":
        return bool(one.name == other.name)
    exponent = level.value(other)
    return exponent is not None and exponent.size == 1 and bool(exponent == 2)


def _is_gate(x: gs.Tensor, y: gs.Tensor, offset: float, level: _Level) -> bool:
    """Says whether Clip(v + offset) is multiplied or divided: a decomposed hard-swish."""
    add = level.producers.get(x.name)
    if add is None or add.op != "Add" or not level.consumers.get(y.name, set()) & {"Mul", "Div"}:
        return False
    terms = [level.value(tensor) for tensor in add.inputs]
    return any(term is not None and term.size == 1 and bool(term == offset) for term in terms)


def _decoded(tensor: gs.Constant) -> Array | None:
    """Returns a small constant's values, which stay as lazy in the graph as they are."""
    lazy = lazy_message(tensor)
    if lazy is None:
        loaded: Array = tensor._values
        return loaded if loaded.size <= SMALL else None
    if isinstance(lazy, onnx.SparseTensorProto) or lazy.data_location == TensorProto.EXTERNAL:
        return None
    if np.prod(lazy.dims, dtype=np.int64) > SMALL:
        return None
    try:
        return numpy_helper.to_array(lazy)
    except (ValueError, TypeError):
        return None
