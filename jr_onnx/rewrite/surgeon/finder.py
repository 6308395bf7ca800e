"""The second opinion: the sites of a `gs.Graph`, found on gs's own objects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jr_onnx.model import Address, Model, Scope, ValueTypes, scopes
from jr_onnx.model.graphs import ONNX_DOMAINS, opset_of
from jr_onnx.rewrite.sites import FLOATS, INTEGERS, Site, changed_operator, type_at
from jr_onnx.rewrite.surgeon.values import SMALL, lazy_message, leading
from jr_onnx.rewrite.surroundings import INDEX_USERS, PASSING

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
        inner: the levels in it.
    """

    surgeon: Any
    graph: gs.Graph
    scope: Scope
    outer: _Level | None
    inner: list[_Level] = field(default_factory=list)

    @cached_property
    def producers(self) -> dict[str, gs.Node]:
        return {tensor.name: node for node in self.graph.nodes for tensor in node.outputs}

    @cached_property
    def consumers(self) -> dict[str, list[gs.Node]]:
        found: dict[str, list[gs.Node]] = {}
        for node in self.graph.nodes:
            for tensor in node.inputs:
                found.setdefault(tensor.name, []).append(node)
        return found

    @cached_property
    def defined(self) -> set[str]:
        weights = () if self.scope.is_function else self.scope.graph.initializer
        inputs = {tensor.name for tensor in self.graph.inputs}
        return inputs | self.producers.keys() | {tensor.name for tensor in weights}

    def home(self, name: str) -> _Level:
        """Returns the level that defines a name, this one or the nearest around it."""
        if self.outer is None or name in self.defined:
            return self
        return self.outer.home(name)

    def maker(self, name: str) -> tuple[_Level, gs.Node] | None:
        home = self.home(name)
        return (home, home.producers[name]) if name in home.producers else None

    def users(self, name: str) -> Iterator[tuple[_Level, gs.Node]]:
        """Yields the nodes that use a name of this level, those of the levels inside too."""
        yield from ((self, node) for node in self.consumers.get(name, ()))
        for level in self.inner:
            if name not in level.defined:
                yield from level.users(name)

    def users_of(self, name: str) -> Iterator[tuple[_Level, gs.Node]]:
        """Yields the nodes that use a name as it is seen from this level."""
        return self.home(name).users(name)

    @cached_property
    def overridable(self) -> set[str]:
        proto = self.scope.graph
        return set() if self.scope.is_function else {value.name for value in proto.input}

    def value(self, tensor: gs.Tensor) -> Array | None:
        """Returns what a tensor always is, None if it may vary or is large."""
        if isinstance(tensor, self.surgeon.Constant):
            return None if tensor.name in self.overridable else _decoded(tensor)
        made = self.maker(tensor.name)
        return None if made is None else made[0]._made_by(made[1])

    def number(self, tensor: gs.Tensor) -> float | None:
        """Returns a constant of one value."""
        value = None if tensor.is_empty() else self.value(tensor)
        numeric = value is not None and value.size == 1 and value.dtype.kind not in "OSUc"
        return float(value.reshape(-1)[0]) if value is not None and numeric else None

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
                    for below in nested(value, (*address, index, which, -1), level):
                        if below.outer is level:
                            level.inner.append(below)
                        yield below

    yield from nested(graph, ("graph",), None)
    for number, function in enumerate(graph.functions):
        yield from nested(function, ("function", number), None)


def find(surgeon: Any, graph: gs.Graph, outline: Model) -> Iterator[Site]:
    """Yields the sites of a graph; types, shapes and opsets are those of its export."""
    types = ValueTypes(outline)
    for level in list(_levels(surgeon, graph, outline)):
        scope = level.scope
        for index, node in enumerate(level.graph.nodes, leading(surgeon, level.graph)):
            if (node.domain or "") not in ONNX_DOMAINS or not node.inputs or not node.outputs:
                continue
            found = _activation(node, level, types)
            if found is None or _is_a_part(node, found, level):
                continue
            x, cap, jump = found
            y = node.outputs[0].name
            tensor = type_at(types, scope, x.name, y, [each.name for each in node.inputs])
            typed = tensor.element in (*FLOATS, *INTEGERS)
            if tensor.element in INTEGERS and any(
                user.op in INDEX_USERS for _, user in level.users(y)
            ):
                continue
            if scope.opset < 7 or not (typed or (scope.opset >= 15 and not tensor.element)):
                continue
            if changed_operator(tensor.element, scope.opset, opset_of(outline.proto.opset_import)):
                continue
            path = f"{scope.label}>{y}" if scope.label else y
            yield Site(
                path, node.op, node.name, x.name, y, cap, jump, tensor, scope.address, index,
                scope.opset,
            )  # fmt: skip


# Input, upper bound and jump of a ReLU-like node.
_Activation = tuple["gs.Tensor", float | None, float]


def _activation(node: gs.Node, level: _Level, types: ValueTypes) -> _Activation | None:
    """Returns input, upper bound and jump of a ReLU-like node, None for any other node."""
    x = node.inputs[0]
    if node.op == "Relu":
        return x, None, 0.0
    if node.op == "LeakyRelu":
        return (x, None, 0.0) if _number(node, "alpha", 0.01) == 0 else None
    if node.op == "ThresholdedRelu":
        alpha = _number(node, "alpha", 1.0)
        return (x, None, alpha) if alpha is not None and 0 <= alpha < math.inf else None
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


def _max_with_zero(node: gs.Node, level: _Level, types: ValueTypes) -> _Activation | None:
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
    if zero.size > 1 or zero.ndim > len(shape or ()):
        return None  # it may broadcast x
    return x, None, 0.0


def _clip_at_zero(node: gs.Node, level: _Level) -> _Activation | None:
    if level.scope.opset < 11:
        low, high = _number(node, "min", -math.inf), _number(node, "max", math.inf)
        if high is not None and high == np.finfo(np.float32).max:
            high = math.inf
    else:
        bounds: list[float | None] = [-math.inf, math.inf]
        for which, tensor in enumerate(node.inputs[1:3]):
            if not tensor.is_empty():
                value = level.value(tensor)
                whole = value is not None and value.dtype.kind in "iu" and value.size == 1
                bounds[which] = int(value.flat[0]) if whole else level.number(tensor)  # type: ignore[union-attr]
        low, high = bounds
    if low != 0 or high is None or not high > 0:
        return None
    return node.inputs[0], (None if high == math.inf else high), 0.0


def _is_a_part(node: gs.Node, found: _Activation, level: _Level) -> bool:
    """Says whether a node that looks like a ReLU is a part of a variance or of a hard-swish."""
    x, cap, _ = found
    if node.op in ("Clip", "Max") and _is_variance(x, level):
        return True
    if cap is None and _is_half(x.name, node.outputs[0].name, level):
        return True
    added, top = _traced_back(x.name, level, math.inf if cap is None else cap)
    gate = added is not None and (added == 3 if added.size == 1 else 2 <= np.median(added) <= 4)
    for name, here, bound in _passed_on(node.outputs[0].name, level, top):
        if bound == 1 and added is not None and added.size == 1 and added == 0.5:
            return True
        for where, user in here.users(name) if bound == 6 else ():
            if user.op not in ("Mul", "Div") or (user.domain or "") not in ONNX_DOMAINS:
                continue
            if gate or _sixth(name, user, where):
                return True
            product = user.outputs[0].name
            if user.op == "Mul" and any(
                _sixth(copy, later, there)
                for copy, home, _ in _passed_on(product, where, math.inf)
                for there, later in home.users(copy)
            ):
                return True
    return False


def _is_variance(x: gs.Tensor, level: _Level) -> bool:
    """Says whether x is E[u^2] - E[u]^2, which is only kept from going below 0."""
    difference = level.maker(x.name)
    if difference is None or difference[1].op != "Sub":
        return False
    square = difference[0].maker(difference[1].inputs[1].name)
    if square is None or square[1].op not in ("Mul", "Pow"):
        return False
    one, other = square[1].inputs
    if square[1].op == "Mul":
        return bool(one.name == other.name)
    return square[0].number(other) == 2


def _is_half(x: str, y: str, level: _Level) -> bool:
    """Says whether y, the part of x above 0, and its part below 0 are added up, perhaps scaled."""
    below: list[tuple[str, _Level]] = []
    signs = [(user.outputs[0].name, at) for at, user in level.users_of(x) if user.op == "Neg"]
    made = level.maker(x)
    if made is not None and made[1].op == "Neg":
        signs.append((made[1].inputs[0].name, made[0]))
    for sign, home in signs:
        users = home.users_of(sign)
        below += [(user.outputs[0].name, at) for at, user in users if user.op in ("Relu", "Max")]
    for at, user in level.users_of(x):
        name = user.outputs[0].name
        if user.op == "Min":
            below.append((name, at))
        for where, later in at.users_of(name) if user.op == "Abs" else ():
            if later.op == "Sub" and x in (each.name for each in later.inputs):
                below.append((later.outputs[0].name, where))
    sums = _added_up(y, level)
    return any(not sums.isdisjoint(_added_up(name, at)) for name, at in below)


def _added_up(name: str, level: _Level) -> set[int]:
    """Returns the ids of the sums that a value, or a multiple of it, is in."""
    found: set[int] = set()
    values = [(name, level)]
    for each, here in values:  # which grows
        for at, node in here.users_of(each):
            if node.op in ("Add", "Sub"):
                found.add(id(node))
            elif node.op in PASSING or node.op in ("Neg", "Mul", "Div"):
                zero = any(
                    value is not None and value.dtype.kind not in "OSUc" and not value.any()
                    for value in map(at.value, node.inputs)
                )
                if not zero and len(values) < _STEPS:
                    values.append((node.outputs[0].name, at))
    return found


def _sixth(name: str, node: gs.Node, level: _Level) -> bool:
    """Says whether a node makes a sixth of a value."""
    if node.op not in ("Mul", "Div") or len(node.inputs) != 2:
        return False
    one, other = node.inputs
    if node.op == "Div":
        return one.name == name and level.number(other) == 6
    factor = level.number(other if one.name == name else one)
    return factor is not None and abs(factor * 6 - 1) < 0.01


def _traced_back(name: str, level: _Level, top: float) -> tuple[Array | None, float]:
    """Returns the constant added before a value is bounded or converted, and the lowest bound."""
    for _ in range(_STEPS):
        made = level.maker(name)
        if made is None:
            break
        level, node = made
        source = _source(node, level)
        if source is None:
            return _summand(node, level), top
        name, top = source[0], min(top, source[1])
    return None, top


def _passed_on(name: str, level: _Level, top: float) -> Iterator[tuple[str, _Level, float]]:
    """Yields the names that a value has, bounded or converted; their levels; the lowest bounds."""
    found = [(name, level.home(name), top)]
    for at, here, bound in found:  # which grows
        yield at, here, bound
        for where, user in here.users(at):
            source, y = _source(user, where), user.outputs[0].name
            if source is None or source[0] != at or len(found) == _STEPS:
                continue
            if y not in (entry[0] for entry in found):
                found.append((y, where, min(bound, source[1])))


_STEPS = 16


def _source(node: gs.Node, level: _Level) -> tuple[str, float] | None:
    """Returns what a node passes on, and up to which bound; None if it makes something new."""
    if (node.domain or "") not in ONNX_DOMAINS or not node.inputs or not node.outputs:
        return None
    x = node.inputs[0].name
    if node.op in PASSING or node.op == "Relu":
        return x, math.inf
    if node.op == "Clip":
        high = _number(node, "max", math.inf) if level.scope.opset < 11 else math.inf
        if level.scope.opset >= 11 and len(node.inputs) > 2:
            high = level.number(node.inputs[2])
        return x, math.inf if high is None else high
    if node.op in ("Min", "Max") and len(node.inputs) == 2:
        for tensor, other in (node.inputs, reversed(node.inputs)):
            number = level.number(other)
            if number is not None:
                return tensor.name, number if node.op == "Min" else math.inf
    return None


def _summand(node: gs.Node, level: _Level) -> Array | None:
    """Returns the constant that a node adds to something."""
    terms = {"Add": (1, 0), "Sub": (1,), "Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,)}
    if (node.domain or "") not in ONNX_DOMAINS:
        return None
    for which in terms.get(node.op, ()):
        value = level.value(node.inputs[which]) if which < len(node.inputs) else None
        if value is not None and value.size and value.dtype.kind not in "OSUc":
            number = value.astype(np.float64)
            return -number if node.op == "Sub" else number
    return None


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
