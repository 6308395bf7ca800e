"""Finding the activations a jump can go into.

    Relu(x)                                          a site
    Clip(x, 0), Clip(x, 0, cap)                      a site, the cap is kept
    Max(x, 0), Max(0, x)                             a site
    LeakyRelu(x) with slope 0, PRelu with slopes 0   a site
    ThresholdedRelu(x)                               a site, its jump is changed
    Where(x > c, x, 0), x * Cast(x > c)              a threshold already: left alone
    what is a part of something else                 left alone: see surroundings.py
    FusedConv, QLinearConv, RNN, ... with a Relu     no node to replace: see hidden.py

in the main graph, in bodies of If, Loop and Scan at any depth, and in local functions.

A site's path is the name of its output, which ONNX keeps unique in a scope, behind the label of
the scope: `relu_1`, `if_out.then_branch>relu_1`, `my.domain::Block>relu`. The rewrite keeps output
names, so a path means the same site before and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, defs

from jr_onnx.model import (
    Address,
    Constants,
    Model,
    Scope,
    Tensor,
    ValueTypes,
    attribute_of,
    dtype_name,
)
from jr_onnx.model.graphs import ONNX_DOMAINS
from jr_onnx.model.model import readable, text
from jr_onnx.rewrite.hidden import HIDING, hidden_relu
from jr_onnx.rewrite.surroundings import Surroundings, Value

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
INTEGERS = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)
_TYPES = frozenset((*FLOATS, *INTEGERS))

# Shown as skipped, so that a reader of the report finds a word on them. Smooth activations
# (Sigmoid, Gelu, ...) have no place where a jump would go, and are not mentioned.
_CUT_AT_ZERO = frozenset(("Elu", "Selu", "Celu", "HardSwish", "HardSigmoid", "Shrink"))


@dataclass(frozen=True)
class Site:
    """One activation to replace.

    Attributes:
        path: its readable, stable name.
        op_type: the operator it is now.
        node: the node's name, often empty.
        x: the name of its input.
        y: the name of its output.
        cap: the upper bound that the rewrite keeps, None where there is none; an int for integers.
        jump: the jump that it has already (ThresholdedRelu), else 0.
        tensor: element type and shape of x; element 0 where only a run tells, as in a local
            function, whose callers decide.
        scope: address of the list of nodes it is in.
        index: its position there.
        opset: the opset of that scope.
    """

    path: str
    op_type: str
    node: str
    x: str
    y: str
    cap: float | None
    jump: float
    tensor: Tensor
    scope: Address
    index: int
    opset: int

    @property
    def in_function(self) -> bool:
        """Whether it is in a local function, which may be called with several types."""
        return self.scope[0] == "function"

    def to_json(self) -> dict[str, Any]:
        """Returns the site as `inspect --json` lists it."""
        return {
            "path": self.path,
            "op_type": self.op_type,
            "node": self.node,
            "dtype": dtype_name(self.tensor.element),
            "shape": None if self.tensor.shape is None else list(self.tensor.shape),
            "cap": self.cap,
        }


@dataclass(frozen=True)
class Skipped:
    """An activation that is left as it is, and why.

    Attributes:
        path: as of a site.
        op_type: the operator.
        reason: why it is left, and what to do where something can be done.
        hidden: whether it is a Relu inside a fused or quantised operator: a retrofit of the rest
            of the model would look complete and not be.
    """

    path: str
    op_type: str
    reason: str
    hidden: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as `inspect --json` lists it."""
        return {
            "path": self.path,
            "op_type": self.op_type,
            "reason": self.reason,
            "hidden": self.hidden,
        }


class _Found(NamedTuple):
    """What makes a node an activation: its input, and what else it does."""

    x: str
    cap: float | None = None
    jump: float = 0.0


class _RefusalError(Exception):
    """Why a node that looks like an activation is none."""


@dataclass(slots=True)
class _Node:
    """A node and what its recogniser may ask."""

    node: onnx.NodeProto
    op_type: str
    scope: Scope
    types: ValueTypes
    around: Surroundings

    def constant(self, index: int, what: str) -> np.ndarray[Any, Any] | None:
        """Returns the value of an optional input, None where it is left out."""
        if index >= len(self.node.input) or not self.node.input[index]:
            return None
        name, constants = self.node.input[index], self.around.constants
        value = constants.value(self.scope, name)
        if value is None:
            unread = constants.unread(self.scope, name)
            known = f"{unread}: only small ones in the model file are read" if unread else ""
            raise _RefusalError(f"its {what} {name!r} {known or 'is not a constant of the model'}")
        return value

    def bound(self, index: int, what: str) -> float | None:
        """Returns the number that an optional input of a Clip is, an int for integers."""
        value = self.constant(index, what)
        if value is None:
            return None
        if value.size != 1 or value.dtype.kind in "OSUc":
            raise _RefusalError(f"its {what} has the shape {value.shape}, expected one number")
        number = value.reshape(-1)[0]
        return int(number) if value.dtype.kind in "iu" else float(number)

    def attribute(self, name: str, default: float) -> float:
        attribute = attribute_of(self.node, name)
        if attribute is None:
            return default
        if attribute.ref_attr_name:
            raise _RefusalError(f"its {name} is decided by the caller of the function")
        return float(attribute.f)


def find_sites(model: Model) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Lists every activation of the model, those to replace and those to leave.

    Raises:
        ParameterError: it is no `Model`.
        InvalidModelError: a name in it is not UTF-8.
    """
    with readable(model):
        return _find(model)


def _find(model: Model) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    sites: list[Site] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    types, around = ValueTypes(model), Surroundings(model, Constants(model))
    telling = _TELLING if around.op_types.isdisjoint(_COMPARISONS) else _TELLING | _THRESHOLDS
    for scope in model.scopes:
        for index, node in enumerate(scope.graph.node):
            op_type = node.op_type
            if op_type not in telling and node.domain in ONNX_DOMAINS:
                continue
            if not (node.input and node.input[0] and node.output and node.output[0]):
                continue  # not valid ONNX, as the checker will say, or used by nobody
            found = _classify(_Node(node, op_type, scope, types, around), index)
            if isinstance(found, Site) and found.path in taken:
                reason = "another site has the same path: rename one of the outputs"
                skipped.append(Skipped(found.path, found.op_type, reason))
            elif isinstance(found, Site):
                taken.add(found.path)
                sites.append(found)
            elif found is not None:
                skipped.append(found)
    return tuple(sites), tuple(skipped)


def _classify(seen: _Node, index: int) -> Site | Skipped | None:
    if seen.op_type in HIDING or seen.node.domain not in ONNX_DOMAINS:
        hidden = hidden_relu(seen.scope, seen.node, seen.around)
        return _skipped(seen, hidden, hidden=True) if hidden else None
    if seen.op_type in _CUT_AT_ZERO:
        return _skipped(seen, f"{seen.op_type} is no ReLU")
    recognise = _RECOGNISERS.get(seen.op_type)
    if recognise is None:
        return None
    try:
        found = recognise(seen)
        if found is None:
            return None
        _check_surroundings(seen, found)
        return _site(seen, index, found)
    except _RefusalError as reason:
        return _skipped(seen, str(reason))


def _check_surroundings(seen: _Node, found: _Found) -> None:
    if seen.op_type == "Relu" and not (seen.around.has_bounds or seen.around.has_halves):
        return  # it takes a bound or a second half to make anything else of it
    x, y = Value(seen.scope, found.x), Value(seen.scope, seen.node.output[0])
    if seen.op_type in ("Clip", "Max") and seen.around.is_a_variance(x):
        raise _RefusalError(
            "it keeps a variance from going below 0 by rounding, and is no activation"
        )
    if seen.around.is_a_gate(x, y, found.cap):
        raise _RefusalError(
            "it is a part of a decomposed hard-swish or hard-sigmoid, Clip(x + 3, 0, 6) / 6 or "
            "alike, not an activation of its own"
        )
    if found.cap is None and seen.around.is_a_half(x, y):
        raise _RefusalError(
            "it is half of a decomposed PRelu, Relu(x) + slope * Relu(-x) or alike, whose slope "
            "below 0 is not 0"
        )


def _site(seen: _Node, index: int, found: _Found) -> Site:
    scope, node = seen.scope, seen.node
    x, y = text(found.x), text(node.output[0])
    tensor = type_at(seen.types, scope, x, y, node.input)
    known, opset = tensor.element, scope.opset
    if known in INTEGERS and seen.around.is_an_index(Value(scope, y)):
        raise _RefusalError("it keeps integers in range that are used as indices or shapes")
    if known and known not in _TYPES:
        raise _RefusalError(f"there is no jump for {dtype_name(known)} tensors")
    if opset < 7:
        raise _RefusalError(
            f"opset {opset} has no usable Greater, opset 7 is needed: export the model again, or "
            "run onnx.version_converter"
        )
    if not known and opset < 15:
        raise _RefusalError(
            f"the element type of {x!r} is not declared nor inferable; CastLike, which "
            f"adapts to it, needs opset 15 (this is {opset})"
        )
    changed = changed_operator(known, opset, seen.around.opset)
    if changed is not None:
        raise _RefusalError(
            f"its function imports opset {opset}, the model {seen.around.opset}, and onnx.checker "
            f"refuses a {changed} there, as it differs between the two"
        )
    return Site(
        path=_path(scope, node),
        op_type=seen.op_type,
        node=node.name,
        x=x,
        y=y,
        cap=found.cap,
        jump=found.jump,
        tensor=tensor,
        scope=scope.address,
        index=index,
        opset=opset,
    )


def changed_operator(element: int, opset: int, of_model: int) -> str | None:
    """Returns an operator of the forms that a function's opset has in another version, or None."""
    if opset == of_model:
        return None
    needed = ("Constant", "Sub", "Greater", "Where", *(() if element else ("CastLike",)))
    return next((name for name in needed if _differs(name, opset, of_model)), None)


@lru_cache(maxsize=256)
def _differs(op_type: str, one: int, other: int) -> bool:
    latest = defs.onnx_opset_version()
    try:
        since = {defs.get_schema(op_type, min(each, latest)).since_version for each in (one, other)}
    except defs.SchemaError:
        return False  # there is no such operator yet: the forms know their opsets
    return len(since) > 1


def type_at(types: ValueTypes, scope: Scope, x: str, y: str, others: Sequence[str]) -> Tensor:
    """Returns what is known of x, if need be by y and the other inputs, which have its type."""
    tensor = types.of(scope, x)
    if tensor.element:
        return tensor
    like = types.of(scope, y)
    elements = (types.of(scope, name).element for name in others if name)
    element = like.element or next(filter(None, elements), 0)
    return Tensor(element, like.shape if tensor.shape is None else tensor.shape)


def _relu(seen: _Node) -> _Found:
    return _Found(seen.node.input[0])


def _clip(seen: _Node) -> _Found | None:
    if seen.scope.opset < 11:
        low: float | None = seen.attribute("min", -math.inf)
        high: float | None = seen.attribute("max", math.inf)
        # Some exporters cannot leave an attribute out: the largest float32 means none.
        high = math.inf if high == _LARGEST_FLOAT32 else high
    else:
        low, high = seen.bound(1, "lower bound"), seen.bound(2, "upper bound")
    if low != 0:
        return None  # a clip to some range, no activation
    if high is not None and not high > 0:
        raise _RefusalError(f"its upper bound is {high:g}, expected a number above its lower one")
    return _Found(seen.node.input[0], cap=None if high == math.inf else high)


def _max(seen: _Node) -> _Found | None:
    values = [seen.around.constants.value(seen.scope, name) for name in seen.node.input]
    zeros = [value is not None and value.size > 0 and not value.any() for value in values]
    if not any(zeros):
        return None  # a maximum of several values
    if len(values) != 2 or all(zeros):
        raise _RefusalError(f"Max of {len(values)} inputs, expected x and one zero")
    zero = values[zeros.index(True)]
    x = seen.node.input[zeros.index(False)]
    shape = seen.types.of(seen.scope, x).shape
    if zero is not None and zero.size != 1:
        raise _RefusalError(
            f"its zero has shape {zero.shape}, which may broadcast x; expected a scalar"
        )
    if zero is not None and zero.ndim > 0 and (shape is None or zero.ndim > len(shape)):
        raise _RefusalError(f"its zero has {zero.ndim} axes, and x may have fewer")
    return _Found(x)


def _leaky_relu(seen: _Node) -> _Found:
    slope = seen.attribute("alpha", 0.01)
    if slope != 0:
        raise _RefusalError(f"its slope below 0 is {slope:g}; only slope 0 is a ReLU")
    return _Found(seen.node.input[0])


def _prelu(seen: _Node) -> _Found:
    slope = seen.constant(1, "slope")
    if slope is None or slope.any():
        raise _RefusalError("its slopes below 0 are not all 0; only slope 0 is a ReLU")
    return _Found(seen.node.input[0])


def _thresholded_relu(seen: _Node) -> _Found:
    alpha = seen.attribute("alpha", 1.0)
    if not 0 <= alpha < math.inf:
        raise _RefusalError(
            f"its threshold is {alpha:g}; only one that is finite and >= 0 is a jump"
        )
    return _Found(seen.node.input[0], jump=alpha)


def _where(seen: _Node) -> None:
    """Where(LessOrEqual(x, c), 0, x) and its like: what exporters make of a threshold."""
    if len(seen.node.input) != 3:
        return
    made = seen.around.maker(Value(seen.scope, seen.node.input[0]))
    if made is None or made.node.op_type not in _COMPARISONS:
        return
    for zero, x in (seen.node.input[1:], seen.node.input[:0:-1]):
        value = seen.around.constants.value(seen.scope, zero)
        if value is not None and value.size and not value.any() and x in made.node.input:
            raise _is_a_threshold(seen, made.node)


def _mul(seen: _Node) -> None:
    """x * Cast(Greater(x, c)), which is the same."""
    if len(seen.node.input) != 2:
        return
    for x, mask in (seen.node.input, seen.node.input[::-1]):
        cast = seen.around.maker(Value(seen.scope, mask))
        if cast is None or cast.node.op_type != "Cast":
            continue
        made = seen.around.maker(Value(cast.scope, cast.node.input[0]))
        if made is not None and made.node.op_type in _COMPARISONS and x in made.node.input:
            raise _is_a_threshold(seen, made.node)


def _is_a_threshold(seen: _Node, comparison: onnx.NodeProto) -> _RefusalError:
    return _RefusalError(
        f"it is a threshold already, spelled {comparison.op_type} and {seen.op_type}: a jump of "
        "its own, which is not changed"
    )


_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_COMPARISONS = frozenset(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
_RECOGNISERS: dict[str, Callable[[_Node], _Found | None]] = {
    "Relu": _relu,
    "Clip": _clip,
    "Max": _max,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
    "Mul": _mul,
}
_THRESHOLDS = frozenset(("Where", "Mul"))  # with a comparison
_TELLING = (_CUT_AT_ZERO | HIDING | _RECOGNISERS.keys()) - _THRESHOLDS


def _skipped(seen: _Node, reason: str, *, hidden: bool = False) -> Skipped:
    return Skipped(_path(seen.scope, seen.node), seen.op_type, reason, hidden)


def _path(scope: Scope, node: onnx.NodeProto) -> str:
    output = node.output[0] if node.output else node.name
    return f"{scope.label}>{output}" if scope.label else output
