r"""Activations: the cotangent times the slope, where possible in terms of the output.

Sigmoid: y (1 - y)        Tanh: 1 - y^2       Softplus: s(x)       Softsign: 1 / (1 + |x|)^2
Erf: 2 / sqrt(pi) e^(-x^2)                    LeakyRelu, PRelu: a + (1 - a) [x > 0]
Elu, Selu, Celu: a e^x below 0, else 1        HardSigmoid: a [0 < y < 1]
HardSwish: h + x / 6 [0 < h < 1]              Swish: s + a x s (1 - s)
Mish: t + x (1 - t^2) s(x), t = tanh(softplus(x))
Gelu: P + x p, P and p the (approximate) normal distribution and its density
Softmax: y (g - sum(g y))                     LogSoftmax: g - e^y sum(g)             Hardmax: 0

with s the sigmoid. At a kink the slope is one of the two sides'.
"""

from __future__ import annotations

import math

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.gelu import slope
from jr_onnx.autodiff.registry import Call, vjp


@vjp("Sigmoid", 6, 13)
def sigmoid(call: Call) -> str:
    """y = 1 / (1 + e^-x)."""
    g, _, y = call.terms()
    return (g * (y * (1 - y))).name


@vjp("Tanh", 6, 13)
def tanh(call: Call) -> str:
    """y = tanh x."""
    g, _, y = call.terms()
    return (g * (1 - y * y)).name


@vjp("Softplus", 1, 22)
def softplus(call: Call) -> str:
    """y = log(1 + e^x)."""
    g, x, _ = call.terms()
    return (g * x.op("Sigmoid")).name


@vjp("Softsign", 1, 22)
def softsign(call: Call) -> str:
    """y = x / (1 + |x|). From x, because 1 - |y| would cancel far out."""
    g, x, _ = call.terms()
    wide = 1 + x.op("Abs")
    return (g / (wide * wide)).name


@vjp("Erf", 9, 13)
def erf(call: Call) -> str:
    """y = 2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x."""
    g, x, _ = call.terms()
    # The factor is in the exponent: one pass over the data less.
    return (g * (math.log(2 / math.sqrt(math.pi)) - x * x).op("Exp")).name


@vjp("LeakyRelu", 6, 16)
def leaky_relu(call: Call) -> str:
    """y = x if x > 0 else alpha x.

    The mask is read off y where it has the sign of x, so that onnxruntime may fuse Conv with it.
    """
    g, x, y = call.terms()
    alpha = call.number("alpha", 0.01)
    positive = (y if alpha >= 0 else x) > 0
    return (g * (alpha + (1 - alpha) * positive)).name


@vjp("PRelu", 9, 16)
def prelu_x(call: Call) -> str:
    """y = x if x > 0 else slope x, for x. The slope is broadcast."""
    g, x, _ = call.terms()
    slope = call.term(call.node.input[1])
    return (g * (slope + (1 - slope) * (x > 0))).name


@vjp("PRelu", 9, 16, wrt=1)
def prelu_slope(call: Call) -> str:
    """y = x if x > 0 else slope x, for the slope: g min(x, 0)."""
    x = call.term(call.node.input[0])
    return call.unbroadcast((call.term(call.g) * x.op("Min", 0)).name)


@vjp("Elu", 6, 22)
def elu(call: Call) -> str:
    """y = x if x > 0 else alpha (e^x - 1)."""
    g, x, _ = call.terms()
    return (g * _exponential_slope(x, call.number("alpha", 1.0))).name


@vjp("Selu", 6, 22)
def selu(call: Call) -> str:
    """y = gamma (x if x > 0 else alpha (e^x - 1))."""
    g, x, _ = call.terms()
    slope = _exponential_slope(x, call.number("alpha", 1.6732631921768188))
    return (g * (call.number("gamma", 1.0507010221481323) * slope)).name


@vjp("Celu", 12, 28)
def celu(call: Call) -> str:
    """y = x if x > 0 else alpha (e^(x / alpha) - 1)."""
    g, x, _ = call.terms()
    alpha = call.number("alpha", 1.0)
    return (g * (x.op("Min", 0) / alpha).op("Exp")).name


@vjp("HardSigmoid", 6, 22)
def hard_sigmoid(call: Call) -> str:
    """y = min(max(alpha x + beta, 0), 1)."""
    g, _, y = call.terms()
    return (g * (call.number("alpha", 0.2) * _inside(y))).name


@vjp("HardSwish", 14, 22)
def hard_swish(call: Call) -> str:
    """y = x h, h = min(max(x / 6 + 1 / 2, 0), 1)."""
    g, x, _ = call.terms()
    h = x.op("HardSigmoid", alpha=1 / 6, beta=0.5)
    return (g * (h + x / 6 * _inside(h))).name


@vjp("Swish", 24)
def swish(call: Call) -> str:
    """y = x s(alpha x)."""
    g, x, _ = call.terms()
    scaled = x * call.number("alpha", 1.0)
    s = scaled.op("Sigmoid")
    return (g * (s + scaled * (s * (1 - s)))).name


@vjp("Mish", 18, 22)
def mish(call: Call) -> str:
    """y = x tanh(softplus(x))."""
    g, x, _ = call.terms()
    t = x.op("Softplus").op("Tanh")
    return (g * (t + x * ((1 - t * t) * x.op("Sigmoid")))).name


@vjp("Gelu", 20)
def gelu(call: Call) -> str:
    """y = x P(x): P = (1 + erf(x / sqrt 2)) / 2, or (1 + tanh(c (x + k x^3))) / 2."""
    g, x, _ = call.terms()
    if call.attribute("approximate", "none") == "tanh":
        square = x * x
        c, k = math.sqrt(2 / math.pi), 0.044715
        t = (x * (c + c * k * square)).op("Tanh")
        density = (1 - t * t) * (c / 2 + 1.5 * c * k * square)
        return (g * (0.5 + 0.5 * t + x * density)).name
    return (g * slope(x)).name


@vjp("Softmax", 1, 11, 13)
def softmax(call: Call) -> str:
    """y = e^x / sum(e^x).

    A row that is masked as a whole is NaN, which models replace afterwards: its g is 0, but 0 times
    NaN would be NaN again.
    """
    g, _, y = call.terms()
    if not _is_product(call, call.x):
        y = y.op("IsNaN").op("Where", 0, y)
    return (y * (g - (g * y).sum(_normalized(call)))).name


def _is_product(call: Call, name: str) -> bool:
    """Whether a value is a matrix product, scaled or not, that no mask made infinite."""
    node = call.made(name)
    if node is not None and node.op_type in ("Mul", "Div"):
        return any(_is_product(call, each) for each in node.input)
    return node is not None and node.op_type == "MatMul"


@vjp("LogSoftmax", 1, 11, 13)
def log_softmax(call: Call) -> str:
    """y = x - log(sum(e^x))."""
    g, _, y = call.terms()
    return (g - y.op("Exp") * g.sum(_normalized(call))).name


@vjp("Hardmax", 1, 11, 13)
def hardmax(call: Call) -> str:
    """y = 1 at the first maximum, else 0: piecewise constant."""
    return ""


def _exponential_slope(x: Term, alpha: float) -> Term:
    """alpha e^x below 0, else 1. The exponential is taken of min(x, 0): it cannot overflow."""
    below = x.op("Min", 0).op("Exp")
    return below if alpha == 1 else alpha * below + (1 - alpha) * (x > 0)


def _inside(y: Term) -> Term:
    """1 where 0 < y < 1."""
    return (y > 0) * (y < 1)


def _normalized(call: Call) -> list[int]:
    """The axes of one distribution: until opset 12 all from `axis` on, then `axis` alone."""
    if call.emit.opset >= 13:
        return [call.attribute("axis", -1)]
    rank, axis = len(call.shape(call.x)), call.attribute("axis", 1)
    return list(range(axis + rank if axis < 0 else axis, rank))
