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
from jr_onnx.autodiff.surrogates import Surrogate
from jr_onnx.model import Tensor, attribute_of
from jr_onnx.model.graphs import ONNX_DOMAINS

# Returns the value that a name always has, None if it may vary.
Constant = Callable[[str], np.ndarray[Any, Any] | None]
# Where a scope's node says its site path: inlining a function renames its values.
PATH_KEY = "jr_onnx/path"


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
        clip: a Clip after the jump that belongs to the site: it gives the cap.
    """

    path: str
    node: onnx.NodeProto = field(repr=False)
    x: str
    threshold: str | float
    passed: str
    cap: str | float | None = None
    clip: onnx.NodeProto | None = field(default=None, repr=False)

    @property
    def y(self) -> str:
        """The name of the site's output."""
        return str((self.clip or self.node).output[0])

    def cotangent(self, emit: Emitter, g: str, tensor: Tensor, surrogate: Surrogate) -> str:
        """Appends the cotangent of x under a surrogate slope.

        Args:
            emit: where to append nodes.
            g: the cotangent of y.
            tensor: what is known of y.
            surrogate: the slope to use.
        """
        x = Term(emit, self.x, tensor.element)
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
        # Old exporters (IR 3) list the weights among the inputs.
        weights = {tensor.name for tensor in graph.initializer}
        self._given = {value.name for value in graph.input} - weights - {x}
        self._outputs = {value.name for value in graph.output}

    def jumps(self, node: onnx.NodeProto) -> Iterator[Jump]:
        if node.domain not in ONNX_DOMAINS:
            return
        if node.op_type == "ThresholdedRelu":
            alpha = attribute_of(node, "alpha")
            jump = 1.0 if alpha is None else alpha.f
            if jump >= 0:
                yield self._site(node, node.input[0], float(jump), node.input[0], None)
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
                v, cap = self._passed(passed, compared[0])
                if v:
                    yield self._site(node, *compared, v, cap)
                    return

    def _site(
        self,
        node: onnx.NodeProto,
        x: str,
        threshold: str | float,
        passed: str,
        cap: str | float | None,
    ) -> Jump:
        """Takes a Clip that is all that reads the jump as a part of the site.

        On the way back it would see 0, its lower bound, wherever the jump let nothing pass.
        """
        y, clip = node.output[0], None
        users = self._users.get(y, [])
        if cap is None and len(users) == 1 and y not in self._outputs and self._is_clip(users[0]):
            clip, cap = users[0], self._upper(users[0])
        return Jump(self._path(clip or node), node, x, threshold, passed, cap, clip)

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

    def _passed(self, v: str, x: str) -> tuple[str, str | float | None]:
        """Returns the value that passes if it is x wherever x is positive; and its upper bound."""
        absolute = self._of(v, "Abs")
        inner = absolute.input[0] if absolute else v
        if inner == x:
            return x, None  # above a jump x is positive, so |x| is x
        relu, clip = self._of(inner, "Relu"), self._of(inner, "Clip")
        if clip and clip.input[0] == x and self._is_clip(clip):
            return v, self._upper(clip)
        return (v if relu and relu.input[0] == x else ""), None

    def _of(self, name: str, op_type: str) -> onnx.NodeProto | None:
        node = self._made.get(name)
        known = node is not None and node.op_type == op_type and node.domain in ONNX_DOMAINS
        return node if known else None

    def _is_clip(self, node: onnx.NodeProto) -> bool:
        """Whether it is a Clip from 0."""
        if node.op_type != "Clip" or node.domain not in ONNX_DOMAINS:
            return False
        bound = attribute_of(node, "min")
        if bound is not None:
            return bool(bound.f == 0)
        return len(node.input) > 1 and self._is_zero(node.input[1])

    def _upper(self, clip: onnx.NodeProto) -> str | float | None:
        bound = attribute_of(clip, "max")
        if bound is not None:
            return float(bound.f)
        return (clip.input[2] if len(clip.input) > 2 else "") or None

    def _is_jump(self, name: str) -> bool:
        value = self._constant(name)
        return name in self._given or (value is not None and bool((value >= 0).all()))

    def _is_zero(self, name: str) -> bool:
        value, difference = self._constant(name), self._of(name, "Sub")
        if difference is not None:
            return bool(difference.input[0] == difference.input[1])
        return value is not None and not value.any()

    def _path(self, node: onnx.NodeProto) -> str:
        noted = {entry.key: entry.value for entry in node.metadata_props}
        return noted.get(PATH_KEY) or str(node.output[0])
