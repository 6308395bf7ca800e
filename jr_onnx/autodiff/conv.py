"""Convolution.

Conv: ConvTranspose(g, W)    bias: sum of g over batch and space    ConvTranspose: Conv(g, W)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jr_onnx.autodiff.registry import Call, vjp


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
    windows = Windows.of(call, _kernel(call))
    return spread(call, call.g, weights, windows, group=call.attribute("group", 1))


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
    windows = _transposed_windows(call, _kernel(call))
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


def _cut(call: Call, whole: str, windows: Windows) -> str:
    """Cuts the padding off the input as the windows see it, its size known at run time only."""
    emit, rank = call.emit, len(windows.kernel)
    if emit.opset < 10:
        raise NotImplementedError("an input size unknown before run time needs Slice of opset 10")
    begin, axes = emit.integers(*windows.pads[:rank]), emit.integers(*range(2, 2 + rank))
    size = emit.op("Gather", emit.op("Shape", call.node.input[0]), axes, axis=0)
    return emit.op("Slice", whole, begin, emit.op("Add", size, begin), axes)


def _kernel(call: Call) -> list[int]:
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
