"""Reductions. g and y stand for themselves with the reduced axes kept, so that they broadcast.

Sum: g            Mean: g / n          SumSquare: 2 g x     Max, Min: g 1[x = y] / number of such x
L1: g sign(x)     L2: g x / y          LogSum: g exp(-y)    LogSumExp: g exp(x - y)
Prod: g times the product of the others, where none, or only x itself, is 0
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.registry import Call, vjp
from jr_onnx.model.types import Dimension


@vjp("ReduceSum", 1, 11, 13)
def reduce_sum(call: Call) -> str:
    """y = sum x."""
    return _like_x(call, _kept(call, call.g))


@vjp("ReduceMean", 1, 11, 13, 18)
def reduce_mean(call: Call) -> str:
    """y = mean x."""
    return averaged(call, _kept(call, call.g))


@vjp("ReduceMax", 1, 11, 12, 13, 18, 20)
@vjp("ReduceMin", 1, 11, 12, 13, 18, 20)
def reduce_extremum(call: Call) -> str:
    """y = max x; equal maxima share the cotangent."""
    return shared_among_equals(
        call, _kept(call, call.g), _kept(call, call.y), lambda x: _again(call, "ReduceSum", x)
    )


@vjp("ReduceProd", 1, 11, 13, 18)
def reduce_prod(call: Call) -> str:
    """y = prod x.

    With P the product of all that is not 0: P / x where nothing is 0, P where only x is 0, else 0.
    """
    emit = call.emit
    one = emit.scalar(1, call.element)
    zero = emit.op("Sub", one, emit.op("Abs", call.emit.sign(call.x, call.element)))
    filled = emit.op("Add", call.x, zero)
    others = emit.op("Sub", _again(call, "ReduceSum", zero), zero)
    alone = emit.op("Sub", one, call.emit.sign(others, call.element))
    product = emit.op("Mul", _again(call, "ReduceProd", filled), _kept(call, call.g))
    return emit.op("Mul", emit.op("Div", product, filled), alone)


@vjp("ReduceL1", 1, 11, 13, 18)
def reduce_l1(call: Call) -> str:
    """y = sum |x|."""
    return call.emit.op("Mul", _kept(call, call.g), call.emit.sign(call.x, call.element))


@vjp("ReduceL2", 1, 11, 13, 18)
def reduce_l2(call: Call) -> str:
    """y = sqrt(sum x^2); 0 where all is 0."""
    outer, inner = norm_slope(call, call.x, _kept(call, call.y), 2)
    return call.emit.op("Mul", inner, call.emit.op("Mul", _kept(call, call.g), outer))


@vjp("ReduceLogSum", 1, 11, 13, 18, 28)
def reduce_log_sum(call: Call) -> str:
    """y = log(sum x)."""
    slope = call.emit.op("Exp", call.emit.op("Neg", call.y))
    return _like_x(call, _kept(call, call.emit.op("Mul", call.g, slope)))


@vjp("ReduceLogSumExp", 1, 11, 13, 18, 28)
def reduce_log_sum_exp(call: Call) -> str:
    """y = log(sum exp x)."""
    share = call.emit.op("Exp", call.emit.op("Sub", call.x, _kept(call, call.y)))
    return call.emit.op("Mul", share, _kept(call, call.g))


@vjp("ReduceSumSquare", 1, 11, 13, 18)
def reduce_sum_square(call: Call) -> str:
    """y = sum x^2."""
    twice = call.emit.op("Mul", call.g, call.emit.scalar(2, call.element))
    return call.emit.op("Mul", call.x, _kept(call, twice))


def averaged(call: Call, g: str) -> str:
    """Spreads g, which broadcasts to x, over x, divided by the elements of x for one of y."""
    emit, known = call.emit, _ratio(call.tensors[call.y].shape, call.tensors[call.x].shape)
    if known is not None:
        ratio = emit.scalar(known, call.element)
    else:
        sizes = (Term(emit, emit.size(name), TensorProto.INT64) for name in (call.y, call.x))
        # float16 ends at 65504.
        above, below = (size.to(TensorProto.DOUBLE) for size in sizes)
        ratio = (above / below).to(call.element).name
    return _like_x(call, emit.op("Mul", g, ratio))


def shared_among_equals(call: Call, g: str, y: str, summed: Callable[[str], str]) -> str:
    """Shares g equally among the elements of x that equal y.

    Args:
        call: of the node that reduces x to y.
        g: the cotangent, reduced axes kept.
        y: the result, reduced axes kept.
        summed: the same reduction as a sum, reduced axes kept.
    """
    emit = call.emit
    mask = emit.op("Cast", emit.equal(call.x, y), to=call.element)
    return emit.op("Mul", mask, emit.op("Div", g, summed(mask)))


def norm_slope(call: Call, x: str, y: str, p: int) -> tuple[str, str]:
    """Returns the factors of the p-norm's slope, |y|^(1-p) and sign(x) |x|^(p-1).

    The first is "" for p = 1. Where y is 0 so is every x, and the slope is taken as 0.
    """
    emit = call.emit
    if p == 1:
        return "", call.emit.sign(x, call.element)
    one = emit.scalar(1, call.element)
    safe = emit.op("Add", y, emit.op("Sub", one, call.emit.sign(y, call.element)))
    if p == 2:
        return emit.op("Div", one, safe), x
    power = emit.op("Pow", emit.op("Abs", x), emit.scalar(p - 1, call.element))
    inner = emit.op("Mul", call.emit.sign(x, call.element), power)
    return emit.op("Pow", safe, emit.scalar(1 - p, call.element)), inner


def _ratio(
    above: tuple[Dimension, ...] | None, below: tuple[Dimension, ...] | None
) -> float | None:
    """Returns the ratio of two shapes' elements if it is known: symbols in both cancel."""
    if above is None or below is None or None in (*above, *below):
        return None
    symbols = [Counter(size for size in shape if isinstance(size, str)) for shape in (above, below)]
    if symbols[0] != symbols[1]:
        return None
    numbers = [
        math.prod(size for size in shape if isinstance(size, int)) for shape in (above, below)
    ]
    return numbers[0] / numbers[1] if numbers[1] else None


def _like_x(call: Call, value: str) -> str:
    return call.emit.op("Expand", value, call.emit.op("Shape", call.x))


def _axes_input(call: Call) -> str:
    return call.node.input[1] if len(call.node.input) > 1 else ""


def _kept(call: Call, value: str) -> str:
    """Gives the reduced axes back with size 1. A full reduction's scalar broadcasts as it is."""
    if call.attribute("keepdims", 1):
        return value
    if _axes_input(call):  # empty axes reduce all or nothing, and leave the value as it is here
        return call.emit.op("Unsqueeze", value, _axes_input(call))
    axes = call.attribute("axes")
    return call.emit.unsqueeze(value, axes) if axes else value


def _again(call: Call, op_type: str, x: str) -> str:
    """Reduces x over the node's axes by another operator, and keeps them."""
    axes = call.attribute("axes")
    if axes and op_type == "ReduceSum":
        return call.emit.reduce_sum(x, axes, keepdims=True)
    inputs = [name for name in (x, _axes_input(call)) if name]
    noop: Any = call.attribute("noop_with_empty_axes")
    return call.emit.op(op_type, *inputs, axes=axes, keepdims=1, noop_with_empty_axes=noop)
