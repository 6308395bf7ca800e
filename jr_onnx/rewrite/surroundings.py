"""What the nodes around an activation say of it: some that look like a ReLU are part of something.

    Clip(x + 3, 0, 6) * x / 6       hard-swish, as it is decomposed; the rest of the table is a gate
    Clip(x + 3, 0, 6) / 6           hard-sigmoid; its 3 may be in the bias of a Conv or Gemm, and is
    Clip(y, 0, 6) / 6               not to be seen at all where the bias is not
    Clip(x / 5 + 0.5, 0, 1)         hard-sigmoid of another slope
    Max(E[u * u] - E[u] * E[u], 0)  a variance that rounding must not make negative
    Gather(w, Clip(i, 0))           an index that is kept in range
    Relu(x) + slope * Relu(-x)      PRelu, as Keras has it; the second may be Min(x, 0) or x - |x|

A Clip may be spelled `Min(Relu(y), 6)`, `Max(Min(y, 6), 0)` and so on; Identity, Cast and
(de)quantisation may stand between any two nodes, and parts may be in the scopes around or inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import onnx

from jr_onnx.model import Address, Constants, Model, Scope, attribute_of
from jr_onnx.model.graphs import ONNX_DOMAINS, opset_of

Array = np.ndarray[Any, Any]
# fmt: off
INDEX_USERS = frozenset((
    "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "GatherND", "OneHot", "Pad",
    "Range", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Tile", "Unsqueeze",
))
# fmt: on
# What passes the value of its first input on.
PASSING = frozenset(("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear"))
_LINEAR = ("Conv", "Gemm", "ConvTranspose")
_SCALING = PASSING | {"Neg", "Mul", "Div"}
_ADDING = ("Add", "Sub")
_FARTHEST = 16  # nodes between the ends of a decomposed activation: many more than any has


class Value(NamedTuple):
    """A name, and a scope that sees it."""

    scope: Scope
    name: str


class Place(NamedTuple):
    """A node, and the scope it is in."""

    scope: Scope
    node: onnx.NodeProto


class _Link(NamedTuple):
    """A node that passes a value on: the input it has it from, and the upper bound it sets."""

    x: str
    bound: float = math.inf


class Surroundings:
    """Who makes and who uses a value; few models ask, so it is found out on demand."""

    def __init__(self, model: Model, constants: Constants) -> None:
        self.constants = constants
        self.opset = opset_of(model.proto.opset_import)
        self._model = model
        self._scopes = {scope.address: scope for scope in model.scopes}
        self._made: dict[Address, dict[str, onnx.NodeProto]] = {}

    def maker(self, value: Value) -> Place | None:
        """Returns the node that makes a value, in its scope or in one around it."""
        home = self._model.definitions.home(value.scope.address, value.name)
        made = self._made.get(home)
        if made is None:
            nodes = self._scopes[home].graph.node
            made = self._made[home] = {name: node for node in nodes for name in node.output}
        node = made.get(value.name)
        return None if node is None else Place(self._scopes[home], node)

    def users(self, value: Value) -> list[Place]:
        """Returns the nodes that use a value, in its scope and in those inside."""
        home = self._model.definitions.home(value.scope.address, value.name)
        return self._users[home].get(value.name, [])

    @cached_property
    def _users(self) -> dict[Address, dict[str, list[Place]]]:
        found: dict[Address, dict[str, list[Place]]] = {}
        for scope in self._model.scopes:
            address = scope.address
            here = found[address] = {}
            inside = address[:-3] in found
            for node in scope.graph.node:
                place = Place(scope, node)
                for name in node.input:
                    if inside:
                        here = found[self._model.definitions.home(address, name)]
                    here.setdefault(name, []).append(place)
        return found

    @cached_property
    def op_types(self) -> frozenset[str]:
        """All that there are: mostly they tell at once what a model does not have."""
        return frozenset(node.op_type for scope in self._model.scopes for node in scope.graph.node)

    @property
    def has_bounds(self) -> bool:
        """Whether any node sets an upper bound: if none does, there is no gate."""
        return not self.op_types.isdisjoint(("Clip", "Min"))

    @property
    def has_halves(self) -> bool:
        """Whether any node may be half of a decomposed PRelu."""
        return not self.op_types.isdisjoint(("Neg", "Min", "Abs"))

    def is_an_index(self, y: Value) -> bool:
        """Whether a value is used as a shape or an index."""
        return any(user.node.op_type in INDEX_USERS for user in self.users(y))

    def is_a_variance(self, x: Value) -> bool:
        """Whether x is E[u * u] - E[u] * E[u], whose rounding errors may make it negative."""
        difference = self.maker(x)
        if difference is None or difference.node.op_type != "Sub":
            return False
        square = self.maker(Value(difference.scope, difference.node.input[1]))
        if square is None or len(square.node.input) != 2:
            return False
        one, other = square.node.input
        if square.node.op_type == "Pow":
            return self._number(Value(square.scope, other)) == 2
        return square.node.op_type == "Mul" and one == other

    def is_a_half(self, x: Value, y: Value) -> bool:
        """Whether y, max(x, 0), and a multiple of max(-x, 0) are added up."""
        if not self.has_halves:
            return False
        sums = self._sums(y)
        return bool(sums) and any(sums & self._sums(half) for half in self._other_halves(x))

    def _other_halves(self, x: Value) -> Iterator[Value]:
        """Yields what is 0 where x is above 0: max(-x, 0), min(x, 0), x - |x|."""
        made = self.maker(x)
        opposites = [*self._made_of(x, "Neg")]
        if made is not None and made.node.op_type == "Neg" and made.node.input:
            opposites.append(Value(made.scope, made.node.input[0]))
        for opposite in opposites:
            yield from self._made_of(opposite, "Relu", "Max")
        yield from self._made_of(x, "Min")
        differences = {value.name for value in self._made_of(x, "Sub")}
        for size in self._made_of(x, "Abs"):
            yield from (each for each in self._made_of(size, "Sub") if each.name in differences)

    def _made_of(self, value: Value, *op_types: str) -> Iterator[Value]:
        """Yields what operators of some types make of a value."""
        for scope, node in self.users(value):
            if node.op_type in op_types and node.domain in ONNX_DOMAINS and node.output:
                yield Value(scope, node.output[0])

    def _sums(self, value: Value) -> set[tuple[Address, str]]:
        """Returns the sums that a value is in, or a multiple of it that is not 0."""
        found: set[tuple[Address, str]] = set()
        pending = [value]
        for each in pending:  # which grows
            found.update((made.scope.address, made.name) for made in self._made_of(each, *_ADDING))
            if len(pending) < _FARTHEST:
                scaled = self._made_of(each, *_SCALING)
                pending += [product for product in scaled if not self._is_a_zero(product)]
        return found

    def _is_a_zero(self, product: Value) -> bool:
        """Whether one of the values that a product is made of is all 0."""
        made = self.maker(product)
        names = made.node.input if made is not None else ()
        factors = (self._constant(Value(product.scope, name)) for name in names)
        return any(factor is not None and not factor.any() for factor in factors)

    def is_a_gate(self, x: Value, y: Value, cap: float | None) -> bool:
        """Whether y, which is x with bounds, is a part of a hard-swish or hard-sigmoid.

        Args:
            x: what an activation is applied to.
            y: what it gives.
            cap: its upper bound.
        """
        if cap is None and not self.has_bounds:
            return False
        bias, cap = self._origin(x, math.inf if cap is None else cap)
        half = bias is not None and bias.size == 1 and bool(bias == 0.5)
        for value, top in self._copies(y, cap):
            if top == 1 and half:
                return True
            if top == 6 and any(self._is_gating(value, user, bias) for user in self.users(value)):
                return True
        return False

    def _is_gating(self, value: Value, user: Place, bias: Array | None) -> bool:
        """Whether a value between 0 and 6 is scaled to 1, or multiplied where 3 was added to it."""
        if user.node.op_type not in ("Mul", "Div") or user.node.domain not in ONNX_DOMAINS:
            return False
        if _is_three(bias) or self._is_a_sixth(value, user):
            return True
        product = Value(user.scope, user.node.output[0])
        return user.node.op_type == "Mul" and any(
            self._is_a_sixth(copy, later)
            for copy, _ in self._copies(product, math.inf)
            for later in self.users(copy)
        )

    def _is_a_sixth(self, value: Value, user: Place) -> bool:
        node = user.node
        if len(node.input) != 2 or node.op_type not in ("Mul", "Div"):
            return False
        one, other = node.input
        if node.op_type == "Div":
            return one == value.name and self._number(Value(user.scope, other)) == 6
        factor = self._number(Value(user.scope, other if one == value.name else one))
        return factor is not None and abs(6 * factor - 1) < 0.01  # float16 and bfloat16 round 1/6

    def _origin(self, x: Value, cap: float) -> tuple[Array | None, float]:
        """Returns what is added to make x, and the lowest upper bound on the way."""
        for _ in range(_FARTHEST):
            made = self.maker(x)
            if made is None:
                break
            link = self._link(made)
            if link is None:
                return self._bias(made), cap
            x, cap = Value(made.scope, link.x), min(cap, link.bound)
        return None, cap

    def _copies(self, y: Value, cap: float) -> Iterator[tuple[Value, float]]:
        """Yields y and what only bounds or converts it, each with the lowest upper bound so far."""
        pending, passed = [(y, cap)], {y.name}
        while pending:
            value, top = pending.pop()
            yield value, top
            for user in self.users(value):
                link = self._link(user)
                if link is None or link.x != value.name or user.node.output[0] in passed:
                    continue
                passed.add(user.node.output[0])
                if len(passed) <= _FARTHEST:
                    copy = Value(user.scope, user.node.output[0])
                    pending.append((copy, min(top, link.bound)))

    def _link(self, place: Place) -> _Link | None:
        scope, node = place
        if node.domain not in ONNX_DOMAINS or not node.input or not node.output:
            return None
        if node.op_type in PASSING or node.op_type == "Relu":
            return _Link(node.input[0])
        if node.op_type == "Clip":
            if scope.opset < 11:
                high = attribute_of(node, "max")
                return _Link(node.input[0], math.inf if high is None else high.f)
            above = self._number(Value(scope, node.input[2])) if len(node.input) > 2 else None
            return _Link(node.input[0], math.inf if above is None else above)
        if node.op_type in ("Min", "Max") and len(node.input) == 2:
            for x, other in (node.input, reversed(node.input)):
                number = self._number(Value(scope, other))
                if number is not None:
                    return _Link(x, number if node.op_type == "Min" else math.inf)
        return None

    def _bias(self, place: Place) -> Array | None:
        """Returns the constant that a node adds, None if it adds none."""
        scope, node = place
        if node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type in _LINEAR:
            return self._constant(Value(scope, node.input[2])) if len(node.input) > 2 else None
        if node.op_type not in ("Add", "Sub") or len(node.input) != 2:
            return None
        one, other = (self._constant(Value(scope, name)) for name in node.input)
        if node.op_type == "Sub":
            return None if other is None else -other
        return one if other is None else other

    def _constant(self, value: Value) -> Array | None:
        """Returns a constant as float64, None for what is no constant, or no number."""
        found = self.constants.value(value.scope, value.name) if value.name else None
        if found is None or not found.size or found.dtype.kind in "OSUc":
            return None
        with np.errstate(invalid="ignore"):
            return found.astype(np.float64)

    def _number(self, value: Value) -> float | None:
        """Returns a constant of one value."""
        found = self._constant(value)
        return None if found is None or found.size != 1 else float(found.reshape(-1)[0])


def _is_three(bias: Array | None) -> bool:
    """Whether a bias is 3, or a learned one to which 3 was added."""
    if bias is None:
        return False
    return bool(bias == 3) if bias.size == 1 else bool(2 <= np.median(bias) <= 4)
