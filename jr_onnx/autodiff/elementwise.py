"""Elementwise rules.

Add: g, g    Sub: g, -g    Mul: g b, g a    Div: g / b, -g y / b
Neg: -g      Abs: g sign(x)    Identity: g    Where: g 1[c], g 1[not c]
Relu, ThresholdedRelu: g 1[y > 0]             Clip: g 1[x = y]
"""

from __future__ import annotations

from jr_onnx.autodiff.registry import Call, vjp


@vjp("Identity", 1, 13, 14, 16, 19, 21, 23, 24, 25)
def identity(call: Call) -> str:
    """y = x."""
    return call.g


@vjp("Neg", 1, 6, 13)
def neg(call: Call) -> str:
    """y = -x."""
    return call.emit.op("Neg", call.g)


@vjp("Add", 7, 13, 14, wrt=(0, 1))
def add(call: Call) -> str:
    """y = a + b."""
    return call.unbroadcast(call.g)


@vjp("Sub", 7, 13, 14)
def sub_left(call: Call) -> str:
    """y = a - b, for a."""
    return call.unbroadcast(call.g)


@vjp("Sub", 7, 13, 14, wrt=1)
def sub_right(call: Call) -> str:
    """y = a - b, for b."""
    return call.unbroadcast(call.emit.op("Neg", call.g))


@vjp("Mul", 7, 13, 14, wrt=(0, 1))
def mul(call: Call) -> str:
    """y = a b."""
    other = call.node.input[1 - call.wrt]
    return call.unbroadcast(call.emit.op("Mul", call.g, other))


@vjp("Div", 7, 13, 14)
def div_numerator(call: Call) -> str:
    """y = a / b, for a."""
    return call.unbroadcast(call.emit.op("Div", call.g, call.node.input[1]))


@vjp("Div", 7, 13, 14, wrt=1)
def div_denominator(call: Call) -> str:
    """y = a / b, for b: -g a / b^2 = -g y / b."""
    slope = call.emit.op("Div", call.emit.op("Mul", call.g, call.y), call.x)
    return call.unbroadcast(call.emit.op("Neg", slope))


@vjp("Abs", 1, 6, 13)
def absolute(call: Call) -> str:
    """y = |x|."""
    return call.emit.op("Mul", call.g, call.emit.op("Sign", call.x))


@vjp("Clip", 6, 11, 12, 13)
def clip(call: Call) -> str:
    """y = min(max(x, low), high): g where x = y, the bounds included.

    Pixels at exactly 0 and 1 lose their gradient otherwise.
    """
    emit = call.emit
    if emit.opset >= 11:
        inside = emit.op("Equal", call.x, call.y)
    else:  # Equal knows no floats yet
        moved = emit.op("Or", emit.op("Less", call.x, call.y), emit.op("Greater", call.x, call.y))
        inside = emit.op("Not", moved)
    return emit.masked(call.g, inside, call.element)


@vjp("ThresholdedRelu", 10, 22)
@vjp("Relu", 1, 6, 13, 14)
def relu(call: Call) -> str:
    """y = x if x > jump else 0. The mask is read off y: onnxruntime may then fuse Conv and Relu.

    A jump below 0 would need x; the rewriter makes none.
    """
    if call.node.op_type == "ThresholdedRelu" and call.attribute("alpha", 1.0) < 0:
        raise NotImplementedError("ThresholdedRelu with a negative alpha")
    positive = call.emit.op("Greater", call.y, call.emit.scalar(0, call.element))
    return call.emit.masked(call.g, positive, call.element)


@vjp("Where", 9, 16)
def where_condition(call: Call) -> str:
    """y = a where c else b, for c: piecewise constant."""
    return ""


@vjp("Where", 9, 16, wrt=1)
def where_true(call: Call) -> str:
    """y = a where c else b, for a; with c = x > jump this is the exact gradient of a jump."""
    return call.unbroadcast(call.emit.masked(call.g, call.node.input[0], call.element))


@vjp("Where", 9, 16, wrt=2)
def where_false(call: Call) -> str:
    """y = a where c else b, for b."""
    otherwise = call.emit.op("Not", call.node.input[0])
    return call.unbroadcast(call.emit.masked(call.g, otherwise, call.element))
