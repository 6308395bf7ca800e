"""All the slices of an axis, taken one by one, as one Split before it is differentiated.

    q = Gather(x, 0), k = Gather(x, 1), v = Gather(x, 2)      becomes      Split(x), Squeeze, ...

On the way back their cotangents are then concatenated, and not each padded, and added up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from jr_onnx.autodiff.emit import Emitter
from jr_onnx.autodiff.registry import Call
from jr_onnx.model import Names, Tensor
from jr_onnx.model.graphs import ONNX_DOMAINS, opset_of


def write_as_split(
    proto: onnx.ModelProto,
    tensor: Callable[[str], Tensor],
    constant: Callable[[str], np.ndarray[Any, Any] | None],
) -> bool:
    """Rewrites the Gather nodes of the main graph that take an axis apart, from opset 13 on.

    Args:
        proto: to be changed; values keep their names.
        tensor: returns what is known of a value of the main graph.
        constant: returns the value that the model fixes, None if it may vary.

    Returns:
        Whether there were any: then there are values that `tensor` does not know.
    """
    opset, graph = opset_of(proto.opset_import), proto.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    emit = Emitter(Names.of(proto), "parts", opset)
    whole: dict[str, list[onnx.NodeProto]] = {}  # the nodes in place of a Gather
    for value, nodes in readers.items():
        if opset < 13 or len(nodes) < 2 or not all(_takes_from(node, value) for node in nodes):
            continue
        tensors = {value: tensor(value)}
        calls = [Call(node, emit, ("",), 0, tensors, constant) for node in nodes]
        axis, order = _apart(calls)
        if order:
            sizes, axes = emit.integers(*[1] * len(order)), emit.integers(axis)
            parts = emit.node("Split", [value, sizes], [None] * len(order), axis=axis)
            for call, index in zip(calls, order, strict=True):
                emit.op("Squeeze", parts[index], axes, output=call.y)
            whole.update({call.y: [] for call in calls})
            whole[calls[0].y] = list(emit.nodes)
            emit.nodes.clear()
    made = [new for node in graph.node for new in whole.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(made)
    return bool(whole)


def _takes_from(node: onnx.NodeProto, value: str) -> bool:
    return node.op_type == "Gather" and node.domain in ONNX_DOMAINS and node.input[0] == value


def _apart(calls: list[Call]) -> tuple[int, list[int]]:
    """Returns the axis, and the index that each node picks if they pick each once; else none."""
    shape = calls[0].tensors[calls[0].x].shape
    indices = [call.constants(call.node.input[1]) for call in calls]
    if shape is None or any(index is None or index.ndim for index in indices):
        return 0, []
    axes = {call.attribute("axis", 0) % len(shape) for call in calls}
    axis = axes.pop()
    if axes or shape[axis] != len(calls):
        return 0, []
    order = [int(index) % len(calls) for index in indices if index is not None]
    return axis, order if len(set(order)) == len(calls) else []
