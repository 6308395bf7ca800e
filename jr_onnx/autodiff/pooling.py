"""Pooling.

MaxPool: g to the element each maximum came from      GlobalMaxPool: g shared among the largest
AveragePool: every window spreads g / count           GlobalAveragePool: g / count
LpPool: y = (sum |x|^p)^(1/p):  sign(x) |x|^(p-1)  times every window spreading g y^(1-p)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from jr_onnx.autodiff.conv import BLOCK, Windows, spread
from jr_onnx.autodiff.emit import Emitter, Term
from jr_onnx.autodiff.reduction import averaged, norm_slope, shared_among_equals
from jr_onnx.autodiff.registry import Call, vjp

_TO_THE_END = np.iinfo(np.int64).max


@vjp("GlobalAveragePool", 1, 22)
def global_average_pool(call: Call) -> str:
    """The mean over space.

    Where the convolutions before it are in blocks, so is this: a convolution of one pixel brings g
    into onnxruntime's blocked layout, in which the upsampling and what follows then stay.
    """
    channels, *size = call.shape(call.x)[1:]
    if not _is_blocked(call, channels, size) or call.emit.opset < 13:
        return averaged(call, call.g)
    scale = np.full((channels, 1, 1, 1), 1 / np.prod(size), np.float32)
    pixel = call.emit.op("Conv", call.g, call.emit.constant(scale), group=channels)
    return enlarged(call.emit, pixel, size)


@vjp("GlobalMaxPool", 1, 22)
def global_max_pool(call: Call) -> str:
    """The maximum over space; equal maxima share the cotangent."""
    axes = range(2, len(call.shape(call.x)))
    return shared_among_equals(
        call, call.g, call.y, lambda x: call.emit.reduce_sum(x, axes, keepdims=True)
    )


@vjp("GlobalLpPool", 2, 22)
def global_lp_pool(call: Call) -> str:
    """The p-norm over space."""
    p = call.attribute("p", 2)
    outer, inner = norm_slope(call, call.x, call.y, p)
    scaled = call.emit.op("Mul", call.g, outer) if outer else call.g
    return call.emit.op("Mul", inner, scaled)


@vjp("AveragePool", 7, 10, 11, 19, 22)
def average_pool(call: Call) -> str:
    """The mean over a window, of all its elements or only those that are no padding."""
    windows, ceil = _windows(call)
    share = call.emit.op("Mul", call.g, _share(call, windows, ceil=ceil))
    return _spread_evenly(call, share, windows, ceil=ceil)


@vjp("LpPool", 2, 11, 18, 22)
def lp_pool(call: Call) -> str:
    """The p-norm over a window."""
    windows, ceil = _windows(call)
    outer, inner = norm_slope(call, call.x, call.y, call.attribute("p", 2))
    scaled = call.emit.op("Mul", call.g, outer) if outer else call.g
    return call.emit.op("Mul", inner, _spread_evenly(call, scaled, windows, ceil=ceil))


@vjp("MaxPool", 8, 10, 11, 12, 22)
def max_pool(call: Call) -> str:
    """g to the first element of each window that is the maximum, as torch has it.

    Scatters g to the `Indices` of the forward node, which count in the flat input; windows that
    tile the input are compared with it instead, because Indices keep the forward node from
    onnxruntime's fast kernels.

    Where windows share elements, and the opset's scatter cannot add, every so-many-th window on
    each axis shares none: each such subset is scattered by itself, and the results are added.
    """
    emit = call.emit
    if call.attribute("ceil_mode", 0):
        _windows(call)
    if tiles := _tiles(call):
        return _first_maxima(call, *tiles)
    _count_by_rows(call)
    apart = _apart(call)
    indices, size = call.second_output(), emit.flat(emit.size(call.x))

    def scattered(where: str, what: str, *, add: bool = False) -> str:
        zeros = emit.zeros(size, call.element)
        flat = (zeros, emit.flat(where), emit.flat(what))
        return emit.scatter(*flat, axis=0, add=add, element=call.element)

    if max(apart) == 1 or emit.opset >= 16:
        flat = scattered(indices, call.g, add=max(apart) > 1)
    else:
        subsets = _subsets(call, apart)
        parts = [scattered(some(indices), some(call.g)) for some in subsets]
        flat = emit.op("Sum", *parts)
    return emit.reshape_like(flat, call.x)


def _windows(call: Call) -> tuple[Windows, bool]:
    """Returns the windows, and whether the last may hang over.

    Raises:
        NotImplementedError: onnx infers more of them than there are, as it does before opset 22
            where the last would begin in the padding, and onnxruntime computes with that.
    """
    windows = Windows.of(call, list(call.attribute("kernel_shape")))
    ceil = bool(call.attribute("ceil_mode", 0))
    if not ceil or windows.pads is None:
        return windows, ceil
    size, inferred = call.shape(call.x)[2:], list(call.shape(call.y)[2:])
    known = all(isinstance(length, int) for length in (*size, *inferred))
    number = windows.count(size, windows.pads, ceil=True) if known else inferred
    if number != inferred:
        raise NotImplementedError(
            f"with ceil_mode onnx infers {inferred} windows, there are {number}: take opset 22 "
            "or newer, or no ceil_mode"
        )
    return windows, ceil


def _tiles(call: Call) -> tuple[list[int], list[int]] | None:
    """Returns the kernel and the number of windows of a picture, where they tile it from 0 on."""
    kernel = list(call.attribute("kernel_shape"))
    # Until opset 12 Resize needs a region of interest.
    if call.emit.opset < 13 or call.element != TensorProto.FLOAT or len(kernel) != 2:
        return None
    if len(call.node.output) > 1 and call.node.output[1]:
        return None
    size, number = call.shape(call.x)[2:], call.shape(call.y)[2:]
    if not all(isinstance(length, int) for length in (*size, *number)):
        return None
    apart = list(call.attribute("strides", [1, 1])) == kernel
    whole = call.attribute("dilations", [1, 1]) == [1, 1] and not any(call.attribute("pads", [0]))
    inside = all(n * k <= length for n, k, length in zip(number, kernel, size, strict=True))
    same = call.attribute("auto_pad", "NOTSET").startswith("SAME") and any(
        length % k for length, k in zip(size, kernel, strict=True)
    )
    return (kernel, list(number)) if apart and whole and inside and not same else None


def _first_maxima(call: Call, kernel: list[int], number: list[int]) -> str:
    """Masks of the windows' maxima, weighted by rank in the window, pooled and compared again.

    y repeated = x says where a maximum is, the largest of these ranks which of them comes first.
    """
    emit, size = call.emit, call.shape(call.x)[2:]
    covered = [n * k for n, k in zip(number, kernel, strict=True)]
    cut = covered != list(size)
    x = emit.slice(call.x, [0, 0], covered, [2, 3]) if cut else call.x
    ranks = np.arange(math.prod(kernel), 0, -1).astype(np.float32).reshape(kernel)
    is_maximum = _reaches(call, x, enlarged(emit, call.y, kernel))
    ranked = emit.op("Mul", is_maximum, emit.constant(np.tile(ranks, (1, 1, *number))))
    first = emit.op("MaxPool", ranked, kernel_shape=kernel, strides=kernel)
    chosen = _reaches(call, ranked, enlarged(emit, first, kernel))
    gradient = emit.op("Mul", chosen, enlarged(emit, call.g, kernel))
    rest = [length - c for length, c in zip(size, covered, strict=True)]
    return emit.pad(gradient, [0] * 6 + rest) if cut else gradient


def _reaches(call: Call, x: str, most: str) -> str:
    """1 where x is what it is at most, else 0. CUDA has no kernel of Equal from opset 19 on."""
    return call.emit.op("Cast", call.emit.op("GreaterOrEqual", x, most), to=call.element)


def enlarged(emit: Emitter, x: str, by: Sequence[int]) -> str:
    """Repeats each pixel of a picture so many times, its neighbours together."""
    return emit.op(
        "Resize",
        x,
        "",
        emit.constant(np.array([1, 1, *by], np.float32)),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _is_blocked(call: Call, channels: Any, size: Sequence[Any]) -> bool:
    fits = isinstance(channels, int) and channels % BLOCK == 0 and len(size) == 2
    static = all(isinstance(length, int) for length in size)
    return fits and static and call.element == TensorProto.FLOAT


def _share(call: Call, windows: Windows, *, ceil: bool) -> str:
    """Returns 1 / what each window divides by, `(*windows)`, or one number if that is always same.

    Where sizes are not known it is found out in the graph.
    """
    with_padding, pads = bool(call.attribute("count_include_pad", 0)), windows.pads
    # With auto_pad, which pads is then unknown for, no window hangs over the padding.
    always_same = with_padding if pads is None else not ceil and (with_padding or not any(pads))
    dtype, size = call.tensors[call.y].dtype, call.shape(call.x)[2:]
    if always_same:
        return call.emit.constant(np.array(1 / np.prod(windows.kernel), dtype))
    if pads is None or not all(isinstance(length, int) for length in size):
        return _share_at_run_time(call, windows, with_padding=with_padding)
    rank, numbers = len(windows.kernel), windows.count(size, pads, ceil=ceil)
    counts = []
    for i in range(rank):
        begin, end = pads[i], pads[i + rank]
        first, last = (-begin, size[i] + end) if with_padding else (0, size[i])
        starts = np.arange(numbers[i]) * windows.strides[i] - begin
        seen = starts[:, None] + np.arange(windows.kernel[i]) * windows.dilations[i]
        counts.append(((first <= seen) & (seen < last)).sum(axis=1).astype(float))
    return call.emit.constant((1 / functools.reduce(np.multiply.outer, counts)).astype(dtype))


def _share_at_run_time(call: Call, windows: Windows, *, with_padding: bool) -> str:
    """The same, axis by axis: the taps of a window that come before the end less those before 0."""
    emit, rank, begins = call.emit, len(windows.kernel), windows.begin(call)
    share = None
    for i in range(rank):

        def number(value: str) -> Term:
            return Term(emit, value, TensorProto.INT64).to(TensorProto.FLOAT)

        begin = number(emit.op("Gather", begins, emit.integers(i)))
        places = number(emit.counted(emit.sizes(call.y, [2 + i])))
        start, last = places * windows.strides[i] - begin, number(emit.sizes(call.x, [2 + i]))
        kernel, gap = windows.kernel[i], windows.dilations[i]
        if with_padding and windows.pads is not None:
            start, last = start + begin, last + begin + windows.pads[i + rank]
        until, before = (
            ((bound - start) / gap).op("Ceil").op("Max", 0).op("Min", kernel)
            for bound in (last, start.like(0))
        )
        each = (1 / (until - before)).reshape(-1, *[1] * (rank - 1 - i))
        share = each if share is None else share * each
    assert share is not None
    return share.to(call.element).name


def _apart(call: Call) -> list[int]:
    """Returns for each axis how many windows on one shares nothing with a window."""
    kernel = call.attribute("kernel_shape")
    ones = [1] * len(kernel)
    strides, dilations = call.attribute("strides", ones), call.attribute("dilations", ones)
    return [
        -(-(gap * (size - 1) + 1) // step)
        for size, step, gap in zip(kernel, strides, dilations, strict=True)
    ]


def _subsets(call: Call, apart: list[int]) -> Iterator[Callable[[str], str]]:
    """Yields functions that take every so-many-th element of each spatial axis, from each first."""
    number = call.shape(call.y)[2:]
    for first in itertools.product(*map(range, apart)):
        # A subset may be empty.
        if all(not isinstance(n, int) or i < n for i, n in zip(first, number, strict=True)):
            yield functools.partial(_every, call, first, apart, number)


def _every(
    call: Call, first: tuple[int, ...], apart: list[int], number: tuple[Any, ...], value: str
) -> str:
    emit, rank = call.emit, len(apart)
    if emit.opset >= 10:
        parts = (first, [_TO_THE_END] * rank, range(2, 2 + rank), apart)
        return emit.op("Slice", value, *(emit.integers(*part) for part in parts))
    for i, size in enumerate(number):
        if isinstance(size, int):
            places = emit.integers(*range(first[i], size, apart[i]))
        else:
            length = Term(emit, emit.sizes(value, [2 + i]), TensorProto.INT64)
            count = (length + (apart[i] - 1 - first[i])) / apart[i]
            places = (length.like(emit.counted(count.name)) * apart[i] + first[i]).name
        value = emit.op("Gather", value, places, axis=2 + i)
    return value


def _spread_evenly(call: Call, g: str, windows: Windows, *, ceil: bool) -> str:
    """Gives each element of g to every element of its window, each channel by itself."""
    emit, rank = call.emit, len(windows.kernel)
    planes = emit.op("Reshape", g, emit.integers(-1, 1, *[0] * rank))
    ones = emit.constant(np.ones((1, 1, *windows.kernel), call.tensors[call.y].dtype))
    return emit.reshape_like(spread(call, planes, ones, windows, ceil=ceil), call.x)


def _count_by_rows(call: Call) -> None:
    """Makes the forward node's Indices row-major: y does not depend on it."""
    if not call.attribute("storage_order", 0):
        return
    if len(call.node.output) > 1 and call.node.output[1]:
        raise NotImplementedError("column-major storage_order, with Indices in use")
    kept = [entry for entry in call.node.attribute if entry.name != "storage_order"]
    del call.node.attribute[:]
    call.node.attribute.extend(kept)
