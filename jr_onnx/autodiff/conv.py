"""Convolution.

Conv: ConvTranspose(g, W)    bias: sum of g over batch and space    ConvTranspose: Conv(g, W)

The transposed convolution of Conv's rule is spelled as it runs fastest on onnxruntime's CPU:
    tiny map    Gemm(g, M)                              M = W written out for every pair of pixels
    stride 1    Conv(g, W')                             W' = W flipped in space, in and out swapped
    else        ConvTranspose(g, W)                     few channels, groups that fit no block, ...
M and W' are written in terms of W: onnxruntime folds them when it loads the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import TensorProto

from jr_onnx.autodiff.emit import Term
from jr_onnx.autodiff.registry import Call, vjp

# onnxruntime's blocked layout, NCHWc with AVX-512: channels come in blocks, the rest is filled up.
BLOCK = 16
_TO_THE_START = -(2**31)


@dataclass(frozen=True)
class Windows:
    """How a kernel slides over the spatial axes of `(batch, channels, *spatial)`.

    Attributes:
        kernel: its size.
        strides: its steps.
        dilations: the steps between its elements.
        pads: `[begin..., end...]`, auto_pad resolved; None where it depends on a size that is not
            known.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int] | None

    @classmethod
    def of(cls, call: Call, kernel: list[int]) -> Windows:
        """Reads the attributes of a node that slides a kernel over its first input."""
        ones = [1] * len(kernel)
        strides = list(call.attribute("strides", ones))
        dilations = list(call.attribute("dilations", ones))
        extent = [gap * (size - 1) + 1 for gap, size in zip(dilations, kernel, strict=True)]
        pads = _pads(call, len(kernel), extent, strides)
        return cls(kernel, strides, dilations, pads)

    @property
    def extent(self) -> list[int]:
        """What a window covers, its gaps included."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]

    def count(self, size: Sequence[int], pads: Sequence[int], *, ceil: bool = False) -> list[int]:
        """Returns the number of windows on each axis; with `ceil` the last may hang over."""
        result = []
        for i, length in enumerate(size):
            room = length + pads[i] + pads[i + len(size)] - self.extent[i]
            windows = (-(-room // self.strides[i]) if ceil else room // self.strides[i]) + 1
            # A window that starts in the padding at the end sees nothing.
            outside = ceil and (windows - 1) * self.strides[i] >= length + pads[i]
            result.append(windows - 1 if outside else windows)
        return result

    def begin(self, call: Call) -> str:
        """Returns the padding before each spatial axis, 1-d int64, found out in the graph."""
        emit, rank = call.emit, len(self.kernel)
        if self.pads is not None:
            return emit.integers(*self.pads[:rank])
        space = range(2, 2 + rank)
        number, size = (_integer(call, emit.sizes(name, space)) for name in (call.y, call.x))
        strides, extent = (_integer(call, emit.integers(*n)) for n in (self.strides, self.extent))
        total = (number - 1) * strides + extent - size
        return _first_share(call, total * (total > 0)).name


@vjp("Conv", 1, 11, 22)
def conv_x(call: Call) -> str:
    """For the input `(batch, channels, *spatial)`."""
    weights = call.node.input[1]
    windows = Windows.of(call, kernel_of(call))
    group = call.attribute("group", 1)
    if is_tiny(call, windows, group):
        return _by_matrix(call, windows)
    if _fills_blocks(call, group) and max(windows.strides) == 1 and windows.pads is not None:
        pads = [(windows.extent * 2)[i] - 1 - pad for i, pad in enumerate(windows.pads)]
        if min(pads) >= 0:
            return _flipped(call, windows, pads, group)
    return spread(call, call.g, weights, windows, group=group)


@vjp("Conv", 1, 11, 22, wrt=2)
@vjp("ConvTranspose", 1, 11, 22, wrt=2)
def conv_bias(call: Call) -> str:
    """For the bias `(channels,)`."""
    rank = len(call.shape(call.y))
    return call.emit.reduce_sum(call.g, [0, *range(2, rank)], keepdims=False)


@vjp("ConvTranspose", 1, 11, 22)
def conv_transpose_x(call: Call) -> str:
    """For the input: weights `(in, out / group, *kernel)` mean to Conv what is needed here.

    Output padding may leave room for windows that no input element made: they are cut.
    """
    emit, windows = call.emit, _transposed_windows(call, kernel_of(call))
    product = emit.op(
        "Conv",
        call.g if windows.pads is not None else _padded_back(call, windows),
        call.node.input[1],
        strides=windows.strides,
        dilations=windows.dilations,
        pads=windows.pads,
        group=call.attribute("group", 1),
    )
    padding = call.attribute("output_padding", [0])
    if all(extra < stride for extra, stride in zip(padding, windows.strides, strict=False)):
        return product
    space = range(2, 2 + len(windows.kernel))
    return emit.part(product, emit.integers(*[0] * len(space)), emit.sizes(call.x, space), space)


def spread(
    call: Call, g: str, weights: str, windows: Windows, *, group: int = 1, ceil: bool = False
) -> str:
    """Gives every element of g back to the window it came from: the transposed convolution.

    Rows at the far end that no window reaches come back as output padding; windows that hang over
    the end are cut.

    Args:
        call: of a node whose input is `(batch, channels, *spatial)`.
        g: `(batch, outputs, *windows)`.
        weights: `(outputs, channels / group, *kernel)`.
        windows: of the forward node.
        group: of the convolution.
        ceil: whether the last windows may hang over.
    """
    size, rank = call.shape(call.node.input[0])[2:], len(windows.kernel)
    attributes: dict[str, Any] = {
        "strides": windows.strides, "dilations": windows.dilations, "group": group
    }  # fmt: skip
    if windows.pads is None or not all(isinstance(length, int) for length in size):
        emit, space = call.emit, range(2, 2 + rank)
        extra = [stride - 1 for stride in windows.strides]
        attributes["output_padding"] = extra if any(extra) else None
        whole = emit.op("ConvTranspose", g, weights, **attributes)
        return emit.part(whole, windows.begin(call), emit.sizes(call.x, space), space)
    number = windows.count(size, windows.pads, ceil=ceil)
    excess = [
        (number[i] - 1) * windows.strides[i] + windows.extent[i] - windows.pads[i] - size[i]
        for i in range(rank)
    ]
    missing = [max(0, -rows) for rows in excess]
    return call.emit.op(
        "ConvTranspose",
        g,
        weights,
        pads=[*windows.pads[:rank], *(max(0, rows) for rows in excess)],
        output_padding=missing if any(missing) else None,
        **attributes,
    )


def is_tiny(call: Call, windows: Windows, group: int) -> bool:
    """Whether kernels are so large for the map that they cover little but padding.

    A matrix of all pairs of pixels then asks for fewer products, and is not much larger than W.
    """
    size, number = call.shape(call.x)[2:], call.shape(call.y)[2:]
    channels = call.shape(call.node.input[1])[:2]
    if not all(isinstance(length, int) for length in (*size, *number, *channels)):
        return False
    taps, pixels = math.prod(windows.kernel), math.prod(size)
    small = taps > 1 and pixels <= taps and pixels * math.prod(number) <= 2 * taps
    return small and group == 1 and call.emit.opset >= 11 and call.element == TensorProto.FLOAT


def _by_matrix(call: Call, windows: Windows) -> str:
    """For a tiny map: g as rows, times a matrix `(outputs * windows, channels * pixels)`."""
    emit, size = call.emit, call.shape(call.x)[2:]
    matrix, rows, columns = matrix_of_pairs(call, windows)
    product = emit.op("Gemm", emit.op("Reshape", call.g, emit.integers(-1, rows)), matrix)
    return emit.op("Reshape", product, emit.integers(-1, columns // math.prod(size), *size))


def matrix_of_pairs(call: Call, windows: Windows) -> tuple[str, int, int]:
    """Returns a Conv as a matrix `(outputs * windows, channels * pixels)`, and its two sizes."""
    emit, weights = call.emit, call.node.input[1]
    outputs, inputs = call.shape(weights)[:2]
    size, number = call.shape(call.x)[2:], call.shape(call.y)[2:]
    taps = emit.integers(outputs, inputs, math.prod(windows.kernel))
    # One more tap, of zeros, for pairs that no kernel joins.
    flat = emit.pad(emit.op("Reshape", weights, taps), [0, 0, 0, 0, 0, 1])
    places = emit.constant(_taps_of_pairs(windows, size, number))
    pairs = emit.op("Transpose", emit.op("Gather", flat, places, axis=2), perm=[0, 2, 1, 3])
    rows, columns = outputs * math.prod(number), inputs * math.prod(size)
    return emit.op("Reshape", pairs, emit.integers(rows, columns)), rows, columns


def _taps_of_pairs(
    windows: Windows, size: Sequence[int], number: Sequence[int]
) -> np.ndarray[Any, Any]:
    """Returns which tap of W joins a window and a pixel, `(windows, pixels)`, one past for none."""
    taps, joined = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    assert windows.pads is not None  # as the sizes are known
    for axis, kernel in enumerate(windows.kernel):
        start = np.arange(number[axis]) * windows.strides[axis] - windows.pads[axis]
        offset = np.arange(size[axis]) - start[:, None]
        tap, between = np.divmod(offset, windows.dilations[axis])
        fits = (tap >= 0) & (tap < kernel) & (between == 0)
        shape = (len(taps) * number[axis], taps.shape[1] * size[axis])
        taps = (taps[:, None, :, None] * kernel + tap[:, None]).reshape(shape)
        joined = (joined[:, None, :, None] & fits[:, None]).reshape(shape)
    return np.where(joined, taps, math.prod(windows.kernel))


def _fills_blocks(call: Call, group: int) -> bool:
    """Whether a Conv from the output's channels to the input's would run in the blocked layout.

    It takes channels by the block; what it gives is filled up to blocks, which may cost more than
    the layout saves. ConvTranspose knows no such layout.
    """
    shape = call.shape(call.node.input[1])
    if call.emit.opset < 10 or call.element != TensorProto.FLOAT:
        return False
    if not all(isinstance(size, int) for size in shape[:2]):
        return False
    outputs, inputs = shape[0], shape[1] * group
    if group > 1:  # each channel by itself, or whole blocks
        return outputs == inputs == group or not any(
            channels // group % BLOCK for channels in (outputs, inputs)
        )
    filled = -(-inputs // BLOCK) * BLOCK
    return bool(outputs % BLOCK == 0 and filled <= 1.4 * inputs)


def _flipped(call: Call, windows: Windows, pads: list[int], group: int) -> str:
    """For stride 1: a Conv with W flipped and its channels swapped, padded the other way."""
    emit, weights = call.emit, call.node.input[1]
    outputs, inputs = call.shape(weights)[:2]
    kernel, rank = windows.kernel, len(windows.kernel)
    if math.prod(kernel) > 1:
        back = [[-1] * rank, [_TO_THE_START] * rank, range(2, 2 + rank), [-1] * rank]
        weights = emit.op("Slice", weights, *(emit.integers(*part) for part in back))
    if group == 1:
        weights = emit.op("Transpose", weights, perm=[1, 0, *range(2, 2 + rank)])
    elif outputs > group or inputs > 1:
        split = emit.integers(group, outputs // group, inputs, *kernel)
        parts = emit.op("Reshape", weights, split)
        swapped = emit.op("Transpose", parts, perm=[0, 2, 1, *range(3, 3 + rank)])
        whole = emit.integers(group * inputs, outputs // group, *kernel)
        weights = emit.op("Reshape", swapped, whole)
    dilations = windows.dilations
    return emit.op(
        "Conv", call.g, weights, kernel_shape=kernel, pads=pads, dilations=dilations, group=group
    )


def kernel_of(call: Call) -> list[int]:
    """Returns the size of the kernel of a Conv or ConvTranspose."""
    given = call.attribute("kernel_shape")
    return list(given or call.static(call.shape(call.node.input[1])[2:], "the kernel"))


def _pads(call: Call, rank: int, extent: list[int], strides: list[int]) -> list[int] | None:
    mode = call.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(call.attribute("pads", [0] * 2 * rank))
    if mode == "VALID":
        return [0] * 2 * rank
    if all(step == 1 for step in strides):  # whatever the size
        total = [window - 1 for window in extent]
    else:
        size = call.shape(call.node.input[0])[2:]
        if not all(isinstance(length, int) for length in size):
            return None
        total = [
            max(0, (-(-length // step) - 1) * step + window - length)
            for length, step, window in zip(size, strides, extent, strict=True)
        ]
    return _shared_out(call, total)


def _transposed_windows(call: Call, kernel: list[int]) -> Windows:
    mode, rank = call.attribute("auto_pad", "NOTSET"), len(kernel)
    wanted = call.attribute("output_shape")
    if not wanted and not mode.startswith("SAME"):
        return Windows.of(call, kernel)
    ones, padding = [1] * rank, call.attribute("output_padding", [0] * rank)
    strides, dilations = call.attribute("strides", ones), call.attribute("dilations", ones)
    windows = Windows(kernel, list(strides), list(dilations), None)
    size = call.shape(call.x)[2:]
    # What windows cover beyond a stride for each element, which is all there is with auto_pad.
    total = [windows.extent[i] + padding[i] - strides[i] for i in range(rank)]
    if wanted and not all(isinstance(length, int) for length in size):
        return windows
    if wanted:
        total = [total[i] + strides[i] * size[i] - wanted[-rank:][i] for i in range(rank)]
    # An output may end behind the last window.
    return replace(windows, pads=_shared_out(call, [max(0, rows) for rows in total]))


def _padded_back(call: Call, windows: Windows) -> str:
    """Pads g by what was cut off the windows to get to an output_shape, found out in the graph."""
    emit, rank = call.emit, len(windows.kernel)
    if emit.opset < 11:
        raise NotImplementedError("output_shape, where the input size is unknown, needs opset 11")
    padding = call.attribute("output_padding", [0] * rank)
    more = [e + p - s for e, p, s in zip(windows.extent, padding, windows.strides, strict=True)]
    size, number = (_integer(call, emit.sizes(n, range(2, 2 + rank))) for n in (call.x, call.y))
    strides, rest = (_integer(call, emit.integers(*values)) for values in (windows.strides, more))
    total = size * strides + rest - number
    total = total * (total > 0)
    begin, zeros = _first_share(call, total), emit.integers(0, 0)
    pads = emit.op("Concat", zeros, begin.name, zeros, (total - begin).name, axis=0)
    return emit.op("Pad", call.g, pads)


def _integer(call: Call, name: str) -> Term:
    return Term(call.emit, name, TensorProto.INT64)


def _first_share(call: Call, total: Term) -> Term:
    """Returns the part of the padding that is at the beginning."""
    return (total if _has_more_at_end(call) else total + 1) / 2


def _shared_out(call: Call, total: list[int]) -> list[int]:
    small, large = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
    return small + large if _has_more_at_end(call) else large + small


def _has_more_at_end(call: Call) -> bool:
    return bool(call.attribute("auto_pad", "NOTSET") == "SAME_UPPER")
