"""Quantization, straight through: rounding counts as the identity inside the range.

QuantizeLinear, y = round(x / s) + zero point, cut to the range of its type:
    g / s 1[low <= round(x / s) + zero point <= high]
DequantizeLinear, y = s (x - zero point):    g s

So a pair of them passes g on where nothing is cut, as fake quantization in training does. The
cotangent of an integer tensor is a float one.
"""

from __future__ import annotations

import re

from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.registry import Call, vjp

_SINCE = (10, 13, 19, 21, 23, 24, 25)
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
    g = Term(call.emit, call.g, x.element).to(scale.element)
    return (g / scale * inside).to(x.element).name


@vjp("DequantizeLinear", *_SINCE)
def dequantize_linear(call: Call) -> str:
    """The zero point does not matter. Gives a float cotangent of an integer tensor."""
    scale = _along_axis(call, 1)
    return (call.term(call.g).to(scale.element) * scale).name


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
