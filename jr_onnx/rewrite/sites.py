"""Finding the activations a jump can go into.

    Relu(x)                                          a site
    Clip(x, 0), Clip(x, 0, cap)                      a site, the cap is kept
    Max(x, 0), Max(0, x)                             a site
    LeakyRelu(x) with slope 0, PRelu with slopes 0   a site
    ThresholdedRelu(x)                               a site, its jump is changed
    Clip(x + 3, 0, 6), Clip(x + 0.5, 0, 1)           part of a decomposed hard-swish or
                                                     hard-sigmoid: left alone
    Where(x > c, x, 0)                               a threshold already: left alone
    FusedConv, QLinearConv, RNN, ... with a Relu     hidden: no node to replace

in the main graph, in bodies of If, Loop and Scan at any depth, and in local functions.

A site's path is the name of its output, which ONNX keeps unique in a scope, behind the label of
the scope: `relu_1`, `if_out.then_branch>relu_1`, `my.domain::Block>relu`. The rewrite keeps output
names, so a path means the same site before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

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

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
INTEGERS = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)

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
        cap: the upper bound that the rewrite keeps, None where there is none.
        jump: the jump that it has already (ThresholdedRelu), else 0.
        tensor: element type and shape of x; element 0 in a local function, whose callers decide.
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


@dataclass(frozen=True)
class _Found:
    """What makes a node an activation: its input, and what else it does."""

    x: str
    cap: float | None = None
    jump: float = 0.0


class _RefusalError(Exception):
    """Why a node that looks like an activation is none."""


class _Neighbours:
    """Who makes and who uses a value of a scope; few models ask, so it is found out on demand."""

    def __init__(self, scope: Scope) -> None:
        self._nodes = scope.graph.node

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self._nodes for name in node.output}

    @cached_property
    def consumers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for node in self._nodes:
            for name in node.input:
                found.setdefault(name, []).append(node.op_type)
        return found


@dataclass(frozen=True)
class _Node:
    """A node and what its recogniser may ask."""

    node: onnx.NodeProto
    scope: Scope
    constants: Constants
    types: ValueTypes
    neighbours: _Neighbours

    def constant(self, index: int, what: str) -> np.ndarray[Any, Any] | None:
        """Returns the value of an optional input, None where it is left out."""
        if index >= len(self.node.input) or not self.node.input[index]:
            return None
        name = self.node.input[index]
        value = self.constants.value(self.scope, name)
        if value is None:
            raise _RefusalError(f"its {what} {name!r} is not a constant of the model")
        return value

    def attribute(self, name: str, default: float) -> float:
        attribute = attribute_of(self.node, name)
        if attribute is None:
            return default
        if attribute.ref_attr_name:
            raise _RefusalError(f"its {name} is decided by the caller of the function")
        return float(attribute.f)


def find_sites(model: Model) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Lists every activation of the model, those to replace and those to leave."""
    sites: list[Site] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    types, constants = ValueTypes(model), Constants(model)
    for scope in model.scopes:
        neighbours = _Neighbours(scope)
        for index, node in enumerate(scope.graph.node):
            if node.op_type not in _TELLING and node.domain in ONNX_DOMAINS:
                continue
            if not node.input or not node.output:
                continue  # not valid ONNX, as the checker will say
            found = _classify(_Node(node, scope, constants, types, neighbours), index)
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
    node = seen.node
    if node.domain not in ONNX_DOMAINS or node.op_type in _HIDING:
        hidden = _hidden_relu(seen)
        return _skipped(seen, hidden, hidden=True) if hidden else None
    if node.op_type in _CUT_AT_ZERO:
        return _skipped(seen, f"{node.op_type} is no ReLU")
    recognise = _RECOGNISERS.get(node.op_type)
    if recognise is None:
        return None
    try:
        found = recognise(seen)
        if found is None:
            return None
        return _site(seen, index, found)
    except _RefusalError as reason:
        return _skipped(seen, str(reason))


def _site(seen: _Node, index: int, found: _Found) -> Site:
    scope, node = seen.scope, seen.node
    tensor = seen.types.of(scope, found.x)
    site = Site(
        path=_path(scope, node),
        op_type=node.op_type,
        node=node.name,
        x=found.x,
        y=node.output[0],
        cap=found.cap,
        jump=found.jump,
        tensor=tensor,
        scope=scope.address,
        index=index,
        opset=scope.opset,
    )
    known = tensor.element
    if known in INTEGERS and _is_an_index(seen):
        raise _RefusalError("it keeps integers in range that are used as indices or shapes")
    if not known and not (site.in_function and scope.opset >= 15):
        more = "; CastLike, which adapts to it, needs opset 15" if site.in_function else ""
        raise _RefusalError(f"the element type of {found.x!r} is not declared nor inferable{more}")
    if known and known not in (*FLOATS, *INTEGERS):
        raise _RefusalError(f"there is no jump for {dtype_name(known)} tensors")
    if scope.opset < 7:
        raise _RefusalError(
            f"opset {scope.opset} has no usable Greater, opset 7 is needed: export the model "
            "again, or run onnx.version_converter"
        )
    return site


def _relu(seen: _Node) -> _Found:
    return _Found(seen.node.input[0])


def _clip(seen: _Node) -> _Found | None:
    if seen.scope.opset < 11:
        low = seen.attribute("min", -np.inf)
        high: float | None = seen.attribute("max", np.inf)
    else:
        lower, upper = seen.constant(1, "lower bound"), seen.constant(2, "upper bound")
        low = -np.inf if lower is None else float(lower.reshape(-1)[0])
        high = None if upper is None else float(upper.reshape(-1)[0])
    if low != 0:
        return None  # a clip to some range, no activation
    if _is_a_variance(seen, seen.node.input[0]):
        raise _RefusalError(_VARIANCE)
    # Attributes cannot be left out in a decomposed spelling: the largest float32 means none.
    cap = None if high is None or high >= np.finfo(np.float32).max else high
    for offset, top in ((3.0, 6.0), (0.5, 1.0)):
        if cap == top and _adds(seen, offset) and _is_a_gate(seen):
            raise _RefusalError(
                f"Clip(x + {offset:g}, 0, {top:g}) is a part of a decomposed hard-swish or "
                "hard-sigmoid, not an activation of its own"
            )
    return _Found(seen.node.input[0], cap=cap)


def _adds(seen: _Node, offset: float) -> bool:
    producer = seen.neighbours.producers.get(seen.node.input[0])
    if producer is None or producer.op_type != "Add":
        return False
    values = [seen.constants.value(seen.scope, name) for name in producer.input]
    return any(value is not None and value.size == 1 and value == offset for value in values)


def _is_a_gate(seen: _Node) -> bool:
    uses = seen.neighbours.consumers.get(seen.node.output[0], [])
    return any(op_type in ("Mul", "Div") for op_type in uses)


def _is_a_variance(seen: _Node, x: str) -> bool:
    """Whether x is E[u^2] - E[u]^2, whose rounding errors are kept from going below 0."""
    producer = seen.neighbours.producers.get(x)
    if producer is None or producer.op_type != "Sub":
        return False
    square = seen.neighbours.producers.get(producer.input[1])
    if square is None:
        return False
    if square.op_type == "Pow":
        exponent = seen.constants.value(seen.scope, square.input[1])
        return exponent is not None and exponent.size == 1 and bool(exponent == 2)
    return square.op_type == "Mul" and square.input[0] == square.input[1]


def _is_an_index(seen: _Node) -> bool:
    uses = seen.neighbours.consumers.get(seen.node.output[0], [])
    return any(op_type in INDEX_USERS for op_type in uses)


def _max(seen: _Node) -> _Found | None:
    values = [seen.constants.value(seen.scope, name) for name in seen.node.input]
    zeros = [value is not None and value.size > 0 and not value.any() for value in values]
    if not any(zeros):
        return None  # a maximum of several values
    if len(values) != 2 or all(zeros):
        raise _RefusalError(f"Max of {len(values)} inputs, expected x and one zero")
    zero = values[zeros.index(True)]
    x = seen.node.input[zeros.index(False)]
    if _is_a_variance(seen, x):
        raise _RefusalError(_VARIANCE)
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
    return _Found(seen.node.input[0], jump=seen.attribute("alpha", 1.0))


def _where(seen: _Node) -> None:
    """Where(LessOrEqual(x, c), 0, x) and its like: what exporters make of a threshold."""
    if len(seen.node.input) != 3:
        return
    condition = seen.neighbours.producers.get(seen.node.input[0])
    if condition is None or condition.op_type not in _COMPARISONS:
        return
    for zero, x in (seen.node.input[1:], seen.node.input[:0:-1]):
        value = seen.constants.value(seen.scope, zero)
        if value is not None and value.size and not value.any() and x in condition.input:
            raise _RefusalError(
                f"it is a threshold already, spelled {condition.op_type} and Where: a jump of its "
                "own, which is not changed"
            )


_VARIANCE = "it keeps a variance from going below 0 by rounding, and is no activation"
# fmt: off
INDEX_USERS = frozenset((
    "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "GatherND", "OneHot", "Pad",
    "Range", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Tile", "Unsqueeze",
))
# fmt: on
_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_RECOGNISERS: dict[str, Callable[[_Node], _Found | None]] = {
    "Relu": _relu,
    "Clip": _clip,
    "Max": _max,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
}

_RECURRENT = ("RNN", "GRU", "LSTM")
_HIDING = frozenset(("QLinearConv", "QLinearMatMul", "QuantizeLinear", *_RECURRENT))
_TELLING = _CUT_AT_ZERO | _HIDING | _RECOGNISERS.keys()
# Position of the output's zero point among the inputs.
_ZERO_POINT = {"QLinearConv": 7, "QLinearMatMul": 7, "QLinearAdd": 7, "QGemm": 8}
_LINEAR = frozenset(("Conv", "Gemm", "MatMul", "Add", "BatchNormalization", "ConvTranspose"))


def _hidden_relu(seen: _Node) -> str | None:
    """Says why a Relu may be inside a fused or quantised node, None where none can be."""
    node = seen.node
    activation = attribute_of(node, "activation")
    if activation is not None and activation.s in (b"Relu", b"Clip"):
        return (
            f"{node.op_type} has a {activation.s.decode()} fused into it, which is no node of its "
            "own: retrofit the model before it is optimised"
        )
    if node.op_type in _RECURRENT:
        inner = attribute_of(node, "activations")
        if inner is not None and b"Relu" in inner.strings:
            return f"{node.op_type} computes a Relu inside, which is no node of its own"
        return None
    if node.op_type == "QuantizeLinear":
        producer = seen.neighbours.producers.get(node.input[0])
        zero_point = 2 if producer is not None and producer.op_type in _LINEAR else None
    else:
        zero_point = _ZERO_POINT.get(node.op_type)
    if zero_point is None or zero_point >= len(node.input):
        return None
    value = seen.constants.value(seen.scope, node.input[zero_point])
    if value is None or not value.size or value.dtype.kind not in "iu":
        return None
    if (value != np.iinfo(value.dtype).min).any():
        return None
    return (
        f"{node.op_type} quantises to a range that starts at zero (zero point {value.flat[0]}), as "
        "it does when a Relu was folded into it: retrofit the model before it is quantised"
    )


def _skipped(seen: _Node, reason: str, *, hidden: bool = False) -> Skipped:
    return Skipped(_path(seen.scope, seen.node), seen.node.op_type, reason, hidden)


def _path(scope: Scope, node: onnx.NodeProto) -> str:
    output = node.output[0] if node.output else node.name
    return f"{scope.label}>{output}" if scope.label else output
