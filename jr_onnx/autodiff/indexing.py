"""Operators that pick elements: g goes back to where they were picked, and is added up there.

Slice, Gather, Pad (reflect, edge, wrap) of known sizes: a table says, for every element of x, which
elements of y are copies of it; the gradient gathers those (a zero where there are none), and sums.
Of unknown sizes, GatherND, Compress: the node itself is run on the positions of x's elements, and
g scattered to them.
Pad (constant): the same pads, negative      ReverseSequence: itself      TopK: scatter to Indices
GatherElements: scatter g                    Scatter: g with zeros; for the updates: gather g
OneHot, for the values off and on: the sum of g where it is cold, and where it is hot
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.registry import Call, vjp
from jr_onnx.autodiff.resize import contracted, counted, length, one_hot

Array = np.ndarray[Any, Any]
# Up to so many copies are gathered one by one, which is faster than a sum over a short axis.
_MOST_GATHERS = 4


@vjp("Gather", 1, 11, 13, wrt=1)
@vjp("GatherElements", 11, 13, wrt=1)
@vjp("GatherND", 11, 12, 13, wrt=1)
@vjp("Scatter", 9, 11, wrt=1)
@vjp("ScatterElements", 11, 13, 16, 18, wrt=1)
@vjp("ScatterND", 11, 13, 16, 18, wrt=1)
@vjp("Compress", 9, 11, 28, wrt=1)
@vjp("OneHot", 9, 11, 28, wrt=(0, 1))
def integers(call: Call) -> str:
    """For indices: piecewise constant."""
    return ""


@vjp("Slice", 1, 10, 11, 13)
def slice_(call: Call) -> str:
    """Zeros around g; between its elements, too, where a step is not 1."""
    cuts = _cuts(call)
    if cuts is None:
        return _scattered(call, unique=True)
    emit, g, rank = call.emit, call.g, len(call.shape(call.x))
    pads = [0] * 2 * rank
    for axis, (size, picked) in cuts.items():
        if picked.step == 1:
            pads[axis], pads[rank + axis] = picked.start, size - picked.start - len(picked)
        elif list(picked) != list(range(size)):
            g = _pulled(call, g, axis, np.array(picked, np.int64), size)
    return emit.pad(g, pads) if any(pads) else g


def _cuts(call: Call) -> dict[int, tuple[int, range]] | None:
    """Returns size and picked range of each axis that is cut; None if not known."""
    if call.emit.opset < 10:
        parts = [call.attribute(name) for name in ("starts", "ends", "axes")]
    else:
        names = call.node.input[1:]
        parts = [call.constants(name) if name else None for name in names]
        if any(name and part is None for name, part in zip(names, parts, strict=True)):
            return None
    starts, ends, axes, steps = (*parts, None, None)[:4]
    shape, cuts = call.tensors[call.x].shape, {}
    if shape is None:
        return None
    for i in range(len(starts)):
        axis = int(axes[i] if axes is not None else i) % len(shape)
        size, step = shape[axis], int(steps[i]) if steps is not None else 1
        if not isinstance(size, int):
            return None
        cuts[axis] = size, range(*slice(int(starts[i]), int(ends[i]), step).indices(size))
    return cuts


@vjp("Pad", 2, 11, 13, 18, 19, 21, 23, 24, 25)
def pad(call: Call) -> str:
    """With constants: g cut where x was padded, and the other way round."""
    mode, emit = call.attribute("mode", "constant"), call.emit
    if mode != "constant":
        return _unfolded(call, mode)
    if emit.opset < 11:
        return emit.op("Pad", call.g, pads=[-number for number in call.attribute("pads")])
    known = call.constants(call.node.input[1])
    pads = emit.op("Neg", call.node.input[1]) if known is None else emit.constant(-known)
    axes = call.node.input[3] if len(call.node.input) > 3 else ""
    return emit.op("Pad", call.g, pads, *(["", axes] if axes else []))


@vjp("Pad", 11, 13, 18, 19, 21, 23, 24, 25, wrt=2)
def pad_value(call: Call) -> str:
    """For the constant: the sum of g where the padding is."""
    raise NotImplementedError("the padding's value depends on the input")


def _unfolded(call: Call, mode: str) -> str:
    """For Pad with copies of x: adds up the copies."""
    pads, shape, g = _pads(call), call.shape(call.x), call.g
    known = pads is not None and all(isinstance(shape[axis], int) for axis in pads)
    if pads is None or (not known and call.emit.opset >= 16):
        return _scattered(call, unique=False)
    for axis, (begin, end) in pads.items():
        size = shape[axis]
        if min(begin, end) < 0:
            raise NotImplementedError(f"negative pads in the mode {mode!r}")
        if isinstance(size, int):
            sources = np.pad(np.arange(size), (begin, end), mode)  # type: ignore[call-overload]
            g = _pulled(call, g, axis, sources, size)
        else:  # without the scatter that adds
            matrix = one_hot(_sources(call, mode, axis, begin), counted(call, call.x, axis))
            g = contracted(call, g, axis, matrix.to(call.element).name)
    return g


def _sources(call: Call, mode: str, axis: int, begin: int) -> Term:
    """Appends where the elements of y come from along an axis, in float32."""
    place, last = counted(call, call.y, axis) - begin, length(call, call.x, axis) - 1
    if mode == "edge":
        return place.op("Max", 0).op("Min", last)
    return last - (last - place.op("Abs")).op("Abs")


def _pads(call: Call) -> dict[int, tuple[int, int]] | None:
    """Returns begin and end of each axis that is padded; None if not known."""
    rank, inputs = len(call.shape(call.x)), call.node.input
    pads, axes = call.attribute("pads"), None
    if pads is None:
        pads = call.constants(inputs[1])
        axes = call.constants(inputs[3]) if len(inputs) > 3 and inputs[3] else range(rank)
    if pads is None or (axes is None and call.emit.opset >= 11):
        return None
    axes = range(rank) if axes is None else axes
    pairs = ((int(pads[i]), int(pads[i + len(axes)])) for i in range(len(axes)))
    return {int(axis) % rank: pair for axis, pair in zip(axes, pairs, strict=True) if any(pair)}


@vjp("Gather", 1, 11, 13)
def gather(call: Call) -> str:
    """Rows of g back to the rows they came from; rows picked twice are added."""
    shape, indices = call.shape(call.x), call.constants(call.node.input[1])
    axis = call.attribute("axis", 0) % len(shape)
    size = shape[axis]
    if indices is None or not isinstance(size, int):
        single = call.tensors[call.node.input[1]].shape == ()
        flat = None if indices is None else indices.reshape(-1)
        return _scattered(call, unique=single or _all_different(flat))
    sources = indices.reshape(-1).astype(np.int64) % size
    if indices.ndim == 0:
        return _pulled(call, call.emit.unsqueeze(call.g, [axis]), axis, sources, size)
    g = call.g if indices.ndim == 1 else _rows(call, axis, len(sources))
    return _pulled(call, g, axis, sources, size)


def _rows(call: Call, axis: int, count: int) -> str:
    """Reshapes g so that the axes of the indices become one."""
    emit, rank = call.emit, len(call.shape(call.x))
    parts = [emit.integers(count)]
    if axis:
        parts.insert(0, emit.sizes(call.x, range(axis)))
    if axis + 1 < rank:
        parts.append(emit.sizes(call.x, range(axis + 1, rank)))
    return emit.op("Reshape", call.g, emit.op("Concat", *parts, axis=0))


@vjp("GatherElements", 11, 13)
def gather_elements(call: Call) -> str:
    """Scatters g to the indices."""
    emit, name = call.emit, call.node.input[1]
    zeros = emit.zeros(emit.op("Shape", call.x), call.element)
    axis, indices = call.attribute("axis", 0), call.constants(name)
    lines: list[Array] = []
    if indices is not None:
        lines = list(np.moveaxis(indices, axis, -1).reshape(-1, indices.shape[axis]))
    unique = indices is not None and all(map(_all_different, lines))
    add, element = not unique, call.element
    return emit.scatter(zeros, name, call.g, axis=axis, add=add, element=element)


@vjp("GatherND", 11, 12, 13)
def gather_nd(call: Call) -> str:
    """Scatters g to the positions picked."""
    indices = call.constants(call.node.input[1])
    batched = call.attribute("batch_dims", 0)
    unique = indices is not None and not batched and _all_different(indices)
    return _scattered(call, unique=unique)


@vjp("Compress", 9, 11, 28)
def compress(call: Call) -> str:
    """Scatters g to the positions kept."""
    return _scattered(call, unique=True)


@vjp("ReverseSequence", 10, 28)
def reverse_sequence(call: Call) -> str:
    """Reverses g."""
    return call.emit.op("ReverseSequence", call.g, *call.node.input[1:], **_attributes(call))


@vjp("TopK", 1, 10, 11, 24)
def top_k(call: Call) -> str:
    """Scatters g to the Indices of the forward node."""
    zeros = call.emit.zeros(call.emit.op("Shape", call.x), call.element)
    axis = call.attribute("axis", -1) % len(call.shape(call.x))
    return call.emit.scatter(zeros, call.second_output(), call.g, axis=axis)


@vjp("OneHot", 9, 11, 28, wrt=2)
def one_hot_values(call: Call) -> str:
    """For the values `(off, on)`."""
    emit, axis = call.emit, call.attribute("axis", -1)
    zero_one = emit.constant(np.array([0, 1], np.float32))
    hot = emit.op("OneHot", *call.node.input[:2], zero_one, axis=axis)
    lit = emit.op("Mul", call.g, emit.op("Cast", hot, to=call.element))
    total, on = (emit.op("ReduceSum", value, keepdims=0) for value in (call.g, lit))
    off = emit.op("Sub", total, on)
    column = emit.integers(1)
    return emit.op("Concat", *(emit.op("Reshape", v, column) for v in (off, on)), axis=0)


@vjp("Scatter", 9, 11)
@vjp("ScatterElements", 11, 13, 16, 18)
def scatter_data(call: Call) -> str:
    """For the data: g, with zeros where it was overwritten; g where it was added to."""
    if _reduction(call) == "add":
        return call.g
    emit, (_, indices, updates) = call.emit, call.node.input
    zeros = emit.zeros(emit.op("Shape", updates), call.element)
    return emit.scatter(call.g, indices, zeros, axis=call.attribute("axis", 0))


@vjp("Scatter", 9, 11, wrt=2)
@vjp("ScatterElements", 11, 13, 16, 18, wrt=2)
def scatter_updates(call: Call) -> str:
    """For the updates: g where they went."""
    _reduction(call)
    if call.emit.opset < 11:
        raise NotImplementedError("the updates' gradient needs GatherElements, of opset 11")
    axis = call.attribute("axis", 0)
    return call.emit.op("GatherElements", call.g, call.node.input[1], axis=axis)


@vjp("ScatterND", 11, 13, 16, 18)
def scatter_nd_data(call: Call) -> str:
    """For the data: g, with zeros where it was overwritten; g where it was added to."""
    if _reduction(call) == "add":
        return call.g
    emit, (_, indices, updates) = call.emit, call.node.input
    zeros = emit.zeros(emit.op("Shape", updates), call.element)
    return emit.op("ScatterND", call.g, indices, zeros)


@vjp("ScatterND", 11, 13, 16, 18, wrt=2)
def scatter_nd_updates(call: Call) -> str:
    """For the updates: g where they went."""
    _reduction(call)
    return call.emit.op("GatherND", call.g, call.node.input[1])


def _reduction(call: Call) -> str:
    name = str(call.attribute("reduction", "none"))
    if name not in ("none", "add"):
        raise NotImplementedError(f"reduction={name!r}")
    return name


def _pulled(call: Call, g: str, axis: int, sources: Array, size: int) -> str:
    """Gives the elements of g along an axis back to their sources, and adds up those that share.

    Args:
        call: of a node of known rank.
        g: as long as `sources` on the axis.
        axis: not negative.
        sources: `(length,)`, for each element where it came from.
        size: of the axis in x.
    """
    emit, rank = call.emit, len(call.shape(call.x))
    if len(sources) and np.array_equal(
        sources, sources[0] + np.arange(len(sources))
    ):  # a range: zeros around it
        pads = [0] * 2 * rank
        pads[axis], pads[rank + axis] = int(sources[0]), size - 1 - int(sources[-1])
        return emit.pad(g, pads) if any(pads) else g
    copies: list[list[int]] = [[] for _ in range(size)]
    for place, source in enumerate(sources):
        copies[source].append(place)
    most = max(1, *map(len, copies))
    if any(len(places) < most for places in copies):
        g = emit.pad(g, [int(i == rank + axis) for i in range(2 * rank)])
    table = np.array([[*places, *[len(sources)] * (most - len(places))] for places in copies])
    if most > _MOST_GATHERS:
        pulled = emit.op("Gather", g, emit.constant(table), axis=axis)
        return emit.reduce_sum(pulled, [axis + 1], keepdims=False)
    parts = [emit.op("Gather", g, emit.integers(*column), axis=axis) for column in table.T]
    return parts[0] if most == 1 else emit.op("Sum", *parts)


def _scattered(call: Call, *, unique: bool) -> str:
    """Runs the node on the positions of x's elements, and scatters g to the positions it picks."""
    emit = call.emit
    size = emit.flat(emit.size(call.x))
    positions = emit.reshape_like(emit.counted(size), call.x)
    padded = call.node.op_type == "Pad"  # which onnxruntime runs on CUDA for floats only
    if padded:
        positions = emit.op("Cast", positions, to=TensorProto.DOUBLE)
    picked = emit.op(call.node.op_type, positions, *call.node.input[1:], **_attributes(call))
    if padded:
        picked = emit.op("Cast", picked, to=TensorProto.INT64)
    zeros = emit.zeros(size, call.element)
    picked, g, element = emit.flat(picked), emit.flat(call.g), call.element
    flat = emit.scatter(zeros, picked, g, axis=0, add=not unique, element=element)
    return emit.reshape_like(flat, call.x)


def _attributes(call: Call) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in call.node.attribute}


def _all_different(indices: Array | None) -> bool:
    """Whether no two of some indices, or rows of indices, can mean the same."""
    if indices is None or (indices.size and indices.min() < 0):
        return False
    rows = indices.reshape(-1, indices.shape[-1]) if indices.ndim > 1 else indices
    return len(np.unique(rows, axis=0)) == len(rows)
