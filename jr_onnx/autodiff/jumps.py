"""Recognising y = x if x > t else 0 in a graph, in whatever nodes it is spelled.

    ThresholdedRelu<t>(x)
    Where(x > t, v, 0)      Where(x - t > 0, v, 0)      Where(x <= t, 0, v)
    Mul(v, Cast(x > t))

where v is x, Relu(x), Clip(x, 0, cap), or Abs of these. What a retrofit writes is among them, and
so is what others write by hand; t may be an input of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from jr_onnx.autodiff.emit import Emitter, Term
from jr_onnx.autodiff.surrogates import EXACT, Surrogate
from jr_onnx.model import Tensor, attribute_of
from jr_onnx.model.graphs import ONNX_DOMAINS

# Returns the value that a name always has, None if it may vary.
Constant = Callable[[str], np.ndarray[Any, Any] | None]
# Where a scope's node says its site path: inlining a function renames its values.
PATH_KEY = "jr_onnx/path"
_OURS = "jr_onnx/v1/"


@dataclass(frozen=True)
class Jump:
    """One jump of the graph.

    Attributes:
        path: of the site.
        node: the node that gives y.
        x: the pre-activation.
        threshold: the value t, or the number itself in a ThresholdedRelu.
        passed: the value that y is above t: x, or what a Relu or Clip makes of it.
        cap: upper bound of what passes, the value or the number itself.
    """

    path: str
    node: onnx.NodeProto = field(repr=False)
    x: str
    threshold: str | float
    passed: str
    cap: str | float | None = None

    def cotangent(self, emit: Emitter, g: str, tensor: Tensor, surrogate: Surrogate) -> str:
        """Appends the cotangent of x.

        Args:
            emit: where to append nodes.
            g: the cotangent of y.
            tensor: what is known of y.
            surrogate: the slope to use.
        """
        x, y = (Term(emit, name, tensor.element) for name in (self.x, self.node.output[0]))
        if surrogate == EXACT and self.node.op_type == "ThresholdedRelu":
            # Read off y, which onnxruntime may have fused with what comes before.
            slope: Term | None = y > 0
        else:
            slope = surrogate.slope(x, x.like(self.threshold))
        if self.cap is not None:
            below = 1 - (x > x.like(self.cap))
            slope = below if slope is None else slope * below
        return g if slope is None else (Term(emit, g, tensor.element) * slope).name


def find_jumps(graph: onnx.GraphProto, constant: Constant, x: str) -> list[Jump]:
    """Returns the jumps of a graph without local functions.

    Args:
        graph: its nodes.
        constant: the values that the model fixes.
        x: the input that is under attack; every other input counts as fixed.
    """
    finder = _Finder(graph, constant, x)
    return [jump for node in graph.node for jump in finder.jumps(node)]


class _Finder:
    def __init__(self, graph: onnx.GraphProto, constant: Constant, x: str) -> None:
        self._made = {name: node for node in graph.node for name in node.output if name}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._constant = constant
        self._given = {value.name for value in graph.input} - {x}

    def jumps(self, node: onnx.NodeProto) -> Iterator[Jump]:
        if node.domain not in ONNX_DOMAINS:
            return
        if node.op_type == "ThresholdedRelu":
            alpha = attribute_of(node, "alpha")
            jump = 1.0 if alpha is None else alpha.f
            if jump >= 0:
                yield Jump(self._path(node), node, node.input[0], float(jump), node.input[0])
            return
        if node.op_type == "Where":
            mask, yes, no = node.input
            spellings = [("Greater", mask, yes, no), ("LessOrEqual", mask, no, yes)]
        elif node.op_type == "Mul":
            a, b = node.input
            pairs = [(self._of(name, "Cast"), other) for name, other in ((a, b), (b, a))]
            spellings = [("Greater", cast.input[0], v, "") for cast, v in pairs if cast]
        else:
            return
        for comparison, mask, passed, zero in spellings:
            compared = self._compared(mask, comparison)
            if compared and (not zero or self._is_zero(zero)):
                right, cap = self._passed(passed, compared[0])
                if right:
                    yield Jump(self._path(node), node, *compared, passed, cap)
                    return

    def _compared(self, mask: str, comparison: str) -> tuple[str, str] | None:
        """Returns x and t of a mask that says x > t (or x <= t)."""
        compare = self._of(mask, comparison)
        if compare is None:
            return None
        x, threshold = compare.input
        difference = self._of(x, "Sub")
        if difference is not None and self._is_zero(threshold):
            x, threshold = difference.input
        return (x, threshold) if self._is_jump(threshold) else None

    def _passed(self, v: str, x: str) -> tuple[bool, str | float | None]:
        """Returns whether v is x wherever x is positive, and its upper bound."""
        absolute = self._of(v, "Abs")
        v = absolute.input[0] if absolute else v
        relu, clip = self._of(v, "Relu"), self._of(v, "Clip")
        if clip and clip.input[0] == x and self._starts_at_zero(clip):
            bound = attribute_of(clip, "max")
            given = clip.input[2] if len(clip.input) > 2 else ""
            return True, bound.f if bound else given or None
        return v == x or bool(relu and relu.input[0] == x), None

    def _of(self, name: str, op_type: str) -> onnx.NodeProto | None:
        node = self._made.get(name)
        known = node is not None and node.op_type == op_type and node.domain in ONNX_DOMAINS
        return node if known else None

    def _starts_at_zero(self, clip: onnx.NodeProto) -> bool:
        bound = attribute_of(clip, "min")
        if bound is not None:
            return bool(bound.f == 0)
        return len(clip.input) > 1 and self._is_zero(clip.input[1])

    def _is_jump(self, name: str) -> bool:
        value = self._constant(name)
        return name in self._given or (value is not None and bool((value >= 0).all()))

    def _is_zero(self, name: str) -> bool:
        value, difference = self._constant(name), self._of(name, "Sub")
        if difference is not None:
            return bool(difference.input[0] == difference.input[1])
        return value is not None and not value.any()

    def _path(self, node: onnx.NodeProto) -> str:
        noted = {entry.key: entry.value for entry in node.metadata_props}.get(PATH_KEY)
        y = str(node.output[0])
        users = self._users.get(y, [])
        if noted is None and y.startswith(_OURS) and len(users) == 1:
            return str(users[0].output[0])  # the Clip that caps a jump has the site's name
        return noted or y
