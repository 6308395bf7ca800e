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
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

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
        pads: `[begin..., end...]`, auto_pad resolved.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]

    @classmethod
    def of(cls, call: Call, kernel: list[int]) -> Windows:
        """Reads the attributes of a node that slides a kernel over its first input.

        Raises:
            NotImplementedError: auto_pad depends on a size that is not known.
        """
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

    def count(self, size: Sequence[int], *, ceil: bool = False) -> list[int]:
        """Returns the number of windows on each axis; with `ceil` the last may hang over."""
        result = []
        for i, length in enumerate(size):
            room = length + self.pads[i] + self.pads[i + len(size)] - self.extent[i]
            windows = (-(-room // self.strides[i]) if ceil else room // self.strides[i]) + 1
            # A window that starts in the padding at the end sees nothing.
            outside = ceil and (windows - 1) * self.strides[i] >= length + self.pads[i]
            result.append(windows - 1 if outside else windows)
        return result


@vjp("Conv", 1, 11, 22)
def conv_x(call: Call) -> str:
    """For the input `(batch, channels, *spatial)`."""
    weights = call.node.input[1]
    windows = Windows.of(call, kernel_of(call))
    group = call.attribute("group", 1)
    if is_tiny(call, windows, group):
        return _by_matrix(call, windows)
    if _fills_blocks(call, group):
        pads = [(windows.extent * 2)[i] - 1 - pad for i, pad in enumerate(windows.pads)]
        if max(windows.strides) == 1 and min(pads) >= 0:
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
    windows = _transposed_windows(call, kernel_of(call))
    product = call.emit.op(
        "Conv",
        call.g,
        call.node.input[1],
        strides=windows.strides,
        dilations=windows.dilations,
        pads=windows.pads,
        group=call.attribute("group", 1),
    )
    padding = call.attribute("output_padding", [0])
    if all(extra < stride for extra, stride in zip(padding, windows.strides, strict=False)):
        return product
    size = call.static(call.shape(call.x)[2:], "the input size")
    return call.emit.slice(product, [0] * len(size), size, range(2, 2 + len(size)))


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
    known = all(isinstance(length, int) for length in size)
    attributes: dict[str, Any] = {
        "strides": windows.strides, "dilations": windows.dilations, "group": group
    }  # fmt: skip
    if not known:
        extra = [stride - 1 for stride in windows.strides]
        attributes["output_padding"] = extra if any(extra) else None
        return _cut(call, call.emit.op("ConvTranspose", g, weights, **attributes), windows)
    number = windows.count(size, ceil=ceil)
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


def _cut(call: Call, whole: str, windows: Windows) -> str:
    """Cuts the padding off the input as the windows see it, its size known at run time only."""
    emit, rank = call.emit, len(windows.kernel)
    if emit.opset < 10:
        raise NotImplementedError("an input size unknown before run time needs Slice of opset 10")
    begin, axes = emit.integers(*windows.pads[:rank]), emit.integers(*range(2, 2 + rank))
    size = emit.op("Gather", emit.op("Shape", call.node.input[0]), axes, axis=0)
    return emit.op("Slice", whole, begin, emit.op("Add", size, begin), axes)


def kernel_of(call: Call) -> list[int]:
    """Returns the size of the kernel of a Conv or ConvTranspose."""
    given = call.attribute("kernel_shape")
    return list(given or call.static(call.shape(call.node.input[1])[2:], "the kernel"))


def _pads(call: Call, rank: int, extent: list[int], strides: list[int]) -> list[int]:
    mode = call.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(call.attribute("pads", [0] * 2 * rank))
    if mode == "VALID":
        return [0] * 2 * rank
    if all(step == 1 for step in strides):  # whatever the size
        total = [window - 1 for window in extent]
    else:
        size = call.static(call.shape(call.node.input[0])[2:], "with auto_pad the input size")
        total = [
            max(0, (-(-length // step) - 1) * step + window - length)
            for length, step, window in zip(size, strides, extent, strict=True)
        ]
    return _shared_out(total, more_at_end=mode == "SAME_UPPER")


def _transposed_windows(call: Call, kernel: list[int]) -> Windows:
    mode, rank = call.attribute("auto_pad", "NOTSET"), len(kernel)
    wanted = call.attribute("output_shape")
    if not wanted and not mode.startswith("SAME"):
        return Windows.of(call, kernel)
    strides = list(call.attribute("strides", [1] * rank))
    dilations = list(call.attribute("dilations", [1] * rank))
    padding = call.attribute("output_padding", [0] * rank)
    size = call.static(call.shape(call.x)[2:], "with auto_pad or output_shape the input size")
    result = wanted[-rank:] if wanted else [n * s for n, s in zip(size, strides, strict=True)]
    total = [
        strides[i] * (size[i] - 1) + padding[i] + dilations[i] * (kernel[i] - 1) + 1 - result[i]
        for i in range(rank)
    ]
    if min(total) < 0:
        raise NotImplementedError(f"an output of {list(result)}, larger than its windows")
    return Windows(kernel, strides, dilations, _shared_out(total, more_at_end=mode == "SAME_UPPER"))


def _shared_out(total: list[int], *, more_at_end: bool) -> list[int]:
    small, large = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
    return small + large if more_at_end else large + small
