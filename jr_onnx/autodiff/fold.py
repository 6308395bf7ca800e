"""Shape arithmetic that no input reaches, computed ahead.

    Mod(4, 3) -> Reshape -> Slice(Shape(x), 0, .)      becomes      Slice(Shape(x), 0, [1])

Exporters leave such chains behind, and onnx infers no rank after a Slice of unknown length.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from jr_onnx.autodiff.emit import Emitter
from jr_onnx.errors import InvalidModelError
from jr_onnx.model.graphs import ONNX_DOMAINS

_LARGEST = 1024  # elements; larger constants are weights
# fmt: off
_ARITHMETIC = frozenset((
    "Add", "And", "Cast", "Ceil", "Concat", "Div", "Equal", "Floor", "Gather", "Greater",
    "Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "ReduceProd", "Reshape",
    "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
))
# fmt: on


def fold(proto: onnx.ModelProto) -> None:
    """Replaces nodes of the main graph whose inputs are all fixed and small by their values."""
    graph = proto.graph
    # Before IR 4 every weight had to be listed as an input, and none was overridable.
    given = {value.name for value in graph.input} if proto.ir_version >= 4 else set()
    fixed = {
        tensor.name
        for tensor in graph.initializer
        if tensor.name not in given
        and tensor.data_location != TensorProto.EXTERNAL
        and math.prod(tensor.dims) <= _LARGEST
    }
    constants, computed = [], []
    for node in graph.node:
        if node.domain in ONNX_DOMAINS and node.op_type == "Constant" and _is_small(node):
            constants.append(node)
        elif (
            node.domain in ONNX_DOMAINS
            and node.op_type in _ARITHMETIC
            and fixed.issuperset(filter(None, node.input))
        ):
            computed.append(node)
        else:
            continue
        fixed.update(node.output)
    if not computed:
        return
    used = {name for node in computed for name in node.input}
    made = [name for node in computed for name in node.output]
    part = helper.make_graph(
        [node for node in constants if node.output[0] in used] + computed,
        "fixed",
        [],
        [helper.make_empty_tensor_value_info(name) for name in made],
        [tensor for tensor in graph.initializer if tensor.name in used],
    )
    whole = helper.make_model(part, opset_imports=proto.opset_import)
    try:
        values = ReferenceEvaluator(whole).run(None, {})
    except Exception:  # of no particular type: whatever it does not know stays as it is
        return
    gone = set(made)
    kept = [node for node in graph.node if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    for name, value in zip(made, values, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def settled(emit: Emitter, start: int, name: str) -> np.ndarray[Any, Any] | None:
    """Takes nodes off again if all that they read is fixed, and returns the value that they give.

    Args:
        emit: its nodes from `start` on are meant.
        start: how many nodes stay.
        name: of the value.
    """
    nodes = emit.nodes[start:]
    made = {"", *(name for node in nodes for name in node.output)}
    if not all(made.issuperset(node.input) for node in nodes):
        return None
    del emit.nodes[start:]
    part = helper.make_graph(nodes, "fixed", [], [helper.make_empty_tensor_value_info(name)])
    whole = helper.make_model(part, opset_imports=[helper.make_opsetid("", emit.opset)])
    return np.asarray(ReferenceEvaluator(whole).run(None, {})[0])  # type: ignore[index]


def _is_small(constant: onnx.NodeProto) -> bool:
    if not constant.attribute:  # which onnx.checker lets pass
        raise InvalidModelError(f"Constant {constant.output[0]!r} has no value")
    return bool(math.prod(constant.attribute[0].t.dims) <= _LARGEST)
