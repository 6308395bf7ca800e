"""Resize and Upsample are linear and separable: y = A_1 ... A_n x with a matrix for each axis.

The gradient multiplies by the transposed matrices. Row j of A says how y[j] is made of x:

    nearest    1 at the rounded coordinate
    linear     1 - f and f at the two neighbours, f the fraction of the coordinate
    cubic      four weights, by cubic_coeff_a
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jr_onnx.autodiff.registry import Call, vjp

Array = np.ndarray[Any, Any]


@vjp("Upsample", 9, 10)
def upsample(call: Call) -> str:
    """Resize as it was: `asymmetric` coordinates, rounded down."""
    return resize(call)


@vjp("Resize", 10, 11, 13, 18, 19)
def resize(call: Call) -> str:
    """Multiplies each axis that changes by its matrix, transposed."""
    if call.attribute("antialias", 0):
        raise NotImplementedError("antialias")
    g, rank = call.g, len(call.shape(call.x))
    for axis, (size, number, scale) in _scales(call).items():
        matrix = _matrix(call, size, number, scale)
        if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(size)):
            g = _multiplied(call, g, axis, rank, matrix.astype(call.tensors[call.y].dtype))
    return g


def _multiplied(call: Call, g: str, axis: int, rank: int, matrix: Array) -> str:
    """Contracts an axis of g with the rows of a matrix."""
    emit = call.emit
    if axis == rank - 1:
        return emit.op("MatMul", g, emit.constant(matrix))
    if axis == rank - 2:
        return emit.op("MatMul", emit.constant(np.ascontiguousarray(matrix.T)), g)
    swap = list(range(rank))
    swap[axis], swap[-1] = swap[-1], swap[axis]
    last = emit.op("MatMul", emit.op("Transpose", g, perm=swap), emit.constant(matrix))
    return emit.op("Transpose", last, perm=swap)


def _scales(call: Call) -> dict[int, tuple[int, int, float]]:
    """Returns size of x, size of y and scale of every axis that may change.

    The batch axis keeps its size: examples do not influence each other.
    """
    before, after = call.shape(call.x), call.shape(call.y)
    axes = [axis % len(before) for axis in call.attribute("axes", range(len(before)))]
    scales = _given_scales(call, [before[axis] for axis in axes])
    result = {}
    for index, axis in enumerate(axes):
        scale = None if scales is None else float(scales[index])
        same = before[axis] == after[axis] and before[axis] is not None
        if scale == 1 or (scale is None and (same or axis == 0)):
            continue
        size, number = call.static((before[axis], after[axis]), f"the sizes of axis {axis}")
        result[axis] = (size, number, number / size if scale is None else scale)
    return result


def _given_scales(call: Call, before: list[Any]) -> Array | None:
    """Returns the constant scales of axes; None where the sizes before and after tell."""
    node, given = call.node, call.attribute("scales")
    if given is not None:
        return np.array(given, np.float32)
    policy = call.attribute("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":  # one scale for all axes, whatever the rounded sizes
        sizes = call.constant(3, "sizes")
        ratios = np.asarray(sizes) / call.static(before, "the input size")
        return np.full(len(before), ratios.min() if policy == "not_larger" else ratios.max())
    place = 1 if node.op_type == "Upsample" or call.emit.opset < 11 else 2
    name = node.input[place] if len(node.input) > place else ""
    scales = call.constants(name) if name else None
    if name and scales is None and not (len(node.input) > 3 and node.input[3]):
        raise NotImplementedError(f"its scales {name!r} are not constant")
    return scales if scales is not None and scales.size else None


def _matrix(call: Call, size: int, number: int, scale: float) -> Array:
    """Returns A, `(number, size)`."""
    old = call.emit.opset < 11 or call.node.op_type == "Upsample"
    coordinates = _coordinates(
        "asymmetric" if old else call.attribute("coordinate_transformation_mode", "half_pixel"),
        size,
        number,
        np.float32(scale),
    )
    mode = call.attribute("mode", "nearest")
    if mode == "nearest":
        rounding = "floor" if old else call.attribute("nearest_mode", "round_prefer_floor")
        return _weights(_NEAREST[rounding](coordinates), np.ones((number, 1)), size)
    base, fraction = np.floor(coordinates), coordinates - np.floor(coordinates)
    if mode in ("linear", "bilinear", "trilinear"):
        offsets, weights = np.arange(2), np.stack([1 - fraction, fraction], axis=1)
    else:
        weights = _cubic(fraction, call.attribute("cubic_coeff_a", -0.75))
        offsets = np.arange(-1, 3)
    places = base[:, None] + offsets
    if call.attribute("exclude_outside", 0):
        weights = weights * ((places >= 0) & (places < size))
        weights = weights / weights.sum(axis=1, keepdims=True)
    return _weights(places, weights, size)


def _weights(places: Array, weights: Array, size: int) -> Array:
    """Adds up weights at places `(number, taps)`; those outside count for the border."""
    matrix = np.zeros((len(places), size))
    clipped = np.clip(places, 0, size - 1).astype(np.int64).reshape(weights.shape)
    np.add.at(matrix, (np.arange(len(places))[:, None], clipped), weights)
    return matrix


def _coordinates(mode: str, size: int, number: int, scale: np.float32) -> Array:
    """Returns where each element of y lies in x: in float32, which decides how ties round."""
    j = np.arange(number, dtype=np.float32)
    half = np.float32(0.5)
    if mode == "asymmetric":
        return j / scale
    if mode == "align_corners":
        return j * np.float32(size - 1) / np.float32(max(1, number - 1))
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and number > 1):
        return (j + half) / scale - half
    if mode == "pytorch_half_pixel":
        return j
    if mode == "half_pixel_symmetric":
        adjustment = np.float32(number) / (scale * np.float32(size))
        center = np.float32(size) * half
        return center * (1 - adjustment) + (j + half) / scale - half
    if mode == "tf_half_pixel_for_nn":
        return (j + half) / scale
    raise NotImplementedError(f"coordinate_transformation_mode={mode!r}")


def _cubic(f: Array, a: float) -> Array:
    """Returns the weights of the elements at -1, 0, 1, 2 (Keys 1981)."""
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (f, 1 - f)]
    far = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (1 + f, 2 - f)]
    return np.stack([far[0], near[0], near[1], far[1]], axis=1)


_NEAREST: dict[str, Callable[[Array], Array]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda c: np.ceil(c - np.float32(0.5)),
    "round_prefer_ceil": lambda c: np.floor(c + np.float32(0.5)),
}
