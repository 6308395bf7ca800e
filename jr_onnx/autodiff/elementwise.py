"""Elementwise rules.

Add: g, g    Sub: g, -g    Mul: g b, g a    Div: g / b, -g y / b
Neg: -g      Identity: g   Relu: g 1[y > 0]  Where: g 1[c], g 1[not c]
"""

from __future__ import annotations

from jr_onnx.autodiff.registry import Call, vjp


@vjp("Identity", 1, 13, 14, 16, 19, 21, 23, 24, 25)
def identity(call: Call) -> str:
    """Y = x."""
    return call.g


@vjp("Neg", 1, 6, 13)
def neg(call: Call) -> str:
    """Y = -x."""
    return call.emit.op("Neg", call.g)


@vjp("Add", 7, 13, 14, wrt=(0, 1))
def add(call: Call) -> str:
    """Y = a + b."""
    return call.unbroadcast(call.g)


@vjp("Sub", 7, 13, 14)
def sub_left(call: Call) -> str:
    """Y = a - b, for a."""
    return call.unbroadcast(call.g)


@vjp("Sub", 7, 13, 14, wrt=1)
def sub_right(call: Call) -> str:
    """Y = a - b, for b."""
    return call.unbroadcast(call.emit.op("Neg", call.g))


@vjp("Mul", 7, 13, 14, wrt=(0, 1))
def mul(call: Call) -> str:
    """Y = a b."""
    other = call.node.input[1 - call.wrt]
    return call.unbroadcast(call.emit.op("Mul", call.g, other))


@vjp("Div", 7, 13, 14)
def div_numerator(call: Call) -> str:
    """Y = a / b, for a."""
    return call.unbroadcast(call.emit.op("Div", call.g, call.node.input[1]))


@vjp("Div", 7, 13, 14, wrt=1)
def div_denominator(call: Call) -> str:
    """Y = a / b, for b: -g a / b^2 = -g y / b."""
    slope = call.emit.op("Div", call.emit.op("Mul", call.g, call.y), call.x)
    return call.unbroadcast(call.emit.op("Neg", slope))


@vjp("Relu", 1, 6, 13, 14)
def relu(call: Call) -> str:
    """Y = max(x, 0). The mask is read off y: onnxruntime may then fuse the Relu into its Conv."""
    positive = call.emit.op("Greater", call.y, call.emit.scalar(0, call.element))
    return call.emit.masked(call.g, positive, call.element)


@vjp("Where", 9, 16, wrt=1)
def where_true(call: Call) -> str:
    """Y = a where c else b, for a; with c = x > jump this is the exact gradient of a jump."""
    return call.unbroadcast(call.emit.masked(call.g, call.node.input[0], call.element))


@vjp("Where", 9, 16, wrt=2)
def where_false(call: Call) -> str:
    """Y = a where c else b, for b."""
    otherwise = call.emit.op("Not", call.node.input[0])
    return call.unbroadcast(call.emit.masked(call.g, otherwise, call.element))
