"""The table of rules: (domain, op_type, since-version, input) -> vector-Jacobian product.

A rule is a function of a `Call`: it appends nodes that turn the cotangent of the node's output
into the cotangent of one of its inputs, and returns its name.

    @vjp("Neg", 1, 6, 13)
    def neg(call: Call) -> str:
        return call.emit.op("Neg", call.g)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper

from jr_onnx.autodiff.emit import Emitter, Term
from jr_onnx.model import Tensor

# Returns the cotangent's name; "" says that it is zero by definition.
Rule = Callable[["Call"], str]


class UnknownError(NotImplementedError):
    """A rank or an element type is unknown, often after an operator that onnx does not know."""


class Registered(NamedTuple):
    """A rule, and whether it takes cotangents of other outputs than the first."""

    rule: Rule
    all_outputs: bool


_ANY_INPUT = -1
_rules: dict[tuple[str, str, int, int], Registered] = {}

# Piecewise constant, or about shapes: the gradient is zero by definition, not by omission.
# fmt: off
ZERO_GRADIENT = frozenset((
    "And", "ArgMax", "ArgMin", "BitShift", "Ceil", "ConstantOfShape", "Equal", "EyeLike", "Floor",
    "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "NonZero", "Not", "Or",
    "RandomNormalLike", "RandomUniformLike", "Round", "Shape", "Sign", "Size", "Xor",
))
# fmt: on


@dataclass(frozen=True)
class Call:
    """One node on the way back.

    Attributes:
        node: the forward node, in the working copy (a rule may ask it for another output).
        emit: where to append nodes.
        cotangents: of the node's outputs, "" where there is none.
        wrt: the input whose cotangent is asked for.
        tensors: what is known of the node's inputs and outputs, by name.
        constants: returns the value of an input that the model fixes, None if it may vary.
        made: returns the node of the forward graph that gives a value, None if that is not known.
    """

    node: onnx.NodeProto
    emit: Emitter
    cotangents: tuple[str, ...]
    wrt: int
    tensors: dict[str, Tensor]
    constants: Callable[[str], np.ndarray[Any, Any] | None]
    made: Callable[[str], onnx.NodeProto | None] = lambda name: None

    @property
    def g(self) -> str:
        """The cotangent of the first output, the only one that most rules get."""
        return self.cotangents[0]

    @property
    def x(self) -> str:
        """The input whose cotangent is asked for."""
        return str(self.node.input[self.wrt])

    @property
    def y(self) -> str:
        """The first output."""
        return str(self.node.output[0])

    @property
    def element(self) -> int:
        """The element type of the first output.

        Raises:
            UnknownError: it is unknown.
        """
        element = self.tensors[self.y].element
        if not element:
            raise UnknownError(f"the element type of {self.y!r} is unknown")
        return element

    def term(self, name: str) -> Term:
        """Returns an input, output or cotangent of the output, for use in a formula."""
        element = self.tensors[name].element if name in self.tensors else 0
        return Term(self.emit, name, element or self.element)

    def terms(self) -> tuple[Term, Term, Term]:
        """Returns g, x and y for use in a formula."""
        return self.term(self.g), self.term(self.x), self.term(self.y)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Returns an attribute's value as a Python object."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def number(self, name: str, default: float) -> float:
        """Returns the value of a float attribute."""
        return float(self.attribute(name, default))

    def constant(self, index: int, what: str) -> np.ndarray[Any, Any] | None:
        """Returns the value of an input that must be fixed, None where it is left out.

        Raises:
            NotImplementedError: it is computed at run time.
        """
        if index >= len(self.node.input) or not self.node.input[index]:
            return None
        value = self.constants(self.node.input[index])
        if value is None:
            raise NotImplementedError(f"its {what} {self.node.input[index]!r} is not constant")
        return value

    def shape(self, name: str) -> tuple[Any, ...]:
        """Returns the shape of an input or output.

        Raises:
            UnknownError: the rank is unknown.
        """
        shape = self.tensors[name].shape
        if shape is None:
            raise UnknownError(f"the rank of {name!r} is unknown")
        return shape

    def static(self, sizes: Sequence[Any], what: str) -> list[int]:
        """Returns sizes as numbers.

        Raises:
            NotImplementedError: one is not known before run time.
        """
        if not all(isinstance(size, int) for size in sizes):
            raise NotImplementedError(
                f"{what} {tuple(sizes)} is known only at run time: fix the input size "
                "(onnxruntime.tools.make_dynamic_shape_fixed)"
            )
        return [int(size) for size in sizes]

    def second_output(self) -> str:
        """Returns the node's second output, which is added to the forward node if it has none."""
        while len(self.node.output) < 2:
            self.node.output.append("")
        self.node.output[1] = self.node.output[1] or self.emit.name("second")
        return str(self.node.output[1])

    def unbroadcast(self, g: str) -> str:
        """Sums a cotangent shaped like the output down to the shape of the input asked for."""
        return self.emit.unbroadcast(g, self.tensors[self.y], self.tensors[self.x], self.x)


def vjp(
    op_type: str,
    *since: int,
    wrt: int | Sequence[int] | None = 0,
    all_outputs: bool = False,
    domain: str = "",
) -> Callable[[Rule], Rule]:
    """Registers a rule.

    Args:
        op_type: the operator.
        since: the since-versions of the operator that the rule is right for.
        wrt: the input, or inputs, whose cotangent it gives; None for any (variadic operators).
        all_outputs: whether it reads `cotangents` of several outputs; else a model in which
            another output than the first has a cotangent is refused.
        domain: the operator's domain.

    Raises:
        ValueError: there is a rule already.
    """
    indices = (_ANY_INPUT,) if wrt is None else (wrt,) if isinstance(wrt, int) else tuple(wrt)

    def register(rule: Rule) -> Rule:
        for version in since:
            for index in indices:
                key = (domain, op_type, version, index)
                if key in _rules:
                    raise ValueError(f"a gradient rule for {key} is registered already")
                _rules[key] = Registered(rule, all_outputs)
        return rule

    return register


def registered() -> dict[tuple[str, str, int], frozenset[int] | None]:
    """Returns (domain, op_type, since-version) -> the inputs that have a rule, None for any."""
    found: dict[tuple[str, str, int], frozenset[int] | None] = {}
    for domain, op_type, since, index in sorted(_rules):
        known: frozenset[int] | None = found.get((domain, op_type, since), frozenset())
        if known is not None:
            found[domain, op_type, since] = None if index == _ANY_INPUT else known | {index}
    return found


def find_rule(node: onnx.NodeProto, opsets: dict[str, int], wrt: int) -> Registered | None:
    """Returns the rule for a node, None where there is none.

    Args:
        node: the forward node.
        opsets: the model's version of each domain.
        wrt: the input whose cotangent is asked for.
    """
    domain, since = _domain(node), since_version(node, opsets)
    exact = _rules.get((domain, node.op_type, since, wrt))
    return exact or _rules.get((domain, node.op_type, since, _ANY_INPUT))


def since_version(node: onnx.NodeProto, opsets: dict[str, int]) -> int:
    """Returns the opset that the operator got its present meaning in.

    For operators that onnx does not know, it is the version that the model imports.
    """
    opset = opset_for(node, opsets)
    try:
        return int(onnx.defs.get_schema(node.op_type, opset, _domain(node)).since_version)
    except onnx.defs.SchemaError:
        return opset


def opset_for(node: onnx.NodeProto, opsets: dict[str, int]) -> int:
    """Returns the version of the node's domain that the model imports."""
    domain = _domain(node)
    return opsets.get(domain, opsets.get("ai.onnx", 0) if not domain else 0)


def is_zero_gradient(node: onnx.NodeProto) -> bool:
    """Whether the gradient of every output for every input is zero by definition."""
    return not _domain(node) and node.op_type in ZERO_GRADIENT


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else str(node.domain)
