"""Convolutions of tiny maps as matrix products, before they are differentiated.

    Conv(x, W, b)      becomes      Reshape(Gemm(Reshape(x), M', b repeated for each window))

A 3 x 3 kernel on a map of 2 x 2 pixels covers more padding than pixels: the matrix M of all pairs
of pixels asks for fewer products, forwards and, by Gemm's own rule, backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from jr_onnx.autodiff.conv import Windows, is_tiny, kernel_of, matrix_of_pairs
from jr_onnx.autodiff.emit import Emitter
from jr_onnx.autodiff.registry import Call
from jr_onnx.model import Names, Tensor
from jr_onnx.model.graphs import ONNX_DOMAINS, opset_of


def write_as_matrices(
    proto: onnx.ModelProto,
    tensor: Callable[[str], Tensor],
    constant: Callable[[str], np.ndarray[Any, Any] | None],
) -> bool:
    """Rewrites the Conv nodes of the main graph whose maps are tiny.

    Args:
        proto: to be changed; values keep their names.
        tensor: returns what is known of a value of the main graph.
        constant: returns the value that the model fixes, None if it may vary.

    Returns:
        Whether there were any: then there are values that `tensor` does not know.
    """
    emit = Emitter(Names.of(proto), "dense", opset_of(proto.opset_import))
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in proto.graph.node:
        if node.op_type == "Conv" and node.domain in ONNX_DOMAINS:
            tensors = {name: tensor(name) for name in (*node.input, *node.output)}
            written = _written(Call(node, emit, ("",), 0, tensors, constant))
            nodes += emit.nodes if written else [node]
            changed = changed or written
            emit.nodes.clear()
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return changed


def _written(call: Call) -> bool:
    """Appends the nodes for a Conv if it is tiny."""
    emit = call.emit
    try:
        windows = Windows.of(call, kernel_of(call))
        if not is_tiny(call, windows, call.attribute("group", 1)):
            return False
    except NotImplementedError:  # a rank, type or size is unknown
        return False
    matrix, rows, columns = matrix_of_pairs(call, windows)
    number = call.shape(call.y)[2:]
    bias = list(call.node.input[2:3])
    if bias and bias[0]:
        pixels = emit.integers(1, math.prod(number))
        repeated = emit.op("Expand", emit.unsqueeze(bias[0], [1]), pixels)
        bias = [emit.op("Reshape", repeated, emit.integers(rows))]
    flat = emit.op("Reshape", call.x, emit.integers(-1, columns))
    product = emit.op("Gemm", flat, matrix, *bias, transB=1)
    whole = emit.integers(-1, rows // math.prod(number), *number)
    emit.op("Reshape", product, whole, output=call.y)
    return True
