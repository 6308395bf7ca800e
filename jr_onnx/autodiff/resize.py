"""Resize and Upsample are linear and separable: y = A_1 ... A_n x with a matrix for each axis.

The gradient multiplies by the transposed matrices. Row j of A says how y[j] is made of x:

    nearest    1 at the element that it takes
    linear     1 - f and f at the two neighbours, f the fraction of the coordinate
    cubic      four weights, by cubic_coeff_a

Which element is the nearest is asked of the operator itself, on 0, 1, 2, ...: at ties its rounding
decides, which no other arithmetic gives in every case. The other weights are written in operators;
where the sizes are known they are computed at once, and else in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.fold import settled
from jr_onnx.autodiff.registry import Call, vjp

# The places in x that an element of y reads, each with its weight.
Taps = list[tuple[Term, Term]]
# Transformations of coordinates by the scale alone, and by the sizes of x and y, too.
_PLAIN = ("half_pixel", "asymmetric", "tf_half_pixel_for_nn")
_OF_BOTH_SIZES = ("align_corners", "half_pixel_symmetric", "pytorch_half_pixel")


@vjp("Upsample", 9, 10)
def upsample(call: Call) -> str:
    """Resize as it was: `asymmetric` coordinates, rounded down."""
    return resize(call)


@vjp("Resize", 10, 11, 13, 18, 19)
def resize(call: Call) -> str:
    """Multiplies each axis that changes by its matrix, transposed."""
    if call.attribute("antialias", 0):
        raise NotImplementedError("antialias")
    emit, g, rank = call.emit, call.g, len(call.shape(call.x))
    axes = [axis % rank for axis in call.attribute("axes", range(rank))]
    for index, axis in enumerate(axes):
        start = len(emit.nodes)
        scale = _scale(call, axes, index)
        if scale is None:
            continue
        if call.attribute("mode", "nearest") == "nearest":
            picked = one_hot(_picked(call, axis, scale), counted(call, call.x, axis))
            g = contracted(call, g, axis, picked.to(call.element).name)
            continue
        matrix = _matrix(call, axis, scale).to(call.element).name
        value = settled(emit, start, matrix)
        if value is not None and np.array_equal(value, np.eye(len(value))):
            continue
        g = contracted(call, g, axis, matrix if value is None else emit.constant(value))
    return g


def contracted(call: Call, g: str, axis: int, matrix: str) -> str:
    """Contracts an axis of g with the rows of a matrix."""
    emit, rank = call.emit, len(call.shape(call.x))
    if axis == rank - 1:
        return emit.op("MatMul", g, matrix)
    if axis == rank - 2:
        return emit.op("MatMul", emit.op("Transpose", matrix, perm=[1, 0]), g)
    swap = list(range(rank))
    swap[axis], swap[-1] = swap[-1], swap[axis]
    last = emit.op("MatMul", emit.op("Transpose", g, perm=swap), matrix)
    return emit.op("Transpose", last, perm=swap)


def _scale(call: Call, axes: Sequence[int], index: int) -> Term | None:
    """Appends the scale of an axis; None says that the axis stays as it is.

    The batch axis does: examples do not influence each other.
    """
    node, axis = call.node, axes[index]
    place = 1 if node.op_type == "Upsample" or call.emit.opset < 11 else 2
    scales, sizes = (node.input[at] if len(node.input) > at else "" for at in (place, 3))
    known = call.constants(scales) if scales else None
    if known is not None and known.size:
        return None if known[index] == 1 else _number(call, known[index])
    if axis == 0:
        return None
    if scales and not sizes:
        scale = call.emit.op("Gather", scales, call.emit.integers(index))
        return Term(call.emit, scale, TensorProto.FLOAT)
    before, after = (call.shape(name)[axis] for name in (call.x, call.y))
    policy = call.attribute("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        same = before == after and before is not None
        return None if same else length(call, call.y, axis) / length(call, call.x, axis)
    # One scale for all axes, whatever the rounded sizes.
    ratios = [_wanted(call, sizes, at) / length(call, call.x, each) for at, each in enumerate(axes)]
    return ratios[0].op("Min" if policy == "not_larger" else "Max", *ratios[1:])


def _wanted(call: Call, sizes: str, at: int) -> Term:
    known = call.constants(sizes)
    if known is not None:
        return _number(call, known[at])
    size = call.emit.op("Gather", sizes, call.emit.integers(at))
    return Term(call.emit, size, TensorProto.INT64).to(TensorProto.FLOAT)


def length(call: Call, name: str, axis: int) -> Term:
    """Returns the size of an axis in float32, a constant where it is known."""
    known = call.shape(name)[axis]
    if isinstance(known, int):
        return _number(call, known)
    size = call.emit.sizes(name, [axis])
    return Term(call.emit, size, TensorProto.INT64).to(TensorProto.FLOAT)


def counted(call: Call, name: str, axis: int) -> Term:
    """Returns 0, 1, 2, ... along an axis, in float32."""
    known = call.shape(name)[axis]
    if isinstance(known, int):
        places = call.emit.constant(np.arange(known, dtype=np.float32))
        return Term(call.emit, places, TensorProto.FLOAT)
    places = call.emit.counted(call.emit.sizes(name, [axis]))
    return Term(call.emit, places, TensorProto.INT64).to(TensorProto.FLOAT)


def _number(call: Call, value: float) -> Term:
    return Term(call.emit, call.emit.scalar(value, TensorProto.FLOAT), TensorProto.FLOAT)


def _picked(call: Call, axis: int, scale: Term) -> Term:
    """Appends the place in x of each element of y along an axis, in float32."""
    emit, rank = call.emit, len(call.shape(call.x))
    coordinates, _ = names = ("coordinate_transformation_mode", "nearest_mode")
    how = {name: call.attribute(name) for name in names if call.attribute(name) is not None}
    fitted = call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
    allowed = _PLAIN if fitted else (*_PLAIN, *_OF_BOTH_SIZES)
    if how.get(coordinates, "half_pixel") not in allowed:
        more = ", fitted to sizes" if fitted else ""
        raise NotImplementedError(f"nearest{more}, with {coordinates}={how[coordinates]!r}")
    sized = len(call.node.input) > 3 and call.node.input[3] != "" and not fitted
    places, after = counted(call, call.x, axis), call.shape(call.y)[axis]
    if sized or fitted:
        number = emit.integers(after) if isinstance(after, int) else emit.sizes(call.y, [axis])
    if fitted:
        # The scale is not the ratio of the sizes, which were rounded; it is given, and so many
        # elements more that enough come out. They do not change where the first ones lie.
        size = length(call, call.x, axis)
        enough = emit.counted((3 * size + 1).to(TensorProto.INT64).reshape(1).name)
        places = Term(emit, enough, TensorProto.INT64).to(TensorProto.FLOAT).op("Min", size - 1)
    line = places.reshape(*(-1 if each == axis else 1 for each in range(rank)))
    here = number if sized else scale.reshape(1).name
    one = emit.integers(1) if sized else emit.constant(np.ones(1, np.float32))
    wanted = emit.op("Concat", *(here if each == axis else one for each in range(rank)), axis=0)
    none = "" if emit.opset >= 13 else emit.constant(np.zeros(0, np.float32))
    inputs = [wanted] if _is_old(call) else [none, none, wanted] if sized else [none, wanted]
    taken = emit.op(call.node.op_type, line.name, *inputs, **how)
    taken = emit.part(emit.flat(taken), emit.integers(0), number, [0]) if fitted else taken
    return Term(emit, taken, TensorProto.FLOAT)


def _matrix(call: Call, axis: int, scale: Term) -> Term:
    """Appends A, `(size of y, size of x)`: every tap adds its weight at its place.

    A place outside counts for the border, or not at all.
    """
    places, size = counted(call, call.x, axis), length(call, call.x, axis)
    taps = _taps(call, _coordinates(call, axis, scale))
    if call.attribute("exclude_outside", 0):
        taps = [(place, (place > -1) * (place < size) * weight) for place, weight in taps]
        total = sum((weight for _, weight in taps[1:]), taps[0][1])
        taps = [(place, weight / total) for place, weight in taps]
    rows = []
    for place, weight in taps:
        row = one_hot(place.op("Max", 0).op("Min", size - 1), places)
        rows.append(row * weight.reshape(-1, 1))
    return sum(rows[1:], rows[0])


def one_hot(chosen: Term, places: Term) -> Term:
    """Appends a row for each chosen place, 1 there and else 0. All are whole numbers."""
    return (1 - (chosen.reshape(-1, 1) - places).op("Abs")).op("Relu")


def _taps(call: Call, coordinates: Term) -> Taps:
    mode = call.attribute("mode", "nearest")
    base = coordinates.op("Floor")
    f = coordinates - base
    if mode in ("linear", "bilinear", "trilinear"):
        return [(base, 1 - f), (base + 1, f)]
    weights = _cubic(f, call.number("cubic_coeff_a", -0.75))
    return [(base + offset, weight) for offset, weight in zip(range(-1, 3), weights, strict=True)]


def _is_old(call: Call) -> bool:
    return call.emit.opset < 11 or call.node.op_type == "Upsample"


def _coordinates(call: Call, axis: int, scale: Term) -> Term:
    """Appends where each element of y lies in x."""
    given = call.attribute("coordinate_transformation_mode", "half_pixel")
    mode = "asymmetric" if _is_old(call) else given
    j, size, number = (
        counted(call, call.y, axis),
        *(length(call, name, axis) for name in (call.x, call.y)),
    )
    if mode == "asymmetric":
        return j / scale
    if mode == "align_corners":
        return j * (size - 1) / (number - 1).op("Max", 1)
    if mode == "half_pixel":
        return (j + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return ((j + 0.5) / scale - 0.5) * (number > 1)
    if mode == "half_pixel_symmetric":
        adjustment, center = number / (scale * size), 0.5 * size
        return center * (1 - adjustment) + (j + 0.5) / scale - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (j + 0.5) / scale
    raise NotImplementedError(f"coordinate_transformation_mode={mode!r}")


def _cubic(f: Term, a: float) -> list[Term]:
    """Returns the weights of the elements at -1, 0, 1, 2 (Keys 1981)."""
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (f, 1 - f)]
    far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (1 + f, 2 - f)]
    return [far[0], near[0], near[1], far[1]]
