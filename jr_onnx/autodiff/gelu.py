"""Recognising y = x P(x), P the normal distribution, in a graph, in whatever order it is spelled.

    Mul(Mul(x, Add(Erf(Div(x, sqrt(2))), 1)), 1/2)

Its parts stay untouched on the way back, which takes x P(x) at once: onnxruntime then fuses the way
forward, and the way back has nine passes over the data instead of nine and five.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from jr_onnx.autodiff.emit import Term
from jr_onnx.model.graphs import ONNX_DOMAINS

# Returns the value that a name always has, None if it may vary.
Constant = Callable[[str], np.ndarray[Any, Any] | None]


def slope(x: Term) -> Term:
    """Appends P(x) + x p(x), p the density. Factors are in the exponent: fewer passes."""
    t = x * math.sqrt(0.5)
    density = (-0.5 * math.log(math.pi) - t * t).op("Exp")
    return half_of_one_more(t.op("Erf")) + t * density


def half_of_one_more(erf: Term) -> Term:
    """Appends (1 + erf) / 2, in one pass where CUDA has the operator."""
    if erf.emit.opset < 22:
        return erf.op("HardSigmoid", alpha=0.5, beta=0.5)
    return 0.5 * erf + 0.5


def find_gelus(graph: onnx.GraphProto, constant: Constant) -> dict[str, str]:
    """Returns y -> x.

    Args:
        graph: its nodes.
        constant: the values that the model fixes.
    """
    finder = _Finder(graph, constant)
    found = (finder.around(node) for node in graph.node if node.op_type == "Erf")
    return dict(pair for pair in found if pair)


class _Finder:
    def __init__(self, graph: onnx.GraphProto, constant: Constant) -> None:
        self._made = {name: node for node in graph.node for name in node.output if name}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        for output in graph.output:
            self._users.setdefault(output.name, []).append(onnx.NodeProto())
        self._constant = constant

    def around(self, erf: onnx.NodeProto) -> tuple[str, str] | None:
        """Returns y and x if erf(x / sqrt(2)) is made into y, and into nothing else."""
        x, scale = self._scaled(erf.input[0])
        y = self._reader(erf.output[0], "Add")
        if not _near(scale, math.sqrt(0.5)) or y is None or not self._adds_one(y):
            return None
        factor, has_x, value = 1.0, False, str(y.output[0])
        while not (has_x and _near(factor, 0.5)):
            node = self._reader(value, "Mul", "Div")
            if node is None:
                return None
            other = node.input[1 if node.input[0] == value else 0]
            number = self._number(other)
            base, share = (x, number) if number is not None else self._scaled(other)
            if number is None and (has_x or base != x):
                return None
            has_x = has_x or number is None
            if node.op_type == "Div":
                if node.input[0] != value or number is None:
                    return None
                share = 1 / share
            factor, value = factor * share, str(node.output[0])
        return value, x

    def _reader(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        """Returns the node that reads a value if it is the only one, and one of these."""
        users = self._users.get(name, [])
        fits = len(users) == 1 and users[0].op_type in op_types
        return users[0] if fits and users[0].domain in ONNX_DOMAINS else None

    def _adds_one(self, node: onnx.NodeProto) -> bool:
        return any(self._number(name) == 1 for name in node.input)

    def _scaled(self, name: str) -> tuple[str, float]:
        """Returns what a value is a multiple of, and the factor."""
        node = self._made.get(name)
        if node is None or node.op_type not in ("Mul", "Div") or node.domain not in ONNX_DOMAINS:
            return name, 1.0
        for at in (0, 1) if node.op_type == "Mul" else (1,):
            number = self._number(node.input[at])
            if number is not None:
                factor = number if node.op_type == "Mul" else 1 / number
                return str(node.input[1 - at]), factor
        return name, 1.0

    def _number(self, name: str) -> float | None:
        value = self._constant(name)
        # With more axes it would give x more axes, too.
        one = value is not None and value.size == 1 and value.ndim < 2 and value.dtype.kind == "f"
        if value is None or not one or not value.any():
            return None
        return float(value.reshape(-1)[0])


def _near(value: float, exact: float) -> bool:
    return math.isclose(value, exact, rel_tol=1e-6)
