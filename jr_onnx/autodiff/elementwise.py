"""Elementwise rules.

Add: g, g    Sub: g, -g    Mul: g b, g a    Div: g / b, -g y / b    Sum: g    Mean: g / n
Neg: -g      Abs: g sign(x)    Identity, Dropout: g    Where: g 1[c], g 1[not c]
Pow: g p x^(p - 1), g y log(x)    Sqrt: g / 2y    Exp: g y    Log: g / x    Reciprocal: -g y^2
Sin: g cos(x)    Cos: -g sin(x)    Tan: g (1 + y^2)    Sinh: g cosh(x)    Cosh: g sinh(x)
Asin: g / sqrt(1 - x^2)    Acos: -g / sqrt(1 - x^2)    Atan: g / (1 + x^2)
Asinh: g / sqrt(x^2 + 1)    Acosh: g / sqrt(x^2 - 1)    Atanh: g / (1 - x^2)
Relu, ThresholdedRelu: g 1[y > 0]    Clip: g 1[x = y]    Max, Min: g 1[x = y] / number of ties
Cast, CastLike: g cast back; 0 to or from integers and booleans
"""

from __future__ import annotations

from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.registry import Call, vjp

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# fmt: off
_COUNTABLE = (
    TensorProto.BOOL, TensorProto.STRING, TensorProto.INT2, TensorProto.INT4, TensorProto.INT8,
    TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT2, TensorProto.UINT4,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
)
# fmt: on


@vjp("Identity", 1, 13, 14, 16, 19, 21, 23, 24, 25)
def identity(call: Call) -> str:
    """y = x."""
    return call.g


@vjp("Neg", 6, 13)
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


@vjp("Abs", 6, 13)
def absolute(call: Call) -> str:
    """y = |x|."""
    return call.emit.op("Mul", call.g, call.emit.sign(call.x, call.element))


@vjp("Clip", 6, 11, 12, 13)
def clip(call: Call) -> str:
    """y = min(max(x, low), high): g where x = y, the bounds included.

    Pixels at exactly 0 and 1 lose their gradient otherwise. The bounds of ReLU6 are no pixels': its
    mask is read off y, 0 at the bounds as torch has it, so that onnxruntime may fuse Conv and Clip.
    """
    emit = call.emit
    if _bounds(call) == (0, 6):
        return _relu6(call)
    return emit.masked(call.g, emit.equal(call.x, call.y), call.element)


@vjp("ThresholdedRelu", 10, 22)
@vjp("Relu", 6, 13, 14)
def relu(call: Call) -> str:
    """y = x if x > jump else 0. The mask is read off y: onnxruntime may then fuse Conv and Relu.

    A jump below 0 would need x; the rewriter makes none.
    """
    if call.node.op_type == "ThresholdedRelu" and call.attribute("alpha", 1.0) < 0:
        raise NotImplementedError("ThresholdedRelu with a negative alpha")
    if _has_steps(call):
        return _where_positive(call, call.g)
    positive = call.emit.op("Greater", call.y, call.emit.scalar(0, call.element))
    return call.emit.masked(call.g, positive, call.element)


def _relu6(call: Call) -> str:
    if _has_steps(call):
        below = call.emit.op("HardSigmoid", call.y, alpha=-(2.0**22), beta=6 * 2.0**22)
        return call.emit.op("Mul", _where_positive(call, call.g), below)
    g, _, y = call.terms()
    return (g * (y > 0) * (y < 6)).name


def _has_steps(call: Call) -> bool:
    """Whether a HardSigmoid so steep that it is a step may take the place of a comparison.

    It is one kernel in place of two, and onnxruntime's CPU runs it, unlike a comparison, in the
    blocked layout of the convolutions around it.
    """
    return call.element == TensorProto.FLOAT and call.emit.opset < 22  # CUDA's kernel is older


def _where_positive(call: Call, g: str) -> str:
    """Keeps g where y > 0, for all float32 but subnormal ones, where it fades out."""
    return call.emit.op("Mul", g, call.emit.op("HardSigmoid", call.y, alpha=2.0**127, beta=0.0))


def _bounds(call: Call) -> tuple[float | None, float | None]:
    """Returns the lower and upper bound of a Clip, None where it is not known."""
    if call.emit.opset < 11:
        return call.attribute("min"), call.attribute("max")
    given = [*call.node.input[1:], "", ""]
    found = [call.constants(name) if name else None for name in given[:2]]
    low, high = (None if value is None else float(value.reshape(-1)[0]) for value in found)
    return low, high


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


@vjp("Sum", 8, 13, wrt=None)
def sum_of_inputs(call: Call) -> str:
    """y = a + b + ..."""
    return call.unbroadcast(call.g)


@vjp("Mean", 8, 13, wrt=None)
def mean_of_inputs(call: Call) -> str:
    """y = (a + b + ...) / n."""
    return call.unbroadcast((call.term(call.g) * (1 / len(call.node.input))).name)


@vjp("Max", 8, 12, 13, wrt=None)
@vjp("Min", 8, 12, 13, wrt=None)
def extremum(call: Call) -> str:
    """y = the largest, or the smallest, of the inputs.

    Tied inputs share g equally, as torch has it, but an input that the model fixes takes no share:
    Max(x, bound) agrees with Clip, whose bounds are inclusive.
    """
    varying = [name for name in call.node.input if call.constants(name) is None]
    chosen = _is_extreme(call, call.x)
    if len(varying) > 1:
        ties = [_is_extreme(call, name) for name in varying]
        # At least 1: a fixed input may be the only extreme one.
        chosen = chosen / ties[0].op("Sum", *ties[1:]).op("Max", 1)
    return call.unbroadcast((call.term(call.g) * chosen).name)


@vjp("Pow", 7, 12, 13, 15)
def pow_base(call: Call) -> str:
    """y = x^p, for x: 0 where p = 0, at x = 0 too. The types of x and p may differ."""
    g, x, _ = call.terms()
    fixed = call.constants(call.node.input[1])
    if fixed is not None and (fixed == 2).all():
        return call.unbroadcast((g * (2 * x)).name)
    p = call.term(call.node.input[1]).to(x.element)
    return call.unbroadcast((g * (p * x.op("Pow", p - p.nonzero()))).name)


@vjp("Pow", 7, 12, 13, 15, wrt=1)
def pow_exponent(call: Call) -> str:
    """y = x^p, for p: 0 where x = 0."""
    g, p, y = call.terms()
    x = call.term(call.node.input[0])
    logarithm = (x + (1 - x.nonzero())).op("Log")
    return call.unbroadcast((g * (y * logarithm)).to(p.element).name)


@vjp("Sqrt", 6, 13)
def sqrt(call: Call) -> str:
    """y = sqrt x."""
    g, _, y = call.terms()
    return (0.5 * g / y).name


@vjp("Exp", 6, 13)
def exp(call: Call) -> str:
    """y = e^x."""
    return call.emit.op("Mul", call.g, call.y)


@vjp("Log", 6, 13)
def log(call: Call) -> str:
    """y = log x."""
    return call.emit.op("Div", call.g, call.x)


@vjp("Reciprocal", 6, 13)
def reciprocal(call: Call) -> str:
    """y = 1 / x."""
    g, _, y = call.terms()
    return (-(g * (y * y))).name


@vjp("Sin", 7, 22)
def sin(call: Call) -> str:
    """y = sin x."""
    g, x, _ = call.terms()
    return (g * x.op("Cos")).name


@vjp("Cos", 7, 22)
def cos(call: Call) -> str:
    """y = cos x."""
    g, x, _ = call.terms()
    return (-(g * x.op("Sin"))).name


@vjp("Tan", 7, 22)
def tan(call: Call) -> str:
    """y = tan x."""
    g, _, y = call.terms()
    return (g * (1 + y * y)).name


@vjp("Asin", 7, 22)
def asin(call: Call) -> str:
    """y = asin x."""
    g, x, _ = call.terms()
    return (g / (1 - x * x).op("Sqrt")).name


@vjp("Acos", 7, 22)
def acos(call: Call) -> str:
    """y = acos x."""
    g, x, _ = call.terms()
    return (-(g / (1 - x * x).op("Sqrt"))).name


@vjp("Atan", 7, 22)
def atan(call: Call) -> str:
    """y = atan x."""
    g, x, _ = call.terms()
    return (g / (1 + x * x)).name


@vjp("Sinh", 9, 22)
def sinh(call: Call) -> str:
    """y = sinh x. The slope is spelled out: onnxruntime has no Cosh and Sinh for CUDA."""
    g, x, _ = call.terms()
    return (g * (0.5 * (x.op("Exp") + (-x).op("Exp")))).name


@vjp("Cosh", 9, 22)
def cosh(call: Call) -> str:
    """y = cosh x."""
    g, x, _ = call.terms()
    return (g * (0.5 * (x.op("Exp") - (-x).op("Exp")))).name


@vjp("Asinh", 9, 22)
def asinh(call: Call) -> str:
    """y = asinh x."""
    g, x, _ = call.terms()
    return (g / (1 + x * x).op("Sqrt")).name


@vjp("Acosh", 9, 22)
def acosh(call: Call) -> str:
    """y = acosh x."""
    g, x, _ = call.terms()
    return (g / (x * x - 1).op("Sqrt")).name


@vjp("Atanh", 9, 22)
def atanh(call: Call) -> str:
    """y = atanh x."""
    g, x, _ = call.terms()
    return (g / (1 - x * x)).name


@vjp("Cast", 9, 13, 19, 21, 23, 24, 25, 28)
@vjp("CastLike", 15, 19, 21, 23, 24, 25)
def cast(call: Call) -> str:
    """y = x in another type: back to that of x. Piecewise constant to or from countable types."""
    before, after = (call.tensors[name].element for name in (call.x, call.y))
    if before in _COUNTABLE or after in _COUNTABLE:
        return ""
    if before not in _FLOATS or after not in _FLOATS:
        raise NotImplementedError(f"no gradient from {_spelled(after)} to {_spelled(before)}")
    return call.term(call.g).to(before).name


@vjp("CastLike", 15, 19, 21, 23, 24, 25, wrt=1)
def cast_like_type(call: Call) -> str:
    """Only the type of the second input matters."""
    return ""


@vjp("Dropout", 7, 10, 12, 13, 22)
def dropout(call: Call) -> str:
    """y = x, except in training mode."""
    training = call.constant(2, "training_mode")
    if training is not None and training.any():
        raise NotImplementedError("training mode, in which the output is random")
    return call.g


def _is_extreme(call: Call, name: str) -> Term:
    """1 where an input of Max or Min attains the output."""
    x, y = call.term(name), call.term(call.y)
    return 1 - (x < y if call.node.op_type == "Max" else x > y)


def _spelled(element: int) -> str:
    return TensorProto.DataType.Name(element) if element else "an unknown type"
