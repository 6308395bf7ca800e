"""Normalizations, for their input.

BatchNormalization (inference): g scale / sqrt(var + epsilon)
InstanceNormalization, LayerNormalization, with x^ = (x - mean) / deviation:
    dx^ = g scale,   dx = (dx^ - mean(dx^) - x^ mean(dx^ x^)) / deviation
GroupNormalization: written as InstanceNormalization of the groups
RMSNormalization, with x^ = x / rms:    dx = (dx^ - x^ mean(dx^ x^)) / rms
LRN, y = x d^-beta, d = bias + alpha mean(x^2) over neighbouring channels:
    dx = g d^-beta - 2 alpha beta x mean(g y / d)
LpNormalization, y = x / n, n = |x|_p:    p = 2: dx = (g - y sum(g y)) / n
                                          p = 1: dx = (g - sign(x) sum(g y)) / n

Statistics of float16 are computed in float32, as the operators' default stash_type has it. The
scale and the bias are weights: rules for them are missing, and a model that computes them from
its input is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.expand import expansion
from jr_onnx.autodiff.registry import Call, vjp

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@vjp("BatchNormalization", 9, 14, 15)
def batch_normalization(call: Call) -> str:
    """For x `(batch, channels, ...)`; onnxruntime folds the factor, which is made of weights."""
    if call.attribute("training_mode", 0) or any(call.node.output[1:]):
        raise NotImplementedError("training mode, in which examples influence each other")
    scale, variance = call.term(call.node.input[1]), call.term(call.node.input[4])
    deviation = (variance + call.number("epsilon", 1e-5)).op("Sqrt")
    factor = (scale.to(variance.element) / deviation).to(call.element)
    spatial = max(len(call.shape(call.x)) - 2, 0)
    return (call.term(call.g) * factor.reshape(-1, *[1] * spatial)).name


@vjp("InstanceNormalization", 6, 22)
def instance_normalization(call: Call) -> str:
    """Each channel of each example is standardized; scale `(channels)`."""
    g, x, scale = _inputs(call)
    channels = (0, 0, -1)
    g = g.reshape(*channels) * scale.reshape(-1, 1)
    return _like_x(call, _standardized(call, g, x.reshape(*channels), [2]))


@expansion("GroupNormalization", 18, 21)
def group_normalization(call: Call) -> list[Term]:
    """Each group of channels of each example is standardized, as if it were one channel.

    Written out, because onnx infers no type for the output. Scale and bias are `(groups)`, from
    opset 21 on `(channels)`.
    """
    x, scale, bias = (call.term(name) for name in call.node.input)
    element, groups = _lifted(x.element), call.attribute("num_groups")
    scale, bias = scale.to(element), bias.to(element)
    plain = np.ones(groups, helper.tensor_dtype_to_np_dtype(element))
    if call.emit.opset < 21:
        inner = [scale, bias]
    else:
        inner = [scale.like(call.emit.constant(value)) for value in (plain, 0 * plain)]
    y = x.to(element).reshape(0, groups, -1)
    y = y.op("InstanceNormalization", *inner, epsilon=call.number("epsilon", 1e-5))
    if call.emit.opset >= 21:
        channels = call.static(call.shape(call.node.input[1]), "the number of channels")
        y = y.reshape(0, *channels, -1) * scale.reshape(-1, 1) + bias.reshape(-1, 1)
    return [Term(call.emit, call.emit.reshape_like(y.name, x.name), element).to(x.element)]


@vjp("LayerNormalization", 17)
def layer_normalization(call: Call) -> str:
    """The axes from `axis` on are standardized; the scale is broadcast."""
    g, x, scale = _inputs(call)
    axes, g = _axes_from(call), g * scale
    if x.element != TensorProto.FLOAT:  # the statistics are float32 whatever x is
        return _back(call, _standardized(call, g, x, axes))
    _, mean, inverse = (Term(call.emit, name, x.element) for name in _with_statistics(call))
    centred = x - mean
    tilt = (g * centred).mean(axes) * (inverse * inverse)
    return _back(call, (g - centred * tilt - g.mean(axes)) * inverse)


def _with_statistics(call: Call) -> list[str]:
    """Returns the outputs of a LayerNormalization: y, mean, 1 / deviation, added where needed."""
    outputs = call.node.output
    outputs.extend([""] * (3 - len(outputs)))
    for index, what in ((1, "mean"), (2, "inverse_deviation")):
        outputs[index] = outputs[index] or call.emit.name(what)
    return list(outputs)


@vjp("RMSNormalization", 23)
def rms_normalization(call: Call) -> str:
    """The axes from `axis` on are divided by their root mean square; the scale is broadcast."""
    g, x, scale = _inputs(call)
    g, axes = g * scale, _axes_from(call)
    rms = ((x * x).mean(axes) + call.number("epsilon", 1e-5)).op("Sqrt")
    unit = x / rms
    return _back(call, (g - unit * (g * unit).mean(axes)) / rms)


@vjp("LRN", 1, 13)
def lrn(call: Call) -> str:
    """For x `(batch, channels, ...)`: means over `size` channels, rows of a picture here.

    The window is its own transpose because onnxruntime takes odd sizes only.
    """
    size = call.attribute("size")
    if size % 2 == 0:
        raise NotImplementedError(f"LRN of even size {size}")
    alpha = call.number("alpha", 1e-4)
    beta = call.number("beta", 0.75)
    g, x, y = (term.reshape(0, 0, -1) for term in call.terms())
    g, x, y = (term.like(call.emit.unsqueeze(term.name, [1])) for term in (g, x, y))

    def windows(term: Term) -> Term:
        side = size // 2
        pads = [side, 0, side, 0]
        return term.op("AveragePool", kernel_shape=[size, 1], pads=pads, count_include_pad=1)

    d = call.number("bias", 1.0) + alpha * windows(x * x)
    direct = g * d.op("Pow", -beta)
    return _like_x(call, direct - 2 * alpha * beta * x * windows(g * y / d))


@vjp("LpNormalization", 1, 22)
def lp_normalization(call: Call) -> str:
    """Along one axis. Where the norm is 0, y is 0 by definition, and so is the gradient."""
    g, x, y = call.terms()
    axis = call.attribute("axis", -1)
    axes = [axis + len(call.shape(call.x)) if axis < 0 else axis]
    if call.attribute("p", 2) == 1:
        norm, direction = x.op("Abs").sum(axes), (x > 0) - (x < 0)
    else:
        norm, direction = (x * x).sum(axes).op("Sqrt"), y
    nonzero = norm > 0
    factor = nonzero / (norm + (1 - nonzero))
    return ((g - direction * (g * y).sum(axes)) * factor).name


def _standardized(call: Call, g: Term, x: Term, axes: Sequence[int]) -> Term:
    """From the cotangent of (x - mean) / sqrt(variance + epsilon) to that of x."""
    centred = x - x.mean(axes)
    deviation = ((centred * centred).mean(axes) + call.number("epsilon", 1e-5)).op("Sqrt")
    unit = centred / deviation
    return (g - g.mean(axes) - unit * (g * unit).mean(axes)) / deviation


def _axes_from(call: Call) -> list[int]:
    axis = call.attribute("axis", -1)
    return list(range(axis, 0 if axis < 0 else len(call.shape(call.x))))


def _inputs(call: Call) -> tuple[Term, Term, Term]:
    """Returns g, x and the scale in one element type, float32 for halves."""
    g, x, scale = call.term(call.g), call.term(call.x), call.term(call.node.input[1])
    lifted = _lifted(x.element)
    return g.to(lifted), x.to(lifted), scale.to(lifted)


def _lifted(element: int) -> int:
    return TensorProto.FLOAT if element in _HALF else element


def _like_x(call: Call, gradient: Term) -> str:
    return call.emit.reshape_like(_back(call, gradient), call.x)


def _back(call: Call, gradient: Term) -> str:
    """Undoes the lifting."""
    return gradient.to(call.term(call.x).element).name
