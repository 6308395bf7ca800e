"""Quantization, straight through: rounding counts as the identity inside the range.

QuantizeLinear, y = round(x / s) + zero point, cut to the range of its type:
    g / s 1[low <= round(x / s) + zero point <= high]
DequantizeLinear, y = s (x - zero point):    g s

So a pair of them passes g on where nothing is cut, as fake quantization in training does. The
cotangent of an integer tensor is a float32 one. Between the pair may be operators that pick or
compare integers: they get the gradient that they have on the same numbers as floats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx
from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.registry import Call, vjp
from jr_onnx.model import Tensor
from jr_onnx.model.graphs import ONNX_DOMAINS

_SINCE = (10, 13, 19, 21, 23, 24, 25, 28)
# What DequantizeLinear takes.
_INTEGERS = frozenset(
    TensorProto.DataType.Value(sign + "INT" + bits)
    for sign in ("", "U")
    for bits in ("2", "4", "8", "16", "32")
)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@vjp("QuantizeLinear", *_SINCE)
def quantize_linear(call: Call) -> str:
    """What rounds to a number of the type, once the zero point is added, is inside."""
    x, scale, low, high = call.term(call.x), _along_axis(call, 1), *_range(call.element)
    if x.element not in _FLOATS:
        raise NotImplementedError("integers are quantized again")
    q = x.to(scale.element) / scale
    if any(call.node.input[2:]):
        q = q + _along_axis(call, 2).to(scale.element)
    inside = (q < high + 0.5) - (q < low - 0.5)
    g = Term(call.emit, call.g, TensorProto.FLOAT).to(scale.element)
    return (g / scale * inside).to(x.element).name


@vjp("DequantizeLinear", *_SINCE)
def dequantize_linear(call: Call) -> str:
    """The zero point does not matter. Gives a float cotangent of an integer tensor."""
    scale = _along_axis(call, 1)
    return (call.term(call.g).to(scale.element) * scale).to(TensorProto.FLOAT).name


def in_floats(call: Call) -> Call:
    """Returns the same call of a copy of the node in float32, if it takes quantized numbers.

    The copy runs in the gradient graph, on the values cast to float32; indices and conditions stay
    what they are.
    """
    node, emit = call.node, call.emit
    element = call.tensors[call.x].element
    pair = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    if node.domain not in ONNX_DOMAINS or pair or element not in _INTEGERS:
        return call
    schema = onnx.defs.get_schema(node.op_type, emit.opset)
    copy, origins, tensors = onnx.NodeProto(), {}, dict(call.tensors)
    copy.CopyFrom(node)
    copy.name = emit.name(node.op_type.lower())
    kind = _formal(schema.inputs, call.wrt).type_str
    for at, name in enumerate(node.input):
        if name and _formal(schema.inputs, at).type_str == kind:
            copy.input[at] = emit.op("Cast", name, to=TensorProto.FLOAT)
            origins[copy.input[at]] = name
    for at, name in enumerate(node.output):
        copy.output[at] = emit.name("float") if name else ""
        if name and _formal(schema.outputs, at).type_str == kind:
            origins[copy.output[at]] = name
        elif name:
            tensors[copy.output[at]] = tensors[name]
    floats = {new: Tensor(TensorProto.FLOAT, tensors[old].shape) for new, old in origins.items()}
    emit.nodes.append(copy)
    return replace(
        call,
        node=copy,
        tensors={**tensors, **floats},
        constants=lambda name: call.constants(origins.get(name, name)),
    )


def _formal(formals: Sequence[Any], index: int) -> Any:
    """Returns the formal input or output; the last may stand for any number."""
    return formals[min(index, len(formals) - 1)]


def _along_axis(call: Call, index: int) -> Term:
    """Returns the scale or the zero point in a shape that broadcasts to x."""
    if call.attribute("block_size", 0):
        raise NotImplementedError("a scale for each block: only weights may be quantized like that")
    value = call.term(call.node.input[index])
    shape = call.shape(value.name)
    if not shape or shape == (1,):
        return value
    axis, rank = call.attribute("axis", 1), len(call.shape(call.x))
    return value.reshape(-1, *[1] * (rank - 1 - axis % rank))


def _range(element: int) -> tuple[int, int]:
    """Returns the least and the greatest number of an integer type."""
    name = TensorProto.DataType.Name(element)
    integer = re.fullmatch(r"(U?)INT(\d+)", name)
    if integer is None:
        raise NotImplementedError(f"quantization to {name}: only integer types have a gradient")
    count = 2 ** int(integer[2])
    return (0, count - 1) if integer[1] else (-count // 2, count // 2 - 1)
